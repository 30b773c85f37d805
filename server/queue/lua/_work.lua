-- Work: predicted engine time in microseconds, which travels with each job as its `cost_us`. It is summed up where the job is
-- counted, exactly when it comes into a set or leaves it, so a sum is always that of its set.

-- wait: count a job as waiting.
local function wait(id, priority, created_ms, cost_us)
  if redis.call("ZADD", waiting_key(priority), created_ms, id) == 1 then
    redis.call("HINCRBY", pump_state, "work:" .. priority, cost_us or 0)
  end
end

local function wait_no_more(id, priority, cost_us)
  if redis.call("ZREM", waiting_key(priority), id) == 1 then
    redis.call("HINCRBY", pump_state, "work:" .. priority, -(cost_us or 0))
  end
end

-- add_to_lane: what a lane holds that no worker has started; what limits it.
local function add_to_lane(version, cost_us)
  redis.call("HINCRBY", pump_state, "unstarted:" .. version, cost_us or 0)
end

-- take_turns: have a tenant with waiting jobs get its turn. Whose tag is lowest is next, and each job that is dealt moves
-- its tenant's tag on by its cost: who asks for more work waits longer, however many jobs it is. Who comes anew starts where
-- the others are; who was here a moment ago and is ahead of them stays so. (Start-time fair queuing: Goyal, Vin, Cheng,
-- SIGCOMM 1996.)
local function take_turns(priority, tenant)
  local turns = turns_key(priority)
  if redis.call("ZSCORE", turns, tenant) then return end
  local first = redis.call("ZRANGE", turns, 0, 0, "WITHSCORES")
  redis.call("ZADD", turns, first[2] or redis.call("HGET", pump_state, "tag:" .. priority) or 0, tenant)
end
