-- The rules of one queue of one shard, in Lua: `src/shard/mod.rs`, "The state machine", is the specification.
--
-- One call applies the ops of one queue in order. The script is these files, one after the other: begin (what all
-- need), flow (the hot ones: enqueue, lease, ack), rules (all else, built only when it is needed), sessions (worker sessions,
-- likewise) and finish (the ops one by one, then what every call leaves behind). It is Lua 5.1 and 5.4 alike, and whatever can be refused is
-- refused before the first write.
--
-- KEYS, all of one slot:
--   meta       string   the counters, packed (META_FORMAT)
--   jobs       hash     seq -> 13 digits of the enqueue time, then the record of `Spec::encode`; never changes
--   state      hash     seq -> state record (below), for jobs that are not as their enqueue left them
--   ready      list     seqs of priority 0 in the order of their places; holds ghosts: jobs that ended while they waited
--   ranked     zset     ready seqs of other priorities, and those given back at their old place: -priority * 2^42 + place
--   scheduled, leased, expiring, dead      zsets of seqs by due time, lease end, end of ttl, time of death
--   held       hash     "i" id -> seq; "u" unique key -> seq and the time until which it is held (0: no end);
--                       "g" group -> how many of its jobs have a turn; "s" session -> its number, since when (6
--                       each), then for each who keeps it keeper and end (6 each); "h" id -> seq of a retired job;
--                       "b" shard -> mark (time and number, 6 each) of the last batch of jobs that came from it;
--                       "l" -> mark of the last batch that departed;
--                       "h" -> the version in which homes moved last, as far as the queue was told
--   blocked    zset     ready jobs that wait for a turn of their group, all of score 0: group (2 and bytes),
--                       1000 - priority (2), place (6), seq (6), the job's bound (4)
--   sessions   zset     worker sessions by their ends
--   bound      zset     seqs of leases that hang on a session, by its number
--   limits     hash     "s" the shard's share: version, leased, started, window, waiting (6 each; all bits: no limit);
--                       "r" how many were started in the window, then for each step of it its last moment and how many
--                       (6 each); "l" the ledger's version (6) and text
--   completed, cancelled, expired          lists of the seqs that are kept, oldest first
--   outbox     hash     key of a group of deaths -> its row, as `src/shard/outbox.rs` lays it out
--   moving     hash     jobs on their way to another shard: seq -> rank (4), and "" -> mark of the batch, route
--   retired    list     seqs of jobs without a record, whose state record is kept for its history, oldest first
--   journal    stream   a chunk of events for each call that made some; its id is the number of the last of them
-- ARGV: the header, then the ops. The answer: {outcomes, ready, load, due (-1: nothing), now, deaths}.
--
-- A seq is 6 bytes big-endian, so that members of one score sort by number. A state record:
--   1 state: R ready in the list, r ready in `ranked`, B ready in `blocked`, S scheduled, s the same with its group's turn,
--     L leased, D dead, C completed, X cancelled, E expired
--   2 token (6)   8 flags of the record   9 last verdict: A ack, F fail, R release, P lapse, - none
--   10 the state that the verdict answered   11 place (6), of jobs that are over the order in which they ended
--   17 spent (4)   21 lapses (4)   25 redrives (4)   29 due time, lease end or time of the end (6)
--   35 started (6)   41 progress, 255 none   42 worker, error, trace, progress text (2 and bytes each), history (the rest,
--   and last in it the result: `src/shard/event.rs` has its layout, and that of a chunk)

local call = redis.call
local sub, byte, char, format = string.sub, string.byte, string.char, string.format
local pack, parse = struct.pack, struct.unpack
local spread = table.unpack or unpack
local META, JOBS, STATE, READY, RANKED, SCHEDULED, LEASED = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local EXPIRING, DEAD, HELD, COMPLETED, CANCELLED, EXPIRED = KEYS[8], KEYS[9], KEYS[10], KEYS[11], KEYS[12], KEYS[13]
local OUTBOX, BLOCKED, SESSIONS, BOUND, LIMITS, MOVING = KEYS[14], KEYS[15], KEYS[16], KEYS[17], KEYS[18], KEYS[19]
local RETIRED, JOURNAL = KEYS[20], KEYS[21]
local META_FORMAT = '<dddddddddddddddddddddddddddddddddd'
local META_BYTES = 272
local TIME_MAX = 281474976710655 -- what 6 bytes hold
local NOBODY = '\0\0\0\0\0\0'
local PART_BYTES = 4194304 -- `PART_BYTES_MAX` of `src/shard/mod.rs`

local now, keep_ms, keep_jobs, lapses_max, bulk_max, history_ms, history_jobs, journal_events =
  parse('>I6I6I6I4I4I6I6I6', ARGV[1])
local recording = journal_events > 0
if now == 0 then
  local time = call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- The point so long from now.
local function after(span)
  return math.min(now + span, TIME_MAX)
end

-- Sends a command with any number of arguments; 6000 is even, so that pairs stay together.
local function send(command, key, list)
  local count = #list
  if count <= 6000 then
    return call(command, key, spread(list))
  end
  local sum = 0
  for first = 1, count, 6000 do
    local answer = call(command, key, spread(list, first, math.min(first + 5999, count)))
    sum = sum + (tonumber(answer) or 0)
  end
  return sum
end

-- The fields of a hash, any number of them; `false` where there is none.
local function fetch(key, fields)
  local count = #fields
  if count == 0 then
    return fields
  elseif count <= 6000 then
    return call('HMGET', key, spread(fields))
  end
  local values = {}
  for first = 1, count, 6000 do
    local part = call('HMGET', key, spread(fields, first, math.min(first + 5999, count)))
    for i = 1, #part do
      values[first + i - 1] = part[i]
    end
  end
  return values
end

local meta_was = call('GET', META) or ''
local M
do
  local seq, paused, ready, scheduled, leased, dead, completed_kept, cancelled_kept, expired_kept, enqueued, delivered,
    completed, failed, lapsed, released, died, redriven, cancelled, expired, ranked, odd, ttl, held, ended, keep_until, due,
    deaths, sessions, bound, events, born, retired, retired_until, journal_check =
    -- Shorter where an older version wrote it; what it did not know is 0.
    parse(META_FORMAT, #meta_was < META_BYTES and meta_was .. string.rep('\0', META_BYTES - #meta_was) or meta_was)
  M = {
    seq = seq, paused = paused, ready = ready, scheduled = scheduled, leased = leased, dead = dead,
    completed_kept = completed_kept, cancelled_kept = cancelled_kept, expired_kept = expired_kept,
    enqueued = enqueued, delivered = delivered, completed = completed, failed = failed, lapsed = lapsed,
    released = released, died = died, redriven = redriven, cancelled = cancelled, expired = expired,
    ranked = ranked, -- members of `ranked`
    odd = odd, -- entries of the list `ready` that are ghosts or have a state record
    ttl = ttl, -- members of `expiring`
    -- 1 once the queue has seen an id or a unique key, 2 more once it has seen a group, 4 more while it has a share of a
    -- limit, 8 more while it keeps the ledger of limits.
    held = held,
    ended = ended, -- counts what was put on the lists of the kept, so that the three have one order
    keep_until = keep_until, -- no kept job is too old before this
    due = due, -- when the next thing falls due; 0 for never
    deaths = deaths, -- that the groups in the outbox count
    sessions = sessions, -- members of `sessions`
    bound = bound, -- members of `bound`
    events = events, -- the number of the last event
    born = born, -- when the first was recorded
    retired = retired, -- members of `retired`
    retired_until = retired_until, -- none of them is too old before this
    journal_check = journal_check, -- nothing in the journal is too old before this
  }
end
local function seen(bit)
  return math.floor(M.held / bit) % 2 == 1
end

-- Ready jobs that are not in the line; only those in the line are in `M.ready`.
local function blocked()
  return M.held >= 2 and seen(2) and call('ZCARD', BLOCKED) or 0
end

local ready_was = M.paused == 0 and M.ready or 0
local deaths_was, died_was = M.deaths, M.died
local at = 2 -- the next argument
local shed = false -- the list `ready` has got a ghost
local notes, noted = {}, 0 -- the chunk of this call in pieces, and how many events that is
local rules -- what rules.lua makes, once it is needed
local make_rules
local make_sessions -- makes what sessions.lua adds to the rules
