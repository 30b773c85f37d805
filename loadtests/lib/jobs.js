// Jobs as clients see them: handed in, waited for, and noted down for the audit that follows the run.
import { check, sleep } from "k6";
import { Counter, Trend } from "k6/metrics";
import { call, errorCode } from "./api.js";
import { isMp4 } from "./mp4.js";
import { isPng, isPngBase64 } from "./png.js";

const IMAGES = "/v1/images";
const VIDEOS = "/v1/videos";
// What a server says that has too much to do, or misses a part of itself for a moment.
const COME_AGAIN = [429, 503];
const REFUSALS = [
  "queue_full",
  "tenant_full",
  "overloaded",
  "no_worker",
  "queue_unavailable",
  "store_unavailable",
  "shutting_down",
];

const pictures = new Counter("pictures");
const pictureMs = new Trend("picture_ms", true);
const videoMs = new Trend("video_ms", true);
const refused = new Counter("refused");
const refusalMs = new Trend("refusal_ms", true);
// Answers that are neither what was asked for nor a refusal that says so.
const broken = new Counter("broken");

// An accepted job: its id, the final status if the client has seen it, and its idempotency key. The audit reads this.
export function note(id, status = "-", key = "-") {
  if (__ENV.SUMMARY) {
    console.log(`job ${id} ${status} ${key}`);
  }
}

// One picture, waited for, as bytes. Tags: of its metrics, or a function that is asked for them at the end.
export function drawBytes(model, body, { tags = {} } = {}) {
  const headers = { Accept: "image/png" };
  const name = `${IMAGES} (bytes)`;
  const startedMs = Date.now();
  const answer = call("POST", IMAGES, { body, headers, status: [200, 202, ...COME_AGAIN], name, binary: true });
  if (answer.status === 200) {
    note(answer.headers["X-Job-Id"], "completed");
    return picture(isPng(answer.body, ...sizeOf(model)), startedMs, tags);
  }
  return answer.status === 202 ? awaited(model, answer.json("id"), startedMs, tags) : refusal(answer, tags);
}

// The same in OpenAI's shape: n pictures in base64.
export function drawOpenAI(model, body, { tags = {} } = {}) {
  const startedMs = Date.now();
  const answer = call("POST", `${IMAGES}/generations`, { body, status: [200, ...COME_AGAIN] });
  if (answer.status !== 200) {
    return refusal(answer, tags);
  }
  note(answer.json("id"), "completed");
  const data = answer.json("data");
  const whole = data.length === (body.n || 1) && data.every((one) => isPngBase64(one.b64_json, ...sizeOf(model)));
  return picture(whole, startedMs, tags, data.length);
}

// The same without a waiting request: handed in, looked up until it is finished, fetched.
export function drawPolling(model, body, { tags = {} } = {}) {
  const startedMs = Date.now();
  const answer = handIn(body);
  return answer.status === 202 ? awaited(model, answer.json("id"), startedMs, tags) : refusal(answer, tags);
}

// Hand a job in and answer with its id; whoever is refused or cut off comes again with the same key.
export function handInUntilAccepted(body, key, patienceMs) {
  const deadlineMs = Date.now() + patienceMs;
  while (Date.now() < deadlineMs) {
    const answer = handIn(body, { key, timeoutMs: 10_000 });
    if (answer.status === 202 || answer.status === 200) {
      return answer.json("id");
    }
    sleep(Math.min(1, Number((answer.headers || {})["Retry-After-Ms"] || 200) / 1000));
  }
  return null;
}

export function handIn(body, { key = null, timeoutMs = 150_000 } = {}) {
  const headers = key === null ? {} : { "Idempotency-Key": key };
  const answer = call("POST", IMAGES, {
    body: { ...body, wait_s: 0 },
    headers,
    status: [200, 202, ...COME_AGAIN],
    name: `${IMAGES} (wait_s=0)`,
    timeoutMs,
  });
  if (answer.status === 202 || answer.status === 200) {
    note(answer.json("id"), "-", key || "-");
  }
  return answer;
}

// The job at a path once it is finished; null if it is not in time. Whoever does not answer is asked again.
export function finished(path, name, patienceMs) {
  const deadlineMs = Date.now() + patienceMs;
  for (let pauseS = 0.05; Date.now() < deadlineMs; pauseS = Math.min(1, pauseS * 1.5)) {
    const answer = call("GET", path, { status: [200, ...COME_AGAIN], name, timeoutMs: 10_000 });
    if (answer.status === 200 && !["queued", "in_progress"].includes(answer.json("status"))) {
      const job = answer.json();
      note(job.id, job.status);
      return job;
    }
    sleep(pauseS);
  }
  return null;
}

export function finishedImage(id, patienceMs = 150_000) {
  return finished(`${IMAGES}/${id}`, `${IMAGES}/{id}`, patienceMs);
}

// One video: handed in, looked up until it is finished, fetched.
export function makeVideo(body, { patienceMs = 1_800_000, tags = {} } = {}) {
  const startedMs = Date.now();
  const answer = call("POST", VIDEOS, { body, status: [200, ...COME_AGAIN] });
  if (answer.status !== 200) {
    return refusal(answer, tags);
  }
  const id = answer.json("id");
  note(id);
  const job = finished(`${VIDEOS}/${id}`, `${VIDEOS}/{id}`, patienceMs);
  const name = `${VIDEOS}/{id}/content`;
  const content = job !== null && call("GET", `${VIDEOS}/${id}/content`, { name, binary: true });
  if (job === null || job.status !== "completed" || content.status !== 200 || !isMp4(content.body)) {
    return fault(tags);
  }
  videoMs.add(Date.now() - startedMs, tags);
  return "video";
}

function sizeOf(model) {
  return model.sizes[0].split("x").map(Number);
}

function awaited(model, id, startedMs, tags) {
  const job = finishedImage(id);
  if (job === null || job.status !== "completed") {
    return fault(tags);
  }
  const name = `${IMAGES}/{id}/content`;
  const content = call("GET", `${IMAGES}/${id}/content`, { name, binary: true });
  return picture(content.status === 200 && isPng(content.body, ...sizeOf(model)), startedMs, tags);
}

function picture(whole, startedMs, tags, count = 1) {
  if (!whole) {
    return fault(tags);
  }
  const at = valueOf(tags);
  pictures.add(count, at);
  pictureMs.add(Date.now() - startedMs, at);
  return "picture";
}

function refusal(answer, tags) {
  if (!COME_AGAIN.includes(answer.status)) {
    return fault(tags);
  }
  check(answer, {
    "a refusal has a code": (r) => REFUSALS.includes(errorCode(r)),
    "a refusal says when to come again": (r) => Number(r.headers["Retry-After"]) > 0,
  });
  const at = valueOf(tags);
  refused.add(1, at);
  refusalMs.add(answer.timings.duration, at);
  return "refused";
}

function fault(tags) {
  broken.add(1, valueOf(tags));
  return "broken";
}

function valueOf(tags) {
  return typeof tags === "function" ? tags() : tags;
}
