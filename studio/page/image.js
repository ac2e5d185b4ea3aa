// The dialog of one image: the image as large as the window allows, and beside it why it is kept or not (why.js).
//
//   openImage(key, { next, previous, selection, closed })
//
// next(key), previous(key): the neighbour in the order of whatever it was opened from, or null; may be promises.
// where(key): which one of how many it is, in words. selection: the id of the selection whose rules are shown, or a
// function that gives it. closed(key): called with the image that was seen last.
// While it is open the page's address names the image (`image=KEY` in the fragment).

import { ApiError, call, element } from "/api.js";
import { count } from "/numbers.js";
import { button } from "/panels.js";
import { change, refresh, state, subscribe } from "/store.js";
import { thumbnail } from "/tile.js";
import { WhyPanel } from "/why.js";

const REST = 60; // ms that an image is looked at before it is asked why: a key that is held goes on
const LARGEST = 4; // times its own pixels: beyond that a small image is only blurrier
let view = null; // the one dialog, made when it is first wanted

export function openImage(key, context = {}) {
  view ??= new ImageView();
  view.open(key, context);
}

export const openedImage = () => (view?.dialog.open ? view.key : null);

const imageUrl = (key, reveal) => `/api/data/images/${encodeURIComponent(key)}${reveal ? "?reveal=true" : ""}`;

class ImageView {
  constructor() {
    this.key = null;
    this.context = {};
    this.trail = []; // images that one came from by a click on a similar one
    this.whole = false; // at 100 %
    this.seen = 0; // counts what was asked for: answers that come late are dropped
    this.build();
  }

  build() {
    this.main = figure("why-main");
    this.other = figure("why-other");
    this.other.box.hidden = true;
    this.scale = element("output", { className: "why-scale" });
    this.back = button("‹", () => this.step(-1), { className: "why-step previous", label: "Previous image (←)" });
    this.forth = button("›", () => this.step(1), { className: "why-step next", label: "Next image (→)" });
    this.stage = element("div", { className: "why-stage" }, this.main.box, this.other.box);
    this.frame = element("div", { className: "why-frame" }, this.stage, this.back, this.forth, this.scale);
    this.panel = new WhyPanel({
      close: (after) => this.close(after),
      beside: (key, text) => this.beside(key, text),
      back: () => this.goBack(),
    });
    this.dialog = element("dialog", { className: "why", tabIndex: -1 }, this.frame, this.panel.box);
    this.dialog.setAttribute("aria-label", "One image");
    document.body.append(this.dialog);
    this.dialog.addEventListener("close", () => this.closed());
    this.dialog.addEventListener("keydown", (event) => this.pressed(event));
    document.addEventListener("keydown", (event) => { // what had the focus may be gone
      if (this.dialog.open && event.target === document.body) this.pressed(event);
    });
    this.main.image.addEventListener("click", (event) => !this.moved && this.zoom(event));
    new ResizeObserver(() => this.fit()).observe(this.stage);
    this.swipes();
    this.drags();
  }

  open(key, context) {
    this.context = context;
    this.trail = [];
    if (!this.dialog.open) {
      this.opener = document.activeElement;
      this.dialog.showModal();
      this.dialog.focus(); // not a button: keys are for looking
    }
    this.show(key);
  }

  // after: what is done then, in place of giving the focus back.
  close(after = null) {
    this.after = after;
    this.dialog.close();
  }

  closed() {
    name(null);
    this.seen += 1;
    this.panel.left();
    const { closed } = this.context;
    if (closed) closed(this.key);
    else if (this.opener?.isConnected) this.opener.focus();
    this.key = null;
    this.after?.();
    this.after = null;
  }

  // Show an image at once, what is known of it as soon as the server says.
  async show(key) {
    this.key = key;
    this.revealed = false;
    this.whole = false;
    this.beside(null);
    this.main.box.classList.remove("broken");
    this.main.note("");
    name(key);
    const seen = ++this.seen;
    this.back.disabled = this.forth.disabled = false;
    const loaded = this.load(this.main, key);
    this.panel.wait(key, this.trail.at(-1) ?? "", this.trail.length ? "" : (this.context.where?.(key) ?? ""));
    try {
      await new Promise((done) => setTimeout(done, REST));
      if (seen !== this.seen) return;
      const why = await this.ask(key);
      if (seen !== this.seen) return;
      this.why = why;
      this.main.image.alt = why.caption?.slice(0, 300) || `Image ${key}`;
      if (why.blurred) this.main.note(blurNote(() => this.reveal()));
      await this.panel.show(why, this.context);
    } catch (error) {
      if (seen === this.seen) this.panel.fail(error);
    }
    await loaded;
    if (seen === this.seen) this.prepare(seen);
  }

  async ask(key) {
    const path = `/api/why/${encodeURIComponent(key)}`;
    for (const again of [false, true]) {
      if (again) await refresh(); // a server that was started anew knows the image, not the selection
      const { selection } = this.context;
      const id = typeof selection === "function" ? selection() : selection;
      if (!id) break;
      try {
        return await call(`${path}?selection=${encodeURIComponent(id)}`);
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 404) throw error;
      }
    }
    return call(path);
  }

  // What is shown stays until the next image is there: first its thumbnail, which the browser has, then all of it. Of
  // what can't be decoded the server sends one grey pixel.
  async load(figure, key) {
    const wanted = (figure.wanted = {});
    const place = async (source) => {
      const image = new Image();
      image.src = source;
      await image.decode();
      if (figure.wanted !== wanted) return false;
      figure.size = [image.naturalWidth, image.naturalHeight];
      figure.image.src = source;
      figure.image.hidden = false;
      figure.box.classList.remove("broken");
      this.fit();
      return true;
    };
    let whole = false;
    const small = figure === this.main ? place(thumbnail(key, 320)).catch(() => false) : null;
    try {
      const image = new Image();
      image.src = imageUrl(key, figure === this.main && this.revealed);
      await image.decode();
      if (image.naturalWidth * image.naturalHeight === 1) throw new Error("one grey pixel: it can't be decoded");
      await small;
      if (figure.wanted !== wanted) return;
      whole = true;
      await place(image.src);
    } catch {
      if (figure.wanted !== wanted || whole) return;
      figure.image.hidden = true;
      figure.box.classList.add("broken");
      figure.note("This image can’t be shown.");
    }
  }

  // Ask for the neighbours now, so that the next key shows them at once.
  async prepare(seen) {
    const { next, previous } = this.context;
    const at = this.trail[0] ?? this.key;
    const [after, before] = await Promise.all([next, previous].map((find) => neighbour(find, at)));
    if (seen !== this.seen) return;
    this.back.disabled = !before && !this.trail.length;
    this.forth.disabled = !after;
    for (const key of [after, before]) if (key) new Image().src = imageUrl(key, false);
  }

  // To the neighbour in the grid; from an image that was reached by a click, of the one the grid has.
  async step(by) {
    const move = by < 0 ? this.context.previous : this.context.next;
    const key = await move?.(this.trail[0] ?? this.key);
    if (!key) return;
    this.trail = [];
    this.show(key);
  }

  visit(key) {
    this.trail.push(this.key);
    this.show(key);
  }

  goBack() {
    const key = this.trail.pop();
    if (key) this.show(key);
  }

  // Another image at the side of this one; null: none.
  beside(key, text = "") {
    this.other.box.hidden = !key;
    this.stage.classList.toggle("two", Boolean(key));
    this.main.label.textContent = key ? this.key : "";
    this.panel.mark(key);
    if (!key) return this.fit();
    this.whole = false;
    this.other.label.replaceChildren(
      element("span", {}, text || key),
      button("Open", () => this.visit(key)),
      button("Close", () => this.beside(null), { title: "Only one image" }),
    );
    this.frame.scrollIntoView({ block: "nearest" });
    this.other.image.alt = `Image ${key}`;
    this.other.note("");
    this.load(this.other, key);
  }

  async reveal() {
    if (!this.why?.blurred || this.revealed) return;
    this.revealed = true;
    this.main.note("");
    await this.load(this.main, this.key);
  }

  // -------------------------------------------------------------------------------------------------------- its size

  fit() {
    this.stage.classList.toggle("whole", this.whole);
    this.lower();
    for (const one of [this.main, this.other]) {
      if (!one.size || one.box.hidden) continue;
      const [width, height] = one.size;
      const room = one.room.getBoundingClientRect();
      const scale = this.whole ? 1 : Math.min(room.width / width, room.height / height, LARGEST);
      one.image.style.width = `${Math.max(1, Math.floor(width * scale))}px`;
      one.image.style.height = `${Math.max(1, Math.floor(height * scale))}px`;
      if (one === this.main) this.scale.value = `${Math.round(scale * 100)} %`;
    }
  }

  // On a phone a wide image leaves its room to what is said of it.
  lower() {
    const [width, height] = this.main.size ?? [1, 1];
    const low = !this.whole && matchMedia("(max-width: 900px)").matches;
    const both = this.other.box.hidden ? 1 : 2; // side by side each has half of the width
    const high = Math.min(innerHeight * 0.62, (this.frame.clientWidth * height) / width / both + 16 + 80 * (both - 1));
    this.frame.style.height = low ? `${Math.max(180, high)}px` : "";
  }

  // 100 %, or as large as fits; a click keeps the place that was clicked under the pointer.
  zoom(event = null) {
    const box = this.main.image.getBoundingClientRect();
    const at = event ? [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height] : [0.5, 0.5];
    this.whole = !this.whole;
    this.fit();
    if (!this.whole) return;
    const { stage } = this;
    const view = stage.getBoundingClientRect();
    const point = event ? [event.clientX - view.left, event.clientY - view.top] : [view.width / 2, view.height / 2];
    stage.scrollLeft = at[0] * this.main.image.offsetWidth - point[0];
    stage.scrollTop = at[1] * this.main.image.offsetHeight - point[1];
  }

  // ------------------------------------------------------------------------------------------------------------ keys

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
    const actions = {
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      z: () => this.zoom(),
      r: () => this.reveal(),
      f: () => this.panel.similar(),
      d: () => this.panel.askToDeny("image"),
      c: () => this.panel.copyKey(),
      Backspace: () => this.goBack(),
      Escape: () => this.escape(),
    };
    const act = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    event.stopPropagation(); // keys of the page behind it are not meant
    if (!act) return;
    event.preventDefault();
    act();
  }

  // Esc leaves what was opened last: the question, the second image, the dialog.
  escape() {
    if (this.panel.dropQuestion()) return;
    if (!this.other.box.hidden) this.beside(null);
    else this.dialog.close();
  }

  // At 100 % a mouse moves the image; fingers scroll it by themselves.
  drags() {
    const { stage } = this;
    stage.addEventListener("pointerdown", (down) => {
      this.moved = false;
      if (!this.whole || down.pointerType !== "mouse" || down.button) return;
      const [left, top] = [stage.scrollLeft, stage.scrollTop];
      const move = (event) => {
        const [dx, dy] = [event.clientX - down.clientX, event.clientY - down.clientY];
        this.moved ||= Math.hypot(dx, dy) > 4;
        if (this.moved) stage.scrollTo(left - dx, top - dy);
      };
      document.addEventListener("pointermove", move);
      document.addEventListener("pointerup", () => document.removeEventListener("pointermove", move), { once: true });
    });
  }

  swipes() {
    let from = null;
    this.stage.addEventListener("touchstart", (event) => {
      from = event.touches.length === 1 && !this.whole ? event.touches[0] : null;
    }, { passive: true });
    this.stage.addEventListener("touchend", (event) => {
      const to = event.changedTouches[0];
      if (!from) return;
      const [dx, dy] = [to.clientX - from.clientX, to.clientY - from.clientY];
      if (Math.abs(dx) > 60 && Math.abs(dx) > 2 * Math.abs(dy)) this.step(dx > 0 ? -1 : 1);
      from = null;
    }, { passive: true });
  }
}

// The image that is open, in the page's address: a link to it can be sent, and Back closes it.
function name(key) {
  if (!state.data || (state.more.image ?? "") === (key ?? "")) return;
  const history = key && !state.more.image ? "push" : "replace";
  change({ more: { ...state.more, image: key ?? "" } }, { history });
}

function figure(className) {
  const image = element("img", { alt: "", hidden: true, draggable: false });
  const notes = element("div", { className: "why-note" });
  const label = element("figcaption", { className: "why-label" });
  const room = element("div", { className: "why-room" }, image, notes);
  const box = element("figure", { className }, room, label);
  const note = (text) => notes.replaceChildren(...(text ? [text] : []));
  return { box, room, image, label, note, size: null };
}

// The image before or after one, null where there is none or nobody knows.
async function neighbour(find, key) {
  try {
    return (await find?.(key)) ?? null;
  } catch {
    return null;
  }
}

function blurNote(reveal) {
  const words = ["Blurred: it may be unsafe. ", element("b", {}, "Show it"), element("kbd", {}, "R")];
  return button(words, reveal, { className: "why-blurred" });
}

// The image that the address names, as a link to it has it: opened now, and whenever one goes back to it.
export function followAddress(grid, context) {
  const follow = () => {
    const key = state.more.image ?? "";
    if (key === (openedImage() ?? "")) return;
    if (!key) return view?.dialog.close();
    const place = [...grid.tiles].find(([, tile]) => tile.row?.key === key);
    openFromGrid(grid, { key }, place ? place[0] : null, context);
  };
  subscribe(["more", "live"], () => state.live && follow());
}

// An image of an ImageGrid: the arrows go through its rows, and it follows. index: null where it is not in sight.
export function openFromGrid(grid, row, index, context = {}) {
  const places = new Map(index === null ? [] : [[row.key, index]]);
  const beside = (by) => async (key) => {
    const at = places.has(key) ? places.get(key) + by : by > 0 ? state.place : null;
    if (at === null) return null;
    const found = await grid.row(at);
    if (found) places.set(found.key, at);
    return found?.key ?? null;
  };
  const closed = (key) => {
    if (places.has(key)) grid.setCurrent(places.get(key));
    grid.node.focus({ preventScroll: true });
  };
  const where = (key) => (places.has(key) ? `${count(places.get(key) + 1)} of ${count(grid.total)}` : "");
  openImage(row.key, { next: beside(1), previous: beside(-1), where, closed, ...context });
}
