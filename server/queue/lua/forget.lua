#!lua flags=allow-oom
-- forget: take finished jobs out of Redis, whose answers are in the store as they were when they were read: given as (id,
-- finished_ms, deleted_ms or "", ms for which its key for repetition is kept) each. One that was deleted since stays. The
-- key goes on leading to the answer, unless that was one that asks for another try. -> how many are out
local count = 0
for i = 1, #ARGV, 4 do
  local id, seen_finished, seen_deleted, kept_ms = unpack(ARGV, i, i + 3)
  local status, finished_ms, deleted_ms = read(id, "status", "finished_ms", "deleted_ms")
  local as_seen = (finished_ms or "") == seen_finished and (deleted_ms or "") == seen_deleted
  if status and terminal[status] and as_seen then
    local tenant, idempotency_key, fingerprint, failure = read(id, "tenant", "idempotency_key", "fingerprint", "error")
    redis.call("DEL", job_key(id))
    redis.call("ZREM", ended, id)
    count = count + 1
    local asks_again = status == "failed" and cjson.decode(failure or "{}").code == "storage"
    local idem_key = idempotency_key and tenant and q .. ":i:" .. tenant .. ":" .. idempotency_key
    if idem_key and redis.call("GET", idem_key) == id .. "|" .. (fingerprint or "") then
      if asks_again or tonumber(kept_ms) <= 0 then
        redis.call("DEL", idem_key)
      else
        redis.call("SET", idem_key, id .. "|" .. fingerprint .. "|archived", "PX", kept_ms)
      end
    end
  end
end
return count
