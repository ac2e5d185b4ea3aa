// What the panels share: buttons, numbers for people, commands that can be copied, panels that open under a button.

import { element } from "/api.js";
import { count, short } from "/numbers.js";
import { thumbnail } from "/tile.js";

export function said(value) {
  if (value === null || value === undefined) return "no value";
  if (value === "") return "empty";
  return typeof value === "object" ? JSON.stringify(value) : short(value);
}

// A button; `label` is what it is called where its text is but a sign.
export function button(text, onclick, { label, ...more } = {}) {
  const made = element("button", { type: "button", onclick, ...more }, ...[text].flat());
  if (label) {
    made.setAttribute("aria-label", label);
    made.title ||= label;
  }
  return made;
}

export const hint = (...parts) => element("span", { className: "hint" }, ...parts);

export const many = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

// A button that copies, and says that it did. `text` may be a function that gives the text.
export function copyButton(text, label = "Copy", more = {}) {
  const made = button(label, async () => {
    const done = await copy(typeof text === "function" ? text() : text);
    made.textContent = done ? "Copied" : "Can’t copy";
    clearTimeout(made.timer);
    made.timer = setTimeout(() => (made.textContent = label), 1500);
  }, { className: "copy", ...more });
  return made;
}

// Over plain HTTP from another machine browsers offer no clipboard, but still copy what is selected.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = element("textarea", { value: text, className: "hidden" });
    const focused = document.activeElement;
    (focused?.closest("dialog") ?? document.body).append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus?.();
    return done;
  }
}

// The command that does the same in a terminal.
export function commandLine(command) {
  const code = element("code", { textContent: command, tabIndex: 0 });
  code.setAttribute("aria-label", "Command");
  return element("div", { className: "command" }, code, copyButton(command, "Copy", { title: "Copy the command" }));
}

// A panel that opens under a button, closes by Esc or a click elsewhere, and gives the focus back.
export function opensUnder(opener, panel) {
  panel.popover = "auto";
  panel.classList.add("under");
  opener.setAttribute("aria-expanded", "false");
  opener.setAttribute("aria-haspopup", "dialog");
  const place = () => {
    const at = opener.getBoundingClientRect();
    const width = panel.offsetWidth;
    panel.style.left = `${Math.max(8, Math.min(at.right - width, innerWidth - width - 8))}px`;
    panel.style.top = `${Math.max(8, Math.min(at.bottom + 6, innerHeight - panel.offsetHeight - 8))}px`;
    panel.style.maxHeight = `${innerHeight - Math.min(at.bottom + 6, innerHeight * 0.4) - 12}px`;
  };
  opener.popoverTargetElement = panel;
  panel.addEventListener("toggle", (event) => {
    const open = event.newState === "open";
    opener.setAttribute("aria-expanded", String(open));
    if (open) place();
  });
  new ResizeObserver(() => panel.matches(":popover-open") && place()).observe(panel);
  addEventListener("resize", () => panel.matches(":popover-open") && place());
  return panel;
}

// A thumbnail as a button; its blurring is the server's.
export function imageButton(key, onclick, { title = key, label = `Image ${key}` } = {}) {
  const image = element("img", { src: thumbnail(key, 320), alt: "", loading: "lazy", draggable: false });
  return button([image], onclick, { className: "thumb", title, label });
}
