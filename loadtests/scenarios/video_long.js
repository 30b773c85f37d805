// Videos, one every half a minute, and each is looked up until it is there: does every one come, however long it takes?
import { sleep } from "k6";
import { makeVideo } from "../lib/jobs.js";
import { constantPerMinute, lengthS, optionsOf } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";
import { setup as look } from "../lib/target.js";

export { handleSummary } from "../lib/summary.js";

const PER_MINUTE = Number(__ENV.VIDEOS_PER_MINUTE || 2);
const SECONDS = lengthS(1800, 60);

export const options = optionsOf(
  { video_long: constantPerMinute(PER_MINUTE, SECONDS, { gracefulStop: "1800s" }) },
  { video_ms: [`p(95)<${Number(__ENV.VIDEO_SLO_MS || 300_000)}`], http_req_failed: ["rate==0"] },
);

export function setup() {
  const models = look();
  if (models.video === null) {
    throw new Error("a model for videos is needed");
  }
  return models;
}

export default function long({ video }) {
  while (makeVideo(wish(video)) === "refused") {
    sleep(1);
  }
}
