#!lua flags=allow-oom
-- hand_back: return leases that were never started, given as (entry, id) each in lease order, to the front of their
-- tenants' lists. -> how many went back
local consumer = ARGV[1]
local count = 0
for i = #ARGV - 1, 2, -2 do -- backwards: each goes in front of the one before
  local entry, id = ARGV[i], ARGV[i + 1]
  if owns(consumer, entry) then
    drop_entry(entry)
    local key = job_key(id)
    local st, ent, pr, tn, enq = unpack(redis.call("HMGET", key, "st", "ent", "pr", "tn", "enq"))
    if st and not terminal[st] and ent == entry then
      redis.call("HSET", key, "st", "queued")
      redis.call("HDEL", key, "ent")
      redis.call("ZADD", waiting_key(pr), enq, id)
      if redis.call("LPUSH", tenant_key(pr, tn), id) == 1 then redis.call("LPUSH", ring_key(pr), tn) end
      count = count + 1
    end
  end
end
pump()
return count
