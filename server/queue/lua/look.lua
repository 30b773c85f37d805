#!lua flags=no-writes
-- look: all that the class holds of one job, at one moment. `tenant`, `entry` and the `lane` of the entry say where an id
-- without a record, or with another one, was seen. -> {fields of the record, then 0 or 1 for each place it can be in}
local id, seen_tenant, seen_entry, seen_lane = unpack(ARGV)
local status, tenant, priority, entry, version = read(id, "status", "tenant", "priority", "entry", "version")

local function flag(found) return found and 1 or 0 end
local function is_member(set) return redis.call("ZSCORE", set, id) end
local function in_stream(version, one) return redis.call("XRANGE", stream_of(version), one, one)[1] end
local function is_leased(version, one)
  local pending = redis.pcall("XPENDING", stream_of(version), group, one, one, 1)
  return not pending.err and pending[1]
end

-- Entries up to the group's mark have been delivered; without a lease nobody would ever be given them again.
local function is_undelivered(version, one)
  local groups = redis.pcall("XINFO", "GROUPS", stream_of(version))
  if groups.err or not groups[1] then return true end -- the group will be made, from the first entry on
  local mark
  for i = 1, #groups[1], 2 do
    if groups[1][i] == "last-delivered-id" then mark = groups[1][i + 1] end
  end
  return redis.call("XRANGE", stream_of(version), "(" .. mark, one)[1]
end

local waits = false
for _, priority in ipairs(priorities) do waits = waits or is_member(waiting_key(priority)) end
local listed = status == "queued" and not entry
  and redis.call("LPOS", tenant_key(priority, tenant), id) and redis.call("ZSCORE", turns_key(priority), tenant)
local reachable = entry and version and in_stream(version, entry)
  and (is_leased(version, entry) or is_undelivered(version, entry))
local strays = seen_entry ~= "" and (seen_entry ~= entry or seen_lane ~= version)
  and (in_stream(seen_lane, seen_entry) or is_leased(seen_lane, seen_entry))
local places = {
  flag(is_member(live)), flag(waits), flag(is_member(inflight_key(tenant or seen_tenant))),
  flag(listed), flag(reachable), flag(strays),
}
local found =
  {read(id, "status", "attempt", "created_ms", "deadline_ms", "fingerprint", "outputs", "error", "deleted_ms")}
for _, place in ipairs(places) do found[#found + 1] = place end
return found
