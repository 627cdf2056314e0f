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
local function trim_kept(excess)
  if M.cancelled_kept + M.expired_kept + M.held == 0 and M.keep_until > now then
    -- Under load nearly every call comes here: completed jobs without keys, too many and not too old.
    local gone = call('LPOP', COMPLETED, format('%.0f', math.min(excess, bulk_max)))
    send('HDEL', JOBS, gone)
    M.completed_kept = M.completed_kept - #gone
    if recording then
      if M.retired == 0 then
        -- They are not older than the time for which jobs are kept.
        M.retired_until = math.max(now - keep_ms + history_ms, 1)
      end
      M.retired = M.retired + #gone
      send('RPUSH', RETIRED, gone)
    else
      send('HDEL', STATE, gone)
    end
  else
    rules = rules or make_rules()
    rules.trim()
  end
end

local function trim_retired(excess)
  if M.held == 0 and M.retired_until > now then
    local gone = call('LPOP', RETIRED, format('%.0f', math.min(excess, bulk_max)))
    send('HDEL', STATE, gone)
    M.retired = M.retired - #gone
  else
    rules = rules or make_rules()
    rules.trim_retired()
  end
end

local function trim()
  local excess = M.completed_kept + M.cancelled_kept + M.expired_kept - keep_jobs
  if excess > 0 or M.keep_until ~= 0 and M.keep_until <= now then
    trim_kept(excess)
  end
  excess = M.retired - history_jobs
  if excess > 0 or M.retired_until ~= 0 and M.retired_until <= now then
    trim_retired(excess)
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

-- Writes down what happened in this call, and tells those who listen.
if noted > 0 then
  if M.events == 0 then
    M.born = now
  end
  M.events = M.events + noted
  local chunk = pack('>I6', now) .. table.concat(notes)
  call('XADD', JOURNAL, 'MINID', '~', format('%.0f', math.max(M.events - journal_events + 1, 0)),
    format('%.0f', M.events), 'e', chunk)
  local _, queue, channels = parse('>I2c0I2c0I2c0', ARGV[1], 45)
  local told = pack('>I6I6I6', M.born, M.events, M.died) .. chunk
  call('PUBLISH', channels .. 'feed:' .. queue, told)
  if M.died > died_was then
    call('PUBLISH', channels .. 'dead:' .. queue, told)
  end
  if M.journal_check == 0 then
    M.journal_check = now + history_ms
  end
end
if M.journal_check ~= 0 and M.journal_check <= now then
  rules = rules or make_rules()
  rules.trim_journal()
end

local meta_is = pack(META_FORMAT, M.seq, M.paused, M.ready, M.scheduled, M.leased, M.dead, M.completed_kept, M.cancelled_kept,
  M.expired_kept, M.enqueued, M.delivered, M.completed, M.failed, M.lapsed, M.released, M.died, M.redriven, M.cancelled,
  M.expired, M.ranked, M.odd, M.ttl, M.held, M.ended, M.keep_until, M.due, M.deaths,
  M.sessions, M.bound, M.events, M.born, M.retired, M.retired_until, M.journal_check)
if meta_is ~= meta_was then
  call('SET', META, meta_is)
end

local ready = M.paused == 0 and M.ready or 0
if M.held >= 4 then
  due, ready = rules.limit_effect(due, ready)
end
if ready_was == 0 and ready > 0 then
  local channel, queue = parse('>I2c0I2c0', ARGV[1], 45)
  call('PUBLISH', channel, queue)
end
if deaths_was == 0 and M.deaths > 0 then
  local channel, queue = parse('>I2c0I2c0', ARGV[1], 45)
  call('PUBLISH', channel, '*' .. queue)
end
return {outcomes, ready, M.ready + blocked() + M.leased + M.scheduled, due == 0 and -1 or math.max(due - now, 0), now, M.deaths}
