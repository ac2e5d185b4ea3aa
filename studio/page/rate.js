// The page to rate: who, what, which images; then full-screen (rating.js).

import { $, call, element } from "/api.js";
import { Rating } from "/rating.js";

const form = $("form");
const NEW = "a new one"; // no name of a set has a space in it

const SOME = 12; // images beside the form

let place = ""; // the data folder's
let sets = [];
let columns = []; // numeric ones
let selections = []; // saved ones

const KINDS = {
  scores: (set) => `scores ${set.scale[0]} to ${set.scale[1]}`,
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
  $("sets").replaceChildren(...cards, card(NEW, sets.length ? "Something new" : "A first set", "scores, pairs, or yes and no"));
  $("sets").hidden = !sets.length;
  const value = selected ?? sets[0]?.name ?? NEW;
  for (const input of form.querySelectorAll("[name=set]")) input.checked = input.value === value;
}

function show() {
  const fresh = picked() === NEW;
  $("new").hidden = !fresh;
  $("scale-field").hidden = form.kind.value !== "scores";
  $("concept-field").hidden = form.kind.value !== "labels";
  $("name").placeholder = nameOfSet(form.kind.value, "");
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
  if (values.column && !columns.some((one) => one.name === values.column)) { // the index is being made
    form.column.append(element("option", { value: values.column }, values.column));
  }
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

// What the name of a set can be: it is that of its head and of its column, too.
function slug(text) {
  return text.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^[^a-z]+|_+$/g, "").slice(0, 36);
}

function nameOfSet(kind, given) {
  const name = slug(given) || (kind === "labels" && slug(form.concept.value)) || (kind === "pairs" ? "pairs" : "taste");
  for (let i = 1; ; i++) {
    const free = i === 1 ? name : `${name}_${i}`;
    if (!sets.some((set) => set.name === free)) return free;
  }
}

async function newSet() {
  const kind = form.kind.value;
  const made = { name: nameOfSet(kind, $("name").value), kind };
  if (kind === "scores") made.scale = form.scale.value.split(" ").map(Number);
  if (kind === "labels") made.concept = form.concept.value.trim();
  return call("/api/ratings", { body: made });
}

const on = ({ name, condition }) => ({ name, condition, on: true });

async function begin() {
  showError("");
  keep();
  const set = chosen() ?? (await newSet());
  const how = { how: form.how.value };
  if (how.how === "around") Object.assign(how, { column: form.column.value, value: form.value.value });
  const selection = form.selection.value;
  const rater = form.rater.value.trim();
  const address = new URLSearchParams({ rating: "now", set: set.name, rater, selection, ...how });
  history.replaceState(null, "", `#${address}`);
  const { rules } = selections.find((one) => one.name === selection) ?? {};
  const select = rules && (async () => (await call("/api/selections", { body: { rules: rules.map(on) } })).id);
  const rating = new Rating({ place, set, rater, how, select, onLeave: left, onWaiting: showNotice });
  await rating.open();
}

async function left() {
  history.replaceState(null, "", location.pathname);
  await load().catch((error) => showNotice(error.message));
  $("start").focus();
}

function listColumns(data) {
  columns = data.columns.filter((column) => column.kind === "number" && column.count);
  form.column.replaceChildren(...columns.map(({ name }) => element("option", { value: name }, name)));
  form.querySelector("[name=how][value=around]").closest("label").hidden = !columns.length;
  if (!form.value.value) middle();
}

async function load() {
  const [data, found] = await Promise.all([call("/api/data"), call("/api/ratings")]);
  place = data.place;
  sets = found.sets;
  document.title = `Rate · ${data.name}`;
  listColumns(data);
  selections = data.selections;
  const option = (name) => element("option", { value: name }, `${name}: what it keeps`);
  form.selection.replaceChildren(element("option", { value: "" }, "All images"), ...selections.map(({ name }) => option(name)));
  $("from-field").hidden = !selections.length;
  return restore();
}

// Once the folder's index is made: its columns, and some of its images beside the form.
async function showSome() {
  let data = await call("/api/data");
  while (data.index.state === "building") {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    data = await call("/api/data");
  }
  if (data.index.state !== "ready") return;
  if (!columns.length) listColumns(data);
  if (innerWidth <= 900) return;
  const { id } = await call("/api/selections", { body: { rules: [] } });
  const { rows } = await call(`/api/rows?selection=${id}&show=all&sort=random&limit=${SOME}`);
  const images = rows.map(({ key }) => {
    const image = element("img", { alt: "", loading: "lazy", src: `/api/thumbnails/${encodeURIComponent(key)}?side=320` });
    return element("li", {}, image);
  });
  $("mosaic").replaceChildren(...images);
}

async function open() {
  form.onchange = () => {
    show();
    keep();
  };
  form.concept.oninput = show;
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
  showSome().catch(() => {}); // the form does without
}

open().catch((error) => showNotice(error.message));
