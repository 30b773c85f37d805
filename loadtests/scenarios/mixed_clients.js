// Every kind of client at once, at 60 % of what the server can draw: some wait, some come back, some want four pictures, some leave
// before theirs is drawn, and if there is a model for videos, someone wants those. Nobody may starve.
import { check } from "k6";
import { call } from "../lib/api.js";
import { drawBytes, drawOpenAI, drawPolling, finishedImage, handIn, makeVideo } from "../lib/jobs.js";
import { constant, constantPerMinute, lengthS, optionsOf, SLO_MS } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

const SECONDS = lengthS(600, 20);
const GROUP = 4;
const CLIENTS = ["bytes", "openai", "polling", "groups"];

export const options = optionsOf(
  {
    bytes: constant(20, SECONDS, { exec: "bytes" }),
    openai: constant(15, SECONDS, { exec: "openai" }),
    polling: constant(10, SECONDS, { exec: "polling" }),
    groups: constant(12 / GROUP, SECONDS, { exec: "groups" }),
    fickle: constant(3, SECONDS, { exec: "fickle" }),
    videos: constantPerMinute(2, SECONDS, { exec: "videos", gracefulStop: "1800s" }),
  },
  {
    ...Object.fromEntries(CLIENTS.map((name) => [`picture_ms{scenario:${name}}`, [`p(95)<${SLO_MS}`]])),
    refused: ["count==0"],
    http_req_failed: ["rate<0.001"],
  },
);

export function bytes({ image }) {
  drawBytes(image, wish(image));
}

export function openai({ image }) {
  drawOpenAI(image, { ...wish(image), response_format: "b64_json" });
}

export function polling({ image }) {
  drawPolling(image, wish(image));
}

export function groups({ image }) {
  drawOpenAI(image, { ...wish(image), response_format: "b64_json", n: GROUP });
}

// Hands a job in and takes it back: it is cancelled, or it was too late for that; both are final.
export function fickle({ image }) {
  const answer = handIn(wish(image));
  if (answer.status === 202) {
    const path = `/v1/images/${answer.json("id")}`;
    call("DELETE", path, { name: "/v1/images/{id}" });
    const job = finishedImage(answer.json("id"));
    check(job, { "a job that is taken back ends": (one) => one !== null && ["completed", "failed"].includes(one.status) });
  }
}

export function videos({ video }) {
  if (video !== null) {
    makeVideo(wish(video));
  }
}
