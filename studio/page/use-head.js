// Use a head: fit it fully, and apply it to the whole folder as a column. Both are commands of the terminal, shown here.

import { $, call, element } from "/api.js";

const COLUMN = "[a-z][a-z0-9_]*";

export function openUse(set, head) {
  const dialog = $("use");
  const said = element("p", { className: "hint", role: "status" });
  const output = element("pre", { hidden: true, tabIndex: 0 });
  output.setAttribute("aria-label", "What the commands say");
  const name = element("input", { id: "use-column", value: set.name.toLowerCase().replace(/[^a-z0-9_]+/g, "_"), pattern: COLUMN, required: true, maxLength: 40 });
  const go = element("button", { className: "primary", type: "submit" }, "Fit it and score all images");
  const form = element(
    "form", { method: "dialog" },
    element("label", { htmlFor: "use-column" }, "Name of the column"), name,
    element("div", { className: "row" }, go, element("button", { type: "button", className: "quiet", onclick: () => dialog.close() }, "Close")),
  );
  const commands = element("pre", { className: "commands", tabIndex: 0 }, head.command ?? "");
  form.onsubmit = (event) => {
    event.preventDefault();
    go.disabled = true;
    run(set, name.value, said, output)
      .catch((error) => {
        said.className = "error";
        said.textContent = error.message;
      })
      .finally(() => (go.disabled = false));
  };
  dialog.replaceChildren(
    element("h2", { id: "use-title" }, "Use what it has learnt"),
    element("p", {}, "Every image of the folder gets a score by this head, as a column: then it is a rule like any other."),
    form, element("p", { className: "hint" }, "In a terminal:"), commands, said, output,
  );
  dialog.showModal();
}
