-- The rules of one lock or semaphore, in Lua: `src/shard/mod.rs`, `Deed`, is the specification.
--
-- One call applies the deeds on one object in order. KEYS[1], a hash: `t` and 6 bytes of a token -> end (6 bytes), owner;
-- `fence` -> the fence of the last grant of a lock; `waited` where a proxy was refused and wants to hear of a release.
-- ARGV: the header, then for each deed a letter and its argument. The answer: for each deed a fence, or minus the
-- milliseconds until the first holder's time is up; a count; or {fence, owner, milliseconds left, owner, ...}.

local call = redis.call
local sub, format, pack, parse = string.sub, string.format, struct.pack, struct.unpack
local OBJECT = KEYS[1]
local TIME_MAX = 281474976710655 -- what 6 bytes hold

local now, kind, channel, message = parse('>I6BI2c0I2c0', ARGV[1])
local is_lock = kind == 1
local is_live = now == 0
if is_live then
  local time = call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local fence, waited, freed, changed, count = 0, false, false, false, 0
local ends, owners = {}, {}

local stored = call('HGETALL', OBJECT)
for i = 1, #stored, 2 do
  local field, value = stored[i], stored[i + 1]
  if field == 'fence' then
    fence = tonumber(value)
  elseif field == 'waited' then
    waited = true
  else
    local until_ms = parse('>I6', value)
    if until_ms <= now then
      call('HDEL', OBJECT, field)
    else
      ends[field], owners[field] = until_ms, sub(value, 7)
      count = count + 1
    end
  end
end

local function hold(field, ttl, owner)
  ends[field], owners[field] = math.min(now + ttl, TIME_MAX), owner
  call('HSET', OBJECT, field, pack('>I6', ends[field]) .. owner)
  changed = true
end

local deeds = {}

function deeds.a(arg)
  local limit, ttl, waits, moved_in = parse('>I4I6BI4', arg, 7)
  local field = 't' .. sub(arg, 1, 6)
  if not ends[field] then
    if count >= limit then
      local first = TIME_MAX
      for _, until_ms in pairs(ends) do
        first = math.min(first, until_ms)
      end
      if waits == 1 and not waited then
        call('HSET', OBJECT, 'waited', '1')
        waited = true
      end
      return now - first
    end
    count = count + 1
    if is_lock then
      fence = math.max(fence, moved_in * 4294967296) + 1
      call('HSET', OBJECT, 'fence', format('%.0f', fence))
    end
  end
  hold(field, ttl, sub(arg, 22))
  return fence
end

function deeds.r(arg)
  local field = 't' .. arg
  if not ends[field] then
    return 0
  end
  call('HDEL', OBJECT, field)
  ends[field], count, freed = nil, count - 1, true
  return 1
end

function deeds.x(arg)
  local field = 't' .. sub(arg, 1, 6)
  if not ends[field] then
    return 0
  end
  hold(field, parse('>I6', arg, 7), owners[field])
  return 1
end

function deeds.s()
  local order = {}
  for field in pairs(ends) do
    order[#order + 1] = field
  end
  table.sort(order, function(a, b)
    if ends[a] ~= ends[b] then
      return ends[a] < ends[b]
    end
    return a < b
  end)
  local shown = {fence}
  for _, field in ipairs(order) do
    shown[#shown + 1] = owners[field]
    shown[#shown + 1] = ends[field] - now
  end
  return shown
end

local outcomes = {}
for at = 2, #ARGV, 2 do
  outcomes[#outcomes + 1] = deeds[ARGV[at]](ARGV[at + 1])
end

if freed and waited then
  call('HDEL', OBJECT, 'waited')
  call('PUBLISH', channel, message)
end
if not is_lock then
  if count == 0 and #stored > 0 or freed and count == 0 then
    call('DEL', OBJECT)
  elseif changed and is_live then
    -- One that is not looked at again goes by itself.
    local last = 0
    for _, until_ms in pairs(ends) do
      last = math.max(last, until_ms)
    end
    call('PEXPIREAT', OBJECT, format('%.0f', last))
  end
end
return outcomes
