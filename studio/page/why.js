// The panel beside an image: why it is kept or not, and all else that is known of it. What people or servers wrote goes
// in as text only.

import { call, element } from "/api.js";
import { commandLine, copyButton, imageButton, many, said } from "/panels.js";
import { findSimilar, canFindSimilar } from "/search.js";
import { state } from "/store.js";

const MARKS = {
  true: ["✓", "yes", "true"],
  false: ["✕", "no", "not true"],
  null: ["–", "none", "no value"],
  unknown: ["?", "none", "not known"],
};

export class WhyPanel {
  // actions: close(), open(key), beside(key, text), reveal()
  constructor(actions) {
    this.actions = actions;
    this.title = element("h2", {});
    this.where = element("span", { className: "hint why-where" });
    this.copied = copyButton(() => this.key, "Copy", { title: "Copy the key (C)" });
    this.from = element("button", { type: "button", className: "quiet", hidden: true, onclick: () => actions.back() });
    this.body = element("div", { className: "why-body" });
    this.question = element("div", { className: "why-question", hidden: true });
    this.question.setAttribute("role", "alert");
    this.buttons = element("div", { className: "why-actions" });
    const leave = element("button", { type: "button", className: "why-close", title: "Close (Esc)", onclick: actions.close }, "×");
    leave.setAttribute("aria-label", "Close");
    this.head = element("header", { className: "why-head" }, this.title, this.copied, this.where, this.from, leave);
    this.box = element("aside", { className: "why-panel" }, this.head, this.body, this.question, this.buttons);
  }

  wait(key, from, where) {
    this.key = key;
    this.where.textContent = where;
    this.why = null;
    this.title.textContent = key;
    this.from.hidden = !from;
    this.from.textContent = from ? `‹ ${from}` : "";
    this.from.title = from ? "Back to that image (Backspace)" : "";
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
    this.body.replaceChildren(...[
      this.denied, verdict(why), captions(why), columns(why.columns), similar, selections(why), facts(why), commands(why),
    ].filter(Boolean));
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
      const groups = (why.duplicates ?? []).map((group) => ({ ...group, members: group.members.map((key) => ({ key })) }));
      found = { groups, nearest: [] };
      if (error.status !== 503 && error.status !== 404) place.append(element("p", { className: "hint" }, error.message));
    }
    if (this.why !== why) return;
    for (const group of found.groups) place.append(...this.group(group, why.key));
    if (found.nearest.length) {
      const list = found.nearest.map(({ key, cosine }) => this.card(key, `likeness ${said(cosine)}`, [said(cosine)]));
      place.append(element("h3", {}, "Nearest images"), element("div", { className: "why-cards" }, ...list));
    }
  }

  group({ column, keeper, members }, own) {
    if (members.every(({ key }) => key === own)) return [];
    const kept = !keeper ? "" : keeper === own ? ", this one is kept of them" : `, ${keeper} is kept of them`;
    const cards = members.map(({ key, values }) => {
      const roles = [key === own && "this image", key === keeper && "keeper"].filter(Boolean).join(", ");
      const facts = Object.entries(values ?? {}).filter(([, value]) => value !== null).map(([name, value]) => `${name} ${said(value)}`);
      const lines = [roles, ...facts].filter(Boolean);
      return this.card(key, lines.join(" · "), lines.length ? lines : [key], key === own);
    });
    const says = element("span", { className: "hint" }, `by ${column}: ${many(members.length, "image")}${kept}`);
    return [element("h3", {}, "Near-duplicates ", says), element("div", { className: "why-cards" }, ...cards)];
  }

  // One image that can be shown at the side of this one, and what is said under it.
  card(key, text, lines, own = false) {
    const show = () => this.actions.beside(this.beside === key ? null : key, [key, text].filter(Boolean).join(" · "));
    const made = imageButton(key, show, { title: own ? "" : `${key}: beside this image`, label: `Show ${key} beside this image, ${text}` });
    made.dataset.key = key;
    made.disabled = own;
    return element("div", { className: "why-card" }, made, ...lines.map((line) => element("span", { title: line }, line)));
  }

  mark(key) {
    this.beside = key;
    for (const one of this.body.querySelectorAll(".why-card .thumb")) one.setAttribute("aria-pressed", String(one.dataset.key === key));
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
    this.actions.close();
    findSimilar(key);
  }

  copyKey() {
    if (this.key) this.copied.click();
  }

  // Asked once, since it lasts: what will be written where, and what undoes it.
  askToDeny(what) {
    if (!this.may(what)) return;
    const { why } = this;
    const [name, its] = what === "image" ? ["this image", "Its address goes"] : [why.download.domain, "The domain goes"];
    const yes = element("button", { type: "button", className: "primary", onclick: () => this.deny(why, what) }, what === "image" ? "Deny it" : "Deny the domain");
    const no = element("button", { type: "button", onclick: () => this.dropQuestion() }, "Leave it");
    this.ask(
      element("p", {}, element("b", {}, `Deny ${name}?`)),
      element("p", { className: "hint" }, `${its} into the deny-list of this folder. Nothing is deleted: a command, which is shown then, does that.`),
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
    const undo = element("button", { type: "button", onclick: () => this.allow(key, what) }, "Undo");
    this.ask(
      element("p", {}, element("b", {}, "Denied: "), mine?.entry ?? ""),
      element("p", { className: "hint" }, `Written to ${file}.`, command ? " This takes out of the data what it names:" : ""),
      ...(command ? [commandLine(command)] : []),
      element("div", { className: "row" }, undo, element("button", { type: "button", onclick: () => this.dropQuestion() }, "Done")),
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
    const words = element("p", {}, element("b", {}, denied.what === "domain" ? "Its domain is denied: " : "Denied: "), denied.entry);
    return [words, ...(this.may(denied.what) ? [element("button", { type: "button", onclick: () => this.allow(key, denied.what) }, "Undo")] : [])];
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

function action(text, key, onclick) {
  return element("button", { type: "button", onclick }, `${text} `, ...(key ? [element("kbd", {}, key)] : []));
}

// --------------------------------------------------------------------------------------------------------- what it says

function verdict({ verdict: text, rules }) {
  const failed = rules.filter(({ state: how }) => how !== "true");
  const kept = rules.length ? !failed.length : text === "kept";
  const words = !rules.length ? text ?? "" : kept
    ? `Kept: true of ${rules.length === 1 ? "the one rule" : `all ${rules.length} rules`}`
    : `Rejected by ${failed[0].name}${failed.length > 1 ? ` and ${failed.length - 1} more` : ""}`;
  if (!words) return null;
  const section = element("section", { className: "why-verdict" }, element("p", { className: kept ? "kept" : "rejected" }, words));
  const list = element("ul", {});
  for (const rule of rules) {
    const [mark, className, spoken] = MARKS[rule.state] ?? MARKS.unknown;
    const sign = element("span", { className: `why-mark ${className}` }, mark);
    sign.setAttribute("role", "img");
    sign.setAttribute("aria-label", spoken);
    const values = Object.entries(rule.values ?? {}).map(([name, value]) => element("span", { className: "why-value" }, `${name} `, element("b", {}, said(value))));
    const says = ["null", "unknown"].includes(rule.state) ? [element("em", {}, spoken)] : [];
    list.append(element("li", {}, sign, element("span", { className: "name" }, rule.name), element("span", { className: "values" }, ...values, ...says), element("code", {}, rule.condition)));
  }
  if (rules.length) section.append(list);
  return section;
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
  const all = element("button", { type: "button", className: "quiet" }, `Show all ${text.length.toLocaleString("en")} characters`);
  all.onclick = () => {
    place.textContent = text;
    all.remove();
  };
  return element("div", {}, place, all);
}

// Numbers with their place among all images, then texts, then the names of those that have no value here.
function columns(all) {
  const known = all.filter(({ value }) => value !== null && value !== undefined);
  const placed = known.filter(({ percentile: p }) => p !== null && p !== undefined);
  const list = element("dl", { className: "why-columns" }, ...placed.map(placedColumn));
  for (const { name, value, unit, meaning } of known.filter((one) => !placed.includes(one))) {
    const text = element("dd", { title: String(value), dir: "auto" }, said(value), ...(unit ? [element("small", {}, ` ${unit}`)] : []));
    list.append(element("div", { className: "why-text", title: meaning ?? "" }, element("dt", {}, name), text));
  }
  const none = all.filter((one) => !known.includes(one)).map(({ name }) => name);
  if (!all.length) return null;
  const title = element("h3", {}, "Columns ", element("span", { className: "hint" }, placed.length ? "with its place among all images" : ""));
  const rest = none.length ? [element("p", { className: "hint why-none" }, `No value: ${none.join(", ")}`)] : [];
  return element("section", {}, title, list, ...rest);
}

function placedColumn({ name, value, percentile, meaning, unit }) {
  const bar = element("span", { className: "why-bar", title: `larger than ${said(percentile)} % of all images` }, element("i", {}));
  bar.firstChild.style.width = `${percentile}%`;
  const number = element("dd", { title: String(value) }, said(value), ...(unit ? [element("small", {}, ` ${unit}`)] : []));
  const place = element("dd", { className: "why-place" }, `${Math.round(percentile)} %`);
  return element("div", { title: meaning ?? "" }, element("dt", {}, name), element("dd", {}, bar), number, place);
}

function selections({ selections: all, packs }) {
  if (!all?.length && !packs?.length) return null;
  const list = element("p", { className: "why-chips" });
  for (const { name, verdict: text } of all ?? []) {
    const kept = text === "kept";
    list.append(element("span", { className: kept ? "why-chip kept" : "why-chip" }, name, element("small", {}, kept ? " kept" : text ? ` ${text}` : "")));
  }
  for (const name of packs ?? []) list.append(element("span", { className: "why-chip kept" }, name, element("small", {}, " packed")));
  return element("section", {}, element("h3", {}, "Selections"), list);
}

function facts(why) {
  const { download = {}, licence = {}, list, source = {} } = why;
  const rows = [];
  const add = (name, value) => value !== null && value !== undefined && value !== "" && rows.push([name, value]);
  add("address", why.url && link(why.url));
  add("came from", download.final_url && download.final_url !== why.url ? link(download.final_url) : null);
  add("domain", download.domain);
  for (const [name, text] of Object.entries(licence)) add(name.replace(/^source\./, ""), text);
  if (why.width) add("size", `${why.width} × ${why.height}`);
  const { original_width: width, original_height: height } = download;
  if (width && (width !== why.width || height !== why.height)) add("original size", `${width} × ${height}`);
  add("bytes", download.bytes && said(download.bytes));
  const known = ["status", "final_url", "domain", "width", "height", "original_width", "original_height", "bytes"];
  for (const [name, value] of Object.entries(download)) if (!known.includes(name)) add(name.replaceAll("_", " "), value === null ? null : said(value));
  add("list", list?.name && `${list.name}${list.line !== null && list.line !== undefined ? `, row ${list.line.toLocaleString("en")}` : ""}`);
  for (const [name, value] of Object.entries(source)) if (!(name in licence) && !(`source.${name}` in licence)) add(name, value === null ? null : said(value));
  const table = element("dl", { className: "why-facts" });
  for (const [name, value] of rows) table.append(element("dt", {}, name), element("dd", { dir: "auto" }, value instanceof Node ? value : String(value)));
  return element("section", {}, element("h3", {}, "Where it is from"), table);
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
