#!lua flags=allow-oom
-- set_route: decide anew about versions, unless somebody else did since it was read. What waits in the lane of a
-- version that gets no more jobs is dealt anew. -> 1, or 0 if the decision that was read no longer stands
local rev = ARGV[1]
if (redis.call("HGET", route, "rev") or "0") ~= rev then return 0 end
redis.call("DEL", route)
if #ARGV > 1 then redis.call("HSET", route, "rev", rev + 1, unpack(ARGV, 2)) end
local base, next, share = unpack(redis.call("HMGET", route, "base", "next", "share"))
local windows = redis.call("HGETALL", lanes)
for i = 1, #windows, 2 do
  local version = windows[i]
  local has_share = version == base or version == next and tonumber(share or 0) > 0
  if base and not has_share then empty_lane(version) end
end
pump()
return 1
