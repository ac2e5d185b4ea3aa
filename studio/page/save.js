// Save: the selection under a name, packed, as a contact sheet, or its recipe as YAML. Each is one command (two where
// it has to be saved first), which is shown before it runs, and can be copied; what runs is shown with its last lines
// until it is over, and after (jobs.js).

import { ApiError, call, element, $ } from "/api.js";
import { isActive, showJobs } from "/jobs.js";
import { button, commandLine, copyButton, hint, many, opensUnder } from "/panels.js";
import { loadData, state, subscribe } from "/store.js";

const SHOWN = 8; // commands
const WAYS = [
  { action: "select", button: "Save", title: "Selection", hint: "which images are kept, under this name" },
  { action: "pack", button: "Pack", title: "Pack", hint: "its images, copied into shards to train on" },
  { action: "sheet", button: "Draw", title: "Contact sheet", hint: "kept and rejected images on one PNG" },
];

class SaveMenu {
  constructor(place) {
    this.readOnly = state.data.read_only;
    this.jobs = [];
    this.followed = new Set(); // ids of those that are shown as they go
    this.button = element("button", { type: "button", className: "save-open" }, this.readOnly ? "Recipe" : "Save");
    this.panel = element("div", { className: "save", role: "dialog" });
    this.panel.setAttribute("aria-label", this.button.textContent);
    place.append(this.button, this.panel);
    opensUnder(this.button, this.panel);
    this.build();
    this.panel.addEventListener("toggle", (event) => event.newState === "open" && this.opened());
    subscribe(["rules", "failure", "data"], () => this.changed());
    if (!this.readOnly) this.resume();
  }

  get isOpen() {
    return this.panel.matches(":popover-open");
  }

  build() {
    const plain = { type: "text", maxLength: 100, spellcheck: false, autocomplete: "off" };
    this.name = element("input", { ...plain, id: "save-name", value: state.data.recipe_name ?? "" });
    this.name.oninput = () => this.changed();
    this.note = element("p", { className: "hint" });
    this.error = element("p", { className: "error" });
    this.error.setAttribute("role", "alert");
    this.ways = element("div", { className: "save-ways" });
    this.yaml = element("pre", { className: "save-yaml", tabIndex: 0 });
    this.yaml.setAttribute("aria-label", "Recipe as YAML");
    const copy = copyButton(() => this.yaml.textContent, "Copy the YAML");
    const summary = element("summary", {}, "The recipe as YAML");
    const recipe = element("details", { className: "save-recipe", open: this.readOnly }, summary, this.yaml, copy);
    this.list = element("ul", { className: "jobs" });
    this.list.setAttribute("aria-label", "Commands that run or ran");
    const label = element("label", { htmlFor: "save-name" }, "Name");
    const ways = this.readOnly ? [] : WAYS;
    for (const way of ways) this.ways.append(this.way(way));
    if (this.readOnly) {
      this.command = element("div", { className: "save-commands" });
      this.ways.append(hint("This studio writes nothing. In a terminal this saves the selection:"), this.command);
    }
    const name = element("div", { className: "save-name" }, label, this.name);
    this.panel.append(name, this.note, this.error, this.ways, recipe, this.list);
  }

  way(way) {
    way.run = button(way.button, () => this.run(way));
    if (way === WAYS[0]) way.run.classList.add("primary");
    way.commands = element("div", { className: "save-commands" });
    const words = element("div", {}, element("b", {}, way.title), " ", hint(way.hint));
    return element("div", { className: "save-way" }, words, way.run, way.commands);
  }

  opened() {
    this.changed(true);
    if (!this.readOnly) this.resume(); // others may have begun some
    this.name.focus();
    this.name.select();
  }

  // ------------------------------------------------------------------------------------------------------ previews

  get rules() {
    return state.rules.map(({ name, condition, on }) => ({ name, condition, on }));
  }

  body(action) {
    const body = { action, name: this.name.value.trim() };
    return action === "select" || action === "recipe" ? { ...body, rules: this.rules } : body;
  }

  // The commands of now, a moment after the last change.
  changed(now = false) {
    if (!this.isOpen) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.preview(), now ? 0 : 250);
    const known = this.known;
    const notes = state.live ? [`${many(state.live.kept, "image")} kept`] : [];
    if (known) notes.push(this.isSaved(known) ? "saved just so already" : `replaces what is saved as ${known.name}`);
    this.note.textContent = notes.join(" · ");
  }

  // The saved selection of this name.
  get known() {
    return state.data.selections.find(({ name }) => name === this.name.value.trim());
  }

  // What has to be run: what is saved just so need not be saved again.
  actionsOf({ action }) {
    return action === "select" || (this.known && this.isSaved(this.known)) ? [action] : ["select", action];
  }

  isSaved({ rules, stale }) {
    const text = (some) => JSON.stringify(some.map(({ name, condition }) => [name, condition]));
    return !stale && text(rules) === text(this.rules.filter(({ on }) => on));
  }

  async preview() {
    const names = ["select", "recipe", ...(this.readOnly ? [] : ["pack", "sheet"])];
    const seen = (this.seen = {});
    try {
      if (state.failure) throw new ApiError(state.failure.message);
      const ask = (action) => call("/api/commands/preview", { body: this.body(action) });
      const found = await Promise.all(names.map(ask));
      if (seen !== this.seen) return;
      const shown = Object.fromEntries(names.map((action, i) => [action, found[i]]));
      this.error.textContent = "";
      this.yaml.textContent = shown.recipe.yaml || shown.select.yaml;
      if (this.readOnly) this.command.replaceChildren(commandLine(shown.select.command));
      else for (const way of WAYS) {
        const actions = this.actionsOf(way);
        way.commands.replaceChildren(commandLine(actions.map((action) => shown[action].command).join(" && ")));
        way.run.textContent = actions.length > 1 ? `Save and ${way.button.toLowerCase()}` : way.button;
      }
    } catch (error) {
      if (seen !== this.seen) return;
      if (!(error instanceof ApiError)) throw error;
      this.error.textContent = error.message;
    }
    for (const way of WAYS) if (way.run) way.run.disabled = Boolean(this.error.textContent);
  }

  // ---------------------------------------------------------------------------------------------------------- jobs

  // One command after the other: the next only where the one before it went well.
  async run(way) {
    this.error.textContent = "";
    const bodies = this.actionsOf(way).map((action) => this.body(action));
    way.run.disabled = true;
    try {
      for (const body of bodies) {
        const job = await call("/api/commands", { body });
        this.note.textContent = "";
        if ((await this.follow(job)).state !== "done") break;
      }
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.error.textContent = error.message;
    }
    way.run.disabled = false;
  }

  async resume() {
    try {
      const { jobs } = await call("/api/commands");
      this.jobs = jobs;
      this.showJobs();
      for (const job of jobs) if (isActive(job) && !this.followed.has(job.id)) this.follow(job);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
    }
  }

  // A promise of the job when it is over; it is shown meanwhile.
  async follow(job) {
    this.followed.add(job.id);
    this.update(job);
    while (isActive(job)) { // again where the server was away
      job = await this.change(job);
      this.update(job);
    }
    await loadData();
    this.changed(true);
    return job;
  }

  // The job when it is over, shown as it goes; where the stream ends before that, what it is a second later.
  change(job) {
    return new Promise((resolve) => {
      const stream = new EventSource(`/api/commands/${job.id}/events`);
      stream.onmessage = (event) => {
        const now = JSON.parse(event.data);
        this.update(now);
        if (isActive(now)) return;
        stream.close();
        resolve(now);
      };
      stream.onerror = async () => {
        stream.close();
        await new Promise((wait) => setTimeout(wait, 1000));
        const gone = { ...job, state: "failed", lines: [...job.lines, "The studio was started anew meanwhile."] };
        resolve(await call(`/api/commands/${job.id}`).catch((error) => (error.status === 404 ? gone : job)));
      };
    });
  }

  update(job) {
    const at = this.jobs.findIndex(({ id }) => id === job.id);
    if (at < 0) this.jobs = [job, ...this.jobs];
    else this.jobs = this.jobs.with(at, job);
    this.showJobs();
  }

  showJobs() {
    const active = this.jobs.filter(isActive);
    this.button.classList.toggle("busy", active.length > 0);
    this.button.textContent = active.length ? `Save · ${active.length} running` : this.readOnly ? "Recipe" : "Save";
    showJobs(this.list, this.jobs.slice(0, SHOWN), (job, cancel) => this.cancel(job, cancel));
  }

  async cancel(job, pressed) {
    pressed.disabled = true;
    try {
      this.update(await call(`/api/commands/${job.id}`, { method: "DELETE" }));
    } catch (error) {
      this.error.textContent = error.message;
    }
  }
}

let menu = null;

function mount() {
  if (!menu && state.data && $("save")) menu = new SaveMenu($("save"));
}

subscribe("data", mount);
mount();
