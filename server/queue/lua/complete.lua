#!lua flags=allow-oom
-- complete: record a job's results. The first finisher wins, lease or not: the work is done and was dear.
-- -> "ok" | "stale" (another result or verdict stands) | "unknown"
local consumer, attempt, id, now, res, tm = unpack(ARGV)
local finisher = consumer .. ":" .. attempt
local st, by = unpack(redis.call("HMGET", job_key(id), "st", "by"))
if not st then return "unknown" end
if terminal[st] then return by == finisher and "ok" or "stale" end -- "ok": our first reply was lost
finish(id, "done", now, {"pg", 100, "res", res, "tm", tm, "by", finisher})
return "ok"
