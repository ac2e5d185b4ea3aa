// Two selections side by side: the present one, and a saved one or what was pinned. How many are kept by both and by
// one alone, as a bar, and their images; it follows while cuts are dragged. What it is compared with is in the address
// (`compare`): "saved:NAME", or "rules:" and the rules that were pinned.

import { ApiError, call, element, $ } from "/api.js";
import { ImageGrid } from "/grid.js";
import { openFromGrid } from "/image.js";
import { count } from "/numbers.js";
import { button, commandLine, hint, opensUnder } from "/panels.js";
import { change, state, subscribe } from "/store.js";

const SIDES = ["other", "both", "only"]; // as GET /api/rows calls them, from left to right

class Comparison {
  constructor(place) {
    this.with = null; // {name, rules} of the other selection
    this.other = ""; // its id
    this.counts = null;
    this.shown = "sides"; // or one of SIDES
    this.grids = new Map();
    this.button = button("Compare", null);
    this.menu = element("div", { className: "compare-menu", role: "dialog" });
    this.menu.setAttribute("aria-label", "Compare with");
    place.append(this.button, this.menu);
    opensUnder(this.button, this.menu);
    this.menu.addEventListener("toggle", (event) => event.newState === "open" && this.offer());
    this.build();
    subscribe(["live"], () => this.follow());
    subscribe(["view"], (_, changed) => changed.has("view") && this.with && this.reload());
    subscribe(["more"], () => this.read());
    $("sizes")?.addEventListener("click", ({ target }) => {
      if (target.dataset.size) for (const grid of this.grids.values()) grid.setSize(target.dataset.size);
    });
    this.read();
  }

  build() {
    this.title = element("h2", {});
    this.parts = Object.fromEntries(SIDES.map((side) => [side, this.part(side)]));
    this.bar = element("div", { className: "compare-bar", role: "group" }, ...SIDES.map((side) => this.parts[side]));
    this.bar.setAttribute("aria-label", "What is kept by both, and by one alone");
    this.sides = button("Side by side", () => this.choose("sides"));
    const leave = button("×", () => this.leave(), { className: "quiet", label: "Stop comparing" });
    this.error = element("p", { className: "error", hidden: true });
    this.error.setAttribute("role", "alert");
    this.command = element("div", { className: "compare-command" });
    this.panes = Object.fromEntries(SIDES.map((side) => [side, pane(side)]));
    const panes = element("div", { className: "compare-panes" }, ...Object.values(this.panes));
    const head = element("div", { className: "compare-head" }, this.title, this.sides, leave);
    const before = [head, this.bar, this.command, this.error];
    this.box = element("section", { className: "compared", hidden: true }, ...before, panes);
    this.box.setAttribute("aria-label", "Two selections");
    $("grid").before(this.box);
  }

  part(side) {
    const choose = () => this.choose(this.shown === side ? "sides" : side);
    return button("", choose, { className: `compare-part ${side}` });
  }

  // ----------------------------------------------------------------------------------------------- what it is with

  offer() {
    const pin = button("Pin the selection as it is now", () => this.begin({ rules: onOnly(state.rules) }));
    const saved = state.data.selections.map(({ name, kept, stale, rules }) => {
      const words = hint(`${count(kept)} kept${stale ? ", of before the data changed" : ""}`);
      return element("li", {}, button([name, " ", words], () => this.begin({ name, rules })));
    });
    const others = [element("h3", {}, "Or compare with a saved one"), element("ul", {}, ...saved)];
    const then = hint("then change the rules: what comes and goes is shown side by side");
    this.menu.replaceChildren(pin, then, ...(saved.length ? others : []));
    pin.focus();
  }

  begin({ name = "", rules }) {
    this.menu.hidePopover();
    const text = name ? `saved:${name}` : `rules:${JSON.stringify(rules.map((rule) => [rule.name, rule.condition]))}`;
    change({ more: { ...state.more, compare: text } });
  }

  leave() {
    change({ more: { ...state.more, compare: "" } });
    this.button.focus();
  }

  // What the address says.
  read() {
    const text = state.more.compare ?? "";
    if (text === this.text) return;
    this.text = text;
    this.with = this.parse(text);
    this.other = "";
    this.counts = null;
    this.box.hidden = !this.with;
    document.body.classList.toggle("comparing", Boolean(this.with));
    this.button.setAttribute("aria-pressed", String(Boolean(this.with)));
    if (!this.with) return this.close();
    this.title.textContent = `The rules now, beside ${this.with.name || "those that were pinned"}`;
    this.choose(narrow() ? "only" : "sides");
    this.follow();
  }

  parse(text) {
    if (text.startsWith("saved:")) {
      const name = text.slice(6);
      const rules = state.data.selections.find((one) => one.name === name)?.rules;
      return rules ? { name, rules } : null;
    }
    try {
      if (!text.startsWith("rules:")) return null;
      const rule = ([name, condition]) => ({ name: String(name), condition: String(condition) });
      return { name: "", rules: JSON.parse(text.slice(6)).map(rule) };
    } catch {
      return null;
    }
  }

  close() {
    for (const grid of this.grids.values()) grid.close();
    this.grids.clear();
  }

  // ------------------------------------------------------------------------------------------------------- numbers

  // The numbers and images of now; asked again when something changed meanwhile.
  follow() {
    this.again = true;
    this.asking ??= this.ask().finally(() => (this.asking = null));
  }

  async ask() {
    while (this.again && this.with && state.live) {
      this.again = false;
      const [wanted, a] = [this.with, state.live.id];
      try {
        this.other ||= await idOf(wanted.rules);
        const counts = await call("/api/compare", { body: { a, b: this.other } });
        if (wanted !== this.with) continue;
        this.counts = counts;
        this.error.hidden = true;
        this.showCounts();
        this.reload();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (error.status === 404 && this.other) this.other = ""; // the server was started anew
        this.error.textContent = error.message;
        this.error.hidden = false;
      }
    }
  }

  showCounts() {
    const { both, only_a: only, only_b: other, command } = this.counts;
    this.command.replaceChildren(...(command ? [commandLine(command)] : []));
    const same = only + other === 0 ? ": they keep the same images" : "";
    this.title.textContent = `The rules now, beside ${this.with.name || "those that were pinned"}${same}`;
    const { name } = this.with;
    const words = { other: name ? `only ${name}` : "only before", both: "both", only: "only now" };
    const titles = {
      other: name ? `Kept by ${name}, not now` : "Kept before, not now",
      both: "Kept by both",
      only: name ? `Kept now, not by ${name}` : "Kept now, not before",
    };
    for (const [side, number] of Object.entries({ other, both, only })) {
      const part = this.parts[side];
      part.replaceChildren(element("b", {}, count(number)), ` ${words[side]}`);
      part.style.flexGrow = String(Math.max(number, 0));
      part.title = titles[side];
      this.panes[side].firstChild.replaceChildren(titles[side], " ", hint(count(number)));
    }
  }

  // -------------------------------------------------------------------------------------------------------- images

  choose(shown) {
    this.shown = shown;
    const seen = shown === "sides" ? ["other", "only"] : [shown];
    for (const side of SIDES) {
      this.panes[side].hidden = !seen.includes(side);
      this.parts[side].setAttribute("aria-pressed", String(shown === side));
      if (seen.includes(side)) continue;
      this.grids.get(side)?.close();
      this.grids.delete(side);
    }
    this.sides.setAttribute("aria-pressed", String(shown === "sides"));
    this.reload();
  }

  reload() {
    if (!this.with || !this.counts || !this.other) return;
    const sort = state.view.sort === "nearest" ? "key" : state.view.sort;
    const asked = { selection: state.live.id, other: this.other, sort, descending: state.view.descending };
    for (const side of this.shown === "sides" ? ["other", "only"] : [this.shown]) {
      const path = `/api/rows?${new URLSearchParams({ ...asked, show: side })}`;
      const fetchRows = (offset, limit, signal) => call(`${path}&offset=${offset}&limit=${limit}`, { signal });
      const grid = this.grids.get(side);
      if (grid) grid.reload({ fetchRows });
      else this.grids.set(side, this.newGrid(side, fetchRows));
    }
  }

  newGrid(side, fetchRows) {
    const grid = new ImageGrid({
      container: this.panes[side].lastChild,
      fetchRows,
      onOpen: (row, index) => openFromGrid(grid, row, index, { selection: () => state.live?.id }),
      onError: (error) => {
        this.error.textContent = error.message;
        this.error.hidden = false;
      },
      size: localStorage.getItem("size") ?? "m",
      label: this.panes[side].firstChild.textContent,
      empty: "None.",
    });
    return grid;
  }
}

function pane(side) {
  const grid = element("div", { className: "compare-grid" });
  return element("div", { className: `compare-pane ${side}` }, element("h3", {}), grid);
}

const narrow = () => matchMedia("(max-width: 900px)").matches;

const onOnly = (rules) => rules.filter(({ on }) => on);

async function idOf(rules) {
  const body = { rules: rules.map(({ name, condition }) => ({ name, condition, on: true })), columns: [], log: [] };
  return (await call("/api/selections", { body })).id;
}

let comparison = null;

function mount() {
  if (!comparison && state.data && $("compare") && $("grid")) comparison = new Comparison($("compare"));
}

subscribe("data", mount);
mount();
