// The keys of the Explore page, as its `?` dialog lists them.

export const KEYS = [
  ["1 2 3 4", "all, kept, rejected images; at a cut"],
  ["G", "to the images"],
  ["/", "to the search; Esc clears it"],
  ["← → ↑ ↓", "from image to image; moves a cut that has the focus (Shift: ten times)"],
  ["Page Up, Page Down", "a screen up or down; ten steps of a cut"],
  ["Home, End", "the first image, the last"],
  ["Enter, Space", "open the image large"],
  ["R", "show a blurred image"],
  ["← → Z Esc", "in an image that is open: the one before, the next, at 100 %, close"],
  ["F D C", "there: find similar ones, deny it, copy its key"],
  ["Alt+↑ Alt+↓", "move a rule (in the list of rules)"],
  ["Delete", "remove a rule"],
  ["Enter, Esc", "in a rule that is edited: apply, give up"],
  ["Ctrl+Z, Ctrl+Shift+Z", "undo, redo changes of rules"],
  ["Tab", "to the next rule, cut or button"],
  ["?", "these keys"],
];
