// What the panels share: numbers for people, commands that can be copied, panels that open under a button.

import { element } from "/api.js";
import { count, short } from "/numbers.js";
import { thumbnail } from "/tile.js";

export const said = (value) => (value === null || value === undefined ? "no value" : short(value));

export const many = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

// A button that copies, and says that it did. `text` may be a function that gives the text.
export function copyButton(text, label = "Copy", more = {}) {
  const button = element("button", { type: "button", className: "copy", ...more }, label);
  button.onclick = async () => {
    const done = await copy(typeof text === "function" ? text() : text);
    button.textContent = done ? "Copied" : "Can’t copy";
    clearTimeout(button.timer);
    button.timer = setTimeout(() => (button.textContent = label), 1500);
  };
  return button;
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
export function opensUnder(button, panel) {
  panel.popover = "auto";
  panel.classList.add("under");
  button.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-haspopup", "dialog");
  const place = () => {
    const at = button.getBoundingClientRect();
    const width = panel.offsetWidth;
    panel.style.left = `${Math.max(8, Math.min(at.right - width, innerWidth - width - 8))}px`;
    panel.style.top = `${Math.max(8, Math.min(at.bottom + 6, innerHeight - panel.offsetHeight - 8))}px`;
    panel.style.maxHeight = `${innerHeight - Math.min(at.bottom + 6, innerHeight * 0.4) - 12}px`;
  };
  button.popoverTargetElement = panel;
  panel.addEventListener("toggle", (event) => {
    const open = event.newState === "open";
    button.setAttribute("aria-expanded", String(open));
    if (open) place();
  });
  new ResizeObserver(() => panel.matches(":popover-open") && place()).observe(panel);
  addEventListener("resize", () => panel.matches(":popover-open") && place());
  return panel;
}

// A thumbnail as a button; its blurring is the server's.
export function imageButton(key, onclick, { title = key, label = `Image ${key}` } = {}) {
  const image = element("img", { src: thumbnail(key, 320), alt: "", loading: "lazy", draggable: false });
  const button = element("button", { type: "button", className: "thumb", title, onclick }, image);
  button.setAttribute("aria-label", label);
  return button;
}
