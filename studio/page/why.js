// The panel beside an image: why it is kept or not, and all else that is known of it. What people or servers wrote goes
// in as text only.

import { call, element } from "/api.js";
import { count } from "/numbers.js";
import { button, commandLine, copyButton, hint, imageButton, many, said } from "/panels.js";
import { canFindSimilar, findSimilar } from "/search.js";
import { state } from "/store.js";

const MARKS = {
  true: ["✓", "yes", "true"],
  false: ["✕", "no", "not true"],
  null: ["–", "none", "no value"],
  unknown: ["?", "none", "not known"],
};

// Of a download: what is said in words of its own.
const SAID = ["status", "final_url", "domain", "width", "height", "original_width", "original_height", "bytes"];

export class WhyPanel {
  // actions: close(after), back(), beside(key, text)
  constructor(actions) {
    this.actions = actions;
    this.title = element("h2", {});
    this.where = element("span", { className: "hint why-where" });
    this.copied = copyButton(() => this.key, "Copy", { title: "Copy the key (C)" });
    this.from = button("", actions.back, { className: "quiet", hidden: true, title: "Back to that image (Backspace)" });
    this.body = element("div", { className: "why-body" });
    this.question = element("div", { className: "why-question", hidden: true });
    this.question.setAttribute("role", "alert");
    this.buttons = element("div", { className: "why-actions" });
    const leave = button("×", () => actions.close(), { className: "why-close", title: "Close (Esc)", label: "Close" });
    const head = element("header", { className: "why-head" }, this.title, this.copied, this.where, this.from, leave);
    this.box = element("aside", { className: "why-panel" }, head, this.body, this.question, this.buttons);
  }

  wait(key, from, where) {
    this.key = key;
    this.where.textContent = where;
    this.why = null;
    this.title.textContent = key;
    this.from.hidden = !from;
    this.from.textContent = from ? `‹ ${from}` : "";
    this.box.setAttribute("aria-busy", "true");
    this.dropQuestion();
  }

  fail(error) {
    this.box.removeAttribute("aria-busy");
    this.body.replaceChildren(element("p", { className: "error" }, error.message));
    this.buttons.replaceChildren();
  }

  left() {
    this.key = this.why = null;
  }

  // What is known; the panel stays scrolled where it was, so that one value is compared over many images.
  show(why) {
    this.why = why;
    const { scrollTop } = this.body;
    const similar = element("section", { className: "why-similar" });
    this.denied = element("section", { className: "why-denied" }, ...this.deniedLine(why));
    const before = [this.denied, verdict(why), captions(why), columns(why.columns)];
    const after = [selections(why), facts(why), commands(why)];
    this.body.replaceChildren(...[...before, similar, ...after].filter(Boolean));
    this.body.scrollTop = scrollTop;
    this.box.removeAttribute("aria-busy");
    this.showButtons();
    return this.showSimilar(similar, why);
  }

  // ------------------------------------------------------------------------------------------------- similar images

  async showSimilar(place, why) {
    let found;
    try {
      found = await call(`/api/duplicates/${encodeURIComponent(why.key)}`);
    } catch (error) { // without vectors the columns still say what is a near-duplicate
      const groups = why.duplicates ?? [];
      found = { groups: groups.map((one) => ({ ...one, members: one.members.map((key) => ({ key })) })), nearest: [] };
      if (error.status !== 503 && error.status !== 404) place.append(hint(error.message));
    }
    if (this.why !== why) return;
    for (const group of found.groups) place.append(...this.group(group, why.key));
    if (found.nearest.length) {
      const list = found.nearest.map(({ key, cosine }) => this.card(key, `likeness ${said(cosine)}`, [said(cosine)]));
      place.append(element("h3", {}, "Nearest images"), element("div", { className: "why-cards" }, ...list));
    }
  }

  group({ column, keeper, rule, size, members }, own) {
    if (members.every(({ key }) => key === own)) return [];
    const by = rule ? ` by ${rule}` : "";
    const says = keeper ? `, ${keeper === own ? "this one" : keeper} is kept of them${by}` : "";
    const cards = members.map(({ key, kept = key === keeper, values }) => {
      const roles = [key === own && "this image", kept && "keeper"].filter(Boolean).join(", ");
      const lines = [roles, ...copyLines(column, values ?? {})].filter(Boolean);
      return this.card(key, lines.join(" · "), lines.length ? lines : [key], key === own);
    });
    const title = element("h3", {}, "Near-duplicates ", hint(`by ${column}: ${many(size, "image")}${says}`));
    return [title, element("div", { className: "why-cards wide" }, ...cards)];
  }

  // One image that can be shown at the side of this one, and what is said under it.
  card(key, text, lines, own = false) {
    const show = () => this.actions.beside(this.beside === key ? null : key, [key, text].filter(Boolean).join(" · "));
    const label = `Show ${key} beside this image, ${text}`;
    const made = imageButton(key, show, { title: own ? "" : `${key}: beside this image`, label });
    made.dataset.key = key;
    made.disabled = own;
    const under = lines.map((line) => element("span", { title: line }, line));
    return element("div", { className: "why-card" }, made, ...under);
  }

  mark(key) {
    this.beside = key;
    for (const one of this.body.querySelectorAll(".why-card .thumb")) one.ariaPressed = String(one.dataset.key === key);
  }

  // --------------------------------------------------------------------------------------------------------- actions

  showButtons() {
    const more = [
      canFindSimilar() && action("Find similar", "F", () => this.similar()),
      this.may("image") && action("Deny image", "D", () => this.askToDeny("image")),
      this.may("domain") && action("Deny domain", "", () => this.askToDeny("domain")),
    ];
    this.buttons.replaceChildren(...more.filter(Boolean));
  }

  similar() {
    if (!this.key || !canFindSimilar()) return;
    const { key } = this;
    this.actions.close(() => findSimilar(key));
  }

  copyKey() {
    if (this.key) this.copied.click();
  }

  // Asked once, since it lasts: what will be written where, and what undoes it.
  askToDeny(what) {
    if (!this.may(what)) return;
    const { why } = this;
    const isImage = what === "image";
    const yes = button(isImage ? "Deny it" : "Deny the domain", () => this.deny(why, what), { className: "primary" });
    const no = button("Leave it", () => this.dropQuestion());
    const goes = isImage ? "Its address goes" : "The domain goes";
    this.ask(
      element("b", {}, `Deny ${isImage ? "this image" : why.download.domain}?`),
      hint(`${goes} into the deny-list of this folder. Nothing is deleted: a command, which is shown then, does that.`),
      element("div", { className: "row" }, yes, no),
    );
    yes.focus();
  }

  may(what) {
    if (!this.why || !state.data || state.data.read_only) return false;
    return what === "image" ? Boolean(this.why.url || this.why.download?.sha256) : Boolean(this.why.download?.domain);
  }

  async deny({ key }, what) {
    await this.change(key, async () => {
      const list = await call("/api/deny", { body: { key, what } });
      this.sayDenied(key, what, list);
    });
  }

  sayDenied(key, what, { file, entries, command }) {
    const mine = entries.filter((one) => one.key === key && one.what === what).at(-1) ?? entries.at(-1);
    const undo = button("Undo", () => this.allow(key, what));
    const done = button("Done", () => this.dropQuestion());
    this.ask(
      element("p", {}, element("b", {}, "Denied: "), mine?.entry ?? ""),
      hint(`Written to ${file}.`, command ? " This takes out of the data what it names:" : ""),
      ...(command ? [commandLine(command)] : []),
      element("div", { className: "row" }, undo, done),
    );
    undo.focus();
  }

  async allow(key, what) {
    await this.change(key, async () => {
      await call(`/api/deny/${encodeURIComponent(key)}?what=${what}`, { method: "DELETE" });
      this.dropQuestion();
    });
  }

  // Do something to the deny-list, and say anew whether the image is on it.
  async change(key, act) {
    try {
      await act();
      const why = await call(`/api/why/${encodeURIComponent(key)}`);
      if (this.key !== key || !this.why) return;
      this.why.denied = why.denied;
      this.denied.replaceChildren(...this.deniedLine(this.why));
    } catch (error) {
      this.ask(element("p", { className: "error" }, error.message));
    }
  }

  deniedLine({ key, denied }) {
    if (!denied) return [];
    const what = element("b", {}, denied.what === "domain" ? "Its domain is denied: " : "Denied: ");
    const undo = button("Undo", () => this.allow(key, denied.what));
    return [element("p", {}, what, denied.entry), ...(this.may(denied.what) ? [undo] : [])];
  }

  ask(...parts) {
    this.question.replaceChildren(...parts);
    this.question.hidden = false;
  }

  // True where there was one.
  dropQuestion() {
    const there = !this.question.hidden;
    const held = this.question.contains(document.activeElement);
    this.question.hidden = true;
    this.question.replaceChildren();
    if (held) this.box.closest("dialog").focus();
    return there;
  }
}

// Of a near-duplicate: its size, and what the annotator says of it alone.
function copyLines(column, { original_width: width, original_height: height, ...values }) {
  const own = Object.entries(values).filter(([name]) => ![`${column}_size`, `${column}_of`].includes(name));
  return [width && `${width} × ${height}`, ...own.map(([name, value]) => `${name} ${said(value)}`)].filter(Boolean);
}

const action = (text, key, onclick) => button([`${text} `, ...(key ? [element("kbd", {}, key)] : [])], onclick);

// ---------------------------------------------------------------------------------------------------- what it says

function verdict({ verdict: text, rules }) {
  const failed = rules.filter(({ state: how }) => how !== "true");
  const kept = rules.length ? !failed.length : text === "kept";
  const words = rules.length ? (kept ? keptWords(rules) : rejectedWords(failed)) : text;
  if (!words) return null;
  const title = element("p", { className: kept ? "kept" : "rejected" }, words);
  const list = rules.length ? [element("ul", {}, ...rules.map(ruleLine))] : [];
  return element("section", { className: "why-verdict" }, title, ...list);
}

const keptWords = (rules) => `Kept: true of ${rules.length === 1 ? "the one rule" : `all ${rules.length} rules`}`;

function rejectedWords([first, ...others]) {
  return `Rejected by ${first.name}${others.length ? ` and ${others.length} more` : ""}`;
}

function ruleLine({ name, condition, state: how, values }) {
  const [sign, className, spoken] = MARKS[how] ?? MARKS.unknown;
  const mark = element("span", { className: `why-mark ${className}`, role: "img", ariaLabel: spoken }, sign);
  const value = ([column, of]) => element("span", {}, `${column} `, element("b", {}, said(of)));
  const shown = Object.entries(values ?? {}).map(value);
  if (className === "none") shown.push(element("em", {}, spoken));
  const all = element("span", { className: "values" }, ...shown);
  return element("li", {}, mark, element("span", { className: "name" }, name), all, element("code", {}, condition));
}

function captions({ caption, captions: more }) {
  const all = [["caption", caption], ...Object.entries(more ?? {}).filter(([name]) => name !== "caption")];
  const section = element("section", { className: "why-captions" });
  for (const [name, text] of all) {
    if (name !== "caption") section.append(element("h3", {}, name));
    section.append(long(text));
  }
  return section;
}

// Text that may be 50 kB: its first lines, the rest when it is asked for.
function long(text) {
  if (text === null || text === undefined || text === "") return element("p", { className: "hint" }, "no caption");
  const place = element("p", { className: "text", dir: "auto", textContent: text.slice(0, 600) });
  if (text.length <= 600) return place;
  const showAll = () => {
    place.textContent = text;
    all.remove();
  };
  const all = button(`Show all ${count(text.length)} characters`, showAll, { className: "quiet" });
  return element("div", {}, place, all);
}

// Numbers with their place among all images, then texts, then the names of those that have no value here.
function columns(all) {
  const known = all.filter(({ value }) => value !== null && value !== undefined);
  const placed = known.filter(({ percentile: p }) => p !== null && p !== undefined);
  const others = known.filter((one) => !placed.includes(one));
  const none = all.filter((one) => !known.includes(one)).map(({ name }) => name);
  if (!all.length) return null;
  const title = element("h3", {}, "Columns ", ...(placed.length ? [hint("with its place among all images")] : []));
  const list = element("dl", { className: "why-columns" }, ...placed.map(placedColumn), ...others.map(otherColumn));
  const rest = none.length ? [element("p", { className: "hint why-none" }, `No value: ${none.join(", ")}`)] : [];
  return element("section", {}, title, list, ...rest);
}

function placedColumn(column) {
  const { name, value, percentile, unit } = column;
  const share = element("i", {});
  share.style.width = `${percentile}%`;
  const bar = element("span", { className: "why-bar", title: `larger than ${said(percentile)} % of all` }, share);
  const place = element("dd", { className: "why-place" }, `${Math.round(percentile)} %`);
  const number = element("dd", { title: String(value) }, ...withUnit(value, unit));
  return element("div", { title: meaningOf(column) }, element("dt", {}, name), element("dd", {}, bar), number, place);
}

function otherColumn(column) {
  const { name, value, unit } = column;
  const text = element("dd", { title: String(value), dir: "auto" }, ...withUnit(value, unit));
  return element("div", { className: "why-text", title: meaningOf(column) }, element("dt", {}, name), text);
}

const LONG = 7; // characters of a unit that there is no room for: then it is said with the meaning

const withUnit = (value, unit) => [said(value), ...(unit?.length < LONG ? [element("small", {}, ` ${unit}`)] : [])];
const meaningOf = ({ meaning, unit }) => [meaning, unit && `(${unit})`].filter(Boolean).join(" ");

function selections({ selections: all, packs }) {
  const chip = (name, kept, text) => {
    return element("span", { className: kept ? "why-chip kept" : "why-chip" }, name, element("small", {}, ` ${text}`));
  };
  const chips = [
    ...(all ?? []).map(({ name, verdict: text }) => chip(name, text === "kept", text ?? "")),
    ...(packs ?? []).map((name) => chip(name, true, "packed")),
  ];
  if (!chips.length) return null;
  return element("section", {}, element("h3", {}, "Selections"), element("p", { className: "why-chips" }, ...chips));
}

function facts(why) {
  const { download = {}, licence = {}, list, source = {} } = why;
  const rows = [];
  const add = (name, value) => {
    if (value === null || value === undefined || value === "") return;
    rows.push(element("dt", {}, name), element("dd", { dir: "auto" }, value instanceof Node ? value : said(value)));
  };
  add("address", why.url && link(why.url));
  add("came from", download.final_url && download.final_url !== why.url ? link(download.final_url) : null);
  add("domain", download.domain);
  for (const [name, text] of Object.entries(licence)) add(name.replace(/^source\./, ""), text);
  add("size", why.width && `${why.width} × ${why.height}`);
  const { original_width: width, original_height: height } = download;
  add("original size", width && (width !== why.width || height !== why.height) ? `${width} × ${height}` : null);
  add("bytes", download.bytes);
  for (const [name, value] of Object.entries(download)) if (!SAID.includes(name)) add(name.replaceAll("_", " "), value);
  const line = list?.line ?? null;
  add("list", list?.name && `${list.name}${line === null ? "" : `, row ${count(line)}`}`);
  const own = Object.entries(source).filter(([name]) => !(name in licence || `source.${name}` in licence));
  for (const [name, value] of own) add(name, value);
  const all = element("dl", { className: "why-facts" }, ...rows);
  return element("section", {}, element("h3", {}, "Where it is from"), all);
}

// An address as a link, where a browser should follow it.
function link(address) {
  if (!/^https?:\/\//i.test(address)) return address;
  return element("a", { href: address, target: "_blank", rel: "noreferrer noopener", textContent: address });
}

function commands({ commands: all }) {
  if (!all?.length) return null;
  return element("section", {}, element("h3", {}, "The same in a terminal"), ...all.map(commandLine));
}
