// The state of the Explore page, and the live selection that follows from its rules. Other modules of the page build on
// this interface:
//
//   state              what holds now; read it, change it through the functions below only
//     .data            answer of GET /api/data, null before it came
//     .rules           [{name, condition, on}], in the order in which they are applied
//     .view            which images: {show, rule, other, sort, descending}, as GET /api/rows takes them ("" is none)
//     .version         .data.version of what is shown; another one where the data has changed since
//     .place           the first image that the grid shows, counted from 0
//     .more            {name: text}: what other modules keep in the address (image, search, compare, …)
//     .live            the last answer of POST /api/selections, null before it came; .live.id names it in requests
//     .failure         why the rules can't be applied: {message, rule: name or ""}, or null
//     .away            what to say while the server can't be reached, "" when it can
//   subscribe(parts, run)       run(state, changed) is called after any of these parts changed; gives what ends that
//   change(part, options)       sets parts: change({view: {...state.view, show: "kept"}}); {history: "replace" | "none"}
//   show(view)                  changes parts of the view: show({show: "kept", sort: "aesthetic"}), from its first image
//   setRules(rules, options)    one step that can be undone; {settled: false} while something is dragged
//   tryRules(rules, view)       the same where the server takes them; else throws its ApiError, and all is as before
//   undo(), redo(), steps()     steps() is {undo: number, redo: number}
//   want(columns, log)          the columns whose histograms of kept rows are wanted, and those with a logarithmic axis
//   refresh()                   asks for the live selection again; a promise of when it is there
//   loadData()                  asks for the data folder again
//   rowsPath(offset, limit)     path of a request for images of the present view; rowsQuery() without these two
//
// Rules, view, place and `more` are kept in the address's fragment: reload, back and a link that is sent show the same.

import { ApiError, call } from "/api.js";

const VIEW = { show: "kept", rule: "", other: "", sort: "key", descending: false };
const SHOWN = ["all", "kept", "rejected", "marginal", "around", "unjudged", "only", "other", "both"];
const STEPS = 200; // changes that can be undone

export const state = {
  data: null,
  version: null,
  rules: [],
  view: { ...VIEW },
  place: 0,
  more: {},
  live: null,
  failure: null,
  away: "",
};

// ----------------------------------------------------------------------------------------------------------- events

const listeners = new Set();

export function subscribe(parts, run) {
  const listener = { parts: new Set([parts].flat()), run };
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function publish(part) {
  const changed = new Set(Object.keys(part).filter((name) => part[name] !== state[name]));
  Object.assign(state, part);
  for (const { parts, run } of [...listeners]) {
    if ([...changed].some((name) => parts.has(name))) run(state, changed);
  }
}

export function change(part, { history = "push" } = {}) {
  publish(part);
  if (["rules", "view", "place", "more"].some((name) => name in part)) writeAddress(history);
  if ("rules" in part) refresh();
}

export function show(view) {
  change({ view: { ...state.view, ...view }, place: 0 });
}

// ------------------------------------------------------------------------------------------------------------ rules

let done = []; // what the rules were, for undo
let undone = [];
let settled = []; // the rules before what is being dragged

export const steps = () => ({ undo: done.length, redo: undone.length });

export function setRules(rules, { settled: isSettled = true, view = viewFor(rules) } = {}) {
  if (isSettled) record(rules);
  change({ rules, view }, { history: isSettled ? "push" : "none" });
}

export async function tryRules(rules, view = viewFor(rules)) {
  const live = await call("/api/selections", { body: asked(rules) });
  record(rules);
  change({ rules, view, live, failure: null });
}

function record(rules) {
  if (same(rules, settled)) return;
  done = [...done, settled].slice(-STEPS);
  undone = [];
  settled = rules;
}

export function undo() {
  if (!done.length) return;
  undone = [settled, ...undone];
  settled = done.at(-1);
  done = done.slice(0, -1);
  change({ rules: settled, view: viewFor(settled) });
}

export function redo() {
  if (!undone.length) return;
  done = [...done, settled];
  settled = undone[0];
  undone = undone.slice(1);
  change({ rules: settled, view: viewFor(settled) });
}

// The view, where it is of a rule that these rules have, and which is on; else of all that is kept.
export function viewFor(rules, view = state.view) {
  if (!view.rule || rules.some(({ name, on }) => on && name === view.rule)) return view;
  return { ...view, show: "kept", rule: "", sort: view.sort === "nearest" ? "key" : view.sort };
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

// --------------------------------------------------------------------------------------------------- live selection

let wanted = { columns: [], log: [] };
let asking = null; // the request under way
let again = false; // something changed since it was sent: only the newest state is sent after it

export function want(columns, log) {
  if (same(wanted, { columns, log })) return;
  const had = new Set(wanted.columns);
  const more = columns.some((name) => !had.has(name)) || !same(log, wanted.log);
  wanted = { columns, log };
  if (more && (state.live || asking)) refresh();
}

function asked(rules) {
  return { rules: rules.map(({ name, condition, on }) => ({ name, condition, on })), ...wanted };
}

export function refresh() {
  again = true;
  asking ??= ask().finally(() => (asking = null));
  return asking;
}

async function ask() {
  while (again) {
    again = false;
    try {
      const live = await call("/api/selections", { body: asked(state.rules) });
      publish({ live, failure: null, away: "" });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 422 || error.status === 404) publish({ failure: failureOf(error), away: "" });
      else await isAway(error);
    }
  }
}

function failureOf(error) {
  const named = state.rules.find(({ name }) => error.message.startsWith(`rule ${name} `));
  return { message: error.message, rule: error.answer?.rule ?? named?.name ?? "" };
}

// The server is away or still busy: said, and asked again soon.
async function isAway(error) {
  publish({ away: error.message });
  await new Promise((resolve) => setTimeout(resolve, 2000));
  again = true;
}

// ------------------------------------------------------------------------------------------------------ data folder

export async function loadData() {
  try {
    const data = await call("/api/data");
    if (state.data === null) begin(data);
    else publish({ data, version: state.live ? state.version : data.version, away: "" });
    if (data.index.state === "ready" && !state.live) refresh();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    publish({ away: error.message });
  }
}

function begin(data) {
  const found = readAddress(data);
  settled = found.rules;
  publish({ data, version: data.version, away: "", ...found });
}

export function recipeRules(data = state.data) {
  return (data?.recipe_rules ?? []).map(({ name, condition }) => ({ name, condition, on: true }));
}

// ---------------------------------------------------------------------------------------------------------- address

const text = JSON.stringify;

function writeAddress(history) {
  if (history === "none") return;
  const { rules, view, place, more } = state;
  const parts = new URLSearchParams();
  if (text(rules) !== text(recipeRules())) {
    parts.set("rules", text(rules.map(({ name, condition, on }) => [name, condition, on ? 1 : 0])));
  }
  for (const [name, value] of Object.entries(view)) {
    if (value !== defaultView()[name]) parts.set(name, String(value));
  }
  if (place) parts.set("place", String(place));
  for (const [name, value] of Object.entries(more)) if (value) parts.set(name, value);
  const address = `${location.pathname}#${parts}`;
  if (address === location.pathname + (location.hash || "#")) return;
  if (history === "replace") window.history.replaceState(null, "", address);
  else window.history.pushState(null, "", address);
}

function defaultView(data = state.data) {
  return { ...VIEW, show: recipeRules(data).length ? "kept" : "all" };
}

function readAddress(data = state.data) {
  const parts = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const { rules: written, place = "0", ...rest } = parts;
  const view = defaultView(data);
  for (const name of Object.keys(view)) {
    if (name in rest) view[name] = name === "descending" ? rest[name] === "true" : rest[name];
    delete rest[name];
  }
  if (!SHOWN.includes(view.show)) view.show = defaultView(data).show;
  const rules = readRules(written, data);
  return { rules, view: viewFor(rules, view), place: Math.max(0, parseInt(place, 10) || 0), more: rest };
}

// Rules as a link has them; a link that somebody broke has the recipe's.
function readRules(written, data) {
  if (written === undefined) return recipeRules(data);
  try {
    return JSON.parse(written).map(([name, condition, on]) => ({
      name: String(name),
      condition: String(condition),
      on: Boolean(on),
    }));
  } catch {
    return recipeRules(data);
  }
}

export function rowsQuery() {
  const { show, rule, other, sort, descending } = state.view;
  const query = new URLSearchParams({ show, sort, descending: String(descending) });
  if (state.live) query.set("selection", state.live.id);
  if (rule) query.set("rule", rule);
  if (other) query.set("other", other);
  return query;
}

export function rowsPath(offset, limit) {
  return `/api/rows?${rowsQuery()}&offset=${offset}&limit=${limit}`;
}

window.addEventListener("popstate", () => {
  if (!state.data) return;
  const { rules, ...rest } = readAddress();
  record(rules);
  const part = { ...rest, rules: same(rules, state.rules) ? state.rules : rules };
  publish(part);
  refresh();
});
