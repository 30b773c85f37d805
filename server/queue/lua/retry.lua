#!lua
-- retry: accept a dead letter's request as a new job, and take the letter away. Not allow-oom, as enqueue is not.
-- -> "ok" | "gone" (the letter was retried or dropped before) | "memory"
local letter, id = ARGV[1], ARGV[2]
if redis.call("EXISTS", job_key(id)) == 1 then return "ok" end -- our reply was lost and the operator asks again
if #redis.call("XRANGE", dead, letter, letter) == 0 then return "gone" end
if not make_room(accepting) then return "memory" end
accept(unpack(ARGV, 2))
redis.call("XDEL", dead, letter)
return "ok"
