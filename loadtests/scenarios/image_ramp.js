// Stairs from 10 % to 150 % of what the server can draw: where is its knee, and what does it do beyond?
// `step` is the stair on which a picture was there, or refused; `loadtests/load.py` makes a table of them.
import exec from "k6/execution";
import { drawBytes } from "../lib/jobs.js";
import { CROWD, lengthS, optionsOf, perMinute } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";
import { handleSummary as summary } from "../lib/summary.js";

export { setup } from "../lib/target.js";

// Narrow where the knee should be.
const STEPS = [10, 30, 50, 60, 70, 80, 90, 100, 110, 120, 135, 150];
const STEP_S = lengthS(720, 48) / STEPS.length;

export const options = optionsOf(
  {
    image_ramp: {
      executor: "ramping-arrival-rate",
      startRate: perMinute(STEPS[0]),
      timeUnit: "1m",
      stages: STEPS.flatMap((percent) => [
        { target: perMinute(percent), duration: 0 },
        { target: perMinute(percent), duration: `${STEP_S}s` },
      ]),
      preAllocatedVUs: CROWD,
      gracefulStop: "150s",
    },
  },
  {
    refusal_ms: ["p(95)<500"],
    http_req_failed: ["rate<0.001"],
    // Always true: k6 counts apart only what a threshold asks for.
    ...Object.fromEntries(
      STEPS.flatMap((percent) => [
        [`pictures{step:${percent}}`, ["count>=0"]],
        [`picture_ms{step:${percent}}`, ["p(95)>=0"]],
        [`refused{step:${percent}}`, ["count>=0"]],
      ]),
    ),
  },
);

export default function ramp({ image }) {
  drawBytes(image, wish(image), { tags: () => ({ step: step() }) });
}

export function handleSummary(data) {
  const perS = STEPS.map((percent) => perMinute(percent) / 60);
  return summary({ ...data, stairs: { step_s: STEP_S, percent: STEPS, per_s: perS } });
}

function step() {
  const elapsedS = (Date.now() - exec.scenario.startTime) / 1000;
  return String(STEPS[Math.floor(elapsedS / STEP_S)] || "after");
}
