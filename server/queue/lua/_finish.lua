-- finish: the only road to a terminal status. `fields` is a flat list of hash fields to set with it.
local reply_ttl_ms = 3600 * 1000

local function finish(id, status, now, fields)
  local key = job_key(id)
  local was, priority, tenant, entry, version, reply_to, ttl_ms, cost_us =
    read(id, "status", "priority", "tenant", "entry", "version", "reply_to", "ttl_ms", "cost_us")
  redis.call("HSET", key, "status", status, "finished_ms", now, unpack(fields))
  redis.call("HDEL", key, "entry", "cancel")
  redis.call("PEXPIRE", key, ttl_ms)
  redis.call("ZADD", ended, now + ttl_ms, id) -- when its record expires; `expire` takes it out
  redis.call("PEXPIRE", ended, ttl_ms)
  wait_no_more(id, priority, cost_us)
  if redis.call("ZREM", live, id) == 1 then redis.call("HINCRBY", pump_state, "work:live", -(cost_us or 0)) end
  redis.call("ZREM", inflight_key(tenant), id)
  if entry and version then
    drop_entry(version, entry)
    if was == "queued" then add_to_lane(version, -(cost_us or 0)) end
  elseif was == "queued" then
    redis.call("LREM", tenant_key(priority, tenant), 1, id)
  end
  for boot in string.gmatch(reply_to, "%S+") do
    local replies = q .. ":r:" .. boot
    redis.call("XADD", replies, "MAXLEN", "~", 10000, "*", "id", id, "status", status)
    redis.call("PEXPIRE", replies, reply_ttl_ms)
  end
  if was == "queued" then pump() end -- one that had started took no room
end

local function finish_deadline(id, now)
  learn(id, now)
  local message = "the deadline passed before the job was finished"
  finish(id, "failed", now, {"error", error_json("deadline", message)})
end

local function finish_cancelled(id, now)
  finish(id, "cancelled", now, {"error", error_json("cancelled", "cancelled on request")})
end
