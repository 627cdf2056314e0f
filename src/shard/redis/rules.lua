-- Everything that is not the straight way of a job. Built on first use, since making functions costs each call.
-- A job is here a table with the parts of its state record, its seq as `job`, and its `record`.
function make_rules()
  local rules = {}
  local KEPT = {C = COMPLETED, X = CANCELLED, E = EXPIRED}
  local KEPT_COUNT = {C = 'completed_kept', X = 'cancelled_kept', E = 'expired_kept'}
  local INDEX = {r = RANKED, S = SCHEDULED, s = SCHEDULED, L = LEASED, D = DEAD}
  local COUNT = {R = 'ready', r = 'ready', S = 'scheduled', s = 'scheduled', L = 'leased', D = 'dead'}
  -- The states in which a job of a group has a turn.
  local TURN = {R = true, r = true, s = true, L = true}
  local PLACE_MAX = 4398046511104
  local RATE_STEPS = 512

  local function text(number)
    return format('%.0f', number)
  end

  local function decode(state)
    local it = {
      state = sub(state, 1, 1), token = sub(state, 2, 7), flags = byte(state, 8) - 64, verdict = sub(state, 9, 9),
      answer = sub(state, 10, 10),
    }
    local rest
    it.place, it.spent, it.lapses, it.redrives, it.time, it.started, it.progress, it.worker, it.error, it.trace, it.note, rest =
      parse('>I6I4I4I4I6I6I1I2c0I2c0I2c0I2c0', state, 11)
    it.history = sub(state, rest)
    return it
  end

  local function save(it)
    call('HSET', STATE, it.job, it.state .. it.token .. char(it.flags + 64) .. it.verdict .. it.answer
      .. pack('>I6I4I4I4I6I6I1I2c0I2c0I2c0I2c0', it.place, it.spent, it.lapses, it.redrives, it.time, it.started,
        it.progress, #it.worker, it.worker, #it.error, it.error, #it.trace, it.trace, #it.note, it.note) .. it.history)
  end

  local function has(it, flag)
    return math.floor(it.flags / flag) % 2 == 1
  end

  -- The head of the record: priority, attempts, backoff, backoff_max, ttl.
  local function read_head(it, record)
    local priority, attempts, backoff, backoff_max, ttl, tail =
      string.match(record, '^(%-?%d+),(%d+),(%d+),(%d+),(%d+)\n()', 15)
    it.record, it.tail = record, tail
    it.priority, it.attempts = tonumber(priority), tonumber(attempts)
    it.backoff, it.backoff_max, it.ttl = tonumber(backoff), tonumber(backoff_max), tonumber(ttl)
    it.enqueued = tonumber(sub(record, 1, 13))
    return it
  end

  local function job_of(job, record, state)
    local it
    if state then
      it = read_head(decode(state), record)
      it.stored = true
    else
      it = read_head({
        token = NOBODY, flags = byte(record, 14) - 64, verdict = '-', answer = '-', place = parse('>I6', job), spent = 0,
        lapses = 0, redrives = 0, time = 0, started = 0, progress = 255, worker = '', error = '', trace = '', note = '',
        history = recording and 'Q' .. sub(record, 1, 13) .. rules.id_entry(record) or '',
      }, record)
      it.state = it.priority == 0 and 'R' or 'r'
    end
    it.job = job
    return it
  end

  local function find(job)
    local record = job and call('HGET', JOBS, job)
    if record then
      return job_of(job, record, call('HGET', STATE, job))
    end
  end

  -- The seq of a job by reference: "s" and the seq, or "i" and the id that its client chose.
  local function resolve(reference)
    if byte(reference) == 115 then
      return sub(reference, 2)
    end
    return M.held ~= 0 and call('HGET', HELD, reference)
  end

  -- The id and the unique key with its span, as the record's tail has them.
  local function keys_of(it)
    local position, id, key, span = it.tail, nil, nil, nil
    if has(it, 2) then
      id, position = parse('>I2c0', it.record, position)
    end
    if has(it, 4) then
      key, span = parse('>I2c0I8', it.record, position)
    end
    return id, key, span
  end

  -- The group, and how many of it may have a turn beside the job, itself included.
  local function member_of(it)
    if not it.group then
      local position, _ = it.tail, nil
      if has(it, 2) then
        _, position = parse('>I2c0', it.record, position)
      end
      if has(it, 4) then
        _, _, position = parse('>I2c0I8', it.record, position)
      end
      it.group, it.bound = parse('>I2c0I4', it.record, position)
    end
    return it.group, it.bound
  end

  local function rank_of(it)
    local group, bound = member_of(it)
    return pack('>I2c0I2I6', #group, group, 1000 - it.priority, it.place) .. it.job .. pack('>I4', bound)
  end

  local function give_turn(group)
    if call('HINCRBY', HELD, 'g' .. group, '-1') == 0 then
      call('HDEL', HELD, 'g' .. group)
    end
  end

  -- Lets those of a group into the line, at the places that they have, for whom there is a turn.
  local function admit(group)
    local prefix = pack('>I2c0', #group, group)
    while true do
      local rank = call('ZRANGEBYLEX', BLOCKED, '[' .. prefix, '+', 'LIMIT', '0', '1')[1]
      if not rank or sub(rank, 1, #prefix) ~= prefix then
        return
      end
      local bound = parse('>I4', rank, #rank - 3)
      if tonumber(call('HGET', HELD, 'g' .. group) or 0) >= bound then
        return
      end
      local it = find(sub(rank, -10, -5))
      call('ZREM', BLOCKED, rank)
      call('HINCRBY', HELD, 'g' .. group, '1')
      it.state = 'r'
      M.ready = M.ready + 1
      M.ranked = M.ranked + 1
      call('ZADD', RANKED, text(it.place - it.priority * PLACE_MAX), it.job)
      save(it)
    end
  end

  ------------------------------------------------------------------------------------------------ what is recorded

  -- The entry of a history that names the id that the client chose, or nothing.
  function rules.id_entry(record)
    if math.floor((byte(record, 14) - 64) / 2) % 2 == 0 then
      return ''
    end
    local tail = string.match(record, '\n()', 15)
    return 'i' .. sub(record, tail, tail + 1 + parse('>I2', record, tail))
  end

  -- The same of a history; nothing where it has none.
  local function id_in(history)
    return sub(history, 15, 15) == 'i' and parse('>I2c0', history, 16) or nil
  end

  local function name(job, entry)
    if entry ~= '' then
      notes[#notes + 1] = 'i' .. job .. sub(entry, 2)
    end
  end

  -- Names the jobs of a lease for the journal.
  function rules.name_all(seqs, records)
    for i = 1, #seqs do
      name(seqs[i], rules.id_entry(records[i]))
    end
  end

  -- Names a job that is acked for the journal.
  function rules.name(job, state)
    if math.floor((byte(state, 8) - 64) / 2) % 2 == 1 then
      local id = id_in(decode(state).history)
      name(job, id and 'i' .. pack('>I2c0', #id, id) or rules.id_entry(call('HGET', JOBS, job)))
    end
  end

  local ENTRY_BYTES = {Q = 14, W = 14, p = 8, ['.'] = 5}
  local ENTRY_TEXT = {i = 1, s = 11, f = 7, x = 7} -- what stands before its text

  local function entry_bytes(history, position)
    local letter = sub(history, position, position)
    local before = ENTRY_TEXT[letter]
    if before then
      return before + 2 + parse('>I2', history, position + before)
    end
    return ENTRY_BYTES[letter] or 7
  end

  -- Drops the middle of a history that has grown long.
  local function shorten(history)
    local position, dropped = 1, 0
    while sub(history, position, position) ~= '.' do
      local bytes = entry_bytes(history, position)
      if position - 1 + bytes > 1024 then
        break
      end
      position = position + bytes
    end
    local head = sub(history, 1, position - 1)
    while #history - position + 1 > 2048 do
      local is_gap = sub(history, position, position) == '.'
      dropped = dropped + (is_gap and parse('>I4', history, position + 1) or 1)
      position = position + entry_bytes(history, position)
    end
    return head .. '.' .. pack('>I4', dropped) .. sub(history, position)
  end

  local function extend(history, entry)
    history = history .. entry
    return #history > 4096 and shorten(history) or history
  end

  local HAS_WORKER = {p = true, c = true, f = true, b = true, d = true}
  local ENDS = {c = true, f = true, b = true}

  -- Records what happened to a job: in its history, which is written with the job, and for the journal.
  local function note(it, letter, attempt, message)
    if not recording then
      return
    end
    local entry = letter .. pack('>I6', now)
    message = message and sub(message, 1, 512) or ''
    if letter == 'f' or letter == 'x' then
      entry = entry .. pack('>I2c0', #message, message)
    elseif letter == 'p' then
      entry = entry .. char(it.progress)
    end
    it.history = extend(it.history, entry)
    if has(it, 2) then
      name(it.job, rules.id_entry(it.record))
    end
    local worker = HAS_WORKER[letter] and it.worker or ''
    local duration = ENDS[letter] and math.max(now - it.started, 0) or TIME_MAX
    noted = noted + 1
    notes[#notes + 1] = letter .. it.job .. pack('>I4I6BI2c0I2c0', attempt or 0, duration, letter == 'p' and it.progress or 255,
      #worker, worker, #message, message)
  end

  ------------------------------------------------------------------------------------------------ keys

  local function free_key(it)
    if has(it, 4) then
      local _, key = keys_of(it)
      local holder = call('HGET', HELD, 'u' .. key)
      if holder and sub(holder, 1, 6) == it.job then
        call('HDEL', HELD, 'u' .. key)
      end
    end
  end

  -- The job that holds a unique key now, if any.
  local function holder_of(key)
    local holder = call('HGET', HELD, 'u' .. key)
    if holder then
      local job, ends = sub(holder, 1, 6), parse('>I6', holder, 7)
      if ends == 0 or ends > now then
        return job
      end
    end
  end

  local function hold_key(job, key, span)
    -- A span that ends beyond all times that are kept has no end.
    local ends = (span > 0 and now + span <= TIME_MAX) and now + span or 0
    call('HSET', HELD, 'u' .. key, job .. pack('>I6', ends))
  end

  -- A job on its way to another shard stands in no index: nothing may happen to it.
  local function is_moving(job)
    return call('HEXISTS', MOVING, job) == 1
  end

  -- Takes a job out of where it waits, runs or lies.
  local function leave(it)
    local state = it.state
    if has(it, 8) then
      it.turn = TURN[state]
      if it.turn then
        give_turn(member_of(it))
      end
    end
    if state == 'B' then
      call('ZREM', BLOCKED, rank_of(it))
    elseif state == 'R' then
      shed = true
      if not it.stored then
        M.odd = M.odd + 1
      end
    else
      call('ZREM', INDEX[state], it.job)
      if state == 'r' then
        M.ranked = M.ranked - 1
      elseif state == 'L' and M.bound > 0 then
        M.bound = M.bound - call('ZREM', BOUND, it.job)
      end
    end
    if it.ttl > 0 and state ~= 'L' and state ~= 'D' then
      M.ttl = M.ttl - call('ZREM', EXPIRING, it.job)
    end
    if COUNT[state] then
      M[COUNT[state]] = M[COUNT[state]] - 1
    end
  end

  local function expire_later(it)
    if it.ttl > 0 then
      M.ttl = M.ttl + call('ZADD', EXPIRING, text(it.enqueued + it.ttl), it.job)
    end
  end

  local function is_expired(it)
    return it.ttl > 0 and it.enqueued + it.ttl <= now
  end

  -- Whether a job keeps the turn of its group: with a bound of 1 the others stay behind it, or the order would break.
  local function keeps_turn(it)
    local group, bound = member_of(it)
    if it.turn and bound == 1 then
      call('HINCRBY', HELD, 'g' .. group, '1')
      return true
    end
    return false
  end

  -- Ready as its enqueue left it: it needs no state record.
  local function enter_line(it)
    M.ready = M.ready + 1
    if it.priority == 0 then
      call('RPUSH', READY, it.job)
    else
      M.ranked = M.ranked + 1
      call('ZADD', RANKED, text(it.place - it.priority * PLACE_MAX), it.job)
    end
    expire_later(it)
  end

  -- Ready at the end of the line, or `again` at the place that it had.
  local function make_ready(it, again)
    if not again then
      M.seq = M.seq + 1
      it.place = M.seq
    end
    it.time = again and 0 or now
    if has(it, 8) and not keeps_turn(it) then
      it.state = 'B'
      call('ZADD', BLOCKED, '0', rank_of(it))
      expire_later(it)
      save(it)
      admit(it.group)
      return
    elseif it.priority == 0 and not again then
      it.state = 'R'
      M.odd = M.odd + 1
      call('RPUSH', READY, it.job)
    else
      it.state = 'r'
      M.ranked = M.ranked + 1
      call('ZADD', RANKED, text(it.place - it.priority * PLACE_MAX), it.job)
    end
    M.ready = M.ready + 1
    expire_later(it)
    save(it)
  end

  local function make_scheduled(it, due)
    it.state, it.time = 'S', due
    if has(it, 8) and keeps_turn(it) then
      it.state = 's'
    end
    M.scheduled = M.scheduled + 1
    call('ZADD', SCHEDULED, text(due), it.job)
    expire_later(it)
    save(it)
    if has(it, 8) then
      admit(it.group)
    end
  end

  local function make_over(it, state)
    free_key(it)
    if M.completed_kept + M.cancelled_kept + M.expired_kept == 0 then
      M.keep_until = now + keep_ms
    end
    M.ended = M.ended + 1
    it.state, it.time, it.place = state, now, M.ended
    call('RPUSH', KEPT[state], it.job)
    M[KEPT_COUNT[state]] = M[KEPT_COUNT[state]] + 1
    save(it)
    if has(it, 8) then
      admit(member_of(it))
    end
  end

  local function make_expired(it)
    note(it, 'e')
    M.expired = M.expired + 1
    make_over(it, 'E')
  end

  ------------------------------------------------------------------------------------------------ the outbox of deaths

  local GROUPS_MAX, CHANNELS_MAX, OTHERS = 64, 64, '\255' -- as in `src/shard/outbox.rs`
  local groups, others = {}, nil -- the groups that were looked at, and how many there are beside that of the others

  local function is_number(word)
    return (string.find(word, '[0-9]') or #word >= 4 and not string.find(word, '[^a-fA-F]')) and '#' or nil
  end

  -- `fingerprint` of `src/shard/outbox.rs`.
  local function fingerprint(message)
    local line = string.match(sub(message, 1, 256), '^[^\r\n]*')
    return sub((string.gsub(line, '[0-9A-Za-z]+', is_number)), 1, 100)
  end

  local function kind_of(it)
    local position, kind, _ = it.tail, '', nil
    if has(it, 2) then
      _, position = parse('>I2c0', it.record, position)
    end
    if has(it, 4) then
      _, _, position = parse('>I2c0I8', it.record, position)
    end
    if has(it, 8) then
      _, _, position = parse('>I2c0I4', it.record, position)
    end
    if has(it, 1) then
      kind = parse('>I2c0', it.record, position)
    end
    return kind
  end

  -- A group as it is now, or `false`. A changed one is written by `write_deaths`.
  local function group_of(key)
    local group = groups[key]
    if group == nil then
      local row = call('HGET', OUTBOX, key)
      group = false
      if row then
        group = {}
        group.count, group.last, group.first, group.born, group.told, group.job, group.error, group.rest =
          parse('>I6I6I6I6I2c0I2c0I2c0', row)
        group.worker = sub(row, group.rest)
      end
      groups[key] = group
    end
    return group
  end

  local function count_death(it)
    local kind = kind_of(it)
    local key = char(#kind) .. kind .. fingerprint(it.error)
    local group = group_of(key)
    if not group then
      others = others or call('HLEN', OUTBOX) - call('HEXISTS', OUTBOX, OTHERS)
      if others >= GROUPS_MAX then
        key = OTHERS
        group = group_of(key)
      else
        others = others + 1
      end
    end
    if not group then
      group = {count = 0, first = now, born = M.died, told = ''}
      groups[key] = group
    end
    local id = keys_of(it)
    group.count, group.last, group.changed = group.count + 1, now, true
    group.job, group.error, group.worker = id and 'i' .. id or 's' .. it.job, sub(it.error, 1, 512), it.worker
    M.deaths = M.deaths + 1
  end

  function rules.write_deaths()
    local changed = {}
    for key, group in pairs(groups) do
      if group and group.changed then
        changed[#changed + 1] = key
        changed[#changed + 1] = pack('>I6I6I6I6I2c0I2c0I2c0', group.count, group.last, group.first, group.born,
          #group.told, group.told, #group.job, group.job, #group.error, group.error) .. group.worker
        group.changed = false
      end
    end
    if #changed > 0 then
      send('HSET', OUTBOX, changed)
    end
  end

  local function make_dead(it)
    free_key(it)
    note(it, 'd', it.spent, it.error)
    it.state, it.time = 'D', now
    M.died = M.died + 1
    M.dead = M.dead + 1
    count_death(it)
    call('ZADD', DEAD, text(now), it.job)
    save(it)
    if has(it, 8) then
      admit(member_of(it))
    end
  end

  -- `backoff_delay` of `src/job.rs`; exact, since every product is below 2^53 once it is capped.
  local function backoff(it)
    local plain = math.min(it.backoff * 2 ^ math.min(math.max(it.spent - 1, 0), 40), it.backoff_max)
    local jitter = plain * (parse('>I6', it.token) % 1000 - 500) / 5000
    jitter = jitter < 0 and math.ceil(jitter) or math.floor(jitter)
    return math.min(math.max(plain + jitter, 0), it.backoff_max)
  end

  -- Keeps the histories of jobs of whose state records the oldest is of this time.
  local function retire(seqs, time)
    if not recording then
      return send('HDEL', STATE, seqs)
    end
    if M.retired == 0 then
      M.retired_until = math.max(time + history_ms, 1)
    end
    M.retired = M.retired + #seqs
    send('RPUSH', RETIRED, seqs)
  end

  -- Ends the histories of jobs that are removed before they are over.
  local function cut_short(seqs, reason)
    -- In steps, so that large ones are not held together.
    for first = 1, recording and #seqs or 0, 16 do
      local part = {spread(seqs, first, math.min(first + 15, #seqs))}
      local records, states = fetch(JOBS, part), fetch(STATE, part)
      for i = 1, #part do
        if records[i] then
          local it = job_of(part[i], records[i], states[i])
          note(it, 'x', nil, reason)
          it.state, it.verdict, it.time = 'X', '-', now
          save(it)
        end
      end
    end
  end

  -- Removes jobs and all that names them, except the index they were found in. Of their state records, which have histories,
  -- the oldest is of this time. With a reason they are not over yet.
  local function forget(seqs, time, reason)
    if #seqs == 0 then
      return
    end
    local freed = {}
    -- In steps, so that large ones are not held together.
    for first = 1, M.held ~= 0 and #seqs or 0, 16 do
      local part = {spread(seqs, first, math.min(first + 15, #seqs))}
      local records = fetch(JOBS, part)
      local states = seen(2) and fetch(STATE, part) or {}
      for i = 1, #part do
        if records[i] then
          local it = read_head({job = part[i], flags = byte(records[i], 14) - 64}, records[i])
          free_key(it)
          if has(it, 8) then
            freed[#freed + 1] = member_of(it)
            if not states[i] or TURN[sub(states[i], 1, 1)] then
              give_turn(it.group)
            end
          end
          if has(it, 2) then
            local id = keys_of(it)
            call('HDEL', HELD, 'i' .. id)
            if recording then
              call('HSET', HELD, 'h' .. id, it.job)
            end
          end
        end
      end
    end
    if M.ttl > 0 then
      M.ttl = M.ttl - send('ZREM', EXPIRING, seqs)
    end
    if M.bound > 0 then
      M.bound = M.bound - send('ZREM', BOUND, seqs)
    end
    if reason then
      cut_short(seqs, reason)
    end
    send('HDEL', JOBS, seqs)
    retire(seqs, time)
    for i = 1, #freed do
      admit(freed[i])
    end
  end

  ------------------------------------------------------------------------------------------------ limits

  -- What the shard has of the queue's limits, once it was looked at.
  local share

  -- Forgets the starts that have left the window.
  local function slide()
    local from = 1
    while from < #share.log do
      local last, jobs = parse('>I6I6', share.log, from)
      if last + share.window > now then
        break
      end
      share.started = share.started - jobs
      from = from + 12
    end
    if from > 1 then
      share.log, share.is_changed = sub(share.log, from), true
    end
  end

  local function change_share(packed)
    share.version, share.leased, share.rate, share.window, share.waiting = parse('>I6I6I6I6I6', packed)
    for _, limit in ipairs({'leased', 'rate', 'waiting'}) do
      share[limit] = share[limit] ~= TIME_MAX and share[limit] or nil
    end
    if not share.rate then
      share.log, share.started, share.is_changed = '', 0, false
    end
    slide()
    return share
  end

  local function read_share()
    if not share then
      local found = call('HMGET', LIMITS, 's', 'r')
      share = {version = 0, window = 0, started = 0, log = ''}
      if found[2] then
        share.started, share.log = parse('>I6', found[2]), sub(found[2], 7)
      end
      if found[1] then
        change_share(found[1])
      end
    end
    return share
  end

  -- Of so many jobs, how many may be leased.
  function rules.leasable(count)
    local share = read_share()
    if share.leased then
      count = math.min(count, math.max(share.leased - M.leased, 0))
    end
    if share.rate then
      count = math.min(count, math.max(share.rate - share.started, 0))
    end
    return count
  end

  -- Whether so many jobs may be added to those that wait; how many more may be.
  local function has_room(count)
    local most = read_share().waiting
    local room = most and most - M.ready - blocked() - M.scheduled or math.huge
    return count <= room, room
  end

  -- Of the records of some ops, those of the ops that there is room for, and a mark for each op.
  function rules.fitting(first, count, sizes)
    local _, room = has_room(0)
    local records, marks, position = {}, {}, first
    while position < first + count do
      local size = sizes and parse('>I4', sizes, 4 * #marks + 1) or 1
      local fits = size <= room
      marks[#marks + 1] = fits and '1' or '0'
      if fits then
        room = room - size
        for i = position, position + size - 1 do
          records[#records + 1] = ARGV[i]
        end
      end
      position = position + size
    end
    return records, table.concat(marks)
  end

  -- Remembers that jobs were started.
  function rules.start(count)
    local share = read_share()
    if share.rate then
      local step = math.ceil(share.window / RATE_STEPS)
      local last = now - now % step + step - 1
      local known, jobs = 0, 0
      if share.log ~= '' then
        known, jobs = parse('>I6I6', share.log, #share.log - 11)
      end
      if known >= last then
        share.log = sub(share.log, 1, -13) .. pack('>I6I6', known, jobs + count)
      else
        share.log = share.log .. pack('>I6I6', last, count)
      end
      share.started, share.is_changed = share.started + count, true
    end
  end

  -- Keeps what was started; when the next thing falls due, and how many jobs can be leased.
  function rules.limit_effect(due, ready)
    local share = read_share()
    if share.is_changed then
      call('HSET', LIMITS, 'r', pack('>I6', share.started) .. share.log)
    end
    local most = rules.leasable(ready)
    if ready > 0 and most == 0 and share.rate and share.rate > 0 and share.rate <= share.started then
      local opens = parse('>I6', share.log) + share.window
      due = (due == 0 or opens < due) and opens or due
    end
    return due, most
  end

  ------------------------------------------------------------------------------------------------ for flow.lua

  -- Takes up to `count` ready jobs out of the line, in order, passing over the ghosts.
  function rules.take(count)
    local seqs, records, states, n = {}, {}, {}, 0
    local function keep(job, record, state)
      n = n + 1
      seqs[n], records[n], states[n] = job, record, state
    end
    local function take_ranked(top)
      if M.ranked > 0 and n < count then
        local found = call('ZRANGEBYSCORE', RANKED, '-inf', top, 'LIMIT', '0', text(count - n))
        if #found > 0 then
          local found_records, found_states = fetch(JOBS, found), fetch(STATE, found)
          M.ranked = M.ranked - send('ZREM', RANKED, found)
          for i = 1, #found do
            keep(found[i], found_records[i], found_states[i])
          end
        end
      end
    end
    -- Those of priority 0 in `ranked` were at the head of the list before, so that they come before all of it, but for the
    -- ones that a group has let in: these are merged with the list by their places.
    local function take_merged()
      local old = call('ZRANGEBYSCORE', RANKED, '0', '(' .. text(PLACE_MAX), 'WITHSCORES', 'LIMIT', '0', text(count - n))
      local next, gone = 1, {}
      local function take_old(before)
        while old[next] and n < count and tonumber(old[next + 1]) < before do
          local job = old[next]
          gone[#gone + 1] = job
          keep(job, call('HGET', JOBS, job), call('HGET', STATE, job))
          next = next + 2
        end
      end
      while n < count do
        local heads, passed = call('LRANGE', READY, '0', text(count - n - 1)), 0
        local records, states = fetch(JOBS, heads), fetch(STATE, heads)
        for i = 1, #heads do
          local record, state = records[i], states[i]
          if record and (not state or byte(state) == 82) then
            take_old(parse('>I6', state or heads[i], state and 11 or 1))
            if n == count then
              break
            end
            keep(heads[i], record, state)
          end
          if state or not record then
            M.odd = M.odd - 1
          end
          passed = i
        end
        if passed > 0 then
          call('LPOP', READY, text(passed))
        end
        if #heads == 0 then
          break
        end
      end
      take_old(PLACE_MAX)
      if #gone > 0 then
        M.ranked = M.ranked - send('ZREM', RANKED, gone)
      end
    end
    if seen(2) then
      take_ranked('(0')
      take_merged()
      take_ranked('+inf')
      return seqs, records, states
    end
    take_ranked('(' .. text(PLACE_MAX))
    while n < count do
      local found = call('LPOP', READY, text(count - n))
      if not found or #found == 0 then
        break
      end
      local found_records, found_states = fetch(JOBS, found), fetch(STATE, found)
      for i = 1, #found do
        local record, state = found_records[i], found_states[i]
        if state or not record then
          M.odd = M.odd - 1
        end
        if record and (not state or byte(state) == 82) then
          keep(found[i], record, state)
        end
      end
    end
    take_ranked('+inf')
    return seqs, records, states
  end

  -- The state record of a job that is leased once more.
  function rules.leased_again(state, token, times, worker)
    local it = decode(state)
    local history = it.history
    if recording then
      history = extend(history, 's' .. pack('>I6I4I2c0', now, it.spent + 1, #worker, worker))
    end
    return 'L' .. token .. sub(state, 8, 8) .. '--' .. sub(state, 11, 28) .. times .. '\255'
      .. pack('>I2c0I2c0I2c0I2', #worker, worker, #it.error, it.error, #it.trace, it.trace, 0) .. history
  end

  function rules.spent(states, count)
    local spent = {}
    for i = 1, count do
      spent[i] = states[i] and sub(states[i], 17, 20) or '\0\0\0\0'
    end
    return table.concat(spent)
  end

  -- What a job that is completed holds of others: its unique key, and the turn of its group.
  function rules.free_key(job, state)
    if math.floor((byte(state, 8) - 64) / 4) % 4 > 0 then
      local it = find(job)
      if it then
        free_key(it)
        if has(it, 8) then
          give_turn(member_of(it))
          admit(it.group)
        end
      end
    end
  end

  -- An ack of a lease that has ended: counted where it was counted before, and where the lease only lapsed.
  function rules.ack_late(job, state, result)
    local verdict = sub(state, 9, 9)
    if verdict == 'A' then
      -- The state record of a job that is forgotten is there for its history alone.
      return call('HEXISTS', JOBS, job) == 1 and '1' or '0'
    end
    if verdict ~= 'P' or KEPT[sub(state, 1, 1)] then
      return '0'
    end
    local it = find(job)
    if not it or is_moving(job) then
      return '0'
    end
    leave(it)
    -- A lapse, which has no answer, was counted; the end of a session was not.
    note(it, 'c', it.answer == '-' and it.spent or it.spent + 1)
    it.verdict, it.answer = 'A', 'C'
    if result ~= '' then
      it.history = it.history .. '=' .. result
    end
    M.completed = M.completed + 1
    make_over(it, 'C')
    return '1'
  end

  ------------------------------------------------------------------------------------------------ what falls due

  local function lapse(it)
    leave(it)
    it.spent, it.lapses = it.spent + 1, it.lapses + 1
    it.verdict, it.answer, it.trace = 'P', '-', ''
    M.lapsed = M.lapsed + 1
    if it.lapses >= lapses_max or it.spent >= it.attempts then
      it.error = 'lease lapsed ' .. text(it.lapses) .. ' times: the worker crashed or hung'
      note(it, 'f', it.spent, it.error)
      make_dead(it)
    else
      it.error = 'lease lapsed (' .. text(it.lapses) .. ' of ' .. text(lapses_max) .. ')'
      note(it, 'f', it.spent, it.error)
      if is_expired(it) then
        make_expired(it)
      else
        note(it, 'r', it.spent)
        make_scheduled(it, after(math.max(backoff(it), 1)))
      end
    end
  end

  local function expire(it)
    leave(it)
    it.verdict = '-'
    make_expired(it)
  end

  local function fall_due(it)
    if is_expired(it) then
      expire(it)
    else
      leave(it)
      note(it, 'q')
      make_ready(it)
    end
  end

  -- Moves what has fallen due, at most `room` jobs, and fewer large ones.
  function rules.tick(room)
    local bytes = 0
    if M.sessions > 0 then
      room = make_sessions(rules).give_back(room)
    end
    local function move(key, count, change)
      while count > 0 and room > 0 and bytes < PART_BYTES do
        local found = call('ZRANGEBYSCORE', key, '-inf', text(now), 'LIMIT', '0', text(math.min(room, 16)))
        if #found == 0 then
          break
        end
        room = room - #found
        local records, states = fetch(JOBS, found), fetch(STATE, found)
        for i = 1, #found do
          if records[i] then
            bytes = bytes + #records[i]
            -- One before it may have let it into the line.
            change(seen(2) and find(found[i]) or job_of(found[i], records[i], states[i]))
          end
        end
      end
    end
    move(LEASED, M.leased, lapse)
    move(SCHEDULED, M.scheduled, fall_due)
    move(EXPIRING, M.ttl, expire)
  end

  -- Drops the ghosts at the head of the list, and all of them when nothing else is in it.
  function rules.shed_ghosts()
    if M.odd > 0 and M.ready == M.ranked then
      call('DEL', READY)
      M.odd = 0
    end
    if M.odd == 0 then
      return
    end
    local head = call('LRANGE', READY, '0', '255')
    local states, ghosts = fetch(STATE, head), 0
    for i = 1, #head do
      local state = states[i]
      if state and byte(state) == 82 or not state and call('HEXISTS', JOBS, head[i]) == 1 then
        break
      end
      ghosts = i
    end
    if ghosts > 0 then
      call('LPOP', READY, text(ghosts))
      M.odd = M.odd - ghosts
    end
  end

  -- Forgets the oldest of the kept: what is too many, then what is too old; at most `bulk_max`.
  function rules.trim()
    local over = M.completed_kept + M.cancelled_kept + M.expired_kept - keep_jobs
    local excess = math.min(math.max(over, 0), bulk_max)
    -- While none is too old, no more than the excess and the one that is then the oldest need be looked at.
    local heads, last = {}, text(M.keep_until > now and excess or bulk_max)
    for state, key in pairs(KEPT) do
      if M[KEPT_COUNT[state]] > 0 then
        local seqs = call('LRANGE', key, '0', last)
        local states = fetch(STATE, seqs)
        for i = 1, #seqs do
          heads[#heads + 1] =
            {job = seqs[i], kept = state, place = parse('>I6', states[i], 11), time = parse('>I6', states[i], 29), nth = i}
        end
      end
    end
    table.sort(heads, function(a, b)
      return a.place < b.place or a.place == b.place and a.nth < b.nth
    end)
    local gone, counts = {}, {C = 0, X = 0, E = 0}
    for i = 1, math.min(#heads, bulk_max) do
      local head = heads[i]
      if i > excess and head.time + keep_ms > now then
        break
      end
      gone[i] = head.job
      counts[head.kept] = counts[head.kept] + 1
    end
    for state, count in pairs(counts) do
      if count > 0 then
        call('LPOP', KEPT[state], text(count))
        M[KEPT_COUNT[state]] = M[KEPT_COUNT[state]] - count
      end
    end
    forget(gone, heads[1] and heads[1].time or now)
    local next = heads[#gone + 1]
    M.keep_until = next and next.time + keep_ms or 0
  end

  -- Forgets the oldest histories of jobs that are gone: what is too many, then what is too old; at most `bulk_max`.
  function rules.trim_retired()
    local excess = math.min(math.max(M.retired - history_jobs, 0), bulk_max)
    local seqs = call('LRANGE', RETIRED, '0', text(M.retired_until > now and excess or bulk_max))
    local states, count = fetch(STATE, seqs), 0
    local function ends_at(i)
      return parse('>I6', states[i], 29) + history_ms
    end
    while count < #seqs and count < bulk_max and (count < excess or ends_at(count + 1) <= now) do
      count = count + 1
    end
    if M.held ~= 0 then
      for i = 1, count do
        local id = id_in(decode(states[i]).history)
        if id and call('HGET', HELD, 'h' .. id) == seqs[i] then
          call('HDEL', HELD, 'h' .. id)
        end
      end
    end
    if count > 0 then
      send('HDEL', STATE, call('LPOP', RETIRED, text(count)))
      M.retired = M.retired - count
    end
    M.retired_until = M.retired == 0 and 0 or seqs[count + 1] and math.max(ends_at(count + 1), 1) or now
  end

  -- Drops what is too old from the journal, seldom: up to a chunk that is found by halving.
  function rules.trim_journal()
    local low, high, young = 1, M.events + 1, nil
    while low < high do
      local middle = math.floor((low + high) / 2)
      local found = call('XRANGE', JOURNAL, text(middle), '+', 'COUNT', '1')[1]
      local time = found and parse('>I6', found[2][2])
      if time and time + history_ms <= now then
        low = tonumber(string.match(found[1], '^%d+')) + 1
      else
        high, young = middle, time or young
      end
    end
    call('XTRIM', JOURNAL, 'MINID', text(low))
    M.journal_check = young and math.max(young + history_ms, now + math.ceil(history_ms / 64)) or 0
  end

  ------------------------------------------------------------------------------------------------ the ops

  -- The lease's job when this verdict may be given; else the outcome to answer.
  local function leased(seq, token, verdict)
    local it = find(seq)
    if not it then
      return nil, 'N'
    end
    if not it.stored or it.token ~= token then
      return nil, '!'
    end
    if it.state == 'L' then
      return it
    end
    if verdict and it.verdict == verdict then
      return nil, it.answer
    end
    return nil, '!'
  end

  -- Makes a job wait after a verdict; answers the state.
  local function wait(it, delay, again)
    if is_expired(it) then
      it.answer = 'E'
      make_expired(it)
    elseif delay == 0 then
      it.answer = 'R'
      make_ready(it, again)
    else
      it.answer = 'S'
      make_scheduled(it, after(delay))
    end
    return it.answer
  end

  local function arguments(count)
    at = at + count
    return spread(ARGV, at - count, at - 1)
  end

  -- The version in which homes moved last, as far as the queue was told.
  local function homes_since()
    local told = seen(1) and call('HGET', HELD, 'h')
    return told and parse('>I6', told) or 0
  end

  -- Jobs with something special. ARGV: count, the jobs of each op (4 each), then for each job: what is special, and the record.
  -- Answers for each the seq, or {seq of the holder, its chosen id or false}, or false where there is no room,
  -- or 0 where homes have moved since.
  local function enqueue()
    local placed, count, sizes = {}, arguments(2)
    local nth, left, is_full = 0, 0, false
    for i = 1, tonumber(count) do
      if left == 0 then
        nth, left = nth + 4, parse('>I4', sizes, nth + 1)
        is_full = M.held >= 4 and not has_room(left)
      end
      left = left - 1
      local special, record = arguments(2)
      local mode, when, homes, id, key = parse('>c1I6I6I2c0I2c0', special)
      local span = key ~= '' and parse('>I6', special, #special - 5) or 0
      local holder = id ~= '' and call('HGET', HELD, 'i' .. id) or key ~= '' and holder_of(key)
      if (id ~= '' or key ~= '') and homes < homes_since() then
        placed[i] = 0
      elseif holder then
        local it = find(holder)
        placed[i] = {parse('>I6', holder), it and keys_of(it) or false}
      elseif is_full then
        placed[i] = false
      else
        M.seq = M.seq + 1
        M.enqueued = M.enqueued + 1
        local job, full = pack('>I6', M.seq), format('%013.0f', now) .. record
        local it = job_of(job, full, nil)
        call('HSET', JOBS, job, full)
        if id ~= '' then
          call('HSET', HELD, 'i' .. id, job)
        end
        if key ~= '' then
          hold_key(job, key, span)
        end
        if (id ~= '' or key ~= '') and not seen(1) then
          M.held = M.held + 1
        end
        if has(it, 8) and not seen(2) then
          M.held = M.held + 2
        end
        local due = mode == 'd' and after(when) or mode == 'a' and when or 0
        if recording then
          name(job, rules.id_entry(full))
          noted = noted + 1
          notes[#notes + 1] = (due > now and 'w' or 'q') .. job .. pack('>I4I6BI2I2', 0, TIME_MAX, 255, 0, 0)
        end
        if due > now then
          it.place = 0
          if recording then
            it.history = 'W' .. sub(it.history, 2)
          end
          make_scheduled(it, due)
        elseif has(it, 8) then
          make_ready(it, true)
        else
          enter_line(it)
        end
        placed[i] = M.seq
      end
    end
    return placed
  end

  local function fail()
    local lease, how, message, trace = arguments(4)
    local it, refusal = leased(sub(lease, 1, 6), sub(lease, 7), 'F')
    if not it then
      return refusal
    end
    leave(it)
    it.spent, it.verdict, it.error, it.trace = it.spent + 1, 'F', message, trace
    note(it, 'f', it.spent, message)
    M.failed = M.failed + 1
    if how == 'D' or it.spent >= it.attempts then
      it.answer = 'D'
      make_dead(it)
      return 'D'
    end
    if not is_expired(it) then
      note(it, 'r', it.spent)
    end
    return wait(it, how == '' and backoff(it) or tonumber(how), false)
  end

  local function release()
    local lease, delay = arguments(2)
    local it, refusal = leased(sub(lease, 1, 6), sub(lease, 7), 'R')
    if not it then
      return refusal
    end
    leave(it)
    it.verdict = 'R'
    note(it, 'b', it.spent + 1)
    M.released = M.released + 1
    return wait(it, tonumber(delay), true)
  end

  local function extend()
    local lease, lease_ms = arguments(2)
    local it, refusal = leased(sub(lease, 1, 6), sub(lease, 7))
    if not it then
      return refusal
    end
    it.time = after(tonumber(lease_ms))
    call('ZADD', LEASED, text(it.time), it.job)
    save(it)
    return it.time
  end

  local function progress()
    local lease, percent, message = arguments(3)
    local it, refusal = leased(sub(lease, 1, 6), sub(lease, 7))
    if not it then
      return refusal
    end
    it.progress, it.note = tonumber(percent), message
    note(it, 'p', it.spent + 1)
    save(it)
    return 'O'
  end

  local function cancel()
    local it = find(resolve(arguments(1)))
    if not it or KEPT[it.state] then
      return 0
    elseif is_moving(it.job) then
      return 'W'
    end
    leave(it)
    note(it, 'x')
    M.cancelled = M.cancelled + 1
    it.verdict = '-'
    make_over(it, 'X')
    return 1
  end

  local function view(it)
    return it and {it.job, it.record, it.stored and call('HGET', STATE, it.job) or ''} or false
  end

  local function look()
    return view(find(resolve(arguments(1))))
  end

  local function look_dead()
    local it = find(resolve(arguments(1)))
    return it and it.state == 'D' and view(it) or false
  end

  -- Seqs of the list `ready` without the ghosts. Ghosts can only be told by looking, up to a bound.
  local function list_page(offset, count)
    if M.odd == 0 then
      return call('LRANGE', READY, text(offset), text(offset + count - 1))
    end
    local page, first = {}, 0
    while #page < count and first < 20 * bulk_max do
      local part = call('LRANGE', READY, text(first), text(first + bulk_max - 1))
      if #part == 0 then
        break
      end
      local states = fetch(STATE, part)
      for i = 1, #part do
        local state = states[i]
        if state and byte(state) == 82 or not state and call('HEXISTS', JOBS, part[i]) == 1 then
          if offset > 0 then
            offset = offset - 1
          elseif #page < count then
            page[#page + 1] = part[i]
          end
        end
      end
      first = first + bulk_max
    end
    return page
  end

  -- Those of priority 0: `old` ones of `ranked` and those of the list, by their places.
  local function level_page(old, offset, count)
    if old == 0 then
      return list_page(offset, count)
    end
    local border, reach = '(' .. text(PLACE_MAX), math.min(offset, 20 * bulk_max) + count
    local ranked = call('ZRANGEBYSCORE', RANKED, '0', border, 'WITHSCORES', 'LIMIT', '0', text(reach))
    local list = list_page(0, reach)
    local states, page, next = fetch(STATE, list), {}, 1
    for i = 1, #list do
      local place = parse('>I6', states[i] or list[i], states[i] and 11 or 1)
      while ranked[next] and tonumber(ranked[next + 1]) < place do
        page[#page + 1] = ranked[next]
        next = next + 2
      end
      page[#page + 1] = list[i]
    end
    while ranked[next] do
      page[#page + 1] = ranked[next]
      next = next + 2
    end
    return {spread(page, offset + 1, math.min(offset + count, #page))}
  end

  local function line_page(offset, count)
    local page = {}
    -- What a part of the line, of so many jobs, adds to the page.
    local function add(size, show)
      if #page < count and offset < size then
        local seqs = show(offset, count - #page)
        for i = 1, #seqs do
          page[#page + 1] = seqs[i]
        end
      end
      offset = math.max(offset - size, 0)
    end
    local function ranked(from, to)
      return function(first, most)
        return call('ZRANGEBYSCORE', RANKED, from, to, 'LIMIT', text(first), text(most))
      end
    end
    local border = text(PLACE_MAX)
    local above = M.ranked > 0 and call('ZCOUNT', RANKED, '-inf', '(0') or 0
    local level = M.ranked > 0 and call('ZCOUNT', RANKED, '0', '(' .. border) or 0
    add(above, ranked('-inf', '(0'))
    add(level + M.ready - M.ranked, function(first, most)
      return level_page(level, first, most)
    end)
    add(M.ranked - above - level, ranked(border, '+inf'))
    return page
  end

  -- The line, and behind it those that wait for a turn.
  local function ready_page(offset, count)
    local page = line_page(offset, count)
    local from = math.max(offset - M.ready, 0)
    if seen(2) and #page < count then
      local ranks = call('ZRANGE', BLOCKED, text(from), text(from + count - #page - 1))
      for i = 1, #ranks do
        page[#page + 1] = sub(ranks[i], -10, -5)
      end
    end
    return page
  end

  local function page_of(state, offset, count)
    if state == 'R' then
      return ready_page(offset, count)
    elseif KEPT[state] then
      local seqs, page = call('LRANGE', KEPT[state], text(-offset - count), text(-offset - 1)), {}
      for i = #seqs, 1, -1 do
        page[#page + 1] = seqs[i]
      end
      return page
    end
    return call(state == 'D' and 'ZREVRANGE' or 'ZRANGE', INDEX[state], text(offset), text(offset + count - 1))
  end

  local function count_of(state)
    return M[COUNT[state] or KEPT_COUNT[state]] + (state == 'R' and blocked() or 0)
  end

  local function peek()
    local state, offset, count = arguments(3)
    offset, count = tonumber(offset), tonumber(count)
    count = math.min(count, count_of(state) - offset)
    local views = {}
    if count > 0 then
      local page, bytes = page_of(state, offset, count), 0
      for first = 1, #page, 16 do
        local part = {spread(page, first, math.min(first + 15, #page))}
        local records, states = fetch(JOBS, part), fetch(STATE, part)
        for i = 1, #part do
          if records[i] then
            bytes = bytes + #records[i]
            views[#views + 1] = {part[i], records[i], states[i] or ''}
          end
        end
        if bytes > 16 * PART_BYTES then
          return 'B'
        end
      end
    end
    return views
  end

  -- Since when the job has been ready that is so for longest, of the next one of each of the 16 highest priorities.
  local function ready_since()
    local oldest, bytes = -1, 0
    local function look(job)
      local state = call('HGET', STATE, job)
      local since = state and parse('>I6', state, 29) or 0
      if since == 0 then
        local record = call('HGET', JOBS, job)
        since, bytes = tonumber(sub(record, 1, 13)), bytes + #record
      end
      oldest = oldest < 0 and since or math.min(oldest, since)
    end
    local from, looked = '-inf', 0
    local level = M.ready > M.ranked and list_page(0, 1)[1]
    while M.ranked > 0 and looked < 16 and bytes < PART_BYTES do
      local found = call('ZRANGEBYSCORE', RANKED, from, '+inf', 'WITHSCORES', 'LIMIT', '0', '1')
      if #found == 0 then
        break
      end
      local job, place = found[1], tonumber(found[2])
      local priority = math.floor(place / PLACE_MAX)
      if level and priority > 0 then
        look(level)
        level, looked = nil, looked + 1
      elseif level and priority == 0 then
        local state = call('HGET', STATE, level)
        job = parse('>I6', state or level, state and 11 or 1) < place and level or job
        level = nil
      end
      look(job)
      from, looked = text((priority + 1) * PLACE_MAX), looked + 1
    end
    if level and looked < 16 then
      look(level)
    end
    return oldest
  end

  local function stats()
    return {
      M.ready + blocked(), M.scheduled, M.leased, M.dead, M.completed_kept, M.cancelled_kept, M.expired_kept, M.enqueued, M.delivered,
      M.completed, M.failed, M.lapsed, M.released, M.died, M.redriven, M.cancelled, M.expired, M.paused,
      ready_since(), seen(8) and 1 or 0,
    }
  end

  local function pause()
    M.paused = tonumber(arguments(1))
    return 'O'
  end

  -- Takes up to `count` jobs of a state out of their index, of which there is at least one. Turns of groups stay taken.
  local function pull(state, count)
    local seqs
    if state == 'R' then
      seqs = rules.take(math.min(count, M.ready))
      M.ready = M.ready - #seqs
      local ranks = #seqs < count and call('ZRANGE', BLOCKED, '0', text(count - #seqs - 1)) or {}
      for i = 1, #ranks do
        seqs[#seqs + 1] = sub(ranks[i], -10, -5)
      end
      if #ranks > 0 then
        send('ZREM', BLOCKED, ranks)
      end
    elseif KEPT[state] then
      seqs = call('LPOP', KEPT[state], text(count))
      M[KEPT_COUNT[state]] = M[KEPT_COUNT[state]] - #seqs
      -- Where the clock was set back, what is oldest now may have ended before what was.
      M.keep_until = now
    else
      seqs = call('ZRANGE', INDEX[state], '0', text(count - 1))
      send('ZREM', INDEX[state], seqs)
      M[COUNT[state]] = M[COUNT[state]] - #seqs
    end
    return seqs
  end

  local function purge()
    local state = arguments(1)
    local count = math.min(count_of(state), bulk_max)
    if count == 0 then
      return {0, -1}
    end
    -- Few at once where the first is large, as others of its queue are then.
    local first = state == 'D' and call('ZRANGE', DEAD, '0', '0')[1] or KEPT[state] and call('LINDEX', KEPT[state], '0')
      or page_of(state, 0, 1)[1]
    if first and call('HSTRLEN', JOBS, first) > PART_BYTES / 64 then
      count = math.min(count, 16)
    end
    local seqs = pull(state, count)
    forget(seqs, 0, not KEPT[state] and 'purged' or nil)
    return {#seqs, count_of(state) > 0 and now or -1}
  end

  -- ARGV: what is done, and two more. Answers all that is known about the limits.
  local function limit()
    local deed, first, second = arguments(3)
    if deed == 's' and parse('>I6', first) >= read_share().version then
      call('HSET', LIMITS, 's', first)
      if not change_share(first).rate then
        call('HDEL', LIMITS, 'r')
      end
      local is_limited = share.leased or share.rate or share.waiting
      M.held = M.held + ((is_limited and 4 or 0) - (seen(4) and 4 or 0))
    end
    local ledger, version = call('HGET', LIMITS, 'l') or NOBODY, 0
    version, ledger = parse('>I6', ledger), sub(ledger, 7)
    if deed == 'w' and tonumber(first) == version then
      version, ledger = version + 1, second
      call('HSET', LIMITS, 'l', pack('>I6', version) .. ledger)
      M.held = M.held + ((ledger ~= '' and 8 or 0) - (seen(8) and 8 or 0))
    end
    local known = read_share()
    return {
      known.version, known.leased or -1, known.rate or -1, known.window, known.waiting or -1, version, ledger, M.leased,
      known.started, M.ready + blocked() + M.scheduled, M.paused == 0 and M.ready or 0,
    }
  end

  -- Puts a dead job back; whether it could be.
  local function redrive(it)
    local _, key, span = keys_of(it)
    if key then
      local holder = holder_of(key)
      if holder and holder ~= it.job then
        return false
      end
    end
    leave(it)
    it.spent, it.lapses, it.redrives = 0, 0, it.redrives + 1
    it.token, it.verdict, it.answer = NOBODY, '-', '-'
    note(it, 'v')
    M.redriven = M.redriven + 1
    if is_expired(it) then
      make_expired(it)
    else
      if key then
        hold_key(it.job, key, span)
      end
      make_ready(it)
    end
    return true
  end

  local function dead_retry()
    local count = 0
    for _ = 1, tonumber(arguments(1)) do
      local it = find(resolve(arguments(1)))
      if it and it.state == 'D' and not is_moving(it.job) and redrive(it) then
        count = count + 1
      end
    end
    return count
  end

  local function dead_retry_all()
    local limit = tonumber(arguments(1))
    limit = limit < 0 and now or limit
    local count, passed, bytes = 0, 0, 0
    local function is_enough()
      return count > 0 and bytes >= PART_BYTES
    end
    while count < bulk_max and passed < 10 * bulk_max and not is_enough() do
      local found = call('ZRANGEBYSCORE', DEAD, '-inf', text(limit), 'LIMIT', text(passed), text(bulk_max - count))
      if #found == 0 then
        return {count, -1}
      end
      for i = 1, #found do
        if is_enough() then
          break
        end
        local it = find(found[i])
        bytes = bytes + #it.record
        if redrive(it) then
          count = count + 1
        else
          passed = passed + 1
        end
      end
    end
    local more = call('ZCOUNT', DEAD, '-inf', text(limit)) > passed and count > 0
    return {count, more and limit or -1}
  end

  local function dead_delete()
    local gone = {}
    for _ = 1, tonumber(arguments(1)) do
      local it = find(resolve(arguments(1)))
      if it and it.state == 'D' and not is_moving(it.job) then
        leave(it)
        forget({it.job}, now, 'deleted')
        gone[#gone + 1] = it.job
      end
    end
    return #gone
  end

  local function outbox()
    rules.write_deaths()
    return M.deaths > 0 and call('HGETALL', OUTBOX) or {}
  end

  -- The marks of an op: keys, with born and count of each behind them.
  local function each_mark(change)
    for _ = 1, tonumber(arguments(1)) do
      local key, mark = arguments(2)
      local group = group_of(key)
      if group and group.born == parse('>I6', mark) then
        change(key, group, parse('>I6', mark, 7))
      end
    end
    return 'O'
  end

  local function told()
    local channel = arguments(1)
    return each_mark(function(_, group, count)
      local position, kept, channels, was = 1, {}, {}, nil
      while position <= #group.told do
        local known, number, after_it = parse('>I2c0I6', group.told, position)
        kept[#kept + 1], channels[#channels + 1] = number, known
        if known == channel then
          was = #kept
        end
        position = after_it
      end
      count = math.min(count, group.count)
      if count > (was and kept[was] or 0) then
        if not was and #kept >= CHANNELS_MAX then
          table.remove(kept, 1)
          table.remove(channels, 1)
        end
        was = was or #kept + 1
        kept[was], channels[was] = count, channel
        for i = 1, #kept do
          kept[i] = pack('>I2c0I6', #channels[i], channels[i], kept[i])
        end
        group.told, group.changed = table.concat(kept), true
      end
    end)
  end

  local function settle()
    rules.write_deaths()
    return each_mark(function(key, group, count)
      if group.count == count then
        call('HDEL', OUTBOX, key)
        groups[key], others = nil, nil
        M.deaths = M.deaths - count
      end
    end)
  end

  ------------------------------------------------------------------------------------------------ jobs that travel

  local function seek()
    local what = arguments(1)
    local homes, id, key = parse('>I6I2c0I2c0', what)
    if homes > homes_since() then
      call('HSET', HELD, 'h', pack('>I6', homes))
      if not seen(1) then
        M.held = M.held + 1
      end
    end
    local holder = id ~= '' and call('HGET', HELD, 'i' .. id) or key ~= '' and holder_of(key)
    if not holder then
      return {}
    end
    local it = find(holder)
    return {{parse('>I6', holder), it and keys_of(it) or false}}
  end

  -- Answers {mark, route, views}, or nothing where no batch is on its way.
  local function next_mark()
    M.seq = M.seq + 1
    local last = call('HGET', HELD, 'l')
    local mark = pack('>I6I6', math.max(now, last and parse('>I6', last) or 0), M.seq)
    call('HSET', HELD, 'l', mark)
    return mark
  end

  local function depart()
    local state, most, route, outdated = arguments(4)
    most = math.min(tonumber(most), bulk_max)
    local stored = call('HGETALL', MOVING)
    if #stored == 0 then
      local count, bytes = 0, 0
      while count < most and bytes < PART_BYTES and count_of(state) > 0 do
        local step = pull(state, math.min(16, most - count, count_of(state)))
        local records = fetch(JOBS, step)
        for i = 1, #step do
          bytes = bytes + #records[i]
          stored[#stored + 1] = step[i]
          stored[#stored + 1] = pack('>I4', count + i)
        end
        count = count + #step
        if M.ttl > 0 then
          M.ttl = M.ttl - send('ZREM', EXPIRING, step)
        end
      end
      if count == 0 then
        return {}
      end
      stored[#stored + 1] = ''
      stored[#stored + 1] = next_mark() .. route
      send('HSET', MOVING, stored)
    end
    local mark, seqs, ranks = '', {}, {}
    for i = 1, #stored, 2 do
      local job, value = stored[i], stored[i + 1]
      if job == '' then
        mark, route = sub(value, 1, 12), sub(value, 13)
      else
        seqs[#seqs + 1] = job
        ranks[job] = value
      end
    end
    if mark == outdated then
      mark = next_mark()
      call('HSET', MOVING, '', mark .. route)
    end
    table.sort(seqs, function(a, b) return ranks[a] < ranks[b] end)
    local records, states, views = fetch(JOBS, seqs), fetch(STATE, seqs), {}
    for i = 1, #seqs do
      views[i] = {seqs[i], records[i], states[i] or ''}
    end
    return {mark, route, views}
  end

  local function arrive_one(record, state)
    local char_is, spent, lapses, redrives, time, started, progress, worker, message, trace, note =
      parse('>c1I4I4I4I6I6I1I2c0I2c0I2c0I2c0', state)
    M.seq = M.seq + 1
    local job = pack('>I6', M.seq)
    local it = read_head({
      job = job, token = NOBODY, flags = byte(record, 14) - 64, verdict = '-', answer = '-', place = M.seq, spent = spent,
      lapses = lapses, redrives = redrives, time = time, started = started, progress = progress, worker = worker,
      error = message, trace = trace, note = note, history = '', stored = char_is ~= 'F',
    }, record)
    local id, key, span = keys_of(it)
    if id and call('HEXISTS', HELD, 'i' .. id) == 1 then
      -- Another job has this id here: it gets a new one.
      record = sub(record, 1, 13) .. char(it.flags + 62) .. sub(record, 15, it.tail - 1) .. sub(record, it.tail + 2 + #id)
      it.flags, it.record, id = it.flags - 2, record, nil
    end
    call('HSET', JOBS, job, record)
    if recording then
      local is_scheduled = char_is == 'S'
      it.history = (is_scheduled and 'W' or 'Q') .. format('%013.0f', now) .. rules.id_entry(record)
      name(job, rules.id_entry(record))
      noted = noted + 1
      notes[#notes + 1] = (is_scheduled and 'w' or 'q') .. job .. pack('>I4I6BI2I2', 0, TIME_MAX, 255, 0, 0)
    end
    if (id or key) and not seen(1) then
      M.held = M.held + 1
    end
    if has(it, 8) and not seen(2) then
      M.held = M.held + 2
    end
    if id then
      call('HSET', HELD, 'i' .. id, job)
    end
    if key and char_is ~= 'D' and not holder_of(key) then
      local ends = span == 0 and 0 or (redrives > 0 and now or it.enqueued) + span
      if span == 0 or ends > now then
        call('HSET', HELD, 'u' .. key, job .. pack('>I6', ends <= TIME_MAX and ends or 0))
      end
    end
    if char_is == 'F' then
      enter_line(it)
    elseif char_is == 'S' then
      it.place = 0
      make_scheduled(it, time)
    elseif char_is == 'D' then
      it.state, it.place = 'D', 0
      M.dead = M.dead + 1
      call('ZADD', DEAD, text(time), job)
      save(it)
    else
      make_ready(it)
    end
  end

  local function arrive()
    local source, mark, count = arguments(3)
    count = tonumber(count)
    local last = call('HGET', HELD, 'b' .. source)
    local time, number = parse('>I6I6', mark)
    local last_time, last_number = parse('>I6I6', last or pack('>I6I6', 0, 0))
    if last == mark or last_time > time or last_time == time and last_number > number then
      at = at + 2 * count
      return last == mark and 0 or '<'
    end
    call('HSET', HELD, 'b' .. source, mark)
    for _ = 1, count do
      arrive_one(arguments(2))
    end
    return count
  end

  local function departed()
    local mark = arguments(1)
    local batch = call('HGET', MOVING, '')
    if not batch or sub(batch, 1, 12) ~= mark then
      return 0
    end
    local fields, seqs = call('HKEYS', MOVING), {}
    for i = 1, #fields do
      if fields[i] ~= '' then
        seqs[#seqs + 1] = fields[i]
      end
    end
    forget(seqs, 0, 'moved')
    call('DEL', MOVING)
    return #seqs
  end

  local function history()
    local reference = arguments(1)
    local job = resolve(reference)
    if not job and byte(reference) == 105 then
      job = M.held ~= 0 and call('HGET', HELD, 'h' .. sub(reference, 2))
    end
    local state = job and call('HGET', STATE, job)
    if state then
      return {job, decode(state).history}
    end
    local it = job and find(job)
    return it and {job, it.history} or false
  end

  -- The beginning and the number of the last event, then chunks by the numbers of theirs.
  local function events_after()
    local number, count = arguments(2)
    local answer, last = {M.born, M.events}, tonumber(number)
    while last < M.events and last - tonumber(number) < tonumber(count) do
      local found = call('XRANGE', JOURNAL, text(last + 1), '+', 'COUNT', '16')
      if #found == 0 then
        break
      end
      for i = 1, #found do
        last = tonumber(string.match(found[i][1], '^%d+'))
        answer[#answer + 1] = last
        answer[#answer + 1] = found[i][2][2]
        if last - tonumber(number) >= tonumber(count) then
          break
        end
      end
    end
    return answer
  end

  -- The same, the newest chunk first.
  local function events_recent()
    local count = tonumber(arguments(1))
    local answer, below = {M.born, M.events}, M.events
    while below > 0 and M.events - below < count do
      local found = call('XREVRANGE', JOURNAL, text(below), '-', 'COUNT', '16')
      if #found == 0 then
        break
      end
      for i = 1, #found do
        local last = tonumber(string.match(found[i][1], '^%d+'))
        if M.events - last >= count then
          return answer
        end
        answer[#answer + 1] = last
        answer[#answer + 1] = found[i][2][2]
        below = last - 1
      end
    end
    return answer
  end

  -- For sessions.lua.
  rules.decode, rules.save, rules.job_of, rules.leave, rules.wait, rules.text, rules.note =
    decode, save, job_of, leave, wait, text, note

  rules.ops = {
    o = outbox, T = told, F = settle, y = history, v = events_after, V = events_recent,
    q = seek, d = depart, W = arrive, z = departed,
    E = enqueue, h = limit, f = fail, r = release, x = extend, p = progress, c = cancel, j = look, g = look_dead, k = peek, s = stats,
    P = pause, u = purge, R = dead_retry, A = dead_retry_all, D = dead_delete,
    n = function() return count_of(arguments(1)) end,
    t = function() return 'O' end,
  }
  return rules
end
