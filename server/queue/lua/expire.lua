#!lua flags=allow-oom
-- expire: fail jobs whose deadline passed: queued ones at once, running ones after `grace` ms, in which their
-- worker does it or completes. Ends what no worker is left to end. -> ids that were ended
-- It also forgets finished jobs where hardly any memory is left: a server so full that it runs no enqueue, which would
-- do it, has to get out of that.
make_room(0.95)
local now, grace, limit = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call("ZREMRANGEBYSCORE", ended, "-inf", now) -- their records have expired
local late = {}
for _, id in ipairs(redis.call("ZRANGEBYSCORE", live, "-inf", now, "LIMIT", 0, limit)) do
  local status, deadline_ms = read(id, "status", "deadline_ms")
  if status == "queued" or status == "running" and tonumber(deadline_ms) + grace <= now then
    finish_deadline(id, now)
    late[#late + 1] = id
  end
end
return late
