// Rating, full-screen: one image, or two, and an answer by a key, a click or a tap. What comes next is loaded ahead, so
// that an answer shows it at once; the answer itself is saved behind the scenes (outbox.js).

import { $, call, element } from "/api.js";
import { Learning } from "/learning.js";
import { outboxOf } from "/outbox.js";

const BATCH = 24; // images asked for at once
const MOST = 200; // that the server gives at once
const FEW = 10; // left: ask for more
const AHEAD = 5; // of them are loaded and decoded before they are shown
const LARGER = 3; // times its own pixels an image is shown at most
const ROUND = [10, 20, 50, 100, 200, 300, 500, 1000];

const pathOf = (set) => `/api/ratings/${encodeURIComponent(set)}`;
const keysOf = (body) => (body.key != null ? [body.key] : [body.a, body.b]);
const isAnswer = (body) => "score" in body || "label" in body || "choice" in body; // else it takes one back
const idOf = (keys) => [...keys].sort().join(" ");

// The answers of a set: what is sent, what its button says, and which keys give it.
export function answersOf(set) {
  if (set.kind === "pairs") {
    return [
      { label: "Left", body: { choice: "a" }, keys: ["ArrowLeft", "a", "1"], shown: "←" },
      { label: "Equal", body: { choice: "tie" }, keys: ["ArrowDown", "t"], shown: "↓" },
      { label: "Right", body: { choice: "b" }, keys: ["ArrowRight", "d", "2"], shown: "→" },
    ];
  }
  if (set.kind === "labels") {
    return [
      { label: "No", body: { label: "no" }, keys: ["n", "ArrowLeft"], shown: "N" },
      { label: "Yes", body: { label: "yes" }, keys: ["y", "ArrowRight"], shown: "Y" },
    ];
  }
  const [low, high] = set.scale;
  const count = Number.isInteger(low) && Number.isInteger(high) && high - low < 10 ? high - low + 1 : 10;
  const direct = low >= 0 && low + count - 1 <= (low ? 10 : 9); // then the key is the score itself, 0 for 10
  return Array.from({ length: count }, (_, i) => {
    const score = Number((low + (i * (high - low)) / (count - 1)).toPrecision(4));
    const key = String(direct ? score % 10 : (i + 1) % 10);
    return { label: String(score), body: { score }, keys: [key], shown: key === String(score) ? "" : key };
  });
}

// The question that a set asks, in words.
function questionOf(set) {
  if (set.kind === "pairs") return set.concept ? `Which one is more “${set.concept}”?` : "Which one is better?";
  if (set.kind === "labels") return `Does it show “${set.concept || set.name}”?`;
  return set.concept ? `How much “${set.concept}”?` : "How much do you like it?";
}

export class Rating {
  // place: the data folder's, so that answers of one folder never go to another. how: {how, column, value}. select: gives
  // the id of the selection whose images are rated, where it is not all of them.
  // onLeave(): the stage is closed; onWaiting(text): what to say then of answers that are not saved yet, "" once they are.
  constructor({ place, set, rater, how, select, onLeave, onWaiting }) {
    Object.assign(this, { set, rater, how, select, onLeave, onWaiting });
    this.answers = answersOf(set);
    this.coming = []; // items: {keys, images: [element]}
    this.past = []; // {item, entry}: what this visit answered; entry is null where it was skipped
    this.known = new Set(); // ids of all that was shown, answered or waits in `coming`
    this.current = null;
    this.mine = set.raters?.[rater] ?? 0; // confirmed ones
    this.learning = new Learning($("panel"), set);
    this.outbox = outboxOf(`${place}.${set.name}.${rater}`, {
      onChange: () => this.#said(),
      onConfirmed: (entry, answer) => this.#confirmed(entry, answer),
      onRefused: (entry, error) => this.#refused(entry, error),
    });
    for (const body of this.outbox.bodies.filter(isAnswer)) this.known.add(idOf(keysOf(body)));
  }

  async open() {
    $("question").textContent = questionOf(this.set);
    $("answers").replaceChildren(...this.answers.map((answer) => this.#button(answer)));
    $("answers").dataset.count = this.answers.length;
    $("images").className = this.set.kind === "pairs" ? "two" : "one";
    $("stage").hidden = false;
    for (const behind of document.querySelectorAll("body > .top, main")) behind.inert = true;
    document.body.classList.add("rating");
    this.#listen();
    this.#said();
    const kept = localStorage.getItem("tastemaker.panel");
    this.#showPanel(kept ? kept === "shown" : innerWidth > 900); // on a phone the image has the room
    this.learning.refresh();
    await this.#more();
    this.#next();
    $("stage").focus();
  }

  close() {
    this.listening.abort();
    this.learning.close();
    if (document.fullscreenElement) document.exitFullscreen();
    document.body.classList.remove("rating");
    for (const behind of document.querySelectorAll("body > .top, main")) behind.inert = false;
    $("stage").hidden = true;
    this.onLeave();
    this.#said();
  }

  // ------------------------------------------------------------------------------------------- what is shown next

  async #more() {
    if (this.fetching || this.exhausted) return;
    this.fetching = true;
    const skipped = this.past.filter(({ entry }) => !entry).length;
    const again = skipped + this.coming.length + this.outbox.count; // may be among the answer, and are left out here
    const asked = new URLSearchParams({ ...this.how, rater: this.rater, count: Math.min(MOST, BATCH + again) });
    try {
      if (this.select) asked.set("selection", (this.selection ??= await this.select()));
      const answer = await call(`${pathOf(this.set.name)}/next?${asked}`);
      const fresh = (answer.pairs ?? answer.images.map((image) => [image])).filter((images) => {
        const id = idOf(images.map((image) => image.key));
        return !this.known.has(id) && this.known.add(id);
      });
      this.coming.push(...fresh.map((images) => ({ images })));
      this.exhausted = !fresh.length;
      this.#trouble("");
    } catch (error) {
      if (error.status === 404) this.selection = null; // of before a restart
      this.#trouble(error.message);
      if (!this.listening.signal.aborted) setTimeout(() => this.#more().then(() => this.current ?? this.#next()), 2000);
    }
    this.fetching = false;
    this.#prepare();
  }

  #prepare() {
    for (const item of this.coming.slice(0, AHEAD)) item.figures ??= item.images.map((image) => figure(image));
  }

  #next() {
    this.current = this.coming.shift() ?? null;
    this.#prepare();
    if (this.coming.length < FEW) this.#more().then(() => this.current ?? (this.coming.length && this.#next()));
    this.#show();
  }

  #show() {
    const item = this.current;
    $("reveal").hidden = true;
    if (!item) {
      const text = this.exhausted
        ? "You have seen all that there is here. Thank you. Choose other images, or look at what was learnt."
        : "Loading …";
      $("images").replaceChildren(element("p", { className: "hint" }, text));
      return;
    }
    item.figures ??= item.images.map((image) => figure(image));
    $("images").replaceChildren(...item.figures);
    item.figures.forEach((made, i) => {
      made.onclick = this.set.kind === "pairs" ? () => this.answer(this.answers[i ? 2 : 0]) : null;
    });
    $("reveal").hidden = !item.images.some((image) => image.blurred);
  }

  // -------------------------------------------------------------------------------------------------- what is done

  answer(answer) {
    const item = this.current;
    if (!item || !item.figures.every((made) => made.classList.contains("seen"))) return; // nobody rates what is not there
    const keys = item.images.map((image) => image.key);
    const subject = keys.length === 2 ? { a: keys[0], b: keys[1] } : { key: keys[0] };
    this.past.push({ item, entry: this.outbox.add(pathOf(this.set.name), { rater: this.rater, ...subject, ...answer.body }) });
    this.#mark(answer);
    this.#next();
  }

  skip() {
    if (!this.current) return;
    this.past.push({ item: this.current, entry: null });
    this.#next();
  }

  // Back to the last image: what was answered is taken back, here where it has not been sent, else by the server.
  async undo() {
    const last = this.past.pop();
    if (last) {
      if (last.entry && !this.outbox.withdraw(last.entry)) this.#undoSent(last.item);
      this.#back(last.item);
      return;
    }
    if (this.outbox.count) return; // of before a reload: on their way, and not to be overtaken
    try {
      const { undone } = await call(`${pathOf(this.set.name)}/undo`, { body: { rater: this.rater } });
      if (!undone) return this.#trouble("There is nothing left to undo.");
      this.mine -= 1;
      this.learning.refresh();
      this.#back({ images: (undone.images ?? keysOf(undone)).map((image) => (image.key ? image : { key: image })) });
    } catch (error) {
      this.#trouble(error.message);
    }
  }

  #undoSent(item) {
    const keys = item.images.map((image) => image.key);
    const subject = keys.length === 2 ? { a: keys[0], b: keys[1] } : { key: keys[0] };
    this.outbox.add(`${pathOf(this.set.name)}/undo`, { rater: this.rater, ...subject });
  }

  #back(item) {
    if (this.current) this.coming.unshift(this.current);
    this.current = item;
    this.exhausted = false;
    this.#show();
    this.#said();
  }

  reveal() {
    for (const [i, image] of (this.current?.images ?? []).entries()) {
      if (!image.blurred) continue;
      image.blurred = false;
      image.revealed = true;
      this.current.figures[i] = figure(image);
    }
    if (this.current) this.#show();
  }

  // --------------------------------------------------------------------------------------------- what is said of it

  #confirmed(entry, answer) {
    if (!entry.path.endsWith("/undo")) this.mine += 1;
    else if (answer.undone && !answer.restored) this.mine -= 1;
    this.#said();
    this.learning.refresh();
  }

  #refused(entry, error) {
    this.#said();
    this.#trouble(`An answer could not be saved: ${error.message}`);
  }

  #said() {
    const waiting = this.outbox?.count ?? 0;
    if (this.listening?.signal.aborted) this.onWaiting(waiting ? `Answers on their way to be saved: ${waiting}.` : "");
    const bodies = this.outbox?.bodies ?? [];
    const total = this.mine + 2 * bodies.filter(isAnswer).length - bodies.length;
    $("status").dataset.waiting = waiting;
    $("status").replaceChildren(
      element("b", {}, total.toLocaleString("en")), " rated",
      element("span", { className: waiting ? "waiting" : "hint" }, waiting > 1 || this.outbox?.trouble ? ` · ${waiting} not saved yet` : ""),
    );
    const goal = ROUND.find((round) => round > total) ?? Math.ceil((total + 1) / 1000) * 1000;
    const from = ROUND.findLast((round) => round <= total) ?? (total >= 1000 ? goal - 1000 : 0);
    $("line").setAttribute("aria-valuemax", goal);
    $("line").setAttribute("aria-valuenow", total);
    $("line").title = `${total} of ${goal}`;
    $("line").firstElementChild.style.width = `${(100 * (total - from)) / (goal - from)}%`;
    const trouble = this.outbox?.trouble;
    if (trouble) this.#trouble(`${trouble} What you answered is kept here and sent again.`, "outbox");
    else if ($("trouble").dataset.by === "outbox") this.#trouble("");
  }

  #trouble(text, by = "") {
    $("trouble").textContent = text;
    $("trouble").hidden = !text;
    $("trouble").dataset.by = by;
  }

  // For a moment: what was given, at the foot of the next image and on its button.
  #mark(answer) {
    const given = $("given");
    given.textContent = answer.label;
    for (const one of [given, answer.button]) {
      one.classList.remove("now");
      void one.offsetWidth; // begins the animation anew
      one.classList.add("now");
    }
  }

  #button(answer) {
    answer.button = element("button", { type: "button", onclick: () => this.answer(answer) }, answer.label);
    if (answer.shown) answer.button.append(element("kbd", {}, answer.shown));
    answer.button.onanimationend = () => answer.button.classList.remove("now");
    return answer.button;
  }

  #togglePanel() {
    localStorage.setItem("tastemaker.panel", this.learning.shown ? "hidden" : "shown");
    this.#showPanel(!this.learning.shown);
  }

  #showPanel(shown) {
    $("stage").classList.toggle("with-panel", shown);
    $("panel-button").setAttribute("aria-pressed", String(shown));
    this.learning.shown = shown;
  }

  #listen() {
    this.listening = new AbortController();
    const { signal } = this.listening;
    const acts = {
      s: () => this.skip(), " ": () => this.skip(), u: () => this.undo(), Backspace: () => this.undo(),
      r: () => this.reveal(), h: () => this.#togglePanel(), Escape: () => this.close(),
      f: () => (document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen()),
    };
    for (const answer of this.answers) for (const key of answer.keys) acts[key] = () => this.answer(answer);
    const onkey = (event) => {
      if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
      if (event.target.matches("input, select, textarea")) return;
      if (event.target.matches("button, a, summary") && event.key === " " && event.target.matches(":focus-visible")) return;
      const digit = event.code.replace("Digit", ""); // where digits need Shift, as in France
      const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key] ?? acts[digit];
      if (!act) return;
      event.preventDefault();
      act();
    };
    document.addEventListener("keydown", onkey, { signal });
    const clicks = { leave: "Escape", undo: "u", skip: "s", reveal: "r", full: "f", "panel-button": "h" };
    for (const [id, key] of Object.entries(clicks)) $(id).addEventListener("click", () => acts[key](), { signal });
  }
}

// An image of the data, being loaded; of class "seen" once it can be shown.
function figure(image) {
  const view = element("img", { alt: image.caption || "", decoding: "sync", draggable: false });
  const made = element("figure", { className: "photo" }, view);
  made.dataset.key = image.key;
  if (image.blurred) made.append(element("figcaption", {}, "Blurred: it may be unsafe. R shows it."));
  view.src = `/api/data/images/${encodeURIComponent(image.key)}${image.revealed ? "?reveal=true" : ""}`;
  view.decode().then(
    () => {
      view.style.maxWidth = `${LARGER * view.naturalWidth}px`;
      view.style.maxHeight = `${LARGER * view.naturalHeight}px`;
      made.classList.add("seen");
    },
    () => {
      made.classList.add("broken");
      made.append(element("figcaption", {}, "This image can’t be shown. S skips it."));
    },
  );
  return made;
}
