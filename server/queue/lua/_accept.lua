-- catalog: have a tenant's videos listed, by their ids, which sort by age. Images are too many, and nobody lists them.
-- What is old enough to be forgotten leaves when the next one comes: a record outlives its deadline and grace by `ttl_ms`.
local deadline_grace_ms = 60 * 1000

local function catalog(id, tenant, created_ms, deadline_ms, ttl_ms)
  local kept_ms = (deadline_ms - created_ms) + deadline_grace_ms + ttl_ms
  local oldest = string.format("(vid_%012x", math.max(0, created_ms - kept_ms))
  redis.call("ZREMRANGEBYLEX", catalog_key(tenant), "-", oldest)
  redis.call("ZADD", catalog_key(tenant), 0, id)
  redis.call("PEXPIRE", catalog_key(tenant), kept_ms)
end

-- accept: write a new job and let it wait.
local function accept(
  id, tenant, priority, kind, request, fingerprint, created_ms, deadline_ms, ttl_ms, traceparent, reply_to, cost_us
)
  redis.call(
    "HSET", job_key(id), "status", "queued", "attempt", 0,
    "tenant", tenant, "priority", priority, "kind", kind, "request", request, "fingerprint", fingerprint,
    "created_ms", created_ms, "deadline_ms", deadline_ms, "ttl_ms", ttl_ms, "cost_us", cost_us,
    "traceparent", traceparent, "reply_to", reply_to
  )
  if redis.call("ZADD", live, deadline_ms, id) == 1 then redis.call("HINCRBY", pump_state, "work:live", cost_us) end
  redis.call("ZADD", inflight_key(tenant), deadline_ms, id)
  wait(id, priority, created_ms, cost_us)
  if redis.call("RPUSH", tenant_key(priority, tenant), id) == 1 then take_turns(priority, tenant) end
  if kind == "video" then catalog(id, tenant, created_ms, deadline_ms, ttl_ms) end
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
