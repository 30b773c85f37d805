#!lua flags=allow-oom
-- cancel: end a queued job now; flag a running one for its worker, which looks between steps. -> status, or nil
local id, now = unpack(ARGV)
local status = read(id, "status")
if status == "queued" then
  finish_cancelled(id, now)
  return "cancelled"
end
if status == "running" then redis.call("HSET", job_key(id), "cancel", 1) end
return status
