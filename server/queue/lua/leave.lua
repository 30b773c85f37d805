#!lua flags=allow-oom
-- leave: a worker ends in good order. Its consumer stays while leases are pending on it.
local consumer = ARGV[1]
redis.call("HDEL", workers, consumer)
fit_window()
local pending = redis.pcall("XPENDING", stream, group, "-", "+", 1, consumer)
if pending.err then return end
if #pending == 0 then
  redis.call("XGROUP", "DELCONSUMER", stream, group, consumer)
  redis.call("ZREM", alive, consumer)
else
  redis.call("ZADD", alive, 0, consumer)
end
