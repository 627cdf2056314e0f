-- The rules of locks or of semaphores, in Lua: `src/shard/mod.rs`, `Deed`, is the specification.
--
-- One call applies deeds on many objects of one kind, in order. KEYS: the objects, a string each: the fence of the last
-- grant (8 bytes, a float), 1 where a proxy was refused and wants to hear of a release, then for each holder 6 bytes of a
-- token, its end (6 bytes), owner (4 bytes of length before it). ARGV: the header; then a deed each: a letter, which of KEYS
-- (2 bytes), its argument. The answer: for each deed a fence, or minus the milliseconds until the first holder's time is up;
-- a count; or {fence, owner, milliseconds left, owner, ...}.

local call = redis.call
local format, sub, pack, parse = string.format, string.sub, struct.pack, struct.unpack
local min, max = math.min, math.max
local TIME_MAX = 281474976710655 -- what 6 bytes hold
local HOLDER = '>c6I6I4c0'

local now, mark, prefix, channel = parse('>I6c1BI2c0', ARGV[1])
local is_lock = mark == '!'
local is_live = now == 0
if is_live then
  local time = call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Each a list of token, end, owner, token ...
local objects, freed = {}, nil
local records = call('MGET', unpack(KEYS))

local function look(key)
  local object, record = {fence = 0, waited = 0}, records[key]
  objects[key] = object
  if record then
    local at, filled = 10, 0
    object.fence, object.waited = parse('>dB', record)
    while at <= #record do
      local token, until_ms, owner
      token, until_ms, owner, at = parse(HOLDER, record, at)
      if until_ms > now then
        object[filled + 1], object[filled + 2], object[filled + 3] = token, until_ms, owner
        filled = filled + 3
      else
        object.changed = true
      end
    end
  end
  return object
end

local function place(object, token)
  for at = 1, #object, 3 do
    if object[at] == token then
      return at
    end
  end
end

local function first_end(object)
  local first = TIME_MAX
  for at = 2, #object, 3 do
    first = min(first, object[at])
  end
  return first
end

local function acquire(object, arg)
  local token, limit, ttl, waits, moved_in, owner = parse('>c6I4I6BI4I4c0', arg, 4)
  local held = place(object, token)
  if not held then
    if #object >= limit * 3 then
      if waits == 1 and object.waited == 0 then
        object.waited, object.changed = 1, true
      end
      return now - first_end(object)
    end
    if is_lock then
      object.fence = max(object.fence, moved_in * 4294967296) + 1
    end
    held = #object + 1
    object[held] = token
  end
  object[held + 1], object[held + 2] = min(now + ttl, TIME_MAX), owner
  object.changed = true
  return object.fence
end

local function release(object, arg, key)
  local held = place(object, parse('>c6', arg, 4))
  if not held then
    return 0
  end
  for _ = 1, 3 do
    table.remove(object, held)
  end
  object.changed, object.freed, freed = true, true, key
  return 1
end

local function renew(object, arg)
  local token, ttl = parse('>c6I6', arg, 4)
  local held = place(object, token)
  if not held then
    return 0
  end
  object[held + 1] = min(now + ttl, TIME_MAX)
  object.changed = true
  return 1
end

local function show(object)
  local order = {}
  for at = 1, #object, 3 do
    order[#order + 1] = at
  end
  table.sort(order, function(a, b)
    if object[a + 1] ~= object[b + 1] then
      return object[a + 1] < object[b + 1]
    end
    return object[a] < object[b]
  end)
  local shown = {object.fence}
  for _, at in ipairs(order) do
    shown[#shown + 1] = object[at + 2]
    shown[#shown + 1] = object[at + 1] - now
  end
  return shown
end

local deeds = {[97] = acquire, [114] = release, [120] = renew, [115] = show}
local outcomes = {}
for at = 2, #ARGV do
  local letter, key = parse('>BI2', ARGV[at])
  outcomes[at - 1] = deeds[letter](objects[key] or look(key), ARGV[at], key)
end

local function encode(object)
  local parts = {pack('>dB', object.fence, object.waited)}
  for at = 1, #object, 3 do
    local owner = object[at + 2]
    parts[#parts + 1] = pack(HOLDER, object[at], object[at + 1], #owner, owner)
  end
  return table.concat(parts)
end

-- A server that is out of memory takes a script's writes when the first of them frees some.
if freed then
  call('DEL', KEYS[freed])
end
local stored = {}
for key, object in pairs(objects) do
  if object.freed and object.waited == 1 then
    object.waited = 0
    call('PUBLISH', channel, mark .. sub(KEYS[key], prefix + 1))
  end
  if object.changed then
    if is_lock then
      stored[#stored + 1], stored[#stored + 2] = KEYS[key], encode(object)
    elseif #object == 0 then
      call('DEL', KEYS[key])
    else
      local last = 0
      for at = 2, #object, 3 do
        last = max(last, object[at])
      end
      -- One that is not looked at again goes by itself, at its end by the server's own clock.
      call('SET', KEYS[key], encode(object), 'PXAT', format('%.0f', is_live and last or TIME_MAX))
    end
  end
end
if #stored > 0 then
  call('MSET', unpack(stored))
end
return outcomes
