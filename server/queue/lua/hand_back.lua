#!lua flags=allow-oom
-- hand_back: return leases that were never started, given as (entry, id) each in lease order, to the front of their
-- tenants' lists. -> how many went back
local version, consumer = ARGV[1], ARGV[2]
local count = 0
for i = #ARGV - 1, 3, -2 do -- backwards: each goes in front of the one before
  local entry, id = ARGV[i], ARGV[i + 1]
  if owns(version, consumer, entry) then count = count + put_back(version, entry, id) end
end
pump()
return count
