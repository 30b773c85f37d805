// Pictures at 70 % of what the server can draw, for as long as it takes to trust the p95.
import { drawBytes } from "../lib/jobs.js";
import { constant, lengthS, optionsOf, SLO_MS } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

export const options = optionsOf(
  { image_steady: constant(70, lengthS(600, 20)) },
  { picture_ms: [`p(95)<${SLO_MS}`], refused: ["count==0"], http_req_failed: ["rate<0.001"] },
);

export default function steady({ image }) {
  drawBytes(image, wish(image));
}
