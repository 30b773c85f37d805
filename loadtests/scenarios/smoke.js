// One client, every route, every client error: does the API keep its contract?
//
//   k6 run -e BASE_URL=http://127.0.0.1:8000 loadtests/scenarios/smoke.js
import { check, sleep } from "k6";
import { call, errorCode } from "../lib/api.js";
import { note } from "../lib/jobs.js";
import { isMp4 } from "../lib/mp4.js";
import { isPng, isPngBase64 } from "../lib/png.js";
import { refusals, videoRefusals } from "../lib/refusals.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

export const options = {
  scenarios: { smoke: { executor: "per-vu-iterations", vus: 1, iterations: 10, maxDuration: "5m" } },
  thresholds: { checks: ["rate==1"], http_req_failed: ["rate==0"], iterations: ["count==10"] },
};

export default function smoke({ image, video }) {
  smokeImages(image);
  if (video !== null) {
    smokeVideos(video);
  }
}

function smokeImages(model) {
  const [width, height] = model.sizes[0].split("x").map(Number);
  const picture = { prompt: "a red sphere", seed: __ITER, model: model.id };

  check(call("GET", `/v1/models/${model.id}`, { name: "/v1/models/{id}" }), {
    "the listed model can be looked up": (r) => r.json("id") === model.id && r.json("workers") > 0,
  });

  const generated = call("POST", "/v1/images/generations", { body: { ...picture, response_format: "b64_json" } });
  check(generated, {
    "openai's route draws a picture": (r) => isPngBase64(r.json("data.0.b64_json"), width, height),
    "stages are timed": (r) => r.json("timing_ms.denoise") > 0 && "Server-Timing" in r.headers,
  });
  note(generated.json("id"), "completed");

  for (const steps of model.steps) {
    check(call("POST", "/v1/images", { body: { ...picture, steps, n: 2, response_format: "b64_json" } }), {
      "our route draws n pictures in every number of steps": (r) =>
        r.json("steps") === steps && r.json("data").every((one) => isPngBase64(one.b64_json, width, height)),
      "picture i has seed + i": (r) => r.json("data").every((one, i) => one.seed === __ITER + i),
    });
  }

  jobThatOutlastsTheWait(picture, width, height);
  sameKeySameJob(picture);

  expectRefusals(refusals(model));
}

function smokeVideos(model) {
  const created = call("POST", "/v1/videos", { body: { prompt: "a red ball bouncing", seed: __ITER, model: model.id } });
  check(created, { "a video is a job": (r) => r.json("object") === "video" && r.json("model") === model.id });
  const id = created.json("id");
  note(id);
  const done = poll(`/v1/videos/${id}`, created, "/v1/videos/{id}");
  check(done, { "the video completes": (r) => r.json("status") === "completed" && r.json("progress") === 100 });

  const path = `/v1/videos/${id}/content`;
  const content = call("GET", path, { name: "/v1/videos/{id}/content", binary: true });
  check(content, { "its bytes are an MP4": (r) => r.headers["Content-Type"] === "video/mp4" && isMp4(r.body) });
  const range = { headers: { Range: "bytes=0-99" }, status: 206, name: "/v1/videos/{id}/content", binary: true };
  check(call("GET", path, range), { "players can seek": (r) => r.body.byteLength === 100 });

  check(call("GET", "/v1/videos"), { "it is listed": (r) => r.json("data").some((one) => one.id === id) });
  expectRefusals(videoRefusals(model, id));
  check(call("DELETE", `/v1/videos/${id}`, { name: "/v1/videos/{id}" }), { "it is deleted": (r) => r.json("deleted") });
  check(call("GET", "/v1/videos"), { "and listed no more": (r) => r.json("data").every((one) => one.id !== id) });
}

function expectRefusals(expected) {
  for (const { method, path, body, headers, status, code, name = path } of expected) {
    check(call(method, path, { body, headers, status, name: `${name} (${code})` }), {
      "errors have a code, a type and a message": (r) =>
        errorCode(r) === code && r.json("error.type").length > 0 && r.json("error.message").length > 0,
      "errors carry a request id": (r) => r.headers["X-Request-Id"].length > 0,
    });
  }
}

// The job at `path`, once it is neither queued nor running.
function poll(path, job, name) {
  const deadline = Date.now() + 60_000;
  while (["queued", "in_progress"].includes(job.json("status")) && Date.now() < deadline) {
    sleep(0.05);
    job = call("GET", path, { name });
  }
  return job;
}

function jobThatOutlastsTheWait(picture, width, height) {
  const accepted = call("POST", "/v1/images", { body: { ...picture, wait_s: 0 }, status: 202, name: "/v1/images (wait_s=0)" });
  check(accepted, { "a job that is not waited for has a place to ask": (r) => r.headers.Location.endsWith(r.json("id")) });

  const job = poll(`/v1/images/${accepted.json("id")}`, accepted, "/v1/images/{id}");
  check(job, { "it completes": (r) => r.json("status") === "completed" && r.json("progress") === 100 });

  note(job.json("id"), job.json("status"));
  const content = call("GET", `/v1/images/${accepted.json("id")}/content`, { name: "/v1/images/{id}/content", binary: true });
  check(content, {
    "its bytes are the picture": (r) => r.headers["Content-Type"] === "image/png" && isPng(r.body, width, height),
  });
}

function sameKeySameJob(picture) {
  const headers = { "Idempotency-Key": `smoke-${Date.now()}-${__ITER}` };
  const first = call("POST", "/v1/images", { body: picture, headers });
  const again = call("POST", "/v1/images", { body: picture, headers });
  const other = call("POST", "/v1/images", { body: { ...picture, prompt: "a blue cube" }, headers, status: 422 });
  [first, again].forEach((answer) => note(answer.json("id"), "completed", headers["Idempotency-Key"]));
  check(null, {
    "the same key and body give the same job": () => first.json("id") === again.json("id"),
    "the same key with another body is refused": () => errorCode(other) === "idempotency_mismatch",
  });
}
