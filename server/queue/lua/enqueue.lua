#!lua
-- enqueue: accept a job, or say why not. Not allow-oom: a full server takes no new work.
-- -> {status, id of the job that holds the key, jobs waiting before it}
local id, tn, pr, kd, req, fp, enq, dl, ttl, tp, rp = unpack(ARGV, 1, 11)
local idem, idem_ttl, max_waiting, max_live = unpack(ARGV, 12, 15)
local key = job_key(id)
local idem_key = q .. ":i:" .. tn .. ":" .. idem

if redis.call("EXISTS", key) == 1 then return {"ok", id, 0} end -- our reply was lost and the client asks again

if idem ~= "" then
  local holder, holder_fp = string.match(redis.call("GET", idem_key) or "", "^(.+)|(.+)$")
  local st = holder and redis.call("HGET", job_key(holder), "st")
  if st and holder_fp ~= fp then return {"mismatch", holder, 0} end
  if st then return {"dup", holder, 0} end
end

local memory = redis.call("INFO", "memory")
local used, limit = tonumber(memory:match("used_memory:(%d+)")), tonumber(memory:match("maxmemory:(%d+)"))
if limit > 0 and used > 0.8 * limit then return {"memory", "", 0} end

redis.call("ZREMRANGEBYSCORE", inflight_key(tn), "-inf", enq)
if tonumber(max_live) > 0 and redis.call("ZCARD", inflight_key(tn)) >= tonumber(max_live) then
  return {"tenant_full", "", 0}
end
local waiting = 0
for _, priority in ipairs(priorities) do waiting = waiting + redis.call("ZCARD", waiting_key(priority)) end
if waiting >= tonumber(max_waiting) then return {"queue_full", "", waiting} end

redis.call("HSET", key, "st", "queued", "tn", tn, "pr", pr, "kd", kd, "req", req, "fp", fp, "at", 0,
  "enq", enq, "dl", dl, "ttl", ttl, "tp", tp, "rp", rp)
redis.call("ZADD", live, dl, id)
redis.call("ZADD", inflight_key(tn), dl, id)
redis.call("ZADD", waiting_key(pr), enq, id)
if idem ~= "" then redis.call("SET", idem_key, id .. "|" .. fp, "PX", idem_ttl) end
if redis.call("RPUSH", tenant_key(pr, tn), id) == 1 then redis.call("RPUSH", ring_key(pr), tn) end
pump()
return {"ok", id, waiting}
