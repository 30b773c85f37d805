#!lua flags=allow-oom
-- fail: end a job without results (status "failed" or "cancelled"). Unlike complete it needs the lease: what went
-- wrong with a worker that lost the job says nothing about the job. -> "ok" | "stale" | "unknown"
local version, consumer, attempt, id, now, outcome, failure, timing = unpack(ARGV)
local finisher = consumer .. ":" .. attempt
local status, its_finisher, its_worker, its_attempt, entry, its_version =
  read(id, "status", "finisher", "worker", "attempt", "entry", "version")
if not status then return "unknown" end
if terminal[status] then return its_finisher == finisher and "ok" or "stale" end
if its_worker ~= consumer or its_attempt ~= attempt or not entry or its_version ~= version then return "stale" end
if not owns(version, consumer, entry) then return "stale" end
if cjson.decode(failure).code == "deadline" then learn(id, now) end
finish(id, outcome, now, {"error", failure, "timing", timing, "finisher", finisher})
return "ok"
