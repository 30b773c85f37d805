// Three times what the server can draw all at once, out of the blue: nothing breaks, who is refused learns it in so many words,
// and once the queue has drained everything is as fast as before.
import { drawBytes } from "../lib/jobs.js";
import { constant, CROWD, lengthS, optionsOf, SLO_MS } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

// Of ten parts: three quiet ones, one of the burst, three in which the queue drains, three quiet ones.
const PART_S = lengthS(300, 30) / 10;
const phase = (name, startPart, parts, percent, more = {}) =>
  constant(percent, parts * PART_S, { startTime: `${startPart * PART_S}s`, tags: { phase: name }, ...more });

export const options = optionsOf(
  {
    before: phase("before", 0, 3, 20),
    burst: phase("burst", 3, 1, 300, { vus: CROWD }),
    draining: phase("draining", 4, 3, 20, { vus: CROWD }),
    after: phase("after", 7, 3, 20),
  },
  {
    "picture_ms{phase:before}": [`p(95)<${SLO_MS}`],
    "picture_ms{phase:burst}": ["p(95)>=0"],
    "picture_ms{phase:after}": [`p(95)<${SLO_MS}`],
    "refused{phase:before}": ["count==0"],
    "refused{phase:after}": ["count==0"],
    http_req_failed: ["rate<0.001"],
  },
);

export default function burst({ image }) {
  drawBytes(image, wish(image));
}
