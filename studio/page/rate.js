// The page to rate: who, what, which images; then full-screen (rating.js).

import { $, call, element } from "/api.js";
import { Rating } from "/rating.js";

const form = $("form");
const NEW = "a new one"; // no name of a set has a space in it

let place = ""; // the data folder's
let sets = [];
let columns = []; // numeric ones

const KINDS = {
  scores: (set) => `marks ${set.scale[0]} to ${set.scale[1]}`,
  labels: () => "yes or no",
  pairs: () => "pairs",
};

function showNotice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

const picked = () => form.querySelector("[name=set]:checked")?.value;
const chosen = () => sets.find((set) => set.name === picked());

// ---------------------------------------------------------------------------------------------------- what is shown

function card(value, title, text) {
  const input = element("input", { type: "radio", name: "set", value });
  return element("label", { className: "card" }, input, element("b", {}, title), element("span", { className: "hint" }, text));
}

function listSets(selected) {
  const cards = sets.map((set) => {
    const people = Object.keys(set.raters).length;
    const count = `${set.count.toLocaleString("en")} ${set.kind === "pairs" ? "answers" : "ratings"}`;
    const by = people > 1 ? `by ${people} people` : people ? `by ${Object.keys(set.raters)[0]}` : "";
    const about = set.concept ? `${KINDS[set.kind](set)}: ${set.concept}` : KINDS[set.kind](set);
    return card(set.name, set.name, [about, [count, by].filter(Boolean).join(" ")].join(" · "));
  });
  $("sets").replaceChildren(...cards, card(NEW, sets.length ? "Something new" : "A first set", "marks, pairs, or yes and no"));
  $("sets").hidden = !sets.length;
  const value = selected ?? sets[0]?.name ?? NEW;
  for (const input of form.querySelectorAll("[name=set]")) input.checked = input.value === value;
}

function show() {
  const fresh = picked() === NEW;
  $("new").hidden = !fresh;
  $("name").required = fresh;
  $("scale-field").hidden = form.kind.value !== "scores";
  $("concept-field").hidden = form.kind.value !== "labels";
  $("concept").required = fresh && form.kind.value === "labels";
  $("around").hidden = form.how.value !== "around";
  $("value").required = form.how.value === "around";
  const set = chosen();
  $("terminal").hidden = !set?.command;
  if (set?.command) [$("file").textContent, $("command").textContent] = [set.file, set.command];
}

// What the form says stays in the browser; what is being rated stays in the address, so that a reload goes on with it.
function keep() {
  const names = ["rater", "kind", "scale", "concept", "how", "column", "value", "selection"];
  const values = Object.fromEntries(names.map((name) => [name, form[name].value]));
  localStorage.setItem("tastemaker.rate", JSON.stringify({ ...values, set: picked() }));
}

function restore() {
  const kept = JSON.parse(localStorage.getItem("tastemaker.rate") ?? "{}");
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const values = { ...kept, ...asked };
  listSets(sets.some((set) => set.name === values.set) ? values.set : undefined);
  for (const name of ["rater", "kind", "scale", "concept", "how", "column", "value", "selection"]) {
    if (values[name] !== undefined) form[name].value = values[name];
  }
  if (!form.column.value && columns.length) form.column.value = columns[0].name;
  for (const name of ["kind", "how"]) if (!form[name].value) form[name][0].checked = true;
  if (!form.scale.value) form.scale.value = "1 7";
  show();
  return asked;
}

// A value in the middle of a column, for a cut that was not chosen yet.
function middle() {
  const column = columns.find((one) => one.name === form.column.value);
  if (column) form.value.value = Number(((column.low + column.high) / 2).toPrecision(3));
}

// ------------------------------------------------------------------------------------------------------------ begin

async function newSet() {
  const kind = form.kind.value;
  const made = { name: form.elements.name.value || "taste", kind };
  if (kind === "scores") made.scale = form.scale.value.split(" ").map(Number);
  if (kind === "labels") made.concept = form.concept.value.trim();
  return call("/api/ratings", { body: made });
}

async function begin() {
  showError("");
  keep();
  const set = chosen() ?? (await newSet());
  const how = { how: form.how.value, selection: form.selection.value };
  if (how.how === "around") Object.assign(how, { column: form.column.value, value: form.value.value });
  location.hash = new URLSearchParams({ rating: "now", set: set.name, rater: form.rater.value.trim(), ...how });
  const rating = new Rating({ place, set, rater: form.rater.value.trim(), how, onLeave: left });
  await rating.open();
}

async function left() {
  history.replaceState(null, "", location.pathname);
  await load().catch((error) => showNotice(error.message));
  $("start").focus();
}

async function load() {
  const [data, found] = await Promise.all([call("/api/data"), call("/api/ratings")]);
  place = data.place;
  sets = found.sets;
  columns = (data.columns ?? []).filter((column) => column.kind === "number" && column.count);
  $("data").textContent = data.name;
  form.column.replaceChildren(...columns.map(({ name }) => element("option", { value: name }, name)));
  form.querySelector("[name=how][value=around]").closest("label").hidden = !columns.length;
  const selections = data.selections ?? [];
  const option = (name) => element("option", { value: name }, `${name}: what it keeps`);
  form.selection.replaceChildren(element("option", { value: "" }, "All images"), ...selections.map(({ name }) => option(name)));
  $("from-field").hidden = !selections.length;
  const asked = restore();
  if (!form.value.value) middle();
  return asked;
}

async function open() {
  form.onchange = () => {
    show();
    keep();
  };
  form.column.onchange = middle;
  form.onsubmit = async (event) => {
    event.preventDefault();
    $("start").disabled = true;
    await begin().catch((error) => showError(error.message));
    $("start").disabled = false;
  };
  const asked = await load();
  if (asked.rating === "now" && asked.rater && chosen()) await begin();
  else (form.rater.value ? $("start") : form.rater).focus();
  document.body.dataset.ready = "true";
}

open().catch((error) => showNotice(error.message));
