#!lua flags=allow-oom
-- complete: record the results of jobs, given as (attempt, id, outputs, timing, warnings) each. The first finisher wins, lease
-- or not: the work is done and was dear. -> for each "ok" | "stale" (another result or verdict stands) | "unknown" |
-- "cancelled" (by this call, for the client had it deleted after its last look: nobody wants the result)
-- Several in one call, because who blocks on the reply stream is woken once, with all of them.
local version, consumer, now = ARGV[1], ARGV[2], ARGV[3]
local settled = {}
for i = 4, #ARGV, 5 do
  local attempt, id, res, tm, wn = unpack(ARGV, i, i + 4)
  local finisher = consumer .. ":" .. attempt
  local st, by, del = unpack(redis.call("HMGET", job_key(id), "st", "by", "del"))
  local verdict
  if not st then
    verdict = "unknown"
  elseif terminal[st] then
    verdict = "stale"
    if by == finisher then verdict = del and st == "cancelled" and st or "ok" end -- our first reply was lost
  elseif del then
    redis.call("HSET", job_key(id), "by", finisher)
    finish_cancelled(id, now)
    verdict = "cancelled"
  else
    finish(id, "done", now, {"pg", 100, "res", res, "tm", tm, "by", finisher, "vs", version})
    if wn ~= "" then redis.call("HSET", job_key(id), "wn", wn) end
    verdict = "ok"
  end
  settled[#settled + 1] = verdict
end
return settled
