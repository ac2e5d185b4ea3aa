// What the head learns while one rates: how well it orders images it has not seen rated, as a line from the low to the
// high end of what is likely; what more ratings would do; the best and the worst unseen images; and how to use it.

import { call, element } from "/api.js";
import { linkTo, openUse } from "/use-head.js";

const AGAIN = 700; // milliseconds between questions while it is being fitted
const SHOWN = 6; // best and worst images
const MEASURES = {
  spearman: { title: "Agreement with you", low: 0, high: 1, ends: ["by chance", "exactly"] },
  auroc: { title: "Tells yes from no", low: 0.5, high: 1, ends: ["by chance", "always"] },
  accuracy: { title: "Chooses as you", low: 0.5, high: 1, ends: ["by chance", "always"] },
};

const SVG = "http://www.w3.org/2000/svg";

function drawn(kind, attributes, ...children) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const share = (value, { low, high }) => Math.min(1, Math.max(0, (value - low) / (high - low)));
const number = (value) => value.toFixed(2);

// The measure of a head: a line from low to high, a dot, and where people among themselves are.
function picture(name, { value, low, high }, ceiling) {
  const measure = MEASURES[name];
  const at = (v) => 8 + 284 * share(v, measure);
  const said = `${measure.title}: ${number(value)}, likely between ${number(low ?? value)} and ${number(high ?? value)}`;
  const marks = [
    drawn("line", { class: "scale", x1: 8, x2: 292, y1: 14, y2: 14 }),
    drawn("line", { class: "likely", x1: at(low ?? value), x2: at(high ?? value), y1: 14, y2: 14 }),
    drawn("circle", { class: "dot", cx: at(value), cy: 14, r: 6 }),
  ];
  const people = typeof ceiling === "number";
  if (people) {
    marks.splice(1, 0, drawn("line", { class: "ceiling", x1: at(ceiling), x2: at(ceiling), y1: 4, y2: 24 }));
  }
  return element(
    "div", { className: "measure" },
    element("p", {}, element("b", {}, measure.title), element("output", {}, number(value))),
    drawn("svg", { viewBox: "0 0 300 28", role: "img", "aria-label": said }, ...marks),
    element("p", { className: "ends hint" }, ...measure.ends.map((end) => element("span", {}, end))),
    ...(people ? [element("p", { className: "hint" }, `Dashed: as well as people agree (${number(ceiling)}).`)] : []),
  );
}

function faces(title, found) {
  const list = element("ul", { className: "faces" });
  for (const { key, score } of found.slice(0, SHOWN)) {
    const image = element("img", { alt: key, loading: "lazy", src: `/api/thumbnails/${encodeURIComponent(key)}?side=320` });
    const link = element("a", { href: `/#${new URLSearchParams({ show: "all", image: key })}`, target: "_blank" }, image);
    list.append(element("li", { title: `${score.toPrecision(3)}: all that is known of it` }, link));
  }
  return [element("h3", {}, title), list];
}

export class Learning {
  #timer = null;
  #asking = false;
  #again = false;

  constructor(panel, set) {
    Object.assign(this, { panel, set, shown: true });
    panel.replaceChildren();
  }

  // Ask how far the head is: soon, once for many answers.
  refresh() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), 250);
  }

  close() {
    this.closed = true;
    clearTimeout(this.#timer);
  }

  async #ask() {
    if (this.closed) return;
    if (this.#asking) return void (this.#again = true);
    this.#asking = true;
    try {
      const head = await call(`/api/ratings/${encodeURIComponent(this.set.name)}/head`);
      this.#draw(head);
      if (head.state === "fitting") this.#again = true;
    } catch (error) {
      this.panel.dataset.error = error.message; // the server may be away: rating says so, and asks again when it is back
    }
    this.#asking = false;
    if (this.#again && !this.closed) {
      this.#again = false;
      this.#timer = setTimeout(() => this.#ask(), AGAIN);
    }
  }

  // While a new one is fitted the figures are those of the last one.
  #draw(head) {
    const measure = Object.keys(MEASURES).find((name) => typeof head[name]?.value === "number");
    const parts = head.state === "failed" ? [element("p", { className: "error" }, head.error)]
      : measure ? this.#ready(head, measure)
      : [element("p", {}, head.error ? sentence(head.error) : "A few more ratings, and it begins to learn.")];
    this.panel.replaceChildren(this.#title(head, Boolean(measure)), ...parts);
    this.panel.dataset.state = head.state;
    this.panel.dataset.ratings = head.ratings;
  }

  #title(head, learnt) {
    const title = learnt ? "What it has learnt" : "It learns from you";
    const of = `${head.ratings.toLocaleString("en")} ratings`;
    const fitting = head.state === "fitting";
    return element(
      "header", {}, element("h2", {}, title),
      element("p", { className: fitting ? "hint busy" : "hint" }, fitting ? "learning …" : of),
    );
  }

  #ready(head, measure) {
    const parts = [picture(measure, head[measure], head.ceiling)];
    if (head.verdict) parts.push(element("p", {}, sentence(head.verdict)));
    const more = [];
    if (head.worth_raters) more.push(`It is worth about ${plural(head.worth_raters, "person", "people")} asked.`);
    if (head.more) more.push(`${head.more.toLocaleString("en")} more ratings would make it twice as sure.`);
    if (more.length) parts.push(element("p", { className: "hint" }, more.join(" ")));
    const use = () => openUse(this.set, head);
    parts.push(element("button", { type: "button", className: "primary", onclick: use }, "Use it on all images"));
    if (head.column) parts.push(linkTo(head.column));
    if (head.best?.length) parts.push(...faces("It would rate highest", head.best), ...faces("and lowest", head.worst));
    if (head.of) parts.push(element("p", { className: "hint" }, `Out of ${head.of.toLocaleString("en")} images that nobody has rated.`));
    return parts;
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
const plural = (count, one, many) => `${Number(count).toLocaleString("en", { maximumFractionDigits: 1 })} ${count === 1 ? one : many}`;
