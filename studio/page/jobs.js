// Commands that wait, run or ran, as a list: how far each is, its last lines, how it ended, what it wrote.

import { element } from "/api.js";
import { count } from "/numbers.js";
import { button, copyButton, hint } from "/panels.js";

const LINES = 6; // of a command's last ones, while it runs
const ACTIVE = ["waiting", "running"];
const WORDS = { waiting: "waits", done: "Done", failed: "Failed", cancelled: "Cancelled" };

export const isActive = ({ state }) => ACTIVE.includes(state);

// What is opened or has the focus stays so.
export function showJobs(list, jobs, cancel) {
  const open = new Set([...list.querySelectorAll("details[open]")].map((one) => one.dataset.id));
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const drawn = jobs.find(({ paths }) => paths?.look); // the newest sheet is shown, of the others the file
  list.replaceChildren(...jobs.map((job) => jobRow(job, { open: open.has(job.id), cancel, sheet: job === drawn })));
  if (focused) list.querySelector(`button[data-id="${CSS.escape(focused)}"]`)?.focus();
}

function jobRow(job, { open, cancel, sheet }) {
  const row = element("li", { className: `job ${job.state}` });
  const state = element("span", { className: "job-state" }, says(job));
  row.append(element("code", { title: job.command }, job.command), state);
  if (isActive(job)) row.append(...running(job, cancel));
  const last = job.lines.slice(-LINES).join("\n");
  if (last && (isActive(job) || job.state === "failed")) row.append(element("pre", { textContent: last }));
  else if (last) row.append(lastLines(job, open));
  row.append(...Object.entries(job.paths ?? {}).map(written));
  if (sheet) row.append(sheetOf(job));
  return row;
}

function says({ state, progress, seconds, exit }) {
  if (state === "running") {
    if (!progress) return "runs";
    return `${count(progress.done)} of ${count(progress.of)}${progress.eta ? `, ${progress.eta} left` : ""}`;
  }
  if (state === "done" && seconds) return `Done in ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  return state === "failed" && exit !== null ? `Failed (exit code ${exit})` : (WORDS[state] ?? state);
}

function running(job, cancel) {
  const stop = button("Cancel", () => cancel(job, stop));
  stop.dataset.id = job.id;
  const bar = element("progress", { max: job.progress?.of || 1 });
  if (job.progress) bar.value = job.progress.done;
  return [stop, bar];
}

function lastLines({ id, lines }, open) {
  const all = element("pre", { textContent: lines.join("\n") });
  const made = element("details", { open }, element("summary", {}, "What it said"), all);
  made.dataset.id = id;
  return made;
}

// The contact sheet that a command drew: below report/ in the folder of its selection.
function sheetOf({ id, paths }) {
  const name = paths.look.split("/").at(-2);
  const address = `/api/sheets/${encodeURIComponent(name)}.png?${id}`;
  const image = element("img", { src: address, alt: `Contact sheet of ${name}`, loading: "lazy" });
  return element("a", { href: address, target: "_blank", title: "Open it large" }, image);
}

// A file that a command wrote: its path, to copy.
function written([name, path]) {
  const what = hint(name === "look" ? "sheet" : name);
  const parts = path.split("/");
  const end = element("code", { title: path }, parts.length > 3 ? `…/${parts.slice(-3).join("/")}` : path);
  return element("p", { className: "job-path" }, what, end, copyButton(path));
}
