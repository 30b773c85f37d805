// Pictures at 60 % of what the server can draw, for a working day: what leaks shows.
import { drawBytes, drawOpenAI, drawPolling } from "../lib/jobs.js";
import { constant, iteration, lengthS, optionsOf, SLO_MS } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

export const options = optionsOf(
  { soak: constant(60, lengthS(8 * 3600, 60)) },
  { picture_ms: [`p(95)<${SLO_MS}`, `p(99)<${2 * SLO_MS}`], refused: ["count==0"], http_req_failed: ["rate<0.001"] },
);

export default function soak({ image }) {
  const draw = [drawBytes, drawOpenAI, drawPolling][iteration() % 3];
  draw(image, wish(image));
}
