-- Names every verb uses. KEYS[1] is the prefix of the class, "q:2:{class}": the hash tag keeps all of its keys in
-- one cluster slot, so a script may derive the others from it. Field and key meanings: server/README.md.
local q = KEYS[1]
local root = string.match(q, "^(.-):{")
local group = "w"
local live = q .. ":live"
local ended = q .. ":ended"
local alive = q .. ":alive"
local workers = q .. ":w"
local paces = q .. ":pace"
local pump_state = q .. ":pump"
local lanes = q .. ":lanes"
local offers = q .. ":offers"
local route = q .. ":route"
local dead = q .. ":dead"
local priorities = {"high", "normal", "low"}
local terminal = {done = true, failed = true, cancelled = true}

local function job_key(id) return q .. ":j:" .. id end

-- read: fields of a job's record, each false where there is none.
local function read(id, ...) return unpack(redis.call("HMGET", job_key(id), ...)) end

local function waiting_key(priority) return q .. ":n:" .. priority end
local function turns_key(priority) return q .. ":turns:" .. priority end
local function tenant_key(priority, tenant) return q .. ":t:" .. priority .. ":" .. tenant end
local function inflight_key(tenant) return q .. ":f:" .. tenant end
local function catalog_key(tenant) return q .. ":l:" .. tenant end

-- Every version of the bundle has a dispatch window of its own, its lane: a stream that its workers read.
local function stream_of(version) return q .. ":s:" .. version end

-- True while `consumer` holds the lease on `entry`. The pending entries list is the only truth about leases: after
-- a reclaim it names the new owner, whatever a frozen worker still believes.
local function owns(version, consumer, entry)
  local pending = redis.pcall("XPENDING", stream_of(version), group, entry, entry, 1)
  return not pending.err and pending[1] ~= nil and pending[1][2] == consumer
end

-- Take an entry out of its dispatch window.
local function drop_entry(version, entry)
  redis.call("XACK", stream_of(version), group, entry)
  redis.call("XDEL", stream_of(version), entry)
end

local function error_json(code, message) return cjson.encode({code = code, message = message}) end
