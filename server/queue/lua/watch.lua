#!lua flags=allow-oom
-- watch: have the api process `boot` told when the job ends. -> status as it stands, or nil
local id, boot = unpack(ARGV)
local st, rp = unpack(redis.call("HMGET", job_key(id), "st", "rp"))
if st and not terminal[st] and not string.find(" " .. rp .. " ", " " .. boot .. " ", 1, true) then
  redis.call("HSET", job_key(id), "rp", rp .. " " .. boot)
end
return st
