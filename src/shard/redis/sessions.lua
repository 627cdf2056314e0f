-- Worker sessions: who keeps each, until when, and which leases hang on it. Built on first use; adds to the rules.
function make_sessions(rules)
  if rules.sessions then
    return rules.sessions
  end
  local sessions, text = {}, rules.text
  rules.sessions = sessions

  local function forget(name)
    M.sessions = M.sessions - 1
    call('ZREM', SESSIONS, name)
    call('HDEL', HELD, 's' .. name)
  end

  -- Takes one keeper out of what a session's row says of its keepers, and who keeps it no longer; the last end that is left.
  local function without(keeper, row)
    local others, last = {}, now
    for position = 13, #row, 12 do
      local ending = parse('>I6', row, position + 6)
      if sub(row, position, position + 5) ~= keeper and ending > now then
        others[#others + 1] = sub(row, position, position + 11)
        last = math.max(last, ending)
      end
    end
    return table.concat(others), last
  end

  -- Hangs leases (6 bytes of seq, 6 of token, from the 7th byte on) on a session, if they hold their jobs; its number.
  local function hang(leases, number, run)
    local seqs = {}
    for position = 7, #leases, 12 do
      seqs[#seqs + 1] = sub(leases, position, position + 5)
    end
    local states = fetch(STATE, seqs)
    for i = 1, #seqs do
      local state = states[i]
      if state and byte(state) == 76 and sub(state, 2, 7) == sub(leases, 12 * i + 1, 12 * i + 6) then
        local it = rules.decode(state)
        it.job = seqs[i]
        if not number then
          M.seq = M.seq + 1
          number = M.seq
        end
        M.bound = M.bound + call('ZADD', BOUND, text(number), it.job)
        local ending = math.min(it.started + run, TIME_MAX)
        if ending > it.time then
          it.time = ending
          call('ZADD', LEASED, text(ending), it.job)
          rules.save(it)
        end
      end
    end
    return number
  end

  -- ARGV: keeper and keep_ms (6 each), count, then for each session its name, and run_ms and leases as `hang` has them.
  -- Answers for each how many leases it has.
  function sessions.K()
    local keeper, span, kept = sub(ARGV[at], 1, 6), parse('>I6', ARGV[at], 7), {}
    local count = tonumber(ARGV[at + 1])
    at = at + 2
    for i = 1, count do
      local name, leases = ARGV[at], ARGV[at + 1]
      at = at + 2
      local row, number, since = call('HGET', HELD, 's' .. name), nil, now
      if row then
        number, since = parse('>I6I6', row)
      end
      local was_there = number
      local keepers, last = without(keeper, row or '')
      if span > 0 then
        keepers = keepers .. keeper .. pack('>I6', after(span))
        last = math.max(last, after(span))
      end
      if #leases > 6 then
        number = hang(leases, number, parse('>I6', leases))
      end
      kept[i] = number and call('ZCOUNT', BOUND, text(number), text(number)) or 0
      if kept[i] > 0 then
        if not was_there then
          M.sessions = M.sessions + 1
        end
        call('HSET', HELD, 's' .. name, pack('>I6I6', number, since) .. keepers)
        call('ZADD', SESSIONS, text(last), name)
      elseif was_there then
        forget(name)
      end
    end
    return kept
  end

  -- ARGV: offset, count. Answers for each session its name, since when, end, how many keep it, leases, start of the oldest.
  function sessions.w()
    local first, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
    at = at + 2
    local views = {}
    if M.sessions == 0 or count == 0 then
      return views
    end
    local page = call('ZRANGE', SESSIONS, text(first), text(first + count - 1))
    for i = 1, #page do
      local row = call('HGET', HELD, 's' .. page[i])
      local number, since = parse('>I6I6', row)
      local which = text(number)
      local states, oldest = fetch(STATE, call('ZRANGEBYSCORE', BOUND, which, which, 'LIMIT', '0', '100')), -1
      for j = 1, #states do
        local started = parse('>I6', states[j], 35)
        oldest = oldest < 0 and started or math.min(oldest, started)
      end
      local keepers = without('', row)
      local ending = tonumber(call('ZSCORE', SESSIONS, page[i]))
      views[i] = {page[i], since, ending, #keepers / 12, call('ZCOUNT', BOUND, which, which), oldest}
    end
    return views
  end

  -- Gives back what ended sessions held; how much of the room is left.
  function sessions.give_back(room)
    local ended = call('ZRANGEBYSCORE', SESSIONS, '-inf', text(now), 'LIMIT', '0', text(room))
    for i = 1, #ended do
      if room == 0 then
        break
      end
      local number = text(parse('>I6', call('HGET', HELD, 's' .. ended[i])))
      -- In steps, so that large jobs are not held together; when they are enough there is no more room.
      local bytes = 0
      repeat
        local seqs = call('ZRANGEBYSCORE', BOUND, number, number, 'LIMIT', '0', text(math.min(room, 16)))
        local records, states = fetch(JOBS, seqs), fetch(STATE, seqs)
        room = room - #seqs
        for j = 1, #seqs do
          bytes = bytes + #records[j]
          local it = rules.job_of(seqs[j], records[j], states[j])
          rules.leave(it)
          M.released = M.released + 1
          it.verdict = 'P'
          rules.note(it, 'b', it.spent + 1)
          rules.wait(it, 0, true)
        end
        if bytes >= PART_BYTES then
          room = 0
        end
      until room == 0 or #seqs == 0
      if room > 0 then
        room = room - 1
        forget(ended[i])
      end
    end
    return room
  end

  return sessions
end
