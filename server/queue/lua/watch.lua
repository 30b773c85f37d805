#!lua flags=allow-oom
-- watch: have the api process `boot` told when the job ends. -> status as it stands, or nil
local id, boot = unpack(ARGV)
local status, reply_to = read(id, "status", "reply_to")
if status and not terminal[status] and not string.find(" " .. reply_to .. " ", " " .. boot .. " ", 1, true) then
  redis.call("HSET", job_key(id), "reply_to", reply_to .. " " .. boot)
end
return status
