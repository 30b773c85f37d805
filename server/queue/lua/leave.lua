#!lua flags=allow-oom
-- leave: a worker ends in good order. Its consumer stays while leases are pending on it.
local version, consumer, now = unpack(ARGV)
local stream = stream_of(version)
redis.call("HDEL", workers, consumer)
redis.call("HDEL", paces, consumer)
local pending = redis.pcall("XPENDING", stream, group, "-", "+", 1, consumer)
if pending.err or #pending == 0 then
  redis.pcall("XGROUP", "DELCONSUMER", stream, group, consumer)
  redis.call("ZREM", alive, consumer)
else
  redis.call("ZADD", alive, 0, consumer)
end
fit_lanes(now)
