// One image of a grid: whole, never cut, on the page's own paper; under it a line with its value and its verdict.

import { element } from "/api.js";
import { short } from "/numbers.js";

export function thumbnail(key, side, reveal = false) {
  return `/api/thumbnails/${encodeURIComponent(key)}?side=${side}${reveal ? "&reveal=true" : ""}`;
}

export class Tile {
  constructor(id, reveal) {
    this.image = element("img", { decoding: "async", draggable: false });
    this.image.onload = () => this.node.classList.add("is-there");
    this.image.onerror = () => this.image.getAttribute("src") && this.node.classList.add("is-missing");
    this.button = element("button", { className: "tile-reveal", type: "button", tabIndex: -1, hidden: true }, "Blurred · show");
    this.button.onclick = (event) => {
      event.stopPropagation();
      reveal(this.row);
    };
    this.frame = element("div", { className: "tile-frame" }, this.image, this.button);
    this.value = element("span", { className: "tile-value" });
    this.verdict = element("span", { className: "tile-verdict" });
    const line = element("div", { className: "tile-line" }, this.value, this.verdict);
    this.node = element("div", { className: "tile", id, role: "option" }, this.frame, line);
    this.row = null;
    this.shown = "";
  }

  // Where it is: `side` is that of its square, in CSS pixels.
  place(x, y, side) {
    const where = `translate(${x}px, ${y}px)`;
    if (this.where !== where) this.node.style.transform = this.where = where;
    if (this.side === side) return;
    this.side = side;
    this.node.style.width = this.frame.style.height = `${side}px`;
    this.fit();
  }

  // What it is of; null while that is not known. `plain` is the verdict that needs no mark.
  fill(row, { index, total, current, revealed, plain }) {
    this.node.setAttribute("aria-posinset", index + 1);
    this.node.setAttribute("aria-setsize", total);
    this.node.setAttribute("aria-selected", current);
    const blurred = Boolean(row?.blurred) && !revealed;
    this.button.hidden = !blurred;
    if (row === this.row && this.plain === plain) return;
    [this.row, this.plain] = [row, plain];
    this.image.alt = row ? (row.caption || row.key).slice(0, 300) : "";
    this.value.textContent = row ? short(row.value) : "";
    const rejected = row?.verdict && row.verdict !== "kept" && row.verdict !== plain;
    this.verdict.textContent = rejected ? row.verdict : "";
    this.node.title = row ? (row.caption ?? "").slice(0, 300) : "";
    this.fit();
  }

  // The image's own proportions, at most twice its size: what is small is not blown up.
  fit() {
    if (!this.row || !this.side) return;
    const { width, height } = this.row;
    const scale = width && height ? Math.min(this.side / width, this.side / height, 2) : 0;
    this.image.style.width = scale ? `${Math.round(width * scale)}px` : "";
    this.image.style.height = scale ? `${Math.round(height * scale)}px` : "";
  }

  load(address) {
    if (address === this.shown) return;
    this.shown = address;
    this.node.classList.remove("is-there", "is-missing");
    if (address) this.image.src = address;
    else this.image.removeAttribute("src"); // what is still being loaded is not wanted any more
  }
}
