-- pump: move waiting jobs into the dispatch windows until they are full.
-- A window is short so that what is not in it yet can still be reordered: between priorities by weight, within a
-- priority by taking turns between tenants. It is as long as its workers need for one batch each.
local weights = {high = 8, normal = 3, low = 1}

-- first_of: the tenant whose turn it is in a priority, and its tag; nil if nobody waits.
local function first_of(priority)
  local turns = turns_key(priority)
  while true do
    local first = redis.call("ZRANGE", turns, 0, 0, "WITHSCORES")
    if not first[1] or redis.call("EXISTS", tenant_key(priority, first[1])) == 1 then return first[1], first[2] end
    -- It has no more jobs, and is no longer ahead of those that have.
    redis.call("ZREM", turns, first[1])
    redis.call("HSET", pump_state, "tag:" .. priority, first[2])
  end
end

-- Smooth weighted round robin over the priorities that have waiting jobs: each gains its weight in credit, the
-- richest is served and pays what all of them gained. -> priority, tenant, tag of the tenant; nil if nobody waits
local function next_turn()
  local ready, tenants, tags, total = {}, {}, {}, 0
  for _, priority in ipairs(priorities) do
    local tenant, tag = first_of(priority)
    if tenant then
      ready[#ready + 1] = priority
      tenants[priority], tags[priority] = tenant, tag
      total = total + weights[priority]
    end
  end
  local best, most = ready[1], nil
  if #ready > 1 then -- alone it would pay exactly what it gained
    for _, priority in ipairs(ready) do
      local credit = redis.call("HINCRBY", pump_state, "credit:" .. priority, weights[priority])
      if not most or credit > most then best, most = priority, credit end
    end
    redis.call("HINCRBY", pump_state, "credit:" .. best, -total)
  end
  return best, tenants[best], tags[best]
end

-- The lanes that live workers serve: {version = work it has room for}, one of the versions, and how many they are. What a
-- worker has started takes no room: nobody could reorder it any more.
local function open_lanes()
  local room, some, count = {}, nil, 0
  local windows = redis.call("HGETALL", lanes)
  for i = 1, #windows, 2 do
    local version, window = windows[i], tonumber(windows[i + 1])
    if window > 0 then
      room[version] = window - tonumber(redis.call("HGET", pump_state, "unstarted:" .. version) or 0)
      if room[version] <= 0 and redis.call("XLEN", stream_of(version)) == 0 then -- records were deleted by hand
        redis.call("HDEL", pump_state, "unstarted:" .. version)
        room[version] = window
      end
      some, count = version, count + 1
    end
  end
  return room, some, count
end

-- What was decided about versions, for when several are served; see server/README.md, "Versions".
local function read_plan()
  local base, next, share, dealt, to_next =
    unpack(redis.call("HMGET", route, "base", "next", "share", "dealt", "to_next"))
  local plan = {
    base = base, next = next, offers = {},
    share = tonumber(share or 0), dealt = tonumber(dealt or 0), to_next = tonumber(to_next or 0),
  }
  local told = redis.call("HGETALL", offers)
  for i = 1, #told, 2 do plan.offers[told[i]] = cjson.decode(told[i + 1]) end
  return plan
end

-- The version whose turn it is, and whether that turn counts. The next version never gets more than its share, also
-- when the others are busy; what it has no room for goes to the others, and it catches up.
local function whose_turn(plan, room)
  local base, next = plan.base, plan.next
  if room[base] and room[next] then
    local is_due = (plan.to_next + 1) * 100 <= (plan.dealt + 1) * plan.share
    return is_due and room[next] > 0 and next or base, plan.share > 0
  end
  if room[base] or room[next] then return room[base] and base or next, false end
  local roomiest
  for version, left in pairs(room) do
    if not roomiest or left > room[roomiest] then roomiest = version end
  end
  return roomiest, false
end

local function count_turn(plan, version)
  plan.dealt = redis.call("HINCRBY", route, "dealt", 1)
  if version == plan.next then plan.to_next = redis.call("HINCRBY", route, "to_next", 1) end
end

local function has(list, wanted)
  for _, value in ipairs(list) do
    if value == wanted then return true end
  end
  return #list == 0
end

-- True if a version draws such pictures. Offers are kept only while the versions differ in them.
local function draws(plan, version, request)
  local offer = plan.offers[version]
  if not offer or not request.height then return true end
  local bucket = string.format("%dx%d", request.height, request.width)
  local frames = tonumber(request.frames) or 1
  if frames > 1 then bucket = string.format("%sx%d", bucket, frames) end
  return has(offer.buckets, bucket) and has(offer.num_steps, request.num_steps)
end

-- The version that gets a job, given whose turn it is; `last`: the one it was dealt to before, if it was.
local function deal(plan, room, turn, counts, last, attempt, request_json)
  local version = turn
  if tonumber(attempt) > 0 and room[plan.base] then
    version = plan.base -- a worker died with it: if the next version is to blame, it must not have three of them
  elseif last and room[last] and (last == plan.base or last == plan.next and plan.share > 0) then
    version = last -- handed back: it has had its turn
  end
  if next(plan.offers) then
    local request = cjson.decode(request_json)
    if not draws(plan, version, request) then
      for other in pairs(room) do
        if draws(plan, other, request) then version = other end
      end
    end
  end
  if counts and not last and version == turn then count_turn(plan, version) end
  return version
end

local function pump()
  local room, turn, count = open_lanes()
  if count == 0 then return end
  local plan, counts
  if count > 1 then plan = read_plan() end
  while true do
    if plan then turn, counts = whose_turn(plan, room) end
    if room[turn] <= 0 then return end
    local priority, tenant, tag = next_turn()
    if not priority then return end
    local id = redis.call("LPOP", tenant_key(priority, tenant))
    -- Else somebody has deleted its record by hand.
    local status, cost_us = read(id, "status", "cost_us")
    if status == "queued" then
      redis.call("ZADD", turns_key(priority), tag + (cost_us or 0), tenant)
      local version = turn
      if plan then version = deal(plan, room, turn, counts, read(id, "version", "attempt", "request")) end
      local entry = redis.call("XADD", stream_of(version), "*", "id", id)
      redis.call("HSET", job_key(id), "entry", entry, "version", version)
      add_to_lane(version, cost_us)
      room[version] = room[version] - (cost_us or 0)
    end
  end
end
