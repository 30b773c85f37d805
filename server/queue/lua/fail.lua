#!lua flags=allow-oom
-- fail: end a job without results (status "failed" or "cancelled"). Unlike complete it needs the lease: what went
-- wrong with a worker that lost the job says nothing about the job. -> "ok" | "stale" | "unknown"
local version, consumer, attempt, id, now, status, err, tm = unpack(ARGV)
local finisher = consumer .. ":" .. attempt
local st, by, own, at, ent, vs = unpack(redis.call("HMGET", job_key(id), "st", "by", "own", "at", "ent", "vs"))
if not st then return "unknown" end
if terminal[st] then return by == finisher and "ok" or "stale" end
if own ~= consumer or at ~= attempt or not ent or vs ~= version then return "stale" end
if not owns(version, consumer, ent) then return "stale" end
finish(id, status, now, {"err", err, "tm", tm, "by", finisher})
return "ok"
