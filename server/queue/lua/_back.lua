-- put_back: return a job whose entry nobody works on to the front of its tenant's list. -> 1, or 0 if it was not there
local function put_back(version, entry, id)
  drop_entry(version, entry)
  local key = job_key(id)
  local st, ent, vs, pr, tn, enq = unpack(redis.call("HMGET", key, "st", "ent", "vs", "pr", "tn", "enq"))
  if not st or terminal[st] or ent ~= entry or vs ~= version then return 0 end
  redis.call("HSET", key, "st", "queued")
  redis.call("HDEL", key, "ent")
  redis.call("ZADD", waiting_key(pr), enq, id)
  if redis.call("LPUSH", tenant_key(pr, tn), id) == 1 then redis.call("LPUSH", ring_key(pr), tn) end
  return 1
end

-- put_back_all: the same for entries in the order of their lane, as XREADGROUP and XAUTOCLAIM give them.
local function put_back_all(version, entries)
  for i = #entries, 1, -1 do -- backwards: each goes in front of the one before
    put_back(version, entries[i][1], entries[i][2][2])
  end
end
