// Every request is sent two or three times with one key, and a third of the clients hang up before the answer: one key, one job.
import { check } from "k6";
import { call } from "../lib/api.js";
import { handIn, note } from "../lib/jobs.js";
import { constant, keyOf, lengthS, optionsOf, random } from "../lib/plan.js";
import { wish } from "../lib/prompts.js";

export { handleSummary } from "../lib/summary.js";
export { setup } from "../lib/target.js";

export const options = optionsOf({ idempotent: constant(30, lengthS(300, 15)) }, {});

export default function idempotent({ image }) {
  const key = keyOf();
  const body = wish(image);
  const next = random();
  const ids = [];
  if (next() < 0.3) {
    handIn(body, { key, timeoutMs: Math.ceil(1 + 20 * next()) }); // hangs up
  }
  if (next() < 0.5) {
    ids.push(handIn(body, { key }).json("id"));
  }
  const answer = call("POST", "/v1/images", { body, headers: { "Idempotency-Key": key }, name: "/v1/images (keyed)" });
  note(answer.json("id"), answer.json("status"), key);
  ids.push(answer.json("id"));
  const again = call("POST", "/v1/images", { body, headers: { "Idempotency-Key": key }, name: "/v1/images (keyed)" });
  ids.push(again.json("id"));
  check(again, {
    "the picture is drawn": (r) => r.json("status") === "completed",
    "one key is one job": () => ids.every((id) => id === ids[0]),
    "a repeated answer says so": (r) => r.headers["Idempotent-Replayed"] === "true",
    "and is the same answer": (r) => r.body === answer.body,
  });
}
