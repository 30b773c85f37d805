-- put_back: return a job whose entry nobody works on to the front of its tenant's list. -> 1, or 0 if it was not there
local function put_back(version, entry, id)
  drop_entry(version, entry)
  local status, its_entry, its_version = read(id, "status", "entry", "version")
  if not status or terminal[status] or its_entry ~= entry or its_version ~= version then return 0 end
  local priority, tenant, created_ms, cost_us = read(id, "priority", "tenant", "created_ms", "cost_us")
  redis.call("HSET", job_key(id), "status", "queued")
  redis.call("HDEL", job_key(id), "entry")
  wait(id, priority, created_ms, cost_us)
  local tag = redis.call("ZSCORE", turns_key(priority), tenant)
  if redis.call("LPUSH", tenant_key(priority, tenant), id) == 1 then take_turns(priority, tenant) end
  if status == "queued" then -- its tenant has had nothing for what it has paid
    add_to_lane(version, -(cost_us or 0))
    if tag then redis.call("ZADD", turns_key(priority), tag - (cost_us or 0), tenant) end
  end
  return 1
end

-- put_back_all: the same for entries in the order of their lane, as XREADGROUP and XAUTOCLAIM give them.
local function put_back_all(version, entries)
  for i = #entries, 1, -1 do -- backwards: each goes in front of the one before
    put_back(version, entries[i][1], entries[i][2][2])
  end
end
