-- Jobs without an id, a unique key, a group, a ttl, a priority or a delay.
-- ARGV: count, where an op has several jobs the jobs of each op (4 each), records. Answers the first seq; where the queue
-- has a limit, with a mark for each op: 1 when it was taken, 0 when there was no room for all of its jobs.
local function enqueue_plain(is_sized)
  local count, seq, stamp = tonumber(ARGV[at]), M.seq, format('%013.0f', now)
  local seqs, pairs = {}, {}
  local sizes = is_sized and ARGV[at + 1]
  local first, taken, marks = at + (is_sized and 2 or 1), ARGV, nil
  at = first + count
  if M.held >= 4 then
    taken, marks = rules.fitting(first, count, sizes)
    first, count = 1, #taken
    if count == 0 then
      return {seq + 1, marks}
    end
  end
  for i = 1, count do
    local job = pack('>I6', seq + i)
    seqs[i] = job
    pairs[2 * i - 1] = job
    pairs[2 * i] = stamp .. taken[first + i - 1]
  end
  send('HSET', JOBS, pairs)
  send('RPUSH', READY, seqs)
  M.seq = seq + count
  M.ready = M.ready + count
  M.enqueued = M.enqueued + count
  if recording then
    noted = noted + count
    notes[#notes + 1] = 'Q' .. pack('>I6I4', seq + 1, count)
  end
  return marks and {seq + 1, marks} or seq + 1
end

-- Leases jobs, one for each token, for any number of ops.
-- ARGV: tokens (6 each), parties (jobs 4, lease_ms 6, worker 2 and bytes). Answers {seqs, spent (4 each) or "", records}.
local function lease()
  local tokens, parties = ARGV[at], ARGV[at + 1]
  at = at + 2
  local count = math.min(#tokens / 6, M.ready)
  if M.held >= 4 then
    count = rules.leasable(count)
  end
  if M.paused ~= 0 or count == 0 then
    return {'', '', {}}
  end
  -- In steps, larger ones while jobs are small, so that large ones do not make one answer that takes a shard for seconds.
  local seqs, records, states, bytes, step = {}, {}, nil, 0, 2
  while #seqs < count and bytes < PART_BYTES do
    local taken, found, kept
    step = math.min(step, count - #seqs)
    if M.ranked == 0 and M.odd == 0 and not states then
      taken = call('LPOP', READY, format('%.0f', step))
      found = fetch(JOBS, taken)
    else
      rules, states = rules or make_rules(), states or {}
      taken, found, kept = rules.take(step)
      if #taken == 0 then
        break
      end
    end
    local size = #seqs
    for i = 1, #taken do
      seqs[size + i], records[size + i], bytes = taken[i], found[i], bytes + #found[i]
      if kept then
        states[size + i] = kept[i]
      end
    end
    step = math.min(2 * step, 16)
  end
  count = #seqs
  if recording and M.held ~= 0 then
    rules = rules or make_rules()
  end
  local changes, ends, began, spent = {}, {}, pack('>I6', now), ''
  local named = recording and M.held ~= 0
  local i, position = 0, 1
  while i < count do
    local jobs, lease_ms, worker
    jobs, lease_ms, worker, position = parse('>I4I6I2c0', parties, position)
    local ending = after(lease_ms)
    local ending_text, times = format('%.0f', ending), pack('>I6', ending) .. began
    local text = pack('>I2c0', #worker, worker)
    local plain = '\0\0\0\0\0\0\0\0\0\0\0\0' .. times .. '\255' .. text .. '\0\0\0\0\0\0'
    local started = ''
    if recording then
      plain, started = plain .. 'Q', 's' .. began .. '\0\0\0\1' .. text
    end
    for j = i + 1, math.min(i + jobs, count) do
      local job, state = seqs[j], states and states[j]
      changes[2 * j - 1] = job
      if state then
        changes[2 * j] = rules.leased_again(state, sub(tokens, 6 * j - 5, 6 * j), times, worker)
      elseif recording then
        local record = records[j]
        local id = named and rules.id_entry(record) or ''
        changes[2 * j] = 'L' .. sub(tokens, 6 * j - 5, 6 * j) .. sub(record, 14, 14) .. '--' .. job .. plain
          .. sub(record, 1, 13) .. id .. started
      else
        changes[2 * j] = 'L' .. sub(tokens, 6 * j - 5, 6 * j) .. sub(records[j], 14, 14) .. '--' .. job .. plain
      end
      ends[2 * j - 1] = ending_text
      ends[2 * j] = job
    end
    i = i + jobs
  end
  if count > 0 then
    send('HSET', STATE, changes)
    send('ZADD', LEASED, ends)
    if M.ttl > 0 then
      M.ttl = M.ttl - send('ZREM', EXPIRING, seqs)
    end
    if states then
      spent = rules.spent(states, count)
    end
    M.ready = M.ready - count
    M.leased = M.leased + count
    M.delivered = M.delivered + count
    if M.held >= 4 then
      rules.start(count)
    end
  end
  local all = table.concat(seqs)
  if recording and count > 0 then
    if named then
      rules.name_all(seqs, records)
    end
    noted = noted + count
    notes[#notes + 1] = 'S' .. pack('>I4I4B', count, #parties, spent == '' and 0 or 1) .. parties .. all .. spent
  end
  return {all, spent, records}
end

-- Completes jobs, for any number of ops; no job is named twice.
-- ARGV: leases (seq 6, token 6), groups (jobs 4), the result of each group. Answers "1" or "0" for each lease.
local function ack()
  local leases, groups = ARGV[at], ARGV[at + 1]
  at = at + 2
  local count = #leases / 12
  local seqs, counted = {}, {}
  for i = 1, count do
    seqs[i] = sub(leases, 12 * i - 11, 12 * i - 6)
  end
  local states = fetch(STATE, seqs)
  local changes, done, ends = {}, {}, {}
  local ended = pack('>I6', M.ended + 1)
  local over = pack('>I6', now)
  local i, n = 0, 0
  local function finish()
    if n > 0 then
      send('ZREM', LEASED, done)
      if M.bound > 0 then
        M.bound = M.bound - send('ZREM', BOUND, done)
      end
      send('HSET', STATE, changes)
      send('RPUSH', COMPLETED, done)
      if M.completed_kept + M.cancelled_kept + M.expired_kept == 0 then
        M.keep_until = now + keep_ms
      end
      M.ended = M.ended + 1
      M.leased = M.leased - n
      M.completed = M.completed + n
      M.completed_kept = M.completed_kept + n
      if recording then
        noted = noted + n
        notes[#notes + 1] = 'C' .. pack('>I4', n) .. table.concat(ends)
      end
    end
  end
  for group = 1, #groups, 4 do
    local result = ARGV[at]
    local ending = (recording and 'c' .. over or '') .. (result ~= '' and '=' .. result or '')
    at = at + 1
    for j = i + 1, i + parse('>I4', groups, group) do
      local state, mark = states[j], '0'
      if state and sub(state, 2, 7) == sub(leases, 12 * j - 5, 12 * j) then
        if byte(state, 1) == 76 then
          if M.held ~= 0 then
            rules = rules or make_rules()
            rules.free_key(seqs[j], state)
          end
          n = n + 1
          done[n] = seqs[j]
          changes[2 * n - 1] = seqs[j]
          changes[2 * n] = 'C' .. sub(state, 2, 8) .. 'AC' .. ended .. sub(state, 17, 28) .. over .. sub(state, 35) .. ending
          if recording then
            if M.held ~= 0 then
              rules.name(seqs[j], state)
            end
            local high, low = byte(state, 42, 43)
            ends[2 * n - 1] = seqs[j]
            ends[2 * n] = sub(state, 17, 43 + high * 256 + low)
          end
          mark = '1'
        else
          rules = rules or make_rules()
          -- Those before it were over before it.
          finish()
          changes, done, ends, n = {}, {}, {}, 0
          mark = rules.ack_late(seqs[j], state, result)
          ended = pack('>I6', M.ended + 1)
        end
      end
      counted[j] = mark
      i = j
    end
  end
  finish()
  return table.concat(counted)
end
