// Clients that ask for a picture and then for its bytes, on the connections that they have, until CONTROL says no more.
import http from "k6/http";
import { check } from "k6";

export const options = {
  scenarios: { clients: { executor: "per-vu-iterations", vus: 4, iterations: 1, maxDuration: "30m" } },
  thresholds: { checks: ["rate==1"], http_req_failed: ["rate==0"] },
};

export default function ask() {
  while (http.get(__ENV.CONTROL).status === 200) {
    const made = http.post(`${__ENV.BASE_URL}/v1/images`, JSON.stringify({ prompt: "a red cube" }), {
      headers: { "Content-Type": "application/json" },
      timeout: "600s",
    });
    if (check(made, { "picture is made": (response) => response.status === 200 })) {
      const bytes = http.get(made.json("data.0.url"));
      check(bytes, { "its bytes come": (response) => response.status === 200 });
    }
  }
}
