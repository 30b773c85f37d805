-- pump: move waiting jobs into the dispatch window until it is full.
-- The window is short so that what is not in it yet can still be reordered: between priorities by weight, within a
-- priority by taking turns between tenants.
local weights = {high = 8, normal = 3, low = 1}
local default_window = 16 -- until the first worker says how much it takes

-- Smooth weighted round robin over the priorities that have waiting jobs: each gains its weight in credit, the
-- richest is served and pays what all of them gained.
local function next_priority()
  local ready, total = {}, 0
  for _, priority in ipairs(priorities) do
    if redis.call("EXISTS", ring_key(priority)) == 1 then
      ready[#ready + 1] = priority
      total = total + weights[priority]
    end
  end
  if #ready <= 1 then return ready[1] end -- alone it would pay exactly what it gained
  local best, most
  for _, priority in ipairs(ready) do
    local credit = redis.call("HINCRBY", pump_state, "credit:" .. priority, weights[priority])
    if not most or credit > most then best, most = priority, credit end
  end
  redis.call("HINCRBY", pump_state, "credit:" .. best, -total)
  return best
end

local function pump()
  local window = tonumber(redis.call("HGET", pump_state, "window") or default_window)
  local room = window - redis.call("XLEN", stream)
  while room > 0 do
    local priority = next_priority()
    if not priority then return end
    local tenant = redis.call("LPOP", ring_key(priority))
    local list = tenant_key(priority, tenant)
    local id = redis.call("LPOP", list)
    if redis.call("EXISTS", list) == 1 then redis.call("RPUSH", ring_key(priority), tenant) end
    -- A job that ended while it waited (cancelled, deadline) stays in its list until here.
    if id and redis.call("HGET", job_key(id), "st") == "queued" then
      redis.call("HSET", job_key(id), "ent", redis.call("XADD", stream, "*", "id", id))
      room = room - 1
    end
  end
end
