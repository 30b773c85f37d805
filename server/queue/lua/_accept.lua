-- catalog: have a tenant's videos listed, by their ids, which sort by age. Images are too many, and nobody lists them.
-- What is old enough to be forgotten leaves when the next one comes: a record outlives its deadline and grace by `ttl`.
local deadline_grace_ms = 60 * 1000

local function catalog(id, tn, enq, dl, ttl)
  local kept_ms = (dl - enq) + deadline_grace_ms + ttl
  redis.call("ZREMRANGEBYLEX", catalog_key(tn), "-", string.format("(vid_%012x", math.max(0, enq - kept_ms)))
  redis.call("ZADD", catalog_key(tn), 0, id)
  redis.call("PEXPIRE", catalog_key(tn), kept_ms)
end

-- accept: write a new job and let it wait.
local function accept(id, tn, pr, kd, req, fp, enq, dl, ttl, tp, rp)
  redis.call("HSET", job_key(id), "st", "queued", "tn", tn, "pr", pr, "kd", kd, "req", req, "fp", fp, "at", 0,
    "enq", enq, "dl", dl, "ttl", ttl, "tp", tp, "rp", rp)
  redis.call("ZADD", live, dl, id)
  redis.call("ZADD", inflight_key(tn), dl, id)
  redis.call("ZADD", waiting_key(pr), enq, id)
  if redis.call("RPUSH", tenant_key(pr, tn), id) == 1 then redis.call("RPUSH", ring_key(pr), tn) end
  if kd == "video" then catalog(id, tn, enq, dl, ttl) end
  pump()
end

-- True above 80 % of maxmemory: what is left is for the jobs that were accepted already.
local function is_short_of_memory()
  local memory = redis.call("INFO", "memory")
  local used, limit = tonumber(memory:match("used_memory:(%d+)")), tonumber(memory:match("maxmemory:(%d+)"))
  return limit > 0 and used > 0.8 * limit
end
