#!lua flags=allow-oom
-- delete: the client wants no more of a job. A queued one ends now, a running one at its next step; of a finished one
-- the results count as gone from now on. In no case is it listed any longer. -> status, or nil
local id, now = unpack(ARGV)
local key = job_key(id)
local st, tn = unpack(redis.call("HMGET", key, "st", "tn"))
if not st then return nil end
redis.call("ZREM", catalog_key(tn), id)
redis.call("HSETNX", key, "del", now)
if st == "queued" then
  finish_cancelled(id, now)
  return "cancelled"
end
if st == "running" then redis.call("HSET", key, "cx", 1) end
return st
