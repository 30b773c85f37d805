// The playground: one form, one stage, one history strip, over the same HTTP API that everyone else uses.

const WAIT_S = 1.5; // then poll, so that a long queue shows where the job stands
const POLL_MS = 250;
const STATUS_MS = 5000;
const MAX_HISTORY = 40;
const STAGES = ["queue", "batch", "encode", "denoise", "decode", "pack", "store"];
const LABELS = { rest: "network and the rest" };

const ICONS = {
  dice: "M5 3h14a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2ZM8.5 8.5h.01M15.5 8.5h.01M12 12h.01M8.5 15.5h.01M15.5 15.5h.01",
  theme: "M12 3a9 9 0 1 0 0 18V3Zm0 0a9 9 0 0 1 0 18",
};

const $ = (id) => document.getElementById(id);

const state = {
  models: [],
  model: null, // the chosen one
  examples: [], // prompts that its bundle says it can draw; the page knows none of its own
  history: [], // newest first: {job, elapsedMs}; of a video, `data` holds its one file
  shown: -1,
  run: null, // the request in progress: {controller, path, jobId}
};

/* Small helpers */

function make(tag, { text, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

function icon(path) {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  const shape = document.createElementNS(namespace, "path");
  const look = { viewBox: "0 0 24 24", fill: "none", stroke: "currentColor", "stroke-width": "1.9", "stroke-linecap": "round", "aria-hidden": "true" };
  Object.entries(look).forEach(([name, value]) => svg.setAttribute(name, value));
  shape.setAttribute("d", path);
  svg.append(shape);
  return svg;
}

const milliseconds = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toString()) + " ms";
const duration = (value) => (value < 1000 ? milliseconds(value) : (value / 1000).toFixed(2) + " s");
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
const wait = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

class ApiError extends Error {
  constructor(status, error, retryAfterMs) {
    super(error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.code = error?.code ?? `http_${status}`;
    this.retryAfterMs = retryAfterMs;
  }
}

async function api(path, options = {}) {
  const response = await fetch(path, { headers: { "content-type": "application/json" }, ...options });
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new ApiError(response.status, body?.error, Number(response.headers.get("retry-after-ms")) || null);
  return body;
}

/* What is served */

// Those that a worker serves, or has served since the page was opened; images first.
async function loadModels(live) {
  const { data } = await api("v1/models");
  const shown = [...live, ...state.models.map((model) => model.id)];
  state.models = data.filter((model) => shown.includes(model.id)).toSorted((a, b) => a.kind.localeCompare(b.kind));
  const ids = state.models.map((model) => model.id);
  if (!ids.length) return;
  useModel(state.models.find((model) => model.id === state.model?.id) ?? state.models[0]);
  segmented($("model"), "model", ids, state.model.id);
  $("model").hidden = ids.length < 2;
}

function useModel(model) {
  state.model = model;
  state.examples = model.examples;
  $("prompt").placeholder = state.examples[0] ?? "";
  if ($("stage").dataset.state === "empty") {
    $("overlay-text").textContent = state.examples.length ? "or pick one of the examples" : "";
  }
  segmented($("steps"), "steps", model.steps.toSorted((a, b) => b - a), model.default_steps);
  $("count").hidden = model.kind === "video";
  $("length").hidden = model.kind !== "video";
  if (model.kind === "video") segmented($("length"), "length", model.seconds, model.seconds[0]);
  showChips();
}

async function watchStatus() {
  try {
    const response = await fetch("readyz");
    const readiness = await response.json();
    const served = Object.entries(readiness.models);
    const live = served.filter(([, model]) => model.workers).map(([name]) => name);
    if (live.some((name) => !state.models.some((model) => model.id === name))) await loadModels(live);
    const workers = served.reduce((sum, [, model]) => sum + model.workers, 0);
    const names = served.map(([name]) => name).join(", ");
    if (readiness.status === "ready") {
      setStatus("ready", `${names} · ${workers} worker${workers === 1 ? "" : "s"}`);
      $("status").title = [...new Set(served.flatMap(([, model]) => [...model.backends, ...model.warnings]))].join("\n");
    } else {
      setStatus("down", readiness.error?.message ?? "not ready");
    }
  } catch {
    setStatus("down", "the server does not answer");
  }
}

function setStatus(name, text) {
  $("status").dataset.state = name;
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
}

/* The form */

function segmented(fieldset, name, values, chosen) {
  const options = make("div", { className: "options" });
  for (const value of values) {
    const input = make("input", { type: "radio", name, value: String(value), checked: value === chosen });
    options.append(make("label", {}, input, make("span", { text: String(value) })));
  }
  fieldset.querySelector(".options")?.remove();
  fieldset.append(options);
}

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function showChips(first = 0) {
  const shownAtOnce = 4;
  const picked = Array.from({ length: Math.min(shownAtOnce, state.examples.length) }, (_, i) => state.examples[(first + i) % state.examples.length]);
  const chips = picked.map((prompt) => make("button", { type: "button", className: "chip", text: prompt, onclick: () => usePrompt(prompt) }));
  if (state.examples.length > shownAtOnce) {
    const more = () => showChips((first + shownAtOnce) % state.examples.length);
    chips.push(make("button", { type: "button", className: "chip chip-more", text: "more", onclick: more }));
  }
  $("chips").replaceChildren(...chips);
}

function usePrompt(prompt) {
  $("prompt").value = prompt;
  draw();
}

/* Drawing */

async function draw() {
  const prompt = $("prompt").value.trim();
  if (!prompt) return $("prompt").focus();
  if (!$("form").reportValidity()) return;
  await cancel();

  const video = state.model?.kind === "video";
  const run = { controller: new AbortController(), path: video ? "v1/videos" : "v1/images", jobId: null };
  state.run = run;
  busy();
  const seed = $("seed").value.trim();
  const started = performance.now();
  try {
    const asked = { prompt, steps: Number(chosen("steps")), model: state.model?.id };
    Object.assign(asked, video ? { seconds: chosen("length") } : { n: Number(chosen("count")), wait_s: WAIT_S });
    if (seed) asked.seed = Number(seed);
    let job = await api(run.path, { method: "POST", body: JSON.stringify(asked), signal: run.controller.signal });
    run.jobId = job.id;
    while (job.status === "queued" || job.status === "in_progress") {
      showProgress(job);
      await wait(POLL_MS, run.controller.signal);
      job = await api(`${run.path}/${job.id}`, { signal: run.controller.signal });
    }
    if (job.status === "failed") throw new ApiError(500, job.error);
    if (job.status === "expired") throw new ApiError(410, { code: "result_expired", message: "the result is no longer kept" });
    const elapsedMs = performance.now() - started;
    if (video) Object.assign(job, { data: [{ url: job.url, seed: job.seed }] });
    await Promise.all(job.data.map(({ url }) => (video ? preloadVideo(url) : preload(url))));
    if (state.run === run) remember({ job, elapsedMs });
  } catch (error) {
    if (state.run === run && error.name !== "AbortError") showError(error);
  } finally {
    if (state.run === run) state.run = null;
  }
}

async function cancel() {
  const run = state.run;
  if (!run) return;
  state.run = null;
  run.controller.abort();
  if (run.jobId) await api(`${run.path}/${run.jobId}`, { method: "DELETE" }).catch(() => {});
}

async function preload(url) {
  const image = new Image();
  image.src = local(url);
  await image.decode().catch(() => {
    throw new ApiError(0, { code: "image_unreadable", message: "the picture could not be loaded" });
  });
}

function preloadVideo(url) {
  return new Promise((resolve, reject) => {
    const message = "the video could not be played; does this browser have H.264?";
    const video = make("video", { muted: true, preload: "auto", onloadeddata: resolve });
    video.onerror = () => reject(new ApiError(0, { code: "video_unreadable", message }));
    video.src = local(url);
  });
}

// The server names itself as the client addressed it; behind a proxy only the path is sure to be ours.
function local(url) {
  const { pathname, search } = new URL(url);
  return pathname + search;
}

/* The stage */

function setStage(name, title = "", text = "") {
  const stage = $("stage");
  stage.dataset.state = name;
  delete stage.dataset.slow;
  $("overlay-title").textContent = title;
  $("overlay-text").replaceChildren(text);
  $("progress").hidden = true;
  $("cancel").hidden = true;
  $("draw-text").textContent = name === "busy" ? "Drawing" : "Draw";
}

function busy() {
  setStage("busy", "Drawing");
}

function showProgress(job) {
  $("stage").dataset.slow = "";
  const ahead = job.queue_position;
  const title = job.status === "in_progress" ? "Drawing" : "In the queue";
  const where = job.status === "queued" && ahead ? `${ahead} ahead` : "";
  const eta = job.eta_s === null ? (job.status === "queued" ? "waiting for a worker" : "") : `about ${duration(job.eta_s * 1000)}`;
  $("overlay-title").textContent = title;
  $("overlay-text").textContent = [where, eta].filter(Boolean).join(" · ");
  $("progress").hidden = false;
  $("progress-bar").style.width = `${job.progress}%`;
  $("cancel").hidden = false;
}

function showError(error) {
  const known = error instanceof ApiError;
  const title = { 429: "Too busy right now", 503: "Not available right now" }[error.status] ?? "That did not work";
  setStage("error", title, known ? error.message : "the server does not answer; is it running?");
  if (known) $("overlay-text").append(document.createElement("br"), make("code", { text: error.code }));
  if (error.retryAfterMs) $("overlay-text").append(make("code", { text: ` · again in ${duration(error.retryAfterMs)}` }));
  $("facts").hidden = true;
}

function remember(entry) {
  state.history.unshift(entry);
  state.history.length = Math.min(state.history.length, MAX_HISTORY);
  show(0);
}

function show(index) {
  const entry = state.history[index];
  if (!entry) return;
  state.shown = index;
  const { job, elapsedMs } = entry;
  setStage("done");
  $("stage").dataset.count = job.data.length;
  const pictures = $("pictures");
  pictures.style.setProperty("--columns", Math.ceil(Math.sqrt(job.data.length)));
  pictures.replaceChildren(...(job.object === "video" ? [film(job)] : job.data.map((image, i) => picture(job, image, i))));
  showFacts(job, elapsedMs);
  showHistory();
}

function picture(job, image, i) {
  const source = local(image.url);
  const alt = job.data.length > 1 ? `${job.prompt}, picture ${i + 1} of ${job.data.length}` : job.prompt;
  const shown = make("img", { src: source, alt, title: `seed ${image.seed}` });
  const inner = [make("img", { src: source, alt: "", className: "halo" }), shown];
  shown.addEventListener("load", () => enlarge(shown), { once: true });
  if (job.data.length === 1) return make("div", { className: "picture" }, ...inner);
  // One of several opens on its own: the same seed draws the same picture.
  const open = () => {
    const alone = { ...job, n: 1, seed: image.seed, data: [image] };
    remember({ job: alone, elapsedMs: state.history[state.shown].elapsedMs });
  };
  return make("button", { type: "button", className: "picture", onclick: open }, ...inner);
}

function film(job) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const properties = { controls: true, loop: true, muted: true, playsInline: true, autoplay: !still };
  const poster = `${local(job.url)}?variant=thumbnail`;
  const video = make("video", { ...properties, src: local(job.url), poster, title: `seed ${job.seed}` });
  video.setAttribute("aria-label", job.prompt);
  return make("div", { className: "picture" }, video);
}

// Browsers enlarge small pictures with visible steps. A canvas over the picture holds a smoother enlargement: the
// picture, and over it the same blurred by less than one of its pixels (alone, the blur would fade at the borders).
function enlarge(image) {
  const size = Math.round(image.clientWidth * devicePixelRatio);
  if (size <= image.naturalWidth) return;
  const canvas = make("canvas", { width: size, height: size });
  canvas.setAttribute("aria-hidden", "true");
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, size, size);
  context.filter = `blur(${(0.45 * size) / image.naturalWidth}px)`;
  context.drawImage(image, 0, 0, size, size);
  image.after(canvas);
}

function showFacts(job, elapsedMs) {
  const timing = job.timing_ms;
  const known = STAGES.filter((stage) => timing[stage] > 0).map((stage) => [stage, timing[stage]]);
  const rest = elapsedMs - known.reduce((sum, [, spent]) => sum + spent, 0);
  const parts = rest > 0 ? [...known, ["rest", rest]] : known;
  $("bar").replaceChildren(
    ...parts.map(([stage, spent]) => {
      const part = make("span", { title: `${LABELS[stage] ?? stage}: ${milliseconds(spent)}` });
      part.dataset.stage = stage;
      part.style.flex = `${spent} 0 0`;
      return part;
    }),
  );
  $("bar").setAttribute("aria-label", parts.map(([stage, spent]) => `${LABELS[stage] ?? stage} ${milliseconds(spent)}`).join(", "));
  $("legend").replaceChildren(
    ...parts.map(([stage, spent]) => {
      const entry = make("li", {}, make("i"), make("span", { text: LABELS[stage] ?? stage }), make("b", { text: milliseconds(spent) }));
      entry.dataset.stage = stage;
      return entry;
    }),
  );
  $("caption").textContent = job.prompt;
  $("warnings").textContent = job.warnings.join(". ");
  $("warnings").hidden = job.warnings.length === 0;
  $("elapsed").textContent = duration(elapsedMs);
  $("total").textContent = duration(timing.total ?? 0);
  $("used-steps").textContent = job.steps;
  $("used-seed").textContent = job.seed;
  $("used-model").textContent = job.model;
  const only = job.data.length === 1;
  $("download").hidden = !only;
  if (only) {
    $("download").href = local(job.data[0].url);
    $("download").download = `${job.prompt.replace(/[^a-z0-9]+/gi, "-").slice(0, 60)}-${job.seed}.${job.output_format}`;
  }
  $("facts").hidden = false;
}

function showHistory() {
  $("history-section").hidden = state.history.length < 2;
  const thumbs = state.history.map(({ job }, index) => {
    const thumb = make("button", { type: "button", className: "thumb", title: job.prompt, onclick: () => show(index) });
    const src = local(job.data[0].url);
    thumb.append(job.object === "video" ? make("video", { src, muted: true, preload: "metadata" }) : make("img", { src, alt: job.prompt }));
    thumb.setAttribute("role", "listitem");
    if (index === state.shown) thumb.setAttribute("aria-current", "true");
    return thumb;
  });
  $("history").replaceChildren(...thumbs);
  const current = $("history").children[state.shown];
  if (current) $("history").scrollLeft = current.offsetLeft - $("history").clientWidth / 2;
}

/* Wiring */

function roll() {
  $("seed").value = randomSeed();
}

function toggleTheme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(dark ? "light" : "dark");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("textarea, input:not([type=radio])");
  if (event.key === "Escape") {
    if (state.run) cancel().then(() => (state.history.length ? show(Math.max(0, state.shown)) : setStage("empty", "Cancelled")));
    else event.target.blur();
  } else if (event.target === $("prompt") && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    draw();
  } else if (typing || event.target.matches("video")) {
    return; // a video has keys of its own
  } else if (event.key === "/") {
    event.preventDefault();
    $("prompt").select();
  } else if (event.key === "r") {
    roll();
    draw();
  } else if (event.key === "ArrowLeft" && !event.target.matches("input")) {
    show(Math.max(0, state.shown - 1));
  } else if (event.key === "ArrowRight" && !event.target.matches("input")) {
    show(Math.min(state.history.length - 1, state.shown + 1));
  }
}

function start() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  $("dice").append(icon(ICONS.dice));
  $("theme").append(icon(ICONS.theme));
  segmented($("steps"), "steps", [4, 2, 1], 4);
  segmented($("count"), "count", [1, 2, 4], 1);
  $("model").addEventListener("change", () => useModel(state.models.find((model) => model.id === chosen("model"))));
  showChips();

  $("form").addEventListener("submit", (event) => (event.preventDefault(), draw()));
  $("dice").addEventListener("click", roll);
  $("theme").addEventListener("click", toggleTheme);
  $("cancel").addEventListener("click", () => cancel().then(() => setStage("empty", "Cancelled")));
  $("used-seed").addEventListener("click", () => ($("seed").value = $("used-seed").textContent));
  $("pixels").addEventListener("click", () => {
    const on = $("stage").classList.toggle("pixels");
    $("pixels").setAttribute("aria-pressed", String(on));
  });
  document.addEventListener("keydown", onKey);

  $("prompt").focus();
  watchStatus();
  setInterval(watchStatus, STATUS_MS);
}

start();
