// Requests to the server under test. A status that was asked for is a success to k6, any other a failed request.
import http from "k6/http";

export const BASE_URL = (__ENV.BASE_URL || "http://127.0.0.1:8000").replace(/\/$/, "");

// status: what may come back, one or several.
// name: how the request is grouped in k6's summary, so that ids in a path do not make one row each.
// timeoutMs: after so long the client hangs up, and the status is 0.
export function call(
  method,
  path,
  { body = null, status = 200, headers = {}, name = path, binary = false, timeoutMs = 150_000, tags = {} } = {},
) {
  const payload = body === null || typeof body === "string" ? body : JSON.stringify(body);
  return http.request(method, `${BASE_URL}${path}`, payload, {
    headers: { "Content-Type": "application/json", ...headers },
    responseType: binary ? "binary" : "text",
    responseCallback: http.expectedStatuses(...[].concat(status)),
    timeout: timeoutMs,
    tags: { name: `${method} ${name}`, ...tags },
  });
}

export function errorCode(response) {
  try {
    return response.json("error.code");
  } catch {
    return null;
  }
}
