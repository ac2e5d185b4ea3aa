// The Explore page: what is going on, the funnel, which images are shown and in which order. Rules: rules.js; columns:
// histogram.js; the grid: grid.js; state and address: store.js.

import { $, ApiError, call, element } from "/api.js";
import { ImageGrid } from "/grid.js";
import { startColumns } from "/histogram.js";
import { followAddress, openFromGrid } from "/image.js";
import { KEYS } from "/keys.js";
import { count, share, short } from "/numbers.js";
import { imagesJudged, startRules } from "/rules.js";
import { change, loadData, redo, refresh, rowsQuery, show, state, subscribe, undo } from "/store.js";

const OFTEN = 700; // ms between looks at the folder while its index is made
const SELDOM = 15000; // otherwise
const NARROW = matchMedia("(max-width: 900px)");

let grid = null;

async function start() {
  startRules();
  startColumns();
  startView();
  startPanel();
  startKeys();
  subscribe(["data", "away", "live", "version"], renderNotice);
  subscribe(["live", "failure"], renderFunnel);
  subscribe(["view", "live", "data"], renderView);
  subscribe(["view", "live"], showImages);
  followAddress(grid, ofNow);
  await loadData();
  watchData();
  document.body.dataset.ready = "true";
}

// ------------------------------------------------------------------------------------------------- what is going on

let watching = 0;

function watchData() {
  const soon = !state.data || state.away || state.data.stale || state.data.index.state !== "ready";
  clearTimeout(watching);
  watching = setTimeout(async () => {
    if (!document.hidden) await loadData();
    watchData();
  }, soon ? OFTEN : SELDOM);
}

// Whoever comes back from a terminal sees what was done there.
window.addEventListener("focus", () => state.data && loadData().then(watchData));

let said = ""; // why the images could not be shown, for a while

function say(words) {
  said = words;
  setTimeout(() => {
    said = "";
    renderNotice();
  }, 8000);
  renderNotice();
}

function renderNotice() {
  const { data, away } = state;
  const notice = $("notice");
  notice.replaceChildren();
  if (away || said) notice.append(away || said);
  else if (data && state.live && data.version !== state.version) {
    notice.append("The data has changed. ", button("Show the new state", showNewState));
  } else if (data?.stale) notice.append("The data has changed; its columns are being read anew.");
  notice.classList.toggle("is-wrong", Boolean(away || said));
  notice.hidden = !notice.hasChildNodes();
  if (data) document.title = `${data.name} · Tastemaker`;
  const index = data?.index ?? { state: "building", done: 0, of: 0, seconds: 0 };
  const isReady = index.state === "ready" || Boolean(state.live);
  $("waiting").hidden = isReady || Boolean(away);
  if (isReady) return;
  $("waiting-text").textContent = index.error || waitingText(index);
  $("waiting-bar").hidden = Boolean(index.error);
  $("waiting-bar").value = index.of ? index.done / index.of : 0;
}

// `seconds`: since it was begun.
function waitingText({ done, of, seconds }) {
  const left = done ? Math.ceil((seconds * (of - done)) / done) : 0;
  return `The columns are read once, for all later visits.${left > 2 ? ` About ${count(left)} s more.` : ""}`;
}

const button = (text, onclick) => element("button", { type: "button", textContent: text, onclick });

async function showNewState() {
  change({ version: state.data.version });
  await refresh();
  shownQuery = "";
  showImages();
}

// ------------------------------------------------------------------------------------------------------- the funnel

function renderFunnel() {
  const { live, failure, rules } = state;
  const isElsewhere = failure !== null && !rules.some(({ name }) => name === failure.rule);
  $("failure").hidden = !isElsewhere;
  $("failure").textContent = isElsewhere ? failure.message : "";
  if (!live) return;
  const judged = imagesJudged(live);
  const images = state.data?.images ?? live.rows;
  $("funnel-text").replaceChildren(
    element("b", {}, count(live.kept)),
    ` of ${count(images)} images kept`,
    element("span", { className: "hint" }, ` · ${share(live.kept, images)}${notJudged(live)}`),
  );
  const parts = [part("stay", live.kept, judged, `${count(live.kept)} kept`)];
  for (const { name, on, rejected } of [...live.rules].reverse()) {
    if (on && rejected) parts.push(part("go", rejected, judged, `${name} rejects ${count(rejected)}`));
  }
  $("funnel-bar").replaceChildren(...parts);
  $("funnel-text").title = `${count(live.rows)} rows in the list, ${count(images)} of them with an image`;
  const active = rules.filter(({ on }) => on).length;
  $("open-panel").textContent = active === 1 ? "1 rule" : `${active} rules`;
  $("warnings").textContent = live.warnings.join(" ");
  $("warnings").hidden = !live.warnings.length;
}

const sum = (counts) => Object.values(counts ?? {}).reduce((a, b) => a + b, 0);

function notJudged({ early, denied, unjudged }) {
  const parts = [
    [sum(early), "rejected early"],
    [sum(denied), "denied"],
    [unjudged, "not judged yet"],
  ];
  return parts.filter(([n]) => n).map(([n, what]) => ` · ${count(n)} ${what}`).join("");
}

function part(className, n, of, title) {
  const made = element("i", { className, title });
  made.style.width = `${(100 * n) / (of || 1)}%`;
  return made;
}

// -------------------------------------------------------------------------------------------------- which images

const COMPARED = ["only", "other", "both"];

function startView() {
  const size = localStorage.getItem("size") ?? (NARROW.matches ? "s" : "m");
  grid = new ImageGrid({ container: $("grid"), onOpen: openRow, onPlace: notePlace, onError: rowsFailed, size, empty: "" });
  grid.fetchRows = null;
  for (const choice of $("sizes").children) choice.onclick = () => setSize(choice.dataset.size);
  setSize(size);
  $("of-rule").onchange = ({ target }) => showRule(target.value);
  $("marginal").onchange = ({ target }) => show({ show: target.checked ? "marginal" : "rejected" });
  $("sort").onchange = ({ target }) => show({ sort: target.value, descending: false });
  $("direction").onclick = () => show({ descending: !state.view.descending });
  $("place").oninput = ({ target }) => grid.goTo(Number(target.value));
}

function setSize(size) {
  localStorage.setItem("size", size);
  for (const choice of $("sizes").children) choice.ariaPressed = String(choice.dataset.size === size);
  grid.setSize(size);
}

function choices() {
  const { live, view } = state;
  const judged = (state.data?.images ?? 0) - (live?.unjudged ?? 0);
  const found = [
    ["all", "All", state.data?.images],
    ["kept", "Kept", live?.kept],
    ["rejected", "Rejected", live ? judged - live.kept : undefined],
    ["around", "At a cut", undefined],
  ];
  if (live?.unjudged) found.push(["unjudged", "Not judged", live.unjudged]);
  if (COMPARED.includes(view.show)) found.push([view.show, "Compared", undefined]);
  return found;
}

function renderView() {
  const { view, data } = state;
  const shown = view.show === "marginal" ? "rejected" : view.show;
  const buttons = choices().map(([name, text, n]) => {
    const number = n === undefined ? [] : [element("span", { className: "number" }, count(n))];
    const made = element("button", { type: "button", onclick: () => choose(name) }, text, ...number);
    made.ariaPressed = String(name === shown);
    made.dataset.show = name;
    made.disabled = name === "around" && !active().length;
    return made;
  });
  replaceKeepingFocus($("show"), buttons, "show");
  const byRule = ["rejected", "marginal", "around"].includes(view.show);
  $("of-rule").hidden = !byRule;
  if (byRule) fillSelect($("of-rule"), ruleOptions(), view.rule);
  $("marginal-label").hidden = !(view.rule && ["rejected", "marginal"].includes(view.show));
  $("marginal").checked = view.show === "marginal";
  if (data) fillSelect($("sort"), sortOptions(), view.sort);
  $("direction").textContent = directionText();
  $("direction").hidden = ["random", "nearest"].includes(view.sort) || view.sort.startsWith("search:");
}

// What is at a cut can be rated: the page to rate begins there, on both sides of it.
function linkToRating() {
  const { view, live, data } = state;
  const cut = view.show === "around" && cutOf(live?.rules.find(({ name }) => name === view.rule));
  $("rate").hidden = !cut || data.read_only;
  if (cut) $("rate").href = `/rate#${new URLSearchParams({ how: "around", column: cut.column, value: Number(cut.value.toPrecision(6)) })}`;
}

function replaceKeepingFocus(parent, nodes, name) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.dataset[name] : null;
  parent.replaceChildren(...nodes);
  if (focused) nodes.find((node) => node.dataset[name] === focused)?.focus();
}

function fillSelect(select, options, value) {
  const made = options.map(([option, text]) => element("option", { value: option, textContent: text }));
  if (!options.some(([option]) => option === value)) made.push(element("option", { value, textContent: value }));
  select.replaceChildren(...made);
  select.value = value;
}

const active = () => state.rules.filter(({ on }) => on);

function ruleOptions() {
  const any = state.view.show === "around" ? [] : [["", "by any rule"]];
  const word = state.view.show === "around" ? "" : "by ";
  return [...any, ...active().map(({ name }) => [name, `${word}${name}`])];
}

function sortOptions() {
  const { sort, rule } = state.view;
  const options = [["key", "list order"], ["random", "random"]];
  if (rule) options.push(["nearest", "near the cut"]);
  if (sort.startsWith("search:")) options.push([sort, "likeness"]);
  const columns = state.data.columns.filter(({ kind, sortable }) => sortable && kind !== "text");
  return [...options, ...columns.map(({ name }) => [name, name])];
}

function directionText() {
  if (state.view.sort === "key") return state.view.descending ? "last to first" : "first to last";
  return state.view.descending ? "high to low" : "low to high";
}

function choose(name) {
  if (name === "around") return showCut(cutRule());
  if (COMPARED.includes(name)) return;
  const sort = state.view.sort === "nearest" ? "key" : state.view.sort;
  show({ show: name, rule: "", other: "", sort });
}

// The rule whose cut is looked at first: the one that was, else the last that has one.
function cutRule() {
  const names = active().map(({ name }) => name);
  if (names.includes(state.view.rule)) return state.view.rule;
  const known = (state.live?.rules ?? []).filter((rule) => rule.on && cutOf(rule)).map(({ name }) => name);
  return known.at(-1) ?? names.at(-1) ?? "";
}

function showRule(rule) {
  if (state.view.show === "around") showCut(rule);
  else show({ show: rule ? state.view.show : "rejected", rule, sort: rule ? "nearest" : "key" });
}

function showCut(rule) {
  const cut = cutOf(state.live?.rules.find(({ name }) => name === rule));
  show({ show: "around", rule, other: "", sort: cut?.column ?? "nearest", descending: false });
}

function cutOf(rule) {
  if (rule?.top && rule.top.value !== null) return { ...rule.top, sign: ">=" };
  return rule?.cuts?.[0] ?? null;
}

// ------------------------------------------------------------------------------------------------------- the grid

let showing = null; // the task that shows the newest view
let wanted = false; // it is not the newest any more
let shownQuery = "";

function showImages() {
  wanted = true;
  showing ??= showNewest().finally(() => (showing = null));
}

async function showNewest() {
  while (wanted && state.live) {
    wanted = false;
    const query = rowsQuery();
    const fetchRows = (offset, limit, signal) => call(`/api/rows?${query}&offset=${offset}&limit=${limit}`, { signal });
    if (String(query) === shownQuery) continue;
    try {
      const divider = await findDivider(query);
      shownQuery = String(query);
      await grid.reload({ fetchRows, place: state.place, divider, plain: divider ? state.view.rule : plainVerdict(), line: hasLine() });
      $("total").textContent = totalText();
      linkToRating();
      renderPlace();
    } catch (error) {
      if (error.name !== "AbortError") rowsFailed(error);
    }
  }
}

// Where all have the same verdict it is not said of each.
const plainVerdict = () => (["rejected", "marginal"].includes(state.view.show) ? state.view.rule : "");

// Whether there is something to say under each image.
const hasLine = () => !["key", "random"].includes(state.view.sort) || !["kept", "rejected", "marginal"].includes(state.view.show);

// Across the grid, where the column that it is sorted by crosses the rule's cut.
async function findDivider(query) {
  const { view, live } = state;
  const rule = live.rules.find(({ name }) => name === view.rule);
  const cut = cutOf(rule);
  if (view.show !== "around" || !cut || cut.column !== view.sort) return null;
  const { offset, total } = await call(`/api/place?${query}&value=${cut.value}`);
  const keepsAfter = cut.sign.startsWith(">") !== view.descending;
  const side = (n, keeps) => element("span", {}, `${count(n)} ${keeps ? "kept" : "rejected"}`);
  const node = element(
    "div",
    { className: "divider" },
    side(offset, !keepsAfter),
    element("b", {}, `${view.rule}: ${rule.top ? `best ${short(rule.top.fraction * 100)}%` : `${cut.sign} ${short(cut.value)}`}`),
    side(total - offset, keepsAfter),
  );
  return { at: offset, node, centre: true };
}

function rowsFailed(error) {
  shownQuery = "";
  if (error.status === 404) return lostSelection();
  if (error.status) say(error.message);
  if (error.status === 422) showPlain(); // a link to other data: a column or rule that is not here
  if (error.status) return;
  change({ away: error.message });
  setTimeout(showImages, 2000);
}

function showPlain() {
  if (state.view.sort !== "key" || state.view.show !== "kept") show({ show: "kept", rule: "", other: "", sort: "key", descending: false });
}

let lost = 0;

// The server does not know the selection, or the search, any more: it was restarted.
async function lostSelection() {
  if (++lost > 2) return showPlain();
  await refresh();
  showImages();
  setTimeout(() => (lost = 0), 3000);
}

function totalText() {
  if (!grid.total) return "No images here.";
  return grid.total === 1 ? "1 image" : `${count(grid.total)} images`;
}

let noting = 0;

function notePlace(place) {
  if (place === state.place) return;
  change({ place }, { history: "none" });
  renderPlace();
  clearTimeout(noting);
  noting = setTimeout(() => change({}, { history: "replace" }), 400);
}

function renderPlace() {
  const slider = $("place");
  slider.max = Math.max(0, grid.total - 1);
  slider.value = state.place;
  slider.disabled = grid.total < 2;
  $("at").textContent = grid.total ? `${count(state.place + 1)} of ${count(grid.total)}` : "";
}

// Why this image: the dialog of one image, which goes through the grid as it is.
const ofNow = { selection: () => state.live?.id };

function openRow(row, index) {
  openFromGrid(grid, row, index, ofNow);
}

// -------------------------------------------------------------------------------------------------- panel and keys

function startPanel() {
  const setOpen = (isOpen) => {
    document.body.classList.toggle("panel-open", isOpen);
    $("open-panel").ariaExpanded = String(isOpen);
    (isOpen ? $("close-panel") : $("open-panel")).focus();
  };
  $("open-panel").onclick = () => setOpen(!document.body.classList.contains("panel-open"));
  $("close-panel").onclick = () => setOpen(false);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && document.body.classList.contains("panel-open")) setOpen(false);
  });
}

function startKeys() {
  const list = KEYS.flatMap(([keys, what]) => [element("dt", {}, keys), element("dd", {}, what)]);
  $("key-list").append(...list);
  $("help").onclick = () => $("keys").showModal();
  document.addEventListener("keydown", (event) => {
    const isWriting = event.target.matches("input:not([type=range]):not([type=checkbox]), textarea, select");
    if (isWriting || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key === "z") (event.shiftKey ? redo : undo)();
      else if (key === "y") redo();
      else return;
    } else if (event.altKey) return;
    else if (key === "?") $("keys").showModal();
    else if (key === "g") grid.node.focus();
    else if ("1234".includes(key)) choose(["all", "kept", "rejected", "around"][Number(key) - 1]);
    else return;
    event.preventDefault();
  });
}

start();
