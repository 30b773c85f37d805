// Which models the server has: every scenario's `setup`.
import { fail } from "k6";
import { BASE_URL, call } from "./api.js";

// The first model for images, and the first for videos or null.
export function setup() {
  if (call("GET", "/readyz").status !== 200) {
    fail(`no server is ready at ${BASE_URL}`);
  }
  const models = call("GET", "/v1/models").json("data");
  const ofKind = (kind) => models.find((model) => model.kind === kind) || null;
  const [image, video] = [ofKind("image"), ofKind("video")];
  if (image === null) {
    fail("a model for images is needed");
  }
  return { image, video };
}
