#!lua flags=allow-oom
-- delete: the client wants no more of a job. A queued one ends now, a running one at its next step; of a finished one
-- the results count as gone from now on. In no case is it listed any longer. -> status, or nil
local id, now = unpack(ARGV)
local key = job_key(id)
local status, tenant = read(id, "status", "tenant")
if not status then return nil end
redis.call("ZREM", catalog_key(tenant), id)
redis.call("HSETNX", key, "deleted_ms", now)
if status == "queued" then
  finish_cancelled(id, now)
  return "cancelled"
end
if status == "running" then redis.call("HSET", key, "cancel", 1) end
return status
