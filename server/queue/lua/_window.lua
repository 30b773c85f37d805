-- fit_window: make the dispatch window as long as the live workers can use, one batch in hand and one next.
local function fit_window()
  local rows = 0
  for _, info in ipairs(redis.call("HVALS", workers)) do rows = rows + cjson.decode(info).max_batch end
  if rows == 0 then
    redis.call("HDEL", pump_state, "window")
  else
    redis.call("HSET", pump_state, "window", 2 * rows)
  end
  pump()
end
