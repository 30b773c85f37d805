#!lua flags=allow-oom
-- adopt: what the dead workers of a version that nobody serves any more had leased goes back, once their leases have
-- lapsed; a lane that nothing is left in goes away.
local lease_ms = ARGV[1]
local windows = redis.call("HGETALL", lanes)
for i = 1, #windows, 2 do
  local version, stream = windows[i], stream_of(windows[i])
  if windows[i + 1] == "0" then
    local reply = redis.pcall("XAUTOCLAIM", stream, group, "adopt", lease_ms, "0-0", "COUNT", 1000)
    if not reply.err then
      put_back_all(version, reply[2])
      redis.call("XGROUP", "DELCONSUMER", stream, group, "adopt")
    end
    if redis.call("XLEN", stream) == 0 then
      redis.call("DEL", stream)
      redis.call("HDEL", lanes, version)
      redis.call("HDEL", pump_state, "unstarted:" .. version)
    end
    pump()
  end
end
