"""Intervals of 95% for what a sample says of the whole, in the cases that a projection has."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z = 1.959964
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5% quantiles of Student's t, for 1 to 10 degrees of freedom."""


def share(count: int, sampled: int, whole: int | None = None) -> tuple[float, float]:
    """Wilson's score interval of a share of which `count` of `sampled` rows were seen (JASA 22, 1927, page 209).

    Of `whole` rows, sampled without replacement: as of n (N - 1) / (N - n) rows, the finite population correction
    (Cochran, Sampling Techniques, 1977, section 2.6), and never less than what was seen for certain.
    """
    p = count / sampled
    if whole is None:
        n = float(sampled)
    elif sampled >= whole:
        return p, p
    else:
        n = sampled * (whole - 1) / (whole - sampled)
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    if whole is not None:
        low, high = max(low, count / whole), min(high, 1 - (sampled - count) / whole)
    return low, high


def share_of_all(parts: Sequence[tuple[int, int, int]]) -> tuple[float, float, float]:
    """A share of several lists together, each sampled by itself (count, sampled, whole), and its interval: estimates
    add up by the lists' lengths, and the distances to the ends of their intervals as independent ones do (MOVER: Zou
    and Donner, Statistics in Medicine 27, 2008, page 1693).
    """
    if len(parts) == 1:
        count, sampled, whole = parts[0]
        return count / sampled, *share(count, sampled, whole)
    rows = sum(whole for _, _, whole in parts)
    value = below = above = 0.0
    for count, sampled, whole in parts:
        p, (low, high), weight = count / sampled, share(count, sampled, whole), whole / rows
        value += weight * p
        below += (weight * (p - low)) ** 2
        above += (weight * (high - p)) ** 2
    return value, max(0.0, value - math.sqrt(below)), min(1.0, value + math.sqrt(above))


def ratio(amounts: Sequence[float], units: Sequence[float], taken: float = 0.0) -> tuple[float, float] | None:
    """An interval of sum(amounts) / sum(units) over groups of rows (here shards): the delete-one jackknife of the ratio
    (Tukey 1958; Cochran 1977, section 6.17) with Student's t for so many groups. None of fewer than two groups.

    `taken` is the share of the whole that was sampled, for the finite population correction. Shards are stretches of
    the list: where it is sorted they differ more than random groups would, and the interval is wider than it need be.
    """
    groups = [(a, u) for a, u in zip(amounts, units, strict=True) if u > 0]
    if len(groups) < 2:
        return None
    amount, unit, n = sum(a for a, _ in groups), sum(u for _, u in groups), len(groups)
    without = [(amount - a) / (unit - u) for a, u in groups]
    mean = sum(without) / n
    error = math.sqrt((n - 1) / n * sum((r - mean) ** 2 for r in without) * max(0.0, 1 - taken))
    half = error * (_T[n - 2] if n - 1 <= len(_T) else _Z + 2.4 / (n - 1))
    return max(0.0, amount / unit - half), amount / unit + half


def distinct(rows: int, seen: int, once: int, twice: int, more: float) -> float:
    """How many kinds `rows + more` rows are of, where `rows` are of `seen`, `once` of them seen once and `twice` twice:
    Chao1's lower bound of those unseen, met at the rate of Colwell et al. (J. Plant Ecology 5, 2012, equation 9)."""
    unseen = once**2 / (2 * twice) if twice else once * (once - 1) / 2
    if not unseen or not rows:
        return float(seen)
    return seen + unseen * (1 - (1 - min(1.0, once / (rows * unseen + once))) ** more)
