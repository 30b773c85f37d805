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
local function accept(id, tn, pr, kd, req, fp, enq, dl, ttl, tp, rp, cost)
  redis.call("HSET", job_key(id), "st", "queued", "tn", tn, "pr", pr, "kd", kd, "req", req, "fp", fp, "at", 0,
    "enq", enq, "dl", dl, "ttl", ttl, "tp", tp, "rp", rp, "cost", cost)
  if redis.call("ZADD", live, dl, id) == 1 then redis.call("HINCRBY", pump_state, "work:live", cost) end
  redis.call("ZADD", inflight_key(tn), dl, id)
  wait(id, pr, enq, cost)
  if redis.call("RPUSH", tenant_key(pr, tn), id) == 1 then take_turns(pr, tn) end
  if kd == "video" then catalog(id, tn, enq, dl, ttl) end
  pump()
end

-- Share of maxmemory above which no job is accepted: what is left is for those that were accepted already.
local accepting = 0.8

local function is_short_of_memory(share)
  local memory = redis.call("INFO", "memory")
  local used, limit = tonumber(memory:match("used_memory:(%d+)")), tonumber(memory:match("maxmemory:(%d+)"))
  return limit > 0 and used > share * limit
end

-- make_room: forget finished jobs, the oldest first, until no more than `share` of the memory is used. What is answered
-- already must not keep anybody from being served. -> true if that is so now
local function make_room(share)
  for _ = 1, 20 do -- a bounded time; the next call goes on
    if not is_short_of_memory(share) then return true end
    local oldest = redis.call("ZPOPMIN", ended, 50)
    if #oldest == 0 then return false end
    for i = 1, #oldest, 2 do redis.call("DEL", job_key(oldest[i])) end
    redis.call("HINCRBY", pump_state, "forgotten", #oldest / 2)
  end
  return not is_short_of_memory(share)
end
