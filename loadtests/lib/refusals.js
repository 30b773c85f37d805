// One request for each way in which a client can be wrong: what is sent, and the status and code that must come back.
const IMAGES = "/v1/images";
const VIDEOS = "/v1/videos";

export function refusals(model) {
  const post = (body, status, code, more = {}) => ({ method: "POST", path: IMAGES, body, status, code, ...more });
  const prompt = "a red sphere";
  return [
    post("{", 400, "invalid_json"),
    post({ prompt }, 400, "invalid_header", { headers: { "Idempotency-Key": "k".repeat(256) } }),
    post({ prompt: "x".repeat(70 * 1024) }, 413, "body_too_large"),
    post(prompt, 415, "unsupported_media_type", { headers: { "Content-Type": "text/plain" } }),
    post({}, 422, "missing_parameter"),
    post({ prompt, colour: "red" }, 422, "unknown_parameter"),
    post({ prompt, n: 0 }, 422, "invalid_value"),
    post({ prompt, stream: true }, 422, "unsupported_parameter", { path: `${IMAGES}/generations` }),
    post({ prompt: "x".repeat(model.max_prompt_chars + 1) }, 422, "prompt_too_long"),
    post({ prompt, size: "65x63" }, 422, "size_not_served"),
    post({ prompt, steps: Math.max(...model.steps) + 1 }, 422, "steps_not_served"),
    post({ prompt, model: "no-such-model" }, 404, "model_not_found"),
    post({ prompt, model: model.id }, 422, "wrong_kind", { path: VIDEOS }),
    post("--half", 400, "invalid_form", { path: VIDEOS, headers: { "Content-Type": "multipart/form-data" } }),
    { method: "GET", path: `${IMAGES}/img_nosuchjob`, status: 404, code: "job_not_found" },
    { method: "GET", path: "/v2/images", status: 404, code: "route_not_found" },
    { method: "PUT", path: IMAGES, status: 405, code: "method_not_allowed" },
  ];
}

// The same for a model that makes videos, one of which is finished under `id`.
export function videoRefusals(model, id) {
  const post = (body, code) => ({ method: "POST", path: VIDEOS, body, status: 422, code });
  const prompt = "a red ball bouncing";
  const longest = Math.max(...model.seconds.map(Number));
  return [
    post({ prompt, seconds: String(longest + 1) }, "length_not_served"),
    post({ prompt, fps: model.fps + 1 }, "fps_not_served"),
    post({ prompt, size: "65x63" }, "size_not_served"),
    {
      method: "GET",
      path: `${VIDEOS}/${id}/content`,
      headers: { Range: "bytes=999999999-" },
      status: 416,
      code: "range_not_satisfiable",
      name: `${VIDEOS}/{id}/content`,
    },
    { method: "GET", path: `${VIDEOS}/video_nosuchjob`, status: 404, code: "job_not_found" },
  ];
}
