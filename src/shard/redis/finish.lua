-- The ops, between what has fallen due before and what is kept after.

if M.held >= 4 then
  rules = make_rules()
  ready_was = rules.leasable(ready_was)
end
if M.due > 0 and M.due <= now then
  rules = rules or make_rules()
  rules.tick(bulk_max)
end
-- Forgets what need not be kept any more.
local function trim()
  local excess = M.completed_kept + M.cancelled_kept + M.expired_kept - keep_jobs
  if excess <= 0 and (M.keep_until == 0 or M.keep_until > now) then
    return
  end
  if M.cancelled_kept + M.expired_kept + M.held == 0 and M.keep_until > now then
    -- Under load nearly every call comes here: completed jobs without keys, too many and not too old.
    local gone = call('LPOP', COMPLETED, format('%.0f', math.min(excess, bulk_max)))
    send('HDEL', JOBS, gone)
    send('HDEL', STATE, gone)
    M.completed_kept = M.completed_kept - #gone
  else
    rules = rules or make_rules()
    rules.trim()
  end
end
trim()

local outcomes = {}
while ARGV[at] do
  local op = ARGV[at]
  at = at + 1
  if op == 'e' or op == 'm' then
    outcomes[#outcomes + 1] = enqueue_plain(op == 'm')
  elseif op == 'l' then
    outcomes[#outcomes + 1] = lease()
  elseif op == 'a' then
    outcomes[#outcomes + 1] = ack()
  else
    rules = rules or make_rules()
    outcomes[#outcomes + 1] = (rules.ops[op] or make_sessions(rules)[op])()
  end
end

trim()
if shed then
  rules.shed_ghosts()
end

if rules then
  rules.write_deaths()
end

local due = 0
local function see(key, count)
  if count > 0 then
    local head = tonumber(call('ZRANGE', key, '0', '0', 'WITHSCORES')[2])
    if head and (due == 0 or head < due) then
      due = head
    end
  end
end
see(LEASED, M.leased)
see(SCHEDULED, M.scheduled)
see(EXPIRING, M.ttl)
see(SESSIONS, M.sessions)
M.due = due

local meta_is = pack(META_FORMAT, M.seq, M.paused, M.ready, M.scheduled, M.leased, M.dead, M.completed_kept, M.cancelled_kept,
  M.expired_kept, M.enqueued, M.delivered, M.completed, M.failed, M.lapsed, M.released, M.died, M.redriven, M.cancelled,
  M.expired, M.ranked, M.odd, M.ttl, M.held, M.ended, M.keep_until, M.due, M.deaths,
  M.sessions, M.bound)
if meta_is ~= meta_was then
  call('SET', META, meta_is)
end

local ready = M.paused == 0 and M.ready or 0
if M.held >= 4 then
  due, ready = rules.limit_effect(due, ready)
end
if ready_was == 0 and ready > 0 then
  local channel, queue = parse('>I2c0I2c0', ARGV[1], 27)
  call('PUBLISH', channel, queue)
end
if deaths_was == 0 and M.deaths > 0 then
  local channel, queue = parse('>I2c0I2c0', ARGV[1], 27)
  call('PUBLISH', channel, '*' .. queue)
end
return {outcomes, ready, M.ready + blocked() + M.leased + M.scheduled, due == 0 and -1 or math.max(due - now, 0), now, M.deaths}
