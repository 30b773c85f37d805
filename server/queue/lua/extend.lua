#!lua flags=allow-oom
-- extend: heartbeat of a worker for its leases, given as (entry, id, progress) each. -> a verdict for each:
-- "ok"; "cancel": stop at the next step; "lost": somebody else has it now; "gone": it is finished or unknown.
local version, consumer = ARGV[1], ARGV[2]
local verdicts = {}
for i = 3, #ARGV, 3 do
  local entry, id, progress = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local status, known, cancelled = read(id, "status", "progress", "cancel")
  local verdict
  if not status or terminal[status] then
    verdict = "gone"
  elseif not owns(version, consumer, entry) then
    verdict = "lost"
  else
    -- Resets the idle time and, thanks to JUSTID, not the delivery count. Without the check above this very
    -- command would steal a reclaimed job back.
    redis.call("XCLAIM", stream_of(version), group, consumer, 0, entry, "JUSTID")
    if status == "running" and known ~= progress then redis.call("HSET", job_key(id), "progress", progress) end
    verdict = cancelled and "cancel" or "ok"
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts
