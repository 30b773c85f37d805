-- The margin: by how much waiting takes longer than was predicted, in all but one of twenty cases. A job is accepted if its
-- deadline leaves room for that: predictions that are right on average make every other job late once the queue is full.
-- It follows what happens from job to job, as in adaptive conformal inference (Gibbs and Candès, arXiv 2106.00170), in steps
-- that are shares of itself.
local late_share, learning_rate = 0.05, 0.05
local least_margin, most_margin = 0.5, 4

-- learn: of a job that is done, or too late. What was never near its deadline says nothing, nor what lost a worker.
local function learn(id, now)
  local wait_us, own_us, created_ms, deadline_ms, attempt =
    read(id, "wait_us", "own_us", "created_ms", "deadline_ms", "attempt")
  if not wait_us or tonumber(wait_us) == 0 or tonumber(attempt) > 1 then return end
  local margin = tonumber(redis.call("HGET", pump_state, "margin") or 1)
  local latest_ms = (margin * wait_us + own_us) / 1000
  if 2 * latest_ms < deadline_ms - created_ms then return end
  local is_late = now - created_ms > latest_ms and 1 or 0
  margin = math.min(most_margin, math.max(least_margin, margin * math.exp(learning_rate * (is_late - late_share))))
  redis.call("HSET", pump_state, "margin", string.format("%.4f", margin))
end
