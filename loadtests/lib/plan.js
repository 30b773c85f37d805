// How much and for how long: what `python -m loadtests.load` says in the environment, or what a run by hand gets.
//
// Load is open: requests start when their time has come, whether or not the server has answered those before. A slow
// server does not slow its clients down, and one that k6 could not start in time (`dropped_iterations`) fails the run.
import exec from "k6/execution";

// Pictures per second that the server draws when it is saturated: rates are percentages of it.
export const CAPACITY = Number(__ENV.CAPACITY || 10);
// A picture is in time within so many ms, from asking to having it.
export const SLO_MS = Number(__ENV.SLO_MS || 2000);
// Clients that an overloaded server keeps waiting: a full queue, and what its workers have.
export const CROWD = Math.max(800, Math.ceil(10 * CAPACITY));
const SEED = Number(__ENV.SEED || 1);
const SHORT = __ENV.SHORT === "1";

// Seconds of a scenario: of the full one and of the short one, unless SECONDS is given.
export function lengthS(full, short) {
  return Number(__ENV.SECONDS) || (SHORT ? short : full);
}

// k6 wants whole numbers: requests per minute.
export function perMinute(percent) {
  return Math.max(1, Math.round((CAPACITY * 60 * percent) / 100));
}

// Requests at an even pace. vus: how many may be waited for at once; by default those of 10 s.
export function constant(percent, seconds, more = {}) {
  return constantPerMinute(perMinute(percent), seconds, more);
}

export function constantPerMinute(rate, seconds, { vus = Math.ceil(rate / 6) + 20, ...more } = {}) {
  return {
    executor: "constant-arrival-rate",
    rate,
    timeUnit: "1m",
    duration: `${seconds}s`,
    preAllocatedVUs: vus, // all of them: while k6 makes one more, it drops requests
    gracefulStop: "150s",
    ...more,
  };
}

// Options of a scenario file. There is no tag with an address in it: an id in a path would be a time series each.
export function optionsOf(scenarios, thresholds) {
  return {
    scenarios,
    thresholds: { checks: ["rate==1"], dropped_iterations: ["count==0"], broken: ["count==0"], ...thresholds },
    systemTags: ["check", "error_code", "expected_response", "method", "name", "scenario", "status"],
    summaryTrendStats: ["min", "avg", "med", "p(95)", "p(99)", "max", "count"],
    setupTimeout: "60s",
  };
}

// Which iteration of its scenario this is, counted over all clients: what it asks for depends on nothing else.
export function iteration() {
  return exec.scenario.iterationInTest;
}

// Numbers from 0 to 1, the same in every run: mulberry32 over seed, scenario and iteration.
export function random() {
  let state = SEED;
  for (const char of `${exec.scenario.name} ${iteration()}`) {
    state = (Math.imul(state, 31) + char.charCodeAt(0)) | 0;
  }
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

// A key that no other iteration has, nor another run: the server remembers keys for a day.
export function keyOf() {
  return `${exec.scenario.name}-${exec.scenario.startTime.toString(36)}-${iteration()}`;
}
