// The page: what is asked for on the left, the image in the middle, what was generated before at the bottom.
// Text of people's goes into the page as text only (textContent), never as HTML.

import { $, call, element } from "/api.js";
import { Mask, paint } from "/brush.js";

const form = $("form");
const FIELDS = ["prompt", "negative", "width", "height", "number", "steps", "guidance", "scheduler", "seed", "strength"];
const ACTIVE = ["queued", "drawing"];

let model; // what GET /api/model says
let source = null; // the image to begin with: an ImageBitmap
let mask = new Mask();
let shown = null; // the image on the stage, as GET /api/images gives it
let jobs = []; // mine that are queued or drawn
const failures = new Map(); // id -> {prompt, error}, until they are dismissed
const images = new Map(); // name -> image, all that the history shows

// ------------------------------------------------------------------------------------------------------ the server

async function submit(wanted) {
  showError("");
  const job = await call("/api/jobs", { body: wanted });
  jobs = [...jobs.filter((known) => known.id !== job.id), job]; // the stream may have sent it before this answer
  listJobs();
  if (narrow()) $("queue").lastElementChild?.scrollIntoView({ block: "nearest", behavior: "smooth" });
  watch();
}

let stream = null;

function watch() {
  if (stream) return;
  stream = new EventSource("/api/events");
  stream.onmessage = (event) => {
    showNotice("");
    update(JSON.parse(event.data).jobs);
    if (!jobs.length) unwatch();
  };
  stream.onerror = () => {
    unwatch();
    if (jobs.length) setTimeout(resume, 1000);
  };
}

function unwatch() {
  stream?.close();
  stream = null;
}

// After a reload, or when the server was away.
async function resume() {
  try {
    const known = (await call("/api/jobs?mine=true&limit=500")).jobs;
    const ids = new Set(known.map((job) => job.id));
    for (const job of jobs.filter((job) => !ids.has(job.id))) {
      failures.set(job.id, { prompt: job.asked.prompt, error: "The server was restarted before this was generated." });
    }
    const waited = new Set(jobs.map((job) => job.id));
    jobs = jobs.filter((job) => ids.has(job.id));
    showNotice("");
    await update(known.filter((job) => ACTIVE.includes(job.state) || waited.has(job.id)));
    if (jobs.length) watch();
  } catch {
    showNotice("The server can’t be reached. Trying again …");
    setTimeout(resume, 3000);
  }
}

async function update(all) {
  const ids = new Set(all.map((job) => job.id));
  if (jobs.some((job) => !ids.has(job.id))) return resume(); // it was over before the stream began
  for (const job of all) {
    if (job.state === "failed") failures.set(job.id, { prompt: job.asked.prompt, error: job.error });
  }
  jobs = all.filter((job) => ACTIVE.includes(job.state)).sort((a, b) => (a.position ?? -1) - (b.position ?? -1));
  listJobs();
  const links = all.flatMap((job) => job.pictures);
  if (links.some((link) => !images.has(link.name))) {
    await load();
    const newest = links.filter((link) => images.has(link.name)).sort((a, b) => b.name - a.name)[0];
    if (newest) show(images.get(newest.name), all.find((job) => job.pictures.includes(newest)).note);
    const writes = document.activeElement.matches("textarea, input");
    if (newest && narrow() && !writes) $("frame").scrollIntoView({ block: "nearest", behavior: "smooth" });
  }
}

// ------------------------------------------------------------------------------------------------------- messages

const narrow = () => matchMedia("(max-width: 900px)").matches; // one column: the image is below the form

function showError(text) {
  $("error").hidden = !text;
  $("error").textContent = text;
}

function showNotice(text) {
  text ||= folderError;
  $("notice").hidden = !text;
  $("notice").textContent = text;
}

function listJobs() {
  const drawn = jobs.find((job) => job.state === "drawing");
  const share = drawn?.of ? Math.round((100 * drawn.step) / drawn.of) : 0;
  $("progress").hidden = !drawn;
  $("progress").setAttribute("aria-valuenow", share);
  $("progress").firstElementChild.style.width = `${share}%`;
  const rows = jobs.map((job) => {
    const row = element("li");
    const where =
      job.state === "drawing"
        ? job.of ? `step ${job.step} of ${job.of}` : "beginning"
        : job.position ? `${job.position} before it` : "next";
    const cancel = element("button", { type: "button" }, "Cancel");
    cancel.setAttribute("aria-label", `Cancel ${job.asked.prompt}`);
    cancel.onclick = async () => {
      cancel.disabled = true;
      try {
        await call(`/api/jobs/${job.id}`, { method: "DELETE" });
      } catch (error) {
        showError(error.message);
      }
    };
    const status = [where, job.cost].filter(Boolean).join(" · ");
    row.append(element("b", {}, job.asked.prompt || "(no prompt)"), element("span", { className: "hint" }, status), cancel);
    return row;
  });
  for (const [id, { prompt, error }] of failures) {
    const row = element("li", { className: "failed" });
    const dismiss = element("button", { type: "button" }, "Dismiss");
    dismiss.onclick = () => {
      failures.delete(id);
      listJobs();
    };
    row.append(element("b", {}, prompt || "(no prompt)"), element("span", {}, error), dismiss);
    rows.push(row);
  }
  const focused = [...$("queue").children].findIndex((row) => row.contains(document.activeElement));
  $("queue").replaceChildren(...rows);
  if (focused >= 0) rows[Math.min(focused, rows.length - 1)]?.querySelector("button").focus();
}

// --------------------------------------------------------------------------------------------------------- history

let folderError = ""; // why the folder of images could not be read
let retryTimer; // the timer of the next try

async function load(before) {
  let page;
  try {
    page = await call(`/api/images?limit=24${before ? `&before=${before}` : ""}`);
  } catch (error) {
    showNotice((folderError = error.message));
    clearTimeout(retryTimer);
    retryTimer = setTimeout(() => load().catch(() => {}), 5000);
    throw error;
  }
  folderError = "";
  showNotice("");
  for (const image of page.pictures) images.set(image.name, image);
  const all = [...images.values()].sort((a, b) => b.name - a.name);
  const there = new Map([...$("history").children].map((item) => [item.dataset.name, item]));
  $("history").replaceChildren(...all.map((image) => there.get(image.name) ?? thumbnail(image)));
  if (before || all.length === page.pictures.length) $("older").hidden = !page.more;
  document.querySelector(".history").hidden = !all.length;
}

function thumbnail(image) {
  const item = element("li");
  item.dataset.name = image.name;
  const button = element("button", { type: "button" });
  const view = element("img", { loading: "lazy", alt: image.facts.prompt || `Image ${Number(image.name)}` });
  view.onload = () => view.classList.toggle("small", view.naturalWidth < 160);
  view.src = image.url;
  button.append(view);
  if (image.facts.nsfw?.flagged) button.append(element("em", {}, "flagged"));
  button.onclick = () => {
    show(image);
    $("frame").scrollIntoView({ block: "nearest", behavior: "smooth" });
  };
  item.append(button);
  return item;
}

function show(image, note = "") {
  shown = image;
  $("note").hidden = !note;
  $("note").textContent = note;
  const { facts } = image;
  const view = $("shown");
  view.onload = () => view.classList.toggle("small", view.naturalWidth < 160);
  view.src = image.url;
  view.alt = facts.prompt || "an image without a prompt";
  view.hidden = false;
  $("empty").hidden = true;
  $("about").hidden = false;
  $("caption").textContent = facts.prompt || "(no prompt)";
  const nsfw = facts.nsfw ?? {};
  $("flag").hidden = !nsfw.flagged;
  $("flag").textContent = nsfw.flagged
    ? `Flagged as not safe for work: ${nsfw.score.toFixed(2)} of 1 (from ${nsfw.threshold})` + (nsfw.blurred ? ", and blurred" : "")
    : "";
  const begun = facts.mask ? "redrawn in part" : facts.upscale > 1 ? `enlarged ${facts.upscale}×` : facts.image ? "from an image" : "";
  $("details").textContent = [
    `No. ${Number(image.name)}`, `seed ${facts.seed}`, `${facts.steps} steps`, `guidance ${facts.guidance}`,
    facts.scheduler?.replace("Scheduler", ""), facts.upscale > 1 ? "" : `${facts.width} × ${facts.height}`, begun,
    facts.negative && `without: ${facts.negative}`,
  ].filter(Boolean).join(" · ");
  $("download").href = image.url;
  $("download").download = `${image.name}.png`;
  for (const button of document.querySelectorAll("#history button")) {
    button.setAttribute("aria-current", String(button.parentElement.dataset.name === image.name));
  }
}

// ----------------------------------------------------------------------------------------------- what is begun with

// The image as it is sent: cut to the shape that is asked for, from its middle.
function cut(width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const scale = Math.max(width / source.width, height / source.height);
  const [w, h] = [source.width * scale, source.height * scale];
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(source, (width - w) / 2, (height - h) / 2, w, h);
  return canvas;
}

function showBegin() {
  $("begin").hidden = !source;
  document.querySelector(".choose").hidden = Boolean(source);
  $("strength-row").hidden = !source;
  if (!source) return;
  const { width, height } = size();
  const scale = Math.max(1, Math.round(330 / Math.max(width, height)));
  const canvas = $("input");
  [canvas.width, canvas.height] = [width * scale, height * scale];
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = Math.max(width, height) >= 160;
  pen.drawImage(cut(width, height), 0, 0, canvas.width, canvas.height);
  mask.show(canvas);
  $("paint").textContent = mask.empty ? "Paint what to redraw" : "Change what is painted";
}

async function beginWith(blob, { fit = true } = {}) {
  if (!model.takes_image) return showError("This model draws from words alone: it begins with no image.");
  try {
    source = await createImageBitmap(blob);
  } catch {
    return showError("This file is no image that a browser can read.");
  }
  showError("");
  mask = new Mask();
  if (fit) {
    const { width, height } = model.defaults; // as many pixels as the model draws by itself, in the image's shape
    const ratio = Math.sqrt((width * height) / (source.width * source.height));
    const whole = (side) => Math.max(model.step, Math.round((side * ratio) / model.step) * model.step);
    [form.width.value, form.height.value] = [whole(source.width), whole(source.height)];
  }
  $("strength").value = model.defaults.strength;
  changed();
}

function drop(blob) {
  if (blob?.type.startsWith("image/")) beginWith(blob);
  else if (blob) showError("This is no image.");
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

const png = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));

// -------------------------------------------------------------------------------------------------------- the form

const size = () => ({ width: Number(form.width.value) || model.step, height: Number(form.height.value) || model.step });

function newSeed() {
  form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
}

const locked = () => $("lock").getAttribute("aria-pressed") === "true";

function changed() {
  for (const output of form.querySelectorAll("output")) output.value = $(output.htmlFor[0]).value;
  showBegin();
  keep();
}

function keep() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, form[name].value]));
  localStorage.setItem("tastemaker.form", JSON.stringify({ ...values, locked: locked(), model: model.name }));
  try {
    const { width, height } = size();
    const input = source && JSON.stringify({ picture: cut(width, height).toDataURL(), strokes: mask.strokes });
    if (input) localStorage.setItem("tastemaker.input", input);
    else localStorage.removeItem("tastemaker.input");
  } catch {
    localStorage.removeItem("tastemaker.input"); // larger than a browser keeps
  }
}

async function restore() {
  const own = { ...model.defaults, number: 1, prompt: "", negative: "" };
  const kept = JSON.parse(localStorage.getItem("tastemaker.form") ?? "{}");
  for (const name of FIELDS) if (name in own) form[name].value = own[name];
  newSeed();
  for (const name of FIELDS) {
    const fits = kept.model === model.name || ["prompt", "negative"].includes(name); // sizes are a model's own
    if (kept[name] && fits) form[name].value = kept[name];
  }
  if (!form.scheduler.value) form.scheduler.value = model.defaults.scheduler;
  $("lock").setAttribute("aria-pressed", String(Boolean(kept.locked)));
  const input = JSON.parse(localStorage.getItem("tastemaker.input") ?? "null");
  if (input && model.takes_image) {
    const [head, data] = input.picture.split(",");
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    source = await createImageBitmap(new Blob([bytes], { type: head.slice(5, -7) })).catch(() => null);
    mask = new Mask(input.strokes);
  }
  changed();
}

async function formRequest() {
  const numbers = ["width", "height", "number", "steps", "guidance", "seed"];
  const asked = Object.fromEntries(numbers.map((name) => [name, Number(form[name].value)]));
  for (const name of ["prompt", "negative", "scheduler"]) asked[name] = form[name].value.trim();
  if (!model.takes_negative) asked.negative = "";
  if (source) {
    const { width, height } = size();
    asked.image = await base64(await png(cut(width, height)));
    if (!mask.empty) asked.mask = await base64(await png(mask.canvas(width, height)));
    asked.strength = Number(form.strength.value);
  }
  return asked;
}

// Without words a model draws anything: so that is asked about once.
function asksForWords() {
  const asked = !$("asks").hidden;
  $("asks").hidden = Boolean(form.prompt.value.trim()) || asked;
  if ($("asks").hidden) return false;
  $("asks").textContent = "Say what should be in the image. Or draw once more, for an image without words.";
  form.prompt.focus();
  return true;
}

function bind() {
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (asksForWords()) return;
    $("draw").disabled = true;
    try {
      await submit(await formRequest());
      if (!locked()) newSeed();
      keep();
    } catch (error) {
      showError(error.message);
    }
    $("draw").disabled = false;
  };
  form.oninput = changed;
  form.prompt.addEventListener("input", () => ($("asks").hidden = true));
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && !$("brush").open) form.requestSubmit();
  });
  $("swap").onclick = () => {
    [form.width.value, form.height.value] = [form.height.value, form.width.value];
    changed();
  };
  $("lock").onclick = () => {
    $("lock").setAttribute("aria-pressed", String(!locked()));
    keep();
  };
  $("dice").onclick = () => {
    newSeed();
    keep();
  };
  $("reset").onclick = () => {
    const own = { ...model.defaults, number: 1 };
    for (const name of FIELDS) if (name in own) form[name].value = own[name];
    changed();
  };

  $("file").onchange = () => {
    drop($("file").files[0]);
    $("file").value = "";
  };
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("well").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("well").classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("well").classList.remove("over");
    drop(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
    if (file) beginWith(file);
  });
  $("remove").onclick = () => {
    source = null;
    mask = new Mask();
    changed();
    $("file").focus();
  };
  $("paint").onclick = async () => {
    const { width, height } = size();
    const before = mask.empty;
    mask = await paint($("brush"), cut(width, height), mask);
    if (before && !mask.empty) $("strength").value = model.defaults.strength_mask;
    changed();
  };

  $("reuse").onclick = () => {
    const { facts } = shown;
    for (const name of ["prompt", "negative", "steps", "guidance", "scheduler", "seed", "width", "height", "strength"]) {
      if (facts[name] !== null && facts[name] !== undefined) form[name].value = facts[name];
    }
    form.number.value = 1;
    $("lock").setAttribute("aria-pressed", "true"); // else the next image would be another one
    showError(facts.image ? "It was generated from another image, which you would have to add again." : "");
    changed();
  };
  $("again").onclick = async () => {
    await beginWith(await (await fetch(shown.url)).blob());
    $("well").scrollIntoView({ block: "nearest" });
  };
  $("enlarge").onclick = async () => {
    const { facts } = shown;
    try {
      await submit({
        prompt: facts.prompt, negative: facts.negative ?? "", seed: facts.seed, upscale: 2, scheduler: facts.scheduler,
        steps: Math.min(facts.steps, model.limits.steps), guidance: Math.min(facts.guidance, model.limits.guidance),
        image: await base64(await (await fetch(shown.url)).blob()),
      });
    } catch (error) {
      showError(error.message);
    }
  };
  $("older").onclick = () => load([...images.keys()].sort((a, b) => a - b)[0]).catch(() => {});
  document.addEventListener("visibilitychange", () => document.hidden || load().catch(() => {}));
}

// --------------------------------------------------------------------------------------------------------- to begin

// The model's facts, once it is loaded; until then, and where it can't be, that is said.
async function loadedModel() {
  for (;;) {
    try {
      return await call("/api/model");
    } catch (error) {
      if (error.status !== 503) throw error;
      $("model").textContent = error.message;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

async function open() {
  model = await loadedModel();
  $("model").textContent = `${model.name}, on ${model.device}`;
  for (const name of ["width", "height"]) Object.assign(form[name], { min: model.step, step: model.step });
  for (const id of ["well", "again", "enlarge"]) $(id).hidden = !model.takes_image;
  $("paint").hidden = !model.takes_mask;
  $("leave-out").hidden = !model.takes_negative;
  form.number.max = model.limits.number;
  form.steps.max = model.limits.steps;
  form.prompt.maxLength = form.negative.maxLength = model.limits.prompt;
  form.scheduler.replaceChildren(
    ...model.schedulers.map((name) => element("option", { value: name }, name.replace("Scheduler", ""))),
  );
  await restore();
  bind();
  await load().catch(() => {}); // it has shown why
  const newest = [...images.values()].sort((a, b) => b.name - a.name)[0];
  if (newest) show(newest);
  await resume();
  document.body.dataset.ready = "true";
  $("prompt").focus({ preventScroll: true });
}

open().catch((error) => showNotice(error.message));
