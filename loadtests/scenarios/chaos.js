// Jobs at 40 % of what the server can draw while somebody kills its processes (`python -m loadtests.load --blow COMMAND`): who is
// refused or cut off comes again with the same key, and every accepted job is drawn in the end.
import { check } from "k6";
import { Trend } from "k6/metrics";
import { finishedImage, handInUntilAccepted } from "../lib/jobs.js";
import { constant, keyOf, lengthS, optionsOf, perMinute } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

const PATIENCE_MS = 120_000;
const jobMs = new Trend("job_ms", true);

const PERCENT = 40;
const SECONDS = lengthS(300, 20);
// While nobody draws, everybody waits: the clients of a minute.
const VUS = Math.ceil((perMinute(PERCENT) * Math.min(60, SECONDS)) / 60);

export const options = optionsOf(
  { chaos: constant(PERCENT, SECONDS, { vus: VUS }) },
  { job_ms: [`p(95)<${PATIENCE_MS}`] },
);

export default function chaos({ image }) {
  const startedMs = Date.now();
  const id = handInUntilAccepted(wish(image), keyOf(), PATIENCE_MS);
  const job = id === null ? null : finishedImage(id, PATIENCE_MS);
  check(job, {
    "a job is accepted": () => id !== null,
    "an accepted job is drawn": (one) => one !== null && one.status === "completed",
  });
  jobMs.add(Date.now() - startedMs);
}
