// A column as a histogram: all rows in grey, before them those that are kept, and the cuts of rules to drag. Categories
// and flags are bars; a click on one makes or changes a rule.

import { $, ApiError, call, element } from "/api.js";
import { Axis, countAbove, outline } from "/axis.js";
import { Handle } from "/handle.js";
import { count, share, short } from "/numbers.js";
import { addRule } from "/rules.js";
import { columnWord, columnsIn, cutColumnsIn, readValues, writeNumber, writeValues } from "/sql.js";
import { setRules, show, state, subscribe, want } from "/store.js";

const HEIGHT = 64;
const SVG = "http://www.w3.org/2000/svg";
const WHOLE = /INT/;

const views = new Map(); // name of the column -> ColumnView
const seen = new Set(); // those that are in sight

let sight = null;

export function startColumns() {
  sight = new IntersectionObserver((entries) => entries.forEach(noteSight), { root: $("panel"), rootMargin: "200px" });
  $("find-column").oninput = filter;
  subscribe(["data", "version"], renderColumns);
  subscribe(["live", "rules"], () => views.forEach((view) => view.render()));
  subscribe("live", () => seen.forEach((view) => view.load())); // those that failed while the server was away
  if (state.data) renderColumns();
}

function noteSight({ target, isIntersecting }) {
  const view = views.get(target.dataset.column);
  if (!view) return;
  if (isIntersecting) seen.add(view);
  else seen.delete(view);
  if (isIntersecting) view.load();
  wantSeen();
}

let wanting = 0;

function wantSeen() {
  clearTimeout(wanting);
  wanting = setTimeout(() => {
    const inSight = [...seen].filter((view) => view.histogram);
    want(
      inSight.map((view) => view.column.name),
      inSight.filter((view) => view.log).map((view) => view.column.name),
    );
  }, 60);
}

let version = null; // of the data whose columns are shown

// Columns that rules cut come first, in the order of the rules, then those that they name, then the other numbers, then
// categories; texts have no histogram.
function renderColumns() {
  const { data } = state;
  if (data.index.state !== "ready" || data.version !== state.version || version === state.version) return;
  version = state.version;
  const shown = data.columns.filter(({ kind }) => kind !== "text");
  views.forEach((view) => sight.unobserve(view.node));
  views.clear();
  seen.clear();
  for (const column of byPlace(shown)) {
    const view = column.kind === "number" ? new NumberView(column) : new ValuesView(column);
    views.set(column.name, view);
    sight.observe(view.node);
  }
  $("columns").replaceChildren(...[...views.values()].map(({ node }) => node));
  $("find-column").hidden = views.size < 6;
  filter();
}

function byPlace(columns) {
  const cut = state.rules.flatMap(({ condition }) => cutColumnsIn(condition));
  const used = [...cut, ...state.rules.flatMap(({ condition }) => columnsIn(condition))];
  const place = ({ name, kind }) => (used.includes(name) ? used.indexOf(name) : used.length + (kind === "number" ? 0 : 1));
  return [...columns].sort((a, b) => place(a) - place(b));
}

function filter() {
  const wanted = $("find-column").value.trim().toLowerCase();
  for (const [name, { node, column }] of views) {
    node.hidden = !`${name} ${column.meaning ?? ""}`.toLowerCase().includes(wanted);
  }
}

// ------------------------------------------------------------------------------------------------------ any column

class ColumnView {
  constructor(column) {
    this.column = column;
    this.log = false;
    this.head = element("div", { className: "column-head" });
    const name = element("button", { type: "button", className: "column-name", textContent: column.name, title: column.meaning ?? "" });
    name.ariaExpanded = "false";
    name.onclick = () => {
      this.about.hidden = !this.about.hidden;
      name.ariaExpanded = String(!this.about.hidden);
    };
    this.sort = element("button", { type: "button", className: "quiet icon", textContent: "⇅", title: "Sort the images by this column" });
    this.sort.ariaLabel = `Sort by ${column.name}`;
    this.sort.onclick = () => show({ sort: column.name, descending: state.view.sort === column.name && !state.view.descending });
    this.head.append(name, this.sort);
    this.about = element("p", { className: "hint", hidden: true, textContent: about(column) });
    this.body = element("div", { className: "column-body" });
    this.error = element("p", { className: "error", hidden: true });
    this.node = element("section", { className: "column", ariaLabel: column.name }, this.head, this.about, this.body, this.error);
    this.node.dataset.column = column.name;
  }

  async load() {
    if (this.histogram || this.loading) return;
    this.loading = true;
    const log = this.log;
    try {
      const histogram = await call(`/api/histogram?${new URLSearchParams({ column: this.column.name, log })}`);
      if (log === this.log) this.take(histogram);
      this.error.hidden = true;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.error.textContent = error.message;
      this.error.hidden = false;
    } finally {
      this.loading = false;
    }
    if (log !== this.log) this.load();
    wantSeen();
  }

  get kept() {
    const counts = state.live?.kept_histograms[this.column.name];
    return counts && this.histogram && counts.length >= this.histogram.counts.length ? counts : null;
  }
}

function about({ meaning, unit, made_by: madeBy, count: values, low, high, type }) {
  const range = low !== null && low !== undefined ? `from ${short(low)} to ${short(high)}` : "";
  const facts = [meaning && sentence(meaning), unit && `Unit: ${unit}.`, range && `Values ${range}.`, madeBy && `Made by ${madeBy}.`];
  const counted = Number.isInteger(values) ? `${count(values)} images have a value (${type}).` : "";
  return [...facts, counted].filter(Boolean).join(" ");
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;

// --------------------------------------------------------------------------------------------------------- numbers

class NumberView extends ColumnView {
  constructor(column) {
    super(column);
    this.whole = WHOLE.test(column.type);
    this.handles = new Map(); // "rule/index" -> Handle
    const add = element("button", { type: "button", className: "quiet icon", textContent: "+", title: "A new rule with this column" });
    add.ariaLabel = `New rule with ${column.name}`;
    add.onclick = () => this.offer(0.5);
    if (column.log_possible) this.addLog();
    this.head.append(add);
    this.drawing = document.createElementNS(SVG, "svg");
    this.drawing.setAttribute("aria-hidden", "true");
    this.drawing.setAttribute("preserveAspectRatio", "none");
    [this.all, this.keeps] = ["all", "kept"].map((name) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      return path;
    });
    this.drawing.append(this.all, this.keeps);
    this.plot = element("div", { className: "plot" }, this.drawing);
    this.plot.onclick = (event) => this.clicked(event);
    this.labels = element("div", { className: "axis" });
    this.form = null;
    this.body.append(this.plot, this.labels);
  }

  addLog() {
    this.logButton = element("button", { type: "button", className: "quiet icon", textContent: "log", title: "Logarithmic axis" });
    this.logButton.ariaPressed = "false";
    this.logButton.onclick = () => {
      this.setLog(!this.log);
      this.load();
    };
    this.head.append(this.logButton);
  }

  setLog(log) {
    [this.log, this.histogram, this.chosen] = [log, null, true];
    this.logButton.ariaPressed = String(log);
  }

  // Most values in a twentieth of a linear axis: nothing could be told apart there.
  get isCrowded() {
    const { counts } = this.histogram;
    const all = counts.reduce((a, b) => a + b, 0);
    const near = counts.slice(0, Math.ceil(counts.length / 20)).reduce((a, b) => a + b, 0);
    return all > 0 && near / all > 0.5;
  }

  take(histogram) {
    this.histogram = histogram;
    if (!histogram.edges.length) return this.hasNone();
    if (this.logButton && !this.chosen && this.isCrowded) return this.setLog(true);
    this.axis = new Axis(histogram.edges, histogram.log);
    const bins = histogram.counts.length;
    this.drawing.setAttribute("viewBox", `0 0 ${bins} ${HEIGHT}`);
    this.most = Math.max(1, ...histogram.counts);
    this.all.setAttribute("d", outline(histogram.counts, this.most, HEIGHT));
    this.labels.replaceChildren(...this.axis.labels().map((text) => element("span", {}, text)));
    this.labels.title = histogram.nulls ? `${count(histogram.nulls)} images have no value` : "";
    this.render();
  }

  hasNone() {
    this.node.classList.add("is-empty");
    this.body.replaceChildren(element("p", { className: "hint", textContent: "No image has a value." }));
  }

  render() {
    if (!this.axis || !this.histogram) return;
    const kept = this.kept;
    if (kept) this.keeps.setAttribute("d", outline(kept, this.most, HEIGHT));
    this.renderHandles();
  }

  // Cuts as the server last gave them; those of a rule that has changed since stay where the hand put them.
  renderHandles() {
    const current = new Set();
    const conditions = new Map(state.rules.filter(({ on }) => on).map(({ name, condition }) => [name, condition]));
    for (const rule of state.live?.rules ?? []) {
      if (!conditions.has(rule.name)) continue;
      cutsOf(rule, this.column.name).forEach((cut, i) => {
        const id = `${rule.name}/${i}`;
        current.add(id);
        if (conditions.get(rule.name) === rule.condition) this.handle(id, rule.name, i).read(cut, rule.condition);
      });
    }
    for (const [id, handle] of this.handles) {
      if (current.has(id)) handle.draw();
      else {
        handle.node.remove();
        this.handles.delete(id);
      }
    }
  }

  handle(id, rule, index) {
    if (!this.handles.has(id)) {
      const made = new Handle(this, rule, index);
      this.handles.set(id, made);
      this.plot.append(made.node);
    }
    return this.handles.get(id);
  }

  clicked(event) {
    if (!this.axis || event.target.closest(".cut")) return;
    const { left, width } = this.plot.getBoundingClientRect();
    const part = (event.clientX - left) / width;
    const free = [...this.handles.values()].filter(({ where }) => where);
    if (!free.length) return this.offer(part);
    const distance = ({ cut }) => Math.abs(this.axis.part(cut.value) - part);
    free.sort((a, b) => distance(a) - distance(b))[0].move(part, true);
  }

  // A rule that begins at this part of the axis: one press keeps what is above, or below, or the best part.
  offer(part) {
    if (!this.axis) return;
    this.form?.remove();
    const near = this.axis.value(part);
    const value = writeNumber(near, this.axis.step(near, this.whole));
    const word = columnWord(this.column.name);
    const all = this.histogram.counts.reduce((a, b) => a + b, 0);
    const fraction = writeNumber(Math.max(0.01, countAbove(this.histogram, this.axis, near) / (all || 1)), 0.01);
    const make = (condition) => () => {
      close();
      addRule({ name: this.column.name.replace("source.", ""), condition });
    };
    const close = () => {
      this.form?.remove();
      this.form = null;
    };
    const offered = [
      [`≥ ${short(Number(value))}`, `${word} >= ${value}`],
      [`≤ ${short(Number(value))}`, `${word} <= ${value}`],
      [`best ${Math.round(fraction * 100)}%`, `top(${word}, ${fraction})`],
    ];
    const buttons = offered.map(([text, sql]) => element("button", { type: "button", textContent: text, title: sql, onclick: make(sql) }));
    const cancel = element("button", { type: "button", className: "quiet icon", textContent: "×", ariaLabel: "Cancel", onclick: close });
    const line = element("i", { className: "offer-line" });
    line.style.left = `${100 * part}%`;
    this.form = element("div", { className: "offer" }, line, element("span", {}, "Keep"), ...buttons, cancel);
    this.form.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      close();
      this.head.querySelector("button").focus();
    };
    this.body.append(this.form);
    buttons[0].focus({ preventScroll: true });
  }
}

// The cuts of a rule on a column, and where its top(column, fraction) ends.
function cutsOf(rule, column) {
  const cuts = (rule.cuts ?? []).filter((cut) => cut.column === column);
  return rule.top?.column === column && rule.top.value !== null ? [...cuts, rule.top] : cuts;
}

// ---------------------------------------------------------------------------------------------- categories and flags

class ValuesView extends ColumnView {
  take(histogram) {
    this.histogram = histogram;
    this.most = Math.max(1, ...histogram.counts);
    this.bars = histogram.values.map((value, i) => this.bar(this.typed(value), histogram.counts[i]));
    this.body.replaceChildren(...this.bars.map(({ node }) => node));
    if (!this.bars.length) this.body.append(element("p", { className: "hint", textContent: "No image has a value." }));
    if (histogram.others) this.body.append(element("p", { className: "hint", textContent: `${count(histogram.others)} in other values` }));
    this.render();
  }

  bar(value, images) {
    const all = element("i", { className: "all" });
    const kept = element("i", { className: "kept" });
    all.style.width = `${100 * Math.sqrt(images / this.most)}%`;
    const name = element("span", { className: "value-name", textContent: short(value) || "(empty)" });
    const number = element("span", { className: "value-count", textContent: count(images) });
    const node = element("button", { type: "button", className: "value" }, name, element("span", { className: "value-bar" }, all, kept), number);
    node.onclick = () => this.toggle(value);
    return { node, kept, value, images };
  }

  // A value as a rule has it: the server gives all as text.
  typed(value) {
    if (this.column.kind === "flag") return value === true || value === "true";
    return WHOLE.test(this.column.type) ? Number(value) : value;
  }

  get rule() {
    return state.rules.find(({ condition }) => readValues(condition, this.column.name)) ?? null;
  }

  render() {
    if (!this.histogram) return;
    const values = this.rule ? readValues(this.rule.condition, this.column.name) : [];
    const kept = this.kept;
    this.bars.forEach((bar, i) => {
      bar.node.ariaPressed = String(values.includes(bar.value));
      if (!kept) return;
      bar.kept.style.width = `${100 * Math.sqrt(kept[i] / this.most)}%`;
      bar.node.title = `${count(kept[i])} of ${count(bar.images)} kept (${share(kept[i], bar.images)})`;
    });
  }

  // The value joins the rule of this column, or leaves it.
  toggle(value) {
    const { rule } = this;
    const { name } = this.column;
    if (!rule) return addRule({ name: name.replace("source.", ""), condition: writeValues(name, [value]) });
    const had = readValues(rule.condition, name);
    const values = had.includes(value) ? had.filter((other) => other !== value) : [...had, value];
    const changed = (other) => (other === rule ? { ...rule, on: true, condition: writeValues(name, values) } : other);
    const rules = values.length ? state.rules.map(changed) : state.rules.filter((other) => other !== rule);
    setRules(rules);
  }
}
