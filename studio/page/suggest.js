// Names of columns while a condition is written: arrow keys choose, Tab or a click takes one.

import { element } from "/api.js";
import { columnWord } from "/sql.js";
import { state } from "/store.js";

const MOST = 6;
const FUNCTIONS = ["top(", "best_of(", "first_of(", "at_most("];

export function suggest(field) {
  const list = element("ul", { className: "suggestions", role: "listbox", hidden: true });
  let chosen = -1;
  queueMicrotask(() => field.after(list)); // once the field is in its form

  const word = () => /[\w."]*$/.exec(field.value.slice(0, field.selectionStart))[0];

  function render() {
    const begun = /^[A-Za-z"]/.test(word()) ? word().toLowerCase() : "";
    const found = begun ? names().filter((name) => name.toLowerCase().includes(begun) && name !== word()) : [];
    found.sort((a, b) => Number(b.toLowerCase().startsWith(begun)) - Number(a.toLowerCase().startsWith(begun)));
    chosen = -1;
    list.hidden = !found.length;
    list.replaceChildren(...found.slice(0, MOST).map(option));
  }

  function option(name) {
    const item = element("li", { role: "option", textContent: name });
    item.onpointerdown = (event) => {
      event.preventDefault(); // the field keeps the focus
      take(name);
    };
    return item;
  }

  function take(name) {
    const begun = word();
    const at = field.selectionStart;
    field.setRangeText(name, at - begun.length, at, "end");
    list.hidden = true;
  }

  function choose(by) {
    const items = [...list.children];
    chosen = (chosen + by + items.length + (chosen < 0 && by < 0 ? 1 : 0)) % items.length;
    items.forEach((item, i) => item.setAttribute("aria-selected", i === chosen));
  }

  field.addEventListener("input", render);
  field.addEventListener("blur", () => (list.hidden = true));
  field.addEventListener("keydown", (event) => {
    if (list.hidden || event.altKey || event.ctrlKey) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") choose(event.key === "ArrowDown" ? 1 : -1);
    else if (event.key === "Tab" && !event.shiftKey) take(list.children[Math.max(0, chosen)].textContent);
    else if (event.key === "Enter" && chosen >= 0) take(list.children[chosen].textContent);
    else if (event.key === "Escape") list.hidden = true;
    else return;
    event.preventDefault();
  });
}

const names = () => [...(state.data?.columns ?? []).map(({ name }) => columnWord(name)), ...FUNCTIONS];
