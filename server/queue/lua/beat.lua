#!lua flags=allow-oom
-- beat: a worker says that it lives, and forgets those that no longer do. -> 1 if it was not known, else 0
local version, consumer, now, ttl, info, pace = unpack(ARGV)
local stream = stream_of(version)
local until_ms = redis.call("ZSCORE", alive, consumer)
local fresh = redis.call("ZADD", alive, now + ttl, consumer)
if fresh == 1 then redis.call("HSET", workers, consumer, info) end
redis.call("HSET", paces, consumer, pace)
local gone = 0
for _, other in ipairs(redis.call("ZRANGEBYSCORE", alive, "-inf", now)) do
  -- Deleting a consumer discards its pending entries, so one that has any waits until they are reclaimed.
  local holds, versions = false, redis.call("HGETALL", lanes)
  for i = 1, #versions, 2 do
    local pending = redis.pcall("XPENDING", stream_of(versions[i]), group, "-", "+", 1, other)
    holds = holds or not pending.err and #pending > 0
  end
  if not holds then
    for i = 1, #versions, 2 do redis.pcall("XGROUP", "DELCONSUMER", stream_of(versions[i]), group, other) end
    redis.call("ZREM", alive, other)
    redis.call("HDEL", paces, other)
    gone = gone + redis.call("HDEL", workers, other)
  end
end
-- And those nobody announces: a worker that was forgotten while it was frozen, read once more, and died.
local announced = {}
for _, other in ipairs(redis.call("ZRANGE", alive, 0, -1)) do announced[other] = true end
local consumers = redis.pcall("XINFO", "CONSUMERS", stream, group)
if consumers.err then -- the first of its version, or its lane went away while it was taken for dead
  redis.call("XGROUP", "CREATE", stream, group, 0, "MKSTREAM") -- from 0: whatever the lane holds counts
  consumers = {}
end
for _, fields in ipairs(consumers) do
  local about = {}
  for i = 1, #fields, 2 do about[fields[i]] = fields[i + 1] end
  if about.pending == 0 and not announced[about.name] then
    redis.call("XGROUP", "DELCONSUMER", stream, group, about.name)
  end
end
local revived = until_ms and tonumber(until_ms) <= tonumber(now)
local living = redis.call("ZCOUNT", alive, "(" .. now, "+inf")
if fresh + gone > 0 or revived or living ~= tonumber(redis.call("HGET", pump_state, "living") or -1) then
  fit_lanes(now)
end
return fresh
