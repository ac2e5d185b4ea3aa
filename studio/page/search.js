// Search: by words, by an image of the data, by one that is dropped, pasted or chosen, away from other words; any of
// them together. The answer is an order of the grid ("by likeness"), beside whatever filter holds.
//
//   findSimilar(key)      searches by an image of the data, beside what is searched already
//   canFindSimilar()      whether this page can
//
// What is searched is kept in the address (`search`), but for a dropped image: that is nobody else's.

import { ApiError, call, element, $ } from "/api.js";
import { button, many } from "/panels.js";
import { change, show, state, subscribe } from "/store.js";
import { thumbnail } from "/tile.js";

const LARGEST = 17 << 20; // bytes of a file; in base64 it is as much as a request may have
const NOTHING = { words: "", without: "", key: "", image: null };

let box = null;

export const canFindSimilar = () => Boolean(box && state.data?.search?.images);

export function findSimilar(key) {
  box.ask({ key, image: null });
  box.words.focus();
}

class SearchBox {
  constructor(place) {
    this.asked = { ...NOTHING }; // image: {name, text (base64), url}
    this.found = null; // the last answer
    this.text = ""; // what the address says of it
    this.before = null; // sort and direction before the search
    this.request = null;
    this.build(place);
    subscribe("data", () => this.showAbilities());
    subscribe(["view", "more"], (_, changed) => this.followAddress(changed));
    this.showAbilities();
    this.begin();
  }

  build(place) {
    this.tokens = element("span", { className: "search-tokens" });
    this.words = field("search-words", "Search by words");
    this.without = field("search-without", "Without these words");
    Object.assign(this.without, { placeholder: "without: blurry, text", hidden: true });
    this.file = element("input", { type: "file", accept: "image/*", className: "hidden", tabIndex: -1 });
    this.file.setAttribute("aria-label", "An image to search by");
    const quiet = (name, title) => ({ className: `quiet ${name}`, title });
    this.choose = button("Image", () => this.file.click(), quiet("search-choose", "Choose an image to search by"));
    this.more = button("Without", () => this.openWithout(), quiet("search-more", "Words to move away from"));
    this.clear = button("×", () => this.end(), { ...quiet("", "Clear the search (Esc)"), label: "Clear the search" });
    this.clear.hidden = true;
    this.says = element("p", { className: "search-says hint" });
    this.says.setAttribute("role", "status");
    const buttons = [this.more, this.choose, this.clear, this.file];
    const line = element("div", { className: "search-line" }, this.tokens, this.words, this.without, ...buttons);
    this.form = element("form", { className: "search", autocomplete: "off" }, line, this.says);
    this.form.setAttribute("role", "search");
    place.append(this.form);
    this.listen();
  }

  listen() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.typed();
    });
    this.form.addEventListener("keydown", (event) => this.pressed(event));
    this.file.onchange = () => {
      this.take(this.file.files[0]);
      this.file.value = "";
    };
    for (const one of [this.words, this.without]) { // the browser's own cross in the field
      one.addEventListener("search", () => one.value === "" && this.typed());
    }
    document.addEventListener("paste", (event) => {
      const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
      if (file && !document.querySelector("dialog[open]")) this.take(file);
    });
    document.addEventListener("dragover", (event) => this.over(event));
    document.addEventListener("dragleave", ({ relatedTarget }) => {
      if (relatedTarget === null) this.form.classList.remove("over");
    });
    document.addEventListener("drop", (event) => {
      this.form.classList.remove("over");
      const file = event.dataTransfer?.files[0];
      if (!file) return;
      event.preventDefault();
      this.take(file);
    });
    document.addEventListener("keydown", (event) => {
      const busy = event.target.closest?.("input, textarea, select, dialog, [contenteditable]");
      if (event.key !== "/" || busy || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.words.focus();
    });
  }

  openWithout() {
    this.without.hidden = !this.without.hidden;
    if (!this.without.hidden) this.without.focus();
    else if (this.asked.without) this.ask({ without: (this.without.value = "") });
  }

  over(event) {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    this.form.classList.add("over");
  }

  pressed(event) {
    if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      if (this.any() || this.words.value || this.without.value) this.end();
      else document.activeElement.blur();
    } else if (event.key === "Enter" && event.target.matches("input")) { // of two fields a browser sends none by itself
      event.preventDefault();
      this.typed();
    } else if (event.key === "Backspace" && event.target === this.words && !this.words.value) {
      if (this.asked.image) this.ask({ image: null });
      else if (this.asked.key) this.ask({ key: "" });
    }
  }

  // What can be searched by, in the words of the field itself.
  showAbilities() {
    const can = state.data?.search;
    if (!can) return;
    const nothing = !can.words && !can.images;
    const byImages = can.images ? "Drop or paste an image to search by" : "No search here";
    this.words.placeholder = can.words ? "Search by words, or drop an image" : byImages;
    this.words.title = can.why || "Press / to come here";
    this.words.disabled = this.choose.disabled = nothing;
    this.choose.hidden = !can.images;
    this.more.hidden = !can.words;
    if (nothing) this.say(can.why);
  }

  say(text, wrong = false) {
    this.says.textContent = text;
    this.says.classList.toggle("error", wrong);
    this.says.classList.toggle("hint", !wrong);
  }

  any(asked = this.asked) {
    return Boolean(asked.words || asked.key || asked.image);
  }

  typed() {
    const words = this.words.value.trim();
    const can = state.data?.search;
    if (words && can && !can.words) {
      if (!/^\d{4,}$/.test(words)) return this.say(`Words can’t be searched here: ${can.why}`, true);
      this.words.value = ""; // the number of an image
      return this.ask({ key: words });
    }
    this.ask({ words, without: this.without.value.trim() });
  }

  async take(file) {
    if (!state.data?.search?.images) return this.say(state.data?.search?.why ?? "", true);
    if (!file?.type.startsWith("image/")) return this.say("This file is no image.", true);
    if (file.size > LARGEST) return this.say("This image is too large: at most 17 MB.", true);
    const text = await base64(file);
    this.ask({ image: { name: file.name || "pasted image", text, url: URL.createObjectURL(file) }, key: "" });
  }

  // Search by what is asked now and these changes to it.
  async ask(changes) {
    if (this.asked.image && "image" in changes) URL.revokeObjectURL(this.asked.image.url);
    this.asked = { ...this.asked, ...changes };
    this.showTokens();
    if (!this.any()) return this.end({ keepWithout: true });
    this.request?.abort();
    const request = (this.request = new AbortController());
    this.form.setAttribute("aria-busy", "true");
    try {
      this.found = await call("/api/search", { body: this.body(), signal: request.signal });
      this.order();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      this.say(error.message, true);
    } finally {
      if (this.request === request) this.form.removeAttribute("aria-busy");
    }
  }

  body() {
    const { words, without, key, image } = this.asked;
    const body = {};
    if (words) body.words = words;
    if (key) body.key = key;
    if (image) body.image = image.text;
    if (without) body.without = without;
    return body;
  }

  // The grid in the order that was found.
  order() {
    const { sort, descending } = state.view;
    if (!sort.startsWith("search:")) this.before = { sort, descending };
    const { words, without, key } = this.asked;
    const kept = Object.fromEntries(Object.entries({ words, without, key }).filter(([, value]) => value));
    this.text = Object.keys(kept).length ? JSON.stringify(kept) : "";
    const view = { ...state.view, sort: `search:${this.found.id}`, descending: false };
    const history = this.restores ? "replace" : "push";
    change({ more: { ...state.more, search: this.text }, view, place: 0 }, { history });
    this.restores = false;
    this.showFound();
  }

  showFound() {
    const { seconds, of, exact, recall } = this.found;
    const nearly = recall ? `, ${Math.round(recall * 100)} % of the nearest are found` : ", nearly all of the nearest";
    const took = seconds < 1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toFixed(1)} s`;
    this.say(`By likeness, among ${many(of, "image")} in ${took}${exact ? "" : nearly}`);
    this.says.title = this.asked.words ? state.data.search.why : ""; // what there is to know of words
  }

  showTokens() {
    const { key, image, words } = this.asked;
    this.words.value = words || this.words.value;
    if (this.asked.without) this.without.hidden = false;
    this.without.value = this.asked.without || this.without.value;
    const tokens = [];
    if (key) tokens.push(token(thumbnail(key, 320), `similar to ${key}`, () => this.ask({ key: "" })));
    if (image) tokens.push(token(image.url, image.name, () => this.ask({ image: null })));
    this.tokens.replaceChildren(...tokens);
    this.clear.hidden = !this.any();
  }

  // No search: the order that there was before.
  end({ keepWithout = false } = {}) {
    this.request?.abort();
    this.form.removeAttribute("aria-busy");
    if (this.asked.image) URL.revokeObjectURL(this.asked.image.url);
    this.asked = { ...NOTHING, without: keepWithout ? this.asked.without : "" };
    this.words.value = "";
    if (!keepWithout) [this.without.value, this.without.hidden] = ["", true];
    [this.found, this.text] = [null, ""];
    this.say("");
    this.showTokens();
    if (state.view.sort.startsWith("search:")) {
      const view = { ...state.view, ...(this.before ?? { sort: "key", descending: false }) };
      change({ more: { ...state.more, search: "" }, view, place: 0 });
    }
  }

  // Another order was chosen, or one went to another address.
  followAddress(changed) {
    const searched = state.view.sort.startsWith("search:");
    if (searched && changed.has("more") && (state.more.search ?? "") !== this.text) this.begin();
    else if (this.found && !searched) this.offerOrder();
    else if (this.found && this.any()) this.showFound();
  }

  offerOrder() {
    const again = button("Back to likeness", () => this.ask({}), { className: "quiet" });
    this.says.replaceChildren("Another order is shown. ", again);
  }

  // A link with a search in it: asked again, since a server that was started anew knows nothing of it.
  begin() {
    if (!state.data) return;
    this.text = state.more.search ?? "";
    const kept = read(this.text);
    if (this.any(kept)) {
      this.asked = { ...NOTHING, ...kept };
      this.words.value = kept.words;
      this.restores = true;
      this.ask({});
    } else if (state.view.sort.startsWith("search:") && state.view.sort !== `search:${this.found?.id}`) {
      show({ sort: "key", descending: false }); // by an image that was dropped: nobody has it any more
    }
  }
}

function read(text) {
  try {
    const { words = "", without = "", key = "" } = JSON.parse(text || "{}");
    return { words: String(words), without: String(without), key: String(key) };
  } catch {
    return { words: "", without: "", key: "" };
  }
}

function field(className, label) {
  const made = element("input", { type: "search", className, autocomplete: "off", spellcheck: false, maxLength: 1000 });
  made.setAttribute("aria-label", label);
  return made;
}

function token(source, text, onclick) {
  const image = element("img", { src: source, alt: "" });
  const leave = button("×", onclick, { className: "quiet", label: `Remove ${text} from the search` });
  return element("span", { className: "search-token", title: text }, image, element("span", {}, text), leave);
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

function mount() {
  if (!box && state.data && $("search")) box = new SearchBox($("search"));
}

subscribe("data", mount);
mount();
