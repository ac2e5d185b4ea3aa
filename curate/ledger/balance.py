"""What a selection does to clusters: the share of all images that each has, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from curate.ledger.view import LedgerTable, recorded_columns

CLUSTER = "cluster"
"""The unit of a column that holds the number of a cluster: to compare such numbers means nothing."""

_SHOWN = 5


def cluster_columns(found: Sequence[LedgerTable]) -> list[str]:
    """The columns of these tables that hold numbers of clusters."""
    return [column for column, facts in recorded_columns(found).items() if facts.get("unit") == CLUSTER]


def balance(cluster: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """What became of the clusters of images (n,), of which some are `kept` (n,) bool: pairs are before and after.

    effective: exp of the entropy of the shares, the number of equal clusters that would be as even (Hill 1973, of order
    1).    clusters: how many are not empty.    largest: the largest share.    grown, shrunk: (cluster, share before,
    share after) of those that gained or lost most. An image without a cluster, masked or negative, is in none.
    """
    valid = ~np.ma.getmaskarray(cluster) & (np.ma.getdata(cluster) >= 0)
    numbers, kept = np.ma.getdata(cluster)[valid].astype(np.int64), kept[valid]
    before = np.bincount(numbers)
    both = [_shares(before), _shares(np.bincount(numbers[kept], minlength=len(before)))]
    change = both[1] - both[0]
    order = np.argsort(-change, kind="stable")
    grown = [c for c in order[:_SHOWN] if change[c] > 0]
    shrunk = [c for c in order[::-1][:_SHOWN] if change[c] < 0] if kept.any() else []

    def rows(clusters: list[Any]) -> list[list[float]]:
        return [[int(c), *(float(f"{share[c]:.4g}") for share in both)] for c in clusters]

    return {
        "clusters": [int(np.count_nonzero(share)) for share in both],
        "effective": [float(f"{effective(share):.4g}") for share in both],
        "largest": [float(f"{share.max(initial=0):.4g}") for share in both],
        "grown": rows(grown),
        "shrunk": rows(shrunk),
    }


def effective(shares: np.ndarray) -> float:
    """exp of the entropy of shares that add up to 1; 0 where there are none."""
    some = shares[shares > 0]
    return float(np.exp(-(some * np.log(some)).sum())) if len(some) else 0.0


def balance_words(facts: dict[str, Any]) -> str:
    """What became of the clusters, in a line."""
    (clusters, left), (before, after), (largest, then) = facts["clusters"], facts["effective"], facts["largest"]
    return (
        f"{clusters:,} clusters, as even as {before:,.4g} equal ones, became {left:,}, as even as {after:,.4g}; the "
        f"largest had {largest:.1%}, and has {then:.1%}"
    )


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / max(1, counts.sum())
