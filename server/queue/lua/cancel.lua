#!lua flags=allow-oom
-- cancel: end a queued job now; flag a running one for its worker, which looks between steps. -> status, or nil
local id, now = unpack(ARGV)
local st = redis.call("HGET", job_key(id), "st")
if st == "queued" then
  finish_cancelled(id, now)
  return "cancelled"
end
if st == "running" then redis.call("HSET", job_key(id), "cx", 1) end
return st
