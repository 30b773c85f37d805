#!lua flags=no-writes
-- look: all that the class holds of one job, at one moment. `tenant`, `entry` and the `lane` of the entry say where an id
-- without a record, or with another one, was seen. -> {fields of the record, then 0 or 1 for each place it can be in}
local id, tenant, entry, lane = unpack(ARGV)
local st, tn, pr, at, enq, dl, fp, res, err, del, ent, vs = unpack(redis.call("HMGET", job_key(id),
  "st", "tn", "pr", "at", "enq", "dl", "fp", "res", "err", "del", "ent", "vs"))

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
local listed = st == "queued" and not ent
  and redis.call("LPOS", tenant_key(pr, tn), id) and redis.call("ZSCORE", turns_key(pr), tn)
local reachable = ent and vs and in_stream(vs, ent) and (is_leased(vs, ent) or is_undelivered(vs, ent))
local strays = entry ~= "" and (entry ~= ent or lane ~= vs) and (in_stream(lane, entry) or is_leased(lane, entry))
return {
  st, at, enq, dl, fp, res, err, del, flag(is_member(live)), flag(waits), flag(is_member(inflight_key(tn or tenant))),
  flag(listed), flag(reachable), flag(strays),
}
