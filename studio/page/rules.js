// The rules as chips, in their order: counts, on and off, moved, edited in place, removed; and new ones.

import { $, element } from "/api.js";
import { count } from "/numbers.js";
import { recipeRules, redo, setRules, show, state, steps, subscribe, tryRules, undo, viewFor } from "/store.js";
import { freeName } from "/sql.js";
import { suggest } from "/suggest.js";

const chips = new Map(); // name -> Chip
let adding = null; // the form of a new rule

const without = (name) => state.rules.filter((rule) => rule.name !== name);
const withRule = (name, part) => state.rules.map((rule) => (rule.name === name ? { ...rule, ...part } : rule));

export function startRules() {
  $("undo").onclick = undo;
  $("redo").onclick = redo;
  $("add-rule").onclick = () => addRule();
  $("start-from").onchange = (event) => startFrom(event.target);
  subscribe(["rules", "live", "failure"], render);
  subscribe("data", renderStarts);
  renderStarts();
  render();
}

// ------------------------------------------------------------------------------------------------------------ chips

class Chip {
  constructor(name) {
    this.name = name;
    this.grip = element("button", { className: "grip", type: "button", textContent: "⠿", title: "Drag to move, or Alt+↑ and Alt+↓" });
    this.grip.ariaLabel = `Move ${name}`;
    this.grip.onpointerdown = (event) => dragChip(this, event);
    this.title = element("b", { className: "rule-name", textContent: name });
    this.rejected = element("button", { type: "button", className: "count" });
    this.rejected.onclick = () => show({ show: "rejected", rule: name, other: "", sort: "nearest" });
    this.marginal = element("button", { type: "button", className: "count", title: "All images that this rule rejects, also where an earlier one does" });
    this.marginal.onclick = () => show({ show: "marginal", rule: name, other: "", sort: "nearest" });
    this.on = element("input", { type: "checkbox", ariaLabel: `${name} is on`, title: "On or off" });
    this.on.setAttribute("role", "switch");
    this.on.onchange = () => setRules(withRule(name, { on: this.on.checked }));
    this.remove = element("button", { type: "button", className: "quiet icon", textContent: "×", ariaLabel: `Remove ${name}`, title: "Remove" });
    this.remove.onclick = () => removeRule(name);
    this.sql = element("button", { type: "button", className: "rule-sql", title: "Edit" });
    this.sql.onclick = () => this.edit();
    this.bar = element("div", { className: "rule-bar" }, element("i", { className: "stay" }), element("i", { className: "go" }));
    this.error = element("p", { className: "error", role: "alert", hidden: true });
    const head = element("div", { className: "rule-head" }, this.grip, this.title, this.rejected, this.marginal, this.on, this.remove);
    this.node = element("li", { className: "rule" }, head, this.sql, this.error, this.bar);
    this.node.dataset.name = name;
    this.node.onkeydown = (event) => this.key(event);
  }

  // `before`: how many images reach this rule.
  render(rule, live, before) {
    this.node.classList.toggle("is-off", !rule.on);
    this.on.checked = rule.on;
    if (this.sql.textContent !== rule.condition) this.sql.textContent = rule.condition;
    const known = live && rule.on;
    this.rejected.textContent = known ? (live.rejected ? `−${count(live.rejected)}` : "0") : "";
    this.rejected.title = known ? rejectedTitle(live) : "";
    const isMore = Boolean(known) && live.marginal > live.rejected;
    this.marginal.textContent = isMore ? `${count(live.marginal)} in all` : "";
    this.rejected.hidden = !known;
    this.marginal.hidden = !isMore;
    const [stay, go] = this.bar.children;
    this.bar.hidden = !known || Boolean(this.form);
    if (known) {
      stay.style.width = `${(100 * (before.reach - live.rejected)) / (before.all || 1)}%`;
      go.style.width = `${(100 * live.rejected) / (before.all || 1)}%`;
    }
    const { failure } = state;
    const wrong = failure !== null && failure.rule === this.name ? failure.message : (live?.error ?? "");
    this.node.classList.toggle("is-wrong", Boolean(wrong));
    this.error.hidden = !wrong;
    this.error.textContent = wrong;
  }

  edit() {
    if (this.form) return;
    const rule = state.rules.find(({ name }) => name === this.name);
    const done = (changed) => {
      this.form.remove();
      this.form = null;
      this.sql.hidden = this.bar.hidden = false;
      chips.get(changed ?? this.name)?.sql.focus();
    };
    this.form = ruleForm(rule, (changed) => withRule(this.name, changed), done);
    this.sql.hidden = this.bar.hidden = true;
    this.node.append(this.form);
    this.form.elements.condition.focus();
  }

  key(event) {
    if (this.form) return;
    if (event.altKey && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      moveRule(this.name, event.key === "ArrowUp" ? -1 : 1, event.target);
    } else if (event.key === "Delete") removeRule(this.name);
    else return;
    event.preventDefault();
  }
}

function rejectedTitle({ nulls, unknown }) {
  const more = [nulls && `${count(nulls)} for want of a value`, unknown && `${count(unknown)} are not computed yet`].filter(Boolean);
  return `Images that this rule is the first to reject${more.length ? ` (${more.join(", ")})` : ""}`;
}

function render() {
  const list = $("rules");
  const known = new Map((state.live?.rules ?? []).map((rule) => [rule.name, rule]));
  const nodes = [];
  let reach = imagesJudged(state.live);
  const all = reach;
  for (const rule of state.rules) {
    if (!chips.has(rule.name)) chips.set(rule.name, new Chip(rule.name));
    const chip = chips.get(rule.name);
    const live = known.get(rule.name);
    chip.render(rule, live, { reach, all });
    if (live && rule.on) reach -= live.rejected;
    nodes.push(chip.node);
  }
  for (const [name, chip] of chips) {
    if (nodes.includes(chip.node)) continue;
    chip.node.remove();
    chips.delete(name);
  }
  if (!dragging && nodes.some((node, i) => list.children[i] !== node)) {
    const focused = document.activeElement;
    list.replaceChildren(...nodes);
    if (list.contains(focused)) focused.focus();
  }
  $("undo").disabled = !steps().undo;
  $("redo").disabled = !steps().redo;
  $("no-rules").hidden = state.rules.length > 0 || adding !== null;
}

// The images that come to the first rule.
export function imagesJudged(live) {
  if (!live) return 0;
  return live.kept + live.rules.reduce((sum, rule) => sum + (rule.on ? rule.rejected : 0), 0);
}

// ---------------------------------------------------------------------------------------------------------- changes

function removeRule(name) {
  const at = state.rules.findIndex((rule) => rule.name === name);
  const rules = without(name);
  setRules(rules);
  (chips.get(rules[Math.min(at, rules.length - 1)]?.name)?.remove ?? $("add-rule")).focus();
}

function moveRule(name, by, focus) {
  const rules = [...state.rules];
  const from = rules.findIndex((rule) => rule.name === name);
  const to = from + by;
  if (to < 0 || to >= rules.length) return;
  [rules[from], rules[to]] = [rules[to], rules[from]];
  setRules(rules);
  focus.focus();
  focus.scrollIntoView({ block: "nearest" });
}

let dragging = null;

function dragChip(chip, event) {
  if (event.button) return;
  event.preventDefault();
  chip.grip.focus();
  chip.grip.setPointerCapture(event.pointerId);
  dragging = chip;
  chip.node.classList.add("is-dragged");
  chip.grip.onpointermove = ({ clientY }) => {
    const others = [...$("rules").children].filter((node) => node !== chip.node);
    const isAbove = (node) => clientY > node.getBoundingClientRect().top + node.offsetHeight / 2;
    // The others go around it: a node that is moved itself would lose the pointer.
    for (const node of others) {
      if (isAbove(node)) $("rules").insertBefore(node, chip.node);
    }
    for (const node of others) {
      if (!isAbove(node)) $("rules").append(node);
    }
  };
  chip.grip.onlostpointercapture = () => {
    chip.grip.onpointermove = chip.grip.onlostpointercapture = null;
    chip.node.classList.remove("is-dragged");
    dragging = null;
    const order = [...$("rules").children].map((node) => node.dataset.name);
    if (order.every((name, i) => state.rules[i].name === name)) return;
    setRules(order.map((name) => state.rules.find((rule) => rule.name === name)));
  };
}

// ------------------------------------------------------------------------------------------------------------ forms

// Name and SQL of a rule. `changed(part)` gives all rules with these; `done(name)` ends it, without one where given up.
function ruleForm(rule, changed, done) {
  const name = element("input", { name: "name", value: rule.name, ariaLabel: "Name", spellcheck: false, autocomplete: "off" });
  const condition = element("textarea", {
    name: "condition", value: rule.condition, ariaLabel: "Condition, in SQL", rows: 2, spellcheck: false, placeholder: "aesthetic > 5",
  });
  const error = element("p", { className: "error", role: "alert", hidden: true });
  const give = element("button", { type: "button", className: "quiet", textContent: "Cancel" });
  const actions = element("div", { className: "rule-actions" }, element("button", { className: "primary", textContent: "Apply" }), give);
  const form = element("form", { className: "rule-form", noValidate: true }, name, condition, error, actions);
  suggest(condition);
  give.onclick = () => done();
  form.onsubmit = async (event) => {
    event.preventDefault();
    const part = { name: name.value.trim(), condition: condition.value.trim(), on: rule.on };
    try {
      const rules = named(changed(part), rule, part);
      const { view } = state;
      await tryRules(rules, viewFor(rules, view.rule === rule.name ? { ...view, rule: part.name } : view));
      done(part.name);
    } catch (problem) {
      error.textContent = problem.message;
      error.hidden = false;
    }
  };
  form.onkeydown = (event) => {
    if (event.defaultPrevented || event.isComposing) return;
    if (event.key === "Escape") done();
    else if (event.key === "Enter" && !event.shiftKey && event.target !== give) form.requestSubmit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return form;
}

// Two rules of one name would be one rule to the server.
function named(rules, rule, part) {
  if (rules.filter(({ name }) => name === part.name).length > 1) {
    throw new Error(`There is a rule called ${part.name} already. Choose another name.`);
  }
  return rules;
}

// A form for a new rule, or at once the rule itself where its condition is given.
export function addRule({ name = "", condition = "" } = {}) {
  if (condition) {
    const rule = { name: freeName(name, state.rules), condition, on: true };
    setRules([...state.rules, rule]);
    chips.get(rule.name)?.node.scrollIntoView({ block: "nearest" });
    return;
  }
  if (adding) return adding.elements.name.focus();
  const rule = { name: freeName("rule", state.rules), condition: "", on: true };
  const done = (made) => {
    adding.remove();
    adding = null;
    render();
    (chips.get(made)?.sql ?? $("add-rule")).focus();
  };
  adding = ruleForm(rule, (part) => [...state.rules, part], done);
  $("add-rule").before(adding);
  $("no-rules").hidden = true;
  adding.elements.name.select();
}

// ----------------------------------------------------------------------------------------------------------- starts

function renderStarts() {
  const menu = $("start-from");
  const saved = state.data?.selections ?? [];
  const options = [element("option", { value: "", textContent: "Start from…" })];
  if (recipeRules().length) options.push(element("option", { value: "recipe", textContent: `The recipe${called(state.data.recipe_name)}` }));
  saved.forEach(({ name, kept }, i) => {
    options.push(element("option", { value: String(i), textContent: `Saved: ${name} (${count(kept)} kept)` }));
  });
  options.push(element("option", { value: "none", textContent: "No rules" }));
  menu.replaceChildren(...options);
}

const called = (name) => (name ? ` “${name}”` : "");

function startFrom(menu) {
  const { value } = menu;
  menu.value = "";
  const saved = state.data.selections[Number(value)];
  const starts = { recipe: recipeRules(), none: [] };
  const rules = starts[value] ?? saved.rules.map(({ name, condition }) => ({ name, condition, on: true }));
  setRules(rules);
}

