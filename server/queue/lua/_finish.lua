-- finish: the only road to a terminal state. `fields` is a flat list of hash fields to set with it.
local reply_ttl_ms = 3600 * 1000

local function finish(id, status, now, fields)
  local key = job_key(id)
  local pr, tn, ent, vs, rp, ttl, st, cost =
    unpack(redis.call("HMGET", key, "pr", "tn", "ent", "vs", "rp", "ttl", "st", "cost"))
  redis.call("HSET", key, "st", status, "end", now, unpack(fields))
  redis.call("HDEL", key, "ent", "cx")
  redis.call("PEXPIRE", key, ttl)
  redis.call("ZADD", ended, now + ttl, id) -- when its record expires; `expire` takes it out
  redis.call("PEXPIRE", ended, ttl)
  wait_no_more(id, pr, cost)
  if redis.call("ZREM", live, id) == 1 then redis.call("HINCRBY", pump_state, "work:live", -(cost or 0)) end
  redis.call("ZREM", inflight_key(tn), id)
  if ent and vs then
    drop_entry(vs, ent)
    if st == "queued" then add_to_lane(vs, -(cost or 0)) end
  elseif st == "queued" then
    redis.call("LREM", tenant_key(pr, tn), 1, id)
  end
  for boot in string.gmatch(rp, "%S+") do
    local replies = q .. ":r:" .. boot
    redis.call("XADD", replies, "MAXLEN", "~", 10000, "*", "id", id, "st", status)
    redis.call("PEXPIRE", replies, reply_ttl_ms)
  end
  if st == "queued" then pump() end -- one that had started took no room
end

local function finish_deadline(id, now)
  local message = "the deadline passed before the job was finished"
  finish(id, "failed", now, {"err", error_json("deadline", message)})
end

local function finish_cancelled(id, now)
  finish(id, "cancelled", now, {"err", error_json("cancelled", "cancelled on request")})
end
