-- put_back: return a job whose entry nobody works on to the front of its tenant's list. -> 1, or 0 if it was not there
local function put_back(version, entry, id)
  drop_entry(version, entry)
  local key = job_key(id)
  local st, ent, vs, pr, tn, enq, cost =
    unpack(redis.call("HMGET", key, "st", "ent", "vs", "pr", "tn", "enq", "cost"))
  if not st or terminal[st] or ent ~= entry or vs ~= version then return 0 end
  redis.call("HSET", key, "st", "queued")
  redis.call("HDEL", key, "ent")
  wait(id, pr, enq, cost)
  local tag = redis.call("ZSCORE", turns_key(pr), tn)
  if redis.call("LPUSH", tenant_key(pr, tn), id) == 1 then take_turns(pr, tn) end
  if st == "queued" then -- its tenant has had nothing for what it has paid
    add_to_lane(version, -(cost or 0))
    if tag then redis.call("ZADD", turns_key(pr), tag - (cost or 0), tn) end
  end
  return 1
end

-- put_back_all: the same for entries in the order of their lane, as XREADGROUP and XAUTOCLAIM give them.
local function put_back_all(version, entries)
  for i = #entries, 1, -1 do -- backwards: each goes in front of the one before
    put_back(version, entries[i][1], entries[i][2][2])
  end
end
