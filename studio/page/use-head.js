// Use a head: fit it to all ratings, then score every image with it, so that it is a column of the data folder. Both
// are commands of a terminal, shown here while they run.

import { $, call, element } from "/api.js";

const ENDED = ["done", "failed", "cancelled"];

export function openUse(set, head) {
  const dialog = $("use");
  const commands = element("pre", { tabIndex: 0 }, [head.command, head.apply].filter(Boolean).join("\n"));
  const said = element("p", { role: "status" });
  const bar = element("progress", { hidden: true });
  const output = element("pre", { hidden: true, tabIndex: 0 });
  output.setAttribute("aria-label", "What the command says");
  const go = element("button", { className: "primary", type: "button" }, "Score all images");
  const close = element("button", { className: "quiet", type: "button", onclick: () => dialog.close() }, "Close");
  const actions = [
    { action: "fit", name: set.name, says: "Fitting the head …" },
    { action: "apply", name: set.name, says: "Scoring all images …" },
  ];
  dialog.replaceChildren(
    element("h2", { id: "use-title" }, "Use what it has learnt"),
    element("p", {}, `Every image gets a score, as the column “${set.name}”: to sort by, and for rules like any other.`),
    element("p", { className: "hint" }, "In a terminal:"),
    commands, said, bar, output,
    element("div", { className: "row" }, go, close),
  );
  go.onclick = async () => {
    go.disabled = true;
    said.className = "";
    try {
      for (const action of actions) await run(action, { said, bar, output });
      said.textContent = "Reading the new column …";
      await isThere(set.name);
      said.textContent = "Done.";
      close.before(linkTo(set.name));
      go.hidden = true;
    } catch (error) {
      said.className = "error";
      said.textContent = error.message;
    }
    bar.hidden = true;
    go.disabled = false;
  };
  dialog.showModal();
  go.focus();
}

const asked = ({ says, ...action }) => action;

// Where the Explore page shows all images by this column, the highest first.
export function linkTo(column) {
  const query = new URLSearchParams({ show: "all", sort: column, descending: "true" });
  return element("a", { className: "button", href: `/#${query}` }, "See all images in this order");
}

// Once the Explore page knows the column.
async function isThere(column) {
  for (let tries = 0; tries < 600; tries++) {
    const { columns, index, stale } = await call("/api/data");
    if (index.state !== "building" && !stale && columns.some(({ name }) => name === column)) return;
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

// Run a command, and show how far it is until it is over. Throws an Error with its last line where it fails.
async function run(action, { said, bar, output }) {
  said.textContent = action.says;
  const job = await call("/api/commands", { body: asked(action) });
  const last = await follow(job, (now) => {
    output.hidden = !now.lines.length;
    output.textContent = now.lines.join("\n");
    output.scrollTop = output.scrollHeight;
    bar.hidden = false;
    if (now.progress?.of) Object.assign(bar, { max: now.progress.of, value: now.progress.done });
    else bar.removeAttribute("value");
  });
  if (last.state !== "done") throw new Error(last.lines.at(-1) || `It ended: ${last.state}.`);
}

// The command when it is over; show(command) is called each time that it changed.
async function follow(job, show) {
  while (!ENDED.includes(job.state)) {
    show(job);
    await new Promise((resolve) => setTimeout(resolve, 500));
    try {
      job = await call(`/api/commands/${job.id}`);
    } catch (error) {
      if (error.status === 404) throw error; // of before a restart
    }
  }
  show(job);
  return job;
}
