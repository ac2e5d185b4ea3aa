// A cut of a rule on a histogram: a line to drag, by pointer, touch or keys.

import { element } from "/api.js";
import { countAbove, valueWithAbove } from "/axis.js";
import { short } from "/numbers.js";
import { findCut, findTop, replaceAt, writeNumber } from "/sql.js";
import { setRules, state } from "/store.js";

const REST = 600; // ms after the last key until a step is done, for undo and the address

export class Handle {
  // view: the ColumnView that it stands in
  constructor(view, rule, index) {
    Object.assign(this, { view, rule, index });
    this.label = element("span", { className: "cut-label" });
    this.node = element("div", { className: "cut", role: "slider", tabIndex: 0 }, this.label);
    this.node.dataset.rule = rule;
    this.node.onpointerdown = (event) => this.drag(event);
    this.node.onkeydown = (event) => this.key(event);
    this.node.onblur = () => this.settle();
  }

  // What the server says of it: cut is {column, sign, value}, or {column, fraction, value} of top(column, fraction).
  read(cut, condition) {
    this.cut = { ...cut };
    this.condition = condition;
    this.where = cut.fraction === undefined ? findCut(condition, cut) : findTop(condition, cut);
    this.draw();
  }

  get isTop() {
    return this.cut.fraction !== undefined;
  }

  get words() {
    return this.isTop ? `best ${short(Math.round(this.cut.fraction * 10000) / 100)}%` : `${this.cut.sign} ${short(this.cut.value)}`;
  }

  draw() {
    const { axis } = this.view;
    if (!axis) return;
    const part = axis.part(this.cut.value);
    this.node.style.left = `${100 * part}%`;
    const keepsRight = this.isTop || this.cut.sign.startsWith(">");
    this.node.className = `cut ${keepsRight ? "keeps-right" : "keeps-left"} ${part > 0.5 ? "label-left" : "label-right"}`;
    this.node.classList.toggle("is-fixed", !this.where);
    this.label.textContent = this.words;
    this.node.title = this.where ? `${this.rule}: drag, or ← and →` : `${this.rule}: edit the rule to move this cut`;
    this.node.ariaLabel = `Cut of ${this.rule}`;
    this.node.ariaDisabled = String(!this.where);
    this.node.ariaValueMin = String(axis.low);
    this.node.ariaValueMax = String(axis.high);
    this.node.ariaValueNow = String(this.cut.value);
    this.node.ariaValueText = this.words;
  }

  // Move it to a part of the axis: the constant in the rule's SQL, and nothing else of it, is replaced.
  move(part, settled) {
    if (!this.where) return;
    const { axis, histogram, whole } = this.view;
    const near = axis.value(part);
    let text;
    if (this.isTop) {
      const all = histogram.counts.reduce((a, b) => a + b, 0);
      const fraction = countAbove(histogram, axis, near) / (all || 1);
      text = this.takeFraction(fraction, near);
    } else {
      text = writeNumber(near, axis.step(near, whole));
      this.cut.value = Number(text);
    }
    this.write(text, settled);
  }

  takeFraction(fraction, near) {
    const text = writeNumber(Math.max(0.0001, Math.min(1, fraction)), fraction < 0.02 ? 0.0001 : fraction < 0.1 ? 0.001 : 0.01);
    this.cut.fraction = Number(text);
    this.cut.value = near;
    return text;
  }

  write(text, settled) {
    this.condition = replaceAt(this.condition, this.where, text);
    this.where = { start: this.where.start, end: this.where.start + text.length };
    this.draw();
    const rules = state.rules.map((rule) => (rule.name === this.rule ? { ...rule, condition: this.condition } : rule));
    this.moved = !settled;
    setRules(rules, { settled });
  }

  settle() {
    clearTimeout(this.resting);
    if (!this.moved) return;
    this.moved = false;
    setRules(state.rules);
  }

  drag(event) {
    if (event.button || !this.where) return;
    event.preventDefault();
    event.stopPropagation();
    this.node.focus();
    this.node.setPointerCapture(event.pointerId);
    const { left, width } = this.view.plot.getBoundingClientRect();
    const offset = event.clientX - left - this.view.axis.part(this.cut.value) * width;
    this.node.onpointermove = ({ clientX }) => this.move((clientX - offset - left) / width, false);
    this.node.onlostpointercapture = () => {
      this.node.onpointermove = this.node.onlostpointercapture = null;
      this.settle();
    };
  }

  key(event) {
    const { axis, histogram } = this.view;
    const big = event.shiftKey ? 10 : 1;
    const steps = {
      ArrowLeft: -big, ArrowDown: -big, ArrowRight: big, ArrowUp: big, PageDown: -10, PageUp: 10, Home: -1000, End: 1000,
    };
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey || !this.where) return;
    event.preventDefault();
    const by = steps[event.key];
    if (this.isTop) {
      const all = histogram.counts.reduce((a, b) => a + b, 0);
      const unit = this.cut.fraction <= 0.02 ? 0.001 : 0.01;
      const fraction = Math.max(unit, Math.min(1, this.cut.fraction - by * unit));
      this.write(this.takeFraction(fraction, valueWithAbove(histogram, axis, fraction * all)), false);
    } else {
      const from = axis.part(this.cut.value);
      const before = this.cut.value;
      this.move(from + by / 100, false);
      const unit = axis.step(before, this.view.whole);
      if (this.cut.value === before) this.write(this.takeValue(before + Math.sign(by) * unit, unit), false);
    }
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.settle(), REST);
  }

  takeValue(value, unit) {
    const text = writeNumber(value, unit);
    this.cut.value = Number(text);
    return text;
  }
}
