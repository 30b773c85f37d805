#!lua flags=allow-oom
-- start: begin the next attempt of leased jobs, given as (entry, id) each.
-- -> for each {"run", attempt, start of it} | {"drop", why} | {"lost"}
local version, consumer, now, max_attempts = unpack(ARGV, 1, 4)
local begun_any = false

local function start(entry, id)
  if not owns(version, consumer, entry) then return {"lost"} end -- else a worker frozen since its read would rob the new owner
  local key = job_key(id)
  local st, ent, vs, own, at, dl, cx, pr, cost, beg =
    unpack(redis.call("HMGET", key, "st", "ent", "vs", "own", "at", "dl", "cx", "pr", "cost", "beg"))
  if not st or terminal[st] or ent ~= entry or vs ~= version then
    drop_entry(version, entry)
    return {"drop", terminal[st] and st or "unknown"}
  end
  if cx then
    finish_cancelled(id, now)
    return {"drop", "cancelled"}
  end
  if tonumber(now) >= tonumber(dl) then
    finish_deadline(id, now)
    return {"drop", "deadline"}
  end
  -- The same consumer is the same process life: it asks again because our reply was lost. Nobody died.
  if st == "running" and own == consumer then return {"run", at, beg} end
  if tonumber(at) >= tonumber(max_attempts) then
    local err = error_json("poison", "the worker died in each of its " .. at .. " attempts")
    local tn, req = unpack(redis.call("HMGET", key, "tn", "req"))
    redis.call("XADD", dead, "MAXLEN", "~", 10000, "*", "id", id, "at", at, "err", err, "tn", tn, "pr", pr,
      "req", req, "cost", cost or 0, "own", own or "", "end", now)
    finish(id, "failed", now, {"err", err})
    return {"drop", "poison"}
  end
  redis.call("HSET", key, "st", "running", "own", consumer, "beg", now, "at", at + 1, "pg", 0)
  if st == "queued" then
    wait_no_more(id, pr, cost)
    add_to_lane(version, -(cost or 0))
    begun_any = true
  end
  return {"run", at + 1, now}
end

local replies = {}
for i = 5, #ARGV, 2 do replies[#replies + 1] = start(ARGV[i], ARGV[i + 1]) end
if begun_any then pump() end
return replies
