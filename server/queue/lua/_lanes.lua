-- fit_lanes: open a lane for each version that live workers serve, as long as they can use: the time of a batch for
-- each, to have the next one at hand when they have started one. What waits in a lane that nobody serves any more goes
-- back, and into the others.
local page = 100

local function empty_lane(version)
  local stream = stream_of(version)
  local reply
  repeat
    reply = redis.pcall("XREADGROUP", "GROUP", group, "fit_lanes", "COUNT", page, "STREAMS", stream, ">")
    if reply and reply.err then return end -- none of its workers has come yet
    if reply then put_back_all(version, reply[1][2]) end
  until not reply
  redis.call("XGROUP", "DELCONSUMER", stream, group, "fit_lanes")
end

local function fit_lanes(now)
  local room, offer, consumers = {}, {}, redis.call("ZRANGEBYSCORE", alive, "(" .. now, "+inf")
  for _, consumer in ipairs(consumers) do
    local info = redis.call("HGET", workers, consumer)
    if info then
      local about = cjson.decode(info)
      room[about.version] = (room[about.version] or 0) + math.ceil((about.batch_ms or 100 * about.max_batch) * 1000)
      offer[about.version] = cjson.encode({buckets = about.buckets or {}, num_steps = about.num_steps or {}})
    end
  end
  local windows = redis.call("HGETALL", lanes)
  for i = 1, #windows, 2 do
    if not room[windows[i]] then
      redis.call("HSET", lanes, windows[i], 0)
      redis.call("HDEL", offers, windows[i])
      empty_lane(windows[i])
    end
  end
  local first, differ
  for version, window in pairs(room) do
    redis.call("HSET", lanes, version, window)
    differ = differ or first and offer[version] ~= first
    first = first or offer[version]
  end
  for version, text in pairs(offer) do
    if differ then redis.call("HSET", offers, version, text) else redis.call("HDEL", offers, version) end
  end
  redis.call("HSET", pump_state, "living", #consumers)
  pump()
end
