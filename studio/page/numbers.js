// Numbers as people read them.

// 1234567 -> "1,234,567"
export const count = (n) => Math.round(n).toLocaleString("en-US");

// 0.1234 -> "12%", small and large shares with one more digit, so that few is not none and most is not all
export function share(part, whole) {
  if (!whole) return "0%";
  const percent = (100 * part) / whole;
  const digits = part && part < whole && (percent < 1 || percent > 99) ? 1 : 0;
  const least = digits ? Math.min(99.9, Math.max(0.1, percent)) : percent;
  return `${least.toFixed(digits)}%`;
}

// A value in three digits or so, whatever its size.
export function short(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number" || !Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en-US");
  if (value !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return count(value);
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
}
