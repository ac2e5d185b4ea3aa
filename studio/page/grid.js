// A grid of images of any number of rows: only what is seen is in the page, only what is near it is asked for.
//
//   const grid = new ImageGrid({
//     container,                         an element; it gets the grid, as high as it is itself
//     fetchRows(offset, limit, signal),  -> promise of {total, rows: [{key, width, height, caption, value, verdict, blurred}]}
//     onOpen(row, index),                Enter, Space or a click on an image
//     onPlace(index), onError(error), label, empty, size: "s" | "m" | "l",
//   });
//   grid.reload({fetchRows, place, divider, plain, line})   other rows: what is seen stays until the new ones are there;
//                                        asked again while that is under way, the newest wins. divider: {at, node,
//                                        centre} is an element across the grid, before image number `at`; plain: see
//                                        Tile.fill; line: false where nothing is to be said under the images
//   grid.goTo(index)                     the image in sight;   grid.setSize(size)
//   grid.current                         number of the image that keys act on;   grid.setCurrent(index)
//   grid.row(index)                      promise of a row, null behind the last;   grid.total
//   grid.close()
//
// Ten million rows are higher than an element may be. Then the scroll bar stands for a part of the whole, and the grid
// keeps the true position itself: small steps move by as many pixels, a jump of the bar goes to the same part.

import { element } from "/api.js";
import { Tile, thumbnail } from "/tile.js";

const PAGE = 100; // rows asked for at once
const PAGES = 40; // kept
const HIGHEST = 8_000_000; // px; browsers end at 16 to 33 million
const SIZES = { s: 104, m: 184, l: 320 }; // the least side of a tile, px
const GAP = 12;
const LINE = 24; // px: the line under an image
const DIVIDER = 46;
const HURRY = 90; // ms that a jump rests before its images are asked for

let grids = 0;

export class ImageGrid {
  constructor({ container, fetchRows, onOpen, onPlace, onError, label = "Images", empty = "No images.", size = "m" }) {
    Object.assign(this, { container, fetchRows, onOpen, onPlace, onError, size });
    this.name = `grid${++grids}`;
    this.total = 0;
    this.top = 0; // the true position, px
    this.shift = 0; // of the scroller from the true position, px
    this.current = 0;
    this.pages = new Map(); // number -> rows, or {abort} while they are asked for
    this.tiles = new Map(); // number of the image -> Tile
    this.spare = [];
    this.revealed = new Set();
    this.divider = null;
    this.line = true;
    this.space = element("div", { className: "grid-space" });
    this.note = element("p", { className: "grid-note hint", textContent: empty, hidden: true });
    this.node = element("div", { className: "grid", tabIndex: 0, role: "listbox", ariaLabel: label }, this.space, this.note);
    container.append(this.node);
    this.node.onscroll = () => this.scrolled();
    this.node.onkeydown = (event) => this.key(event);
    this.node.onclick = (event) => this.clicked(event);
    this.sizes = new ResizeObserver(() => this.measure());
    this.sizes.observe(this.node);
    this.measure();
    if (fetchRows) this.reload({});
  }

  close() {
    this.sizes.disconnect();
    this.next = null;
    this.dropPages(() => true);
    clearTimeout(this.resting);
    this.node.remove();
  }

  // ---------------------------------------------------------------------------------------------------------- layout

  measure() {
    const place = this.first();
    const width = this.node.clientWidth - 2 * GAP;
    this.height = this.node.clientHeight;
    this.columns = Math.max(1, Math.floor((width + GAP) / (SIZES[this.size] + GAP)));
    this.side = Math.floor((width - (this.columns - 1) * GAP) / this.columns);
    this.rowHeight = this.side + (this.line ? LINE : 0) + GAP;
    if (this.width === undefined) this.lay();
    else if (this.width !== width || this.laidSize !== this.size) {
      this.lay();
      this.moveTo(this.divider?.centre ? this.middle() : this.rowTop(place));
    }
    [this.width, this.laidSize] = [width, this.size];
    this.render();
  }

  get cut() {
    return Math.min(this.divider?.at ?? 0, this.total);
  }

  // Before the divider rows are filled from its end, so that what is nearest to the cut stands at the divider.
  lay() {
    this.rowsBefore = Math.ceil(this.cut / this.columns);
    this.pad = this.rowsBefore * this.columns - this.cut;
    this.band = this.divider ? DIVIDER : 0;
    const after = Math.ceil((this.total - this.cut) / this.columns);
    this.whole = (this.rowsBefore + after) * this.rowHeight + this.band + 2 * GAP;
    this.scale = Math.min(1, HIGHEST / this.whole);
    this.space.style.height = `${Math.max(this.whole * this.scale, 0)}px`;
    this.note.hidden = this.total > 0 || !this.known;
  }

  rowTop(index) {
    if (index < this.cut) return GAP + Math.floor((index + this.pad) / this.columns) * this.rowHeight;
    const row = this.rowsBefore + Math.floor((index - this.cut) / this.columns);
    return GAP + row * this.rowHeight + this.band;
  }

  left(index) {
    const slot = index < this.cut ? index + this.pad : index - this.cut;
    return GAP + (slot % this.columns) * (this.side + GAP);
  }

  // The image at a height: the first one of its row.
  at(y) {
    const before = GAP + this.rowsBefore * this.rowHeight;
    const index =
      y < before
        ? Math.floor((y - GAP) / this.rowHeight) * this.columns - this.pad
        : this.cut + Math.max(0, Math.floor((y - before - this.band) / this.rowHeight)) * this.columns;
    return Math.max(0, Math.min(index, this.total - 1));
  }

  // The first image of which more than half is seen.
  first() {
    return this.total ? this.at(this.top + this.rowHeight / 2) : 0;
  }

  middle() {
    return GAP + this.rowsBefore * this.rowHeight + this.band / 2 - this.height / 2;
  }

  // ------------------------------------------------------------------------------------------------------- scrolling

  get end() {
    return Math.max(0, this.whole - this.height);
  }

  moveTo(top) {
    this.top = Math.max(0, Math.min(top, this.end));
    const last = Math.max(0, this.whole * this.scale - this.height);
    const wanted = this.scale === 1 ? this.top : this.end ? (this.top / this.end) * last : 0;
    this.node.scrollTop = wanted;
    this.seen = this.node.scrollTop;
    this.shift = this.seen - this.top;
  }

  scrolled() {
    const now = this.node.scrollTop;
    const moved = now - this.seen;
    if (!moved) return;
    this.seen = now;
    const jump = Math.abs(moved) > 1.5 * this.height;
    if (this.scale === 1 || !jump) this.top = Math.max(0, Math.min(this.top + moved, this.end));
    else this.top = (now / Math.max(1, this.whole * this.scale - this.height)) * this.end;
    this.shift = now - this.top;
    this.hurried = jump || (this.hurried && Math.abs(moved) > this.height / 2);
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.rest(), HURRY);
    this.render();
    this.onPlace?.(this.first());
  }

  // The bar shows again which part of the whole is seen.
  rest() {
    this.hurried = false;
    if (this.scale < 1) this.moveTo(this.top);
    this.render();
  }

  goTo(index) {
    this.moveTo(this.rowTop(Math.max(0, Math.min(index, this.total - 1))) - GAP);
    this.render();
    this.onPlace?.(this.first());
  }

  setSize(size) {
    this.size = size;
    this.measure();
  }

  // -------------------------------------------------------------------------------------------------------- rendering

  render() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  draw() {
    const from = this.total ? this.at(this.top - this.rowHeight) : 0;
    const to = this.total ? Math.min(this.total, this.at(this.top + this.height + this.rowHeight) + this.columns) : 0;
    if (!this.hurried) this.load(from, to);
    for (const [index, tile] of this.tiles) if (index < from || index >= to) this.drop(index, tile);
    for (let index = from; index < to; index++) this.drawTile(index);
    if (this.divider) this.divider.node.style.transform = `translateY(${this.rowTop(this.cut) - this.band + this.shift}px)`;
    this.node.setAttribute("aria-activedescendant", this.tiles.has(this.current) ? `${this.name}-${this.current}` : "");
  }

  drawTile(index) {
    let tile = this.tiles.get(index);
    if (!tile) {
      tile = this.spare.pop() ?? new Tile("", (row) => this.reveal(row));
      tile.node.id = `${this.name}-${index}`;
      this.tiles.set(index, tile);
      this.space.append(tile.node);
    }
    const row = this.knownRow(index);
    const revealed = row !== null && this.revealed.has(row.key);
    const current = index === this.current;
    tile.place(this.left(index), this.rowTop(index) + this.shift, this.side);
    tile.fill(row, { index, total: this.total, current, revealed, plain: this.plain });
    const side = this.side * devicePixelRatio > 340 ? 640 : 320;
    if (!row) tile.load("");
    else if (!this.hurried || tile.shown) tile.load(thumbnail(row.key, side, revealed));
  }

  drop(index, tile) {
    this.tiles.delete(index);
    tile.node.remove();
    tile.load("");
    tile.row = undefined;
    this.spare.push(tile);
  }

  reveal(row) {
    this.revealed.add(row.key);
    this.render();
  }

  // ------------------------------------------------------------------------------------------------------------ rows

  knownRow(index) {
    const page = this.pages.get(Math.floor(index / PAGE));
    return Array.isArray(page) ? (page[index % PAGE] ?? null) : null;
  }

  // Ask for the pages of what is seen, and one screen further on both sides.
  load(from, to) {
    const screen = to - from;
    const first = Math.floor(Math.max(0, from - screen) / PAGE);
    const last = Math.floor((Math.min(this.total, to + screen) - 1) / PAGE);
    this.dropPages((number, page) => !Array.isArray(page) && (number < first || number > last));
    const seen = Math.floor((from + to) / 2 / PAGE);
    const wanted = [];
    for (let number = first; number <= last; number++) if (!this.pages.has(number)) wanted.push(number);
    wanted.sort((a, b) => Math.abs(a - seen) - Math.abs(b - seen));
    for (const number of wanted) this.loadPage(number);
    if (this.pages.size > PAGES) this.dropPages((number) => Math.abs(number - seen) > PAGES / 2);
  }

  async loadPage(number) {
    const controller = new AbortController();
    const page = { abort: () => controller.abort() };
    this.pages.set(number, page);
    try {
      const { rows } = await this.fetchRows(number * PAGE, PAGE, controller.signal);
      if (this.pages.get(number) === page) this.pages.set(number, rows);
      this.render();
    } catch (error) {
      if (this.pages.get(number) === page) this.pages.delete(number);
      if (error.name !== "AbortError") this.onError?.(error);
    }
  }

  dropPages(unwanted) {
    for (const [number, page] of [...this.pages]) {
      if (!unwanted(number, page)) continue;
      this.pages.delete(number);
      if (!Array.isArray(page)) page.abort();
    }
  }

  async row(index) {
    if (index < 0 || index >= this.total) return null;
    const known = this.knownRow(index);
    if (known) return known;
    const { rows } = await this.fetchRows(index, 1, undefined);
    return rows[0] ?? null;
  }

  // -------------------------------------------------------------------------------------------------- other rows

  reload({ fetchRows = this.fetchRows, place = this.first(), divider = null, plain = "", line = true }) {
    this.next = { fetchRows, place, divider, plain, line };
    this.swapping ??= this.swap().finally(() => (this.swapping = null));
    return this.swapping;
  }

  // What is seen stays until its successor is there; of several only the newest is asked for.
  async swap() {
    while (this.next) {
      const source = this.next;
      this.next = null;
      this.node.setAttribute("aria-busy", "true");
      try {
        await this.take(source, await this.fetchAround(source));
      } catch (error) {
        if (error.name !== "AbortError" && !this.next) this.onError?.(error);
      }
      this.node.removeAttribute("aria-busy");
    }
  }

  async fetchAround({ fetchRows, place, divider }) {
    const screen = Math.ceil(this.height / this.rowHeight) * this.columns || PAGE;
    const at = divider?.centre ? divider.at - screen / 2 : place;
    const fetchPage = async (number) => [number, await fetchRows(number * PAGE, PAGE)];
    const first = Math.max(0, Math.floor(at / PAGE));
    const last = Math.max(first, Math.floor((at + screen) / PAGE));
    const found = [await fetchPage(first)];
    const { total } = found[0][1];
    if (total && first * PAGE >= total) return [await fetchPage(Math.floor((total - 1) / PAGE))]; // fewer than there were
    for (let number = first + 1; number <= last && number * PAGE < total; number++) found.push(await fetchPage(number));
    return found;
  }

  take({ fetchRows, place, divider, plain, line }, found) {
    this.dropPages(() => true);
    this.divider?.node.remove();
    Object.assign(this, { fetchRows, divider, plain, line, total: found[0][1].total, known: true });
    this.rowHeight = this.side + (line ? LINE : 0) + GAP;
    this.node.classList.toggle("is-bare", !line);
    for (const [number, { rows }] of found) this.pages.set(number, rows);
    if (divider) this.space.append(divider.node);
    this.current = Math.max(0, Math.min(this.current, this.total - 1));
    this.lay();
    this.moveTo(divider?.centre ? this.middle() : this.rowTop(Math.min(place, Math.max(0, this.total - 1))) - GAP);
    this.render();
    this.onPlace?.(this.first());
  }

  // ------------------------------------------------------------------------------------------------------------ keys

  setCurrent(index) {
    this.current = Math.max(0, Math.min(index, this.total - 1));
    const top = this.rowTop(this.current);
    if (top - GAP < this.top) this.moveTo(top - GAP);
    else if (top + this.rowHeight > this.top + this.height) this.moveTo(top + this.rowHeight - this.height);
    this.render();
    this.onPlace?.(this.first());
  }

  // The image so many rows further down that is nearest to straight below.
  below(rows) {
    const first = this.at(this.rowTop(this.current) + rows * this.rowHeight + 1);
    if (this.rowTop(first) === this.rowTop(this.current)) return this.current;
    const x = this.left(this.current);
    let best = first;
    for (let i = first; i < this.total && this.rowTop(i) === this.rowTop(first); i++) {
      if (Math.abs(this.left(i) - x) < Math.abs(this.left(best) - x)) best = i;
    }
    return best;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.total) return;
    const screen = Math.max(1, Math.floor(this.height / this.rowHeight));
    const moves = {
      ArrowLeft: () => this.current - 1,
      ArrowRight: () => this.current + 1,
      ArrowUp: () => this.below(-1),
      ArrowDown: () => this.below(1),
      PageUp: () => this.below(-screen),
      PageDown: () => this.below(screen),
      Home: () => 0,
      End: () => this.total - 1,
    };
    if (event.key in moves) this.setCurrent(moves[event.key]());
    else if (event.key === "Enter" || event.key === " ") this.open(this.current);
    else if (event.key === "r" && this.knownRow(this.current)) this.reveal(this.knownRow(this.current));
    else return;
    event.preventDefault();
  }

  clicked(event) {
    const node = event.target.closest(".tile");
    if (!node) return;
    this.current = Number(node.id.split("-").at(-1));
    this.render();
    this.open(this.current);
  }

  async open(index) {
    const row = await this.row(index);
    if (row) this.onOpen?.(row, index);
  }
}
