#!lua flags=allow-oom
-- start: begin the next attempt of leased jobs, given as (entry, id) each.
-- -> for each {"run", attempt, start of it} | {"drop", why} | {"lost"}
local version, consumer, now, max_attempts = unpack(ARGV, 1, 4)
local begun_any = false

local function start(entry, id)
  if not owns(version, consumer, entry) then return {"lost"} end -- else a worker frozen since its read would rob the new owner
  local status, its_entry, its_version, worker, attempt, started_ms, deadline_ms, cancelled, priority, cost_us = read(
    id, "status", "entry", "version", "worker", "attempt", "started_ms", "deadline_ms", "cancel", "priority", "cost_us"
  )
  if not status or terminal[status] or its_entry ~= entry or its_version ~= version then
    drop_entry(version, entry)
    return {"drop", terminal[status] and status or "unknown"}
  end
  if cancelled then
    finish_cancelled(id, now)
    return {"drop", "cancelled"}
  end
  if tonumber(now) >= tonumber(deadline_ms) then
    finish_deadline(id, now)
    return {"drop", "deadline"}
  end
  -- The same consumer is the same process life: it asks again because our reply was lost. Nobody died.
  if status == "running" and worker == consumer then return {"run", attempt, started_ms} end
  if tonumber(attempt) >= tonumber(max_attempts) then
    local failure = error_json("poison", "the worker died in each of its " .. attempt .. " attempts")
    local tenant, request = read(id, "tenant", "request")
    redis.call(
      "XADD", dead, "MAXLEN", "~", 10000, "*", "id", id, "attempt", attempt, "error", failure, "tenant", tenant,
      "priority", priority, "request", request, "cost_us", cost_us or 0, "worker", worker or "", "finished_ms", now
    )
    finish(id, "failed", now, {"error", failure})
    return {"drop", "poison"}
  end
  attempt = attempt + 1
  redis.call(
    "HSET", job_key(id), "status", "running", "worker", consumer, "started_ms", now, "attempt", attempt, "progress", 0
  )
  if status == "queued" then
    wait_no_more(id, priority, cost_us)
    add_to_lane(version, -(cost_us or 0))
    begun_any = true
  end
  return {"run", attempt, now}
end

local replies = {}
for i = 5, #ARGV, 2 do replies[#replies + 1] = start(ARGV[i], ARGV[i + 1]) end
if begun_any then pump() end
return replies
