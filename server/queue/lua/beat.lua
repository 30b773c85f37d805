#!lua flags=allow-oom
-- beat: a worker says that it lives, and forgets those that no longer do. -> 1 if it was not known, else 0
local consumer, now, ttl, info = unpack(ARGV)
local fresh = redis.call("ZADD", alive, now + ttl, consumer)
if fresh == 1 then
  redis.call("HSET", workers, consumer, info)
  redis.pcall("XGROUP", "CREATE", stream, group, 0, "MKSTREAM") -- from 0: jobs enqueued before the first worker count
end
local gone = 0
for _, other in ipairs(redis.call("ZRANGEBYSCORE", alive, "-inf", now)) do
  -- Deleting a consumer discards its pending entries, so one that has any waits until they are reclaimed.
  if #redis.call("XPENDING", stream, group, "-", "+", 1, other) == 0 then
    redis.call("XGROUP", "DELCONSUMER", stream, group, other)
    redis.call("ZREM", alive, other)
    gone = gone + redis.call("HDEL", workers, other)
  end
end
if fresh + gone > 0 then fit_window() end
return fresh
