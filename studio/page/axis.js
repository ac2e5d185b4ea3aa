// The axis of a histogram: values to parts of its width and back, linear or logarithmic as its bins are.

import { short } from "/numbers.js";

export class Axis {
  constructor(edges, log) {
    [this.low, this.high, this.log] = [edges[0], edges.at(-1), log];
  }

  // The part of the width, from 0 to 1, at which a value stands; values beyond the axis stand at its ends.
  part(value) {
    const [from, to, at] = [this.low, this.high, value].map((v) => (this.log ? Math.log(v) : v));
    if (this.log && value <= 0) return 0;
    return to > from ? Math.max(0, Math.min(1, (at - from) / (to - from))) : 0.5;
  }

  value(part) {
    const inside = Math.max(0, Math.min(1, part));
    if (this.log) return Math.exp(Math.log(this.low) + inside * (Math.log(this.high) - Math.log(this.low)));
    return this.low + inside * (this.high - this.low);
  }

  // How finely a cut near a value is written: a three-hundredth of the axis, a hundredth of the value where it is
  // logarithmic; 1 at least for whole numbers.
  step(value, whole) {
    const fine = this.log ? Math.abs(value) / 100 : (this.high - this.low) / 300;
    const step = 10 ** Math.floor(Math.log10(fine || 1));
    return whole ? Math.max(1, step) : step;
  }

  // Three numbers below it.
  labels() {
    const middle = this.value(0.5);
    const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.max(this.high - this.low, 1e-12))));
    const round = (v) => (this.log ? Number(v.toPrecision(2)) : Number(v.toFixed(Math.min(digits, 12))));
    if (this.low === this.high) return [short(round(this.low))];
    return [this.low, middle, this.high].map((v) => short(round(v)));
  }
}

// The outline of bars of counts over `bins` units of width and `height` units of height. Heights go by the square root,
// so that a hundred images are still seen beside ten thousand.
export function outline(counts, most, height) {
  let path = `M0 ${height}`;
  counts.forEach((n, i) => {
    const top = n ? height - Math.max(1, height * Math.sqrt(n / most)) : height;
    path += `V${top.toFixed(2)}H${i + 1}`;
  });
  return `${path}V${height}Z`;
}

// How many of the counted values are at least this one; within a bin they are taken as spread evenly.
export function countAbove(histogram, axis, value) {
  const at = axis.part(value) * histogram.counts.length;
  return histogram.counts.reduce((sum, n, i) => sum + n * Math.max(0, Math.min(1, i + 1 - at)), 0);
}

// The value that so many of the counted values reach.
export function valueWithAbove(histogram, axis, wanted) {
  let above = 0;
  for (let i = histogram.counts.length - 1; i >= 0; i--) {
    const n = histogram.counts[i];
    if (n && above + n >= wanted) return axis.value((i + 1 - (wanted - above) / n) / histogram.counts.length);
    above += n;
  }
  return axis.low;
}
