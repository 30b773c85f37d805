#!lua
-- enqueue: accept a job, or say why not. Not allow-oom: a full server takes no new work.
-- `max_work` is the most work of others with which it still makes its deadline; `own_us` what is predicted for itself, and
-- `per_work` for the work of others, over that work; each "" if nobody can say.
-- -> {status, id of the job that holds the key, jobs waiting before it, work of all unfinished ones}
local id, tenant, _, _, _, fingerprint, created_ms = unpack(ARGV) -- and the rest of what `accept` takes, 12 in all
local idem, idem_ttl, max_waiting, max_live, max_work, own_us, per_work = unpack(ARGV, 13, 19)
local key = job_key(id)
local idem_name = ":i:" .. tenant .. ":" .. idem
local idem_key = q .. idem_name
local claim_key = root .. idem_name -- which class has it: a tenant uses a key for one request, whatever the model

if redis.call("EXISTS", key) == 1 then return {"ok", id, 0, 0} end -- our reply was lost and the client asks again

-- Which job has an idempotency key, its fingerprint, and "archived" if its answer is in the store.
local function holder_of(name) return string.match(redis.call("GET", name) or "", "^([^|]+)|([^|]+)|?(.*)$") end

if idem ~= "" then
  local other = redis.call("GET", claim_key)
  if other and other ~= q then
    local holder, _, where = holder_of(other .. idem_name)
    if holder and (where == "archived" or redis.call("EXISTS", other .. ":j:" .. holder) == 1) then
      return {"mismatch", holder, 0, 0}
    end
  end
  local holder, holder_fp, where = holder_of(idem_key)
  local status, failure = nil, nil
  if holder then status, failure = read(holder, "status", "error") end
  if status == "failed" and cjson.decode(failure or "{}").code == "storage" then
    status = nil -- its client was told to ask again, and is to have a new job then
  end
  status = status or where == "archived" and where
  if status and holder_fp ~= fingerprint then return {"mismatch", holder, 0, 0} end
  if status then return {"dup", holder, 0, 0} end
end

if not make_room(accepting) then return {"memory", "", 0, 0} end

redis.call("ZREMRANGEBYSCORE", inflight_key(tenant), "-inf", created_ms)
if tonumber(max_live) > 0 and redis.call("ZCARD", inflight_key(tenant)) >= tonumber(max_live) then
  return {"tenant_full", "", 0, 0}
end
local waiting = 0
for _, priority in ipairs(priorities) do waiting = waiting + redis.call("ZCARD", waiting_key(priority)) end
local ahead = tonumber(redis.call("HGET", pump_state, "work:live") or 0)
if waiting >= tonumber(max_waiting) then return {"queue_full", "", waiting, ahead} end
if max_work ~= "" and ahead > tonumber(max_work) then return {"late", "", waiting, ahead} end

if idem ~= "" then
  redis.call("SET", idem_key, id .. "|" .. fingerprint, "PX", idem_ttl)
  redis.call("SET", claim_key, q, "PX", idem_ttl)
end
accept(unpack(ARGV, 1, 12))
if own_us ~= "" then redis.call("HSET", key, "own_us", own_us, "wait_us", math.floor(ahead * per_work)) end
if idem ~= "" then redis.call("HSET", key, "idempotency_key", idem) end
return {"ok", id, waiting, ahead}
