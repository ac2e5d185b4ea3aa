// Rules as text: the constant of a cut is found in a rule's SQL and replaced, nothing else of it is touched; conditions
// that the page writes itself. What can't be found for certain is null.

const TOKEN = new RegExp(
  [
    String.raw`(?<space>\s+|--[^\n]*|/\*[\s\S]*?\*/)`,
    String.raw`(?<string>'(?:[^']|'')*')`,
    String.raw`(?<word>(?:"(?:[^"]|"")*"|[A-Za-z_][\w$]*)(?:\s*\.\s*(?:"(?:[^"]|"")*"|[A-Za-z_][\w$]*))*)`,
    String.raw`(?<number>(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)`,
    String.raw`(?<sign><=|>=|<>|!=|==|::|\|\||[^\s\w'"])`,
  ].join("|"),
  "y",
);

// [{kind, text, start, end}], without spaces and comments; null where it is no SQL that we read.
export function tokens(sql) {
  const found = [];
  let at = 0;
  while (at < sql.length) {
    TOKEN.lastIndex = at;
    const match = TOKEN.exec(sql);
    if (!match) return null;
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    at = TOKEN.lastIndex;
    if (kind !== "space") found.push({ kind, text: match[0], start: match.index, end: at });
  }
  return joinMinus(found);
}

// A minus that is a number's own becomes part of it: after a sign, a bracket or a keyword, not after a value.
function joinMinus(found) {
  const joined = [];
  for (const token of found) {
    const minus = joined.at(-1);
    const before = joined.at(-2);
    const isOwn =
      token.kind === "number" && minus?.text === "-" && (!before || (before.kind === "sign" && before.text !== ")") || isKeyword(before));
    if (!isOwn) joined.push(token);
    else joined[joined.length - 1] = { kind: "number", text: `-${token.text}`, start: minus.start, end: token.end };
  }
  return joined;
}

const KEYWORDS = ["and", "or", "not", "between", "in", "is", "then", "else", "when"];
const isKeyword = (token) => token?.kind === "word" && KEYWORDS.includes(token.text.toLowerCase());
const isWord = (token, word) => token?.kind === "word" && token.text.toLowerCase() === word;

const plain = (name) => name.replaceAll(/"|\s/g, "").toLowerCase();
const FLIPPED = { "<": ">", "<=": ">=", ">": "<", ">=": "<=" };
const COMPARING = Object.keys(FLIPPED);

// The words of a condition that may be columns, as columns are called.
export function columnsIn(condition) {
  return (tokens(condition) ?? []).filter(({ kind }) => kind === "word").map(({ text }) => text.replaceAll('"', ""));
}

// Those that are compared with something, or of which the best are kept.
export function cutColumnsIn(condition) {
  const all = tokens(condition) ?? [];
  const isCut = (i) => COMPARING.includes(all[i + 1]?.text) || COMPARING.includes(all[i - 1]?.text) || isWord(all[i - 2], "top");
  return all.filter(({ kind }, i) => kind === "word" && isCut(i)).map(({ text }) => text.replaceAll('"', ""));
}

const numberOf = (token) => Number(token.text.replaceAll("_", ""));

// Where the constant of a cut {column, sign, value} stands in a condition: {start, end}.
export function findCut(condition, { column, sign, value }) {
  const all = tokens(condition) ?? [];
  const found = [];
  const add = (token, written) => {
    if (token?.kind === "number" && numberOf(token) === value) found.push({ start: token.start, end: token.end, written });
  };
  all.forEach((token, i) => {
    if (token.kind !== "word" || plain(token.text) !== plain(column)) return;
    const [next, after] = [all[i + 1], all[i + 2]];
    const isFirst = begins(all[i - 1]);
    if (COMPARING.includes(next?.text) && isFirst && ends(all[i + 3])) add(after, next.text);
    if (COMPARING.includes(all[i - 1]?.text) && ends(next) && begins(all[i - 3])) add(all[i - 2], FLIPPED[all[i - 1].text]);
    if (isFirst && isWord(next, "between") && isWord(all[i + 3], "and")) {
      add(after, ">=");
      if (ends(all[i + 5])) add(all[i + 4], "<=");
    }
  });
  if (found.length > 1) {
    const exact = found.filter(({ written }) => written === sign);
    return exact.length === 1 ? exact[0] : null;
  }
  return found[0] ?? null;
}

// Whether a comparison ends, or begins, beside this token: nothing more is computed there.
const ends = (token) => !token || token.text === ")" || ["and", "or"].some((word) => isWord(token, word));
const begins = (token) => !token || token.text === "(" || isKeyword(token);

// Where the fraction of top(column, fraction) stands.
export function findTop(condition, { column, fraction }) {
  const all = tokens(condition) ?? [];
  const found = all.filter(
    (token, i) =>
      token.kind === "number" &&
      numberOf(token) === fraction &&
      isWord(all[i - 4], "top") &&
      all[i - 3].text === "(" &&
      plain(all[i - 2].text) === plain(column) &&
      all[i - 1].text === ",",
  );
  return found.length === 1 ? { start: found[0].start, end: found[0].end } : null;
}

export function replaceAt(condition, { start, end }, text) {
  return condition.slice(0, start) + text + condition.slice(end);
}

// A number in as few digits as a step of this size needs.
export function writeNumber(value, step) {
  const digits = Math.max(0, Math.min(12, -Math.floor(Math.log10(step) + 1e-9)));
  return String(Number(value.toFixed(digits)));
}

// A column as a rule names it: source."my column" where a bare word would not do.
export function columnWord(name) {
  const quoted = (word) => (/^[A-Za-z_]\w*$/.test(word) && !RESERVED.has(word.toLowerCase()) ? word : `"${word.replaceAll('"', '""')}"`);
  return name.startsWith("source.") ? `source.${quoted(name.slice(7))}` : quoted(name);
}

const RESERVED = new Set(
  (
    "all and any as asc both case cast check collate column constraint create default deferrable desc describe distinct do " +
    "else end except false fetch for foreign from group having in initially intersect into lambda lateral leading limit not " +
    "null offset on only or order pivot placing primary qualify references returning select show some summarize symmetric " +
    "table then to trailing true union unique unpivot using variadic when where window with"
  ).split(" "),
);

const literal = (value) => (typeof value === "string" ? `'${value.replaceAll("'", "''")}'` : String(value));

// The values that a condition keeps, where it is only that: `lang in ('en', 'de')`, `lang = 'en'`.
export function readValues(condition, column) {
  const all = tokens(condition) ?? [];
  if (all[0]?.kind !== "word" || plain(all[0].text) !== plain(column)) return null;
  if (all.length === 3 && all[1].text === "=") return [valueOf(all[2])];
  if (!isWord(all[1], "in") || all[2]?.text !== "(" || all.at(-1).text !== ")") return null;
  const inner = all.slice(3, -1);
  const regular = inner.length % 2 && inner.every((token, i) => (i % 2 ? token.text === "," : token.kind !== "sign"));
  return regular ? inner.filter((_, i) => i % 2 === 0).map(valueOf) : null;
}

function valueOf(token) {
  if (token.kind === "string") return token.text.slice(1, -1).replaceAll("''", "'");
  if (token.kind === "number") return numberOf(token);
  return isWord(token, "true") ? true : isWord(token, "false") ? false : token.text;
}

export function writeValues(column, values) {
  const word = columnWord(column);
  if (values.length === 1) return `${word} = ${literal(values[0])}`;
  return `${word} in (${values.map(literal).join(", ")})`;
}

// A name for a new rule that no other has.
export function freeName(base, rules) {
  const taken = new Set(rules.map(({ name }) => name));
  let name = base;
  for (let i = 2; taken.has(name); i++) name = `${base}_${i}`;
  return name;
}
