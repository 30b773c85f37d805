// Clients that send nonsense, fifty times a second, beside some that do not: the first are refused cheaply, the second notice nothing.
import { check } from "k6";
import { call, errorCode } from "../lib/api.js";
import { drawBytes } from "../lib/jobs.js";
import { constant, constantPerMinute, iteration, lengthS, optionsOf, SLO_MS } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";
import { refusals } from "../lib/refusals.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

const SECONDS = lengthS(300, 20);

export const options = optionsOf(
  {
    polite: constant(30, SECONDS, { exec: "polite" }),
    abusers: constantPerMinute(50 * 60, SECONDS, { exec: "abuse" }),
  },
  {
    "picture_ms{scenario:polite}": [`p(95)<${SLO_MS}`],
    "http_req_duration{scenario:abusers}": ["p(95)<500"],
    refused: ["count==0"],
    http_req_failed: ["rate==0"],
  },
);

export function polite({ image }) {
  drawBytes(image, wish(image));
}

export function abuse({ image }) {
  const insults = [...refusals(image), ...worse()];
  const { method, path, body, headers, status, code, name = path } = insults[iteration() % insults.length];
  check(call(method, path, { body, headers, status, name: `${name} (${code})` }), {
    "nonsense is refused with its code": (r) => errorCode(r) === code,
  });
}

// What nobody sends by mistake.
function worse() {
  const post = (body, status, code, name) => ({ method: "POST", path: "/v1/images", body, status, code, name });
  return [
    post(`{"prompt": "${"x".repeat(800 * 1024)}"}`, 413, "body_too_large", "/v1/images (800 KiB)"),
    post(`${"[".repeat(30_000)}`, 400, "invalid_json", "/v1/images (deep)"),
    post(`{"prompt": "a", "seed": 1${"0".repeat(6000)}}`, 400, "invalid_json", "/v1/images (long number)"),
    { ...post("{}", 404, "route_not_found", "/{scan}"), path: `/wp-admin/${iteration()}.php` },
    { ...post(null, 404, "job_not_found", "/v1/images/{id}"), method: "GET", path: `/v1/images/img_${"f".repeat(200)}` },
  ];
}
