#!lua flags=allow-oom
-- forget: take finished jobs out of Redis, whose answers are in the store as they were when they were read: given as (id, end,
-- del or "", ms for which its key for repetition is kept) each. One that was deleted since stays. The key goes on leading
-- to the answer, unless that was one that asks for another try. -> how many are out
local count = 0
for i = 1, #ARGV, 4 do
  local id, seen_end, seen_del, kept = unpack(ARGV, i, i + 3)
  local st, en, del, tn, ik, fp, err = unpack(redis.call("HMGET", job_key(id), "st", "end", "del", "tn", "ik", "fp", "err"))
  if st and terminal[st] and (en or "") == seen_end and (del or "") == seen_del then
    redis.call("DEL", job_key(id))
    redis.call("ZREM", ended, id)
    count = count + 1
    local asks_again = st == "failed" and cjson.decode(err or "{}").code == "storage"
    local idem_key = ik and tn and q .. ":i:" .. tn .. ":" .. ik
    if idem_key and redis.call("GET", idem_key) == id .. "|" .. (fp or "") then
      if asks_again or tonumber(kept) <= 0 then
        redis.call("DEL", idem_key)
      else
        redis.call("SET", idem_key, id .. "|" .. fp .. "|archived", "PX", kept)
      end
    end
  end
end
return count
