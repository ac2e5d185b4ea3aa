"""Which columns of a rating file say again what people judged: no metadata, and no sign of a leak.

KonIQ has its mean opinion score (MOS), a z-score of it, the votes and their spread side by side; PARA has the means of
nine judgements. Whoever predicts one of them from another knows nothing of how the images came about.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aesthetic.metrics import spearman

if TYPE_CHECKING:
    import pandas as pd

SAME = 0.95
"""From this rank correlation with the score on a column of numbers counts as the score in another form. Ours: z-scores,
ranks and means without outliers of one set of votes lie above 0.98, other judgements of the same people below 0.95."""

_FEW = 10  # rows below which a correlation says nothing
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # the words of MOS_zscore, aestheticScore_mean, beauty.sd
_SPREADS = {"sd", "std", "stdev", "stddev"}
_STATISTICS = _SPREADS | {
    *("mean", "avg", "average", "median", "var", "variance", "se", "sem", "ci", "z", "norm", "normalized", "rank"),
    *("n", "num", "count", "counts", "total", "min", "max", "percentile", "quantile", "raw"),
}
_JUDGEMENTS = {
    *("score", "scores", "rating", "ratings", "mos", "dmos", "zscore", "vote", "votes", "opinion", "opinions"),
    *("label", "labels", "preference", "preferences"),
}


def restated_columns(
    score: str, columns: Mapping[str, pd.Series], scores: npt.NDArray[np.float64] | None, prefixes: Collection[str] = ()
) -> list[str]:
    """The columns that say the score again, or what the same people judged besides, in their order.

    By name: called after judging (qualityScore, votes), a spread or a number of votes (SD, c_total), or called like the
    column `score` but for one part (valence_mean and valence_n beside beauty_mean). prefixes: of a histogram's columns.
    By value, where `scores` are given: numbers whose rank correlation with them is at least SAME, either way.
    """
    base, statistics = _parts(score)
    siblings = {b for b, s in map(_parts, columns) if s and s == statistics} | {base}
    siblings |= {_parts(p)[0] for p in prefixes}

    def by_name(name: str) -> bool:
        other_base, other_statistics = _parts(name)
        words = other_base | other_statistics
        if not words:
            return False
        return bool(words & (_JUDGEMENTS | _SPREADS)) or bool(
            other_statistics and (other_base in siblings or not other_base)
        )

    return [n for n, values in columns.items() if by_name(n) or (scores is not None and _goes_with(values, scores))]


def _parts(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words of a column's name: what is measured, and which statistic of it."""
    words = frozenset(w.lower() for w in _TOKEN.findall(name))
    return words - _STATISTICS, words & _STATISTICS


def _goes_with(values: pd.Series, scores: npt.NDArray[np.float64]) -> bool:
    if values.dtype.kind not in "iuf":
        return False
    x = values.to_numpy(np.float64)
    known = np.isfinite(x) & np.isfinite(scores)
    return bool(known.sum() >= _FEW and abs(spearman(x[known], scores[known])) >= SAME)
