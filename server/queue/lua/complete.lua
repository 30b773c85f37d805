#!lua flags=allow-oom
-- complete: record the results of jobs, given as (attempt, id, outputs, timing, warnings) each. The first finisher wins, lease
-- or not: the work is done and was dear. -> for each "ok" | "stale" (another result or verdict stands) | "unknown" |
-- "cancelled" (by this call, for the client had it deleted after its last look: nobody wants the result)
-- Several in one call, because who blocks on the reply stream is woken once, with all of them.
local version, consumer, now = ARGV[1], ARGV[2], ARGV[3]
local settled = {}
for i = 4, #ARGV, 5 do
  local attempt, id, outputs, timing, warnings = unpack(ARGV, i, i + 4)
  local finisher = consumer .. ":" .. attempt
  local status, its_finisher, deleted_ms = read(id, "status", "finisher", "deleted_ms")
  local verdict
  if not status then
    verdict = "unknown"
  elseif terminal[status] then
    verdict = "stale"
    if its_finisher == finisher then -- our first reply was lost
      verdict = deleted_ms and status == "cancelled" and status or "ok"
    end
  elseif deleted_ms then
    redis.call("HSET", job_key(id), "finisher", finisher)
    finish_cancelled(id, now)
    verdict = "cancelled"
  else
    learn(id, now)
    finish(id, "done", now, {
      "progress", 100, "outputs", outputs, "timing", timing, "finisher", finisher, "version", version,
    })
    if warnings ~= "" then redis.call("HSET", job_key(id), "warnings", warnings) end
    verdict = "ok"
  end
  settled[#settled + 1] = verdict
end
return settled
