"""What a fitted head comes with, whatever it was fitted to: the report, and the facts that reports share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.examples import PreparedExamples
from aesthetic.heads import Head
from aesthetic.splits import Split

Array = npt.NDArray[np.float64]

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class FitResult:
    """A head, the report on it, and what it predicted for rows that it had not seen.

    report: JSON; docs/taste.md says what each number is. held_out: (n,) in the order of the examples, NaN where a row
    was for fitting only. rated: (n,) the scores, on the reference's scale where there are several sources.
    penalty: of the ridge or the logistic regression; None for a network and for comparisons.
    """

    head: Head
    report: dict[str, Any]
    held_out: Array
    rated: Array
    penalty: float | None


def facts_of(data: PreparedExamples, tested: npt.NDArray[np.bool_], splits: Sequence[Split]) -> dict[str, Any]:
    """What was measured on: how many images in which groups, and which of them (`tested`) the head had not seen."""
    rows = np.flatnonzero(tested)
    return {
        "n": len(data.y),
        **data.groups.facts,
        "how": f"nested cross-validation in {len(splits)} folds by group" if len(splits) > 1 else "held-back test set",
        "tested": len(rows),
        "tested_groups": len({data.groups.names[i] for i in rows}),
        "test_sha256": sha256_of(sorted(data.ids[i] for i in rows)),
    }


def sha256_of(lines: Iterable[str]) -> str:
    """Of lines of text: equal for two reports on the same test set."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def quantiles_of(scores: Array) -> dict[str, float]:
    """The scores below which these shares of the images lie, for rules that keep the best tenth."""
    return {f"{q:.0%}": float(v) for q, v in zip(QUANTILES, np.quantile(scores, QUANTILES), strict=True)}


def chance_verdict(estimate: Mapping[str, float | None], chance: float, more: str) -> str | None:
    """The verdict where the interval of a head's figure does not lie above chance; None where it does."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return "too few groups to say how good it is"
    if high < chance:
        return (
            f"worse than chance ({low:.2f} to {high:.2f}): it orders images the wrong way round. Are high and low, or "
            f"the two labels, mixed up, or are images joined to others' ratings?"
        )
    if low <= chance:
        return f"not shown to be better than chance: {more} more before you filter with it"
    return None


def unsure_verdict(estimate: Mapping[str, float | None], more: str) -> str:
    """The verdict where the interval lies above chance, but begins so near to it that nothing else can be promised."""
    return (
        f"better than chance, but how much is open ({estimate['low']:.2f} to {estimate['high']:.2f}): {more} more "
        f"before you choose with it"
    )


def leak_verdict(report: dict[str, Any], metric: str, chance: float, name: str) -> str | None:
    """The verdict where metadata alone does better than chance and as well as the head; None where it does not."""
    metadata = report["baselines"].get("metadata")
    if not metadata or (metadata[metric]["low"] or 0) <= chance or (metadata["difference"]["low"] or 0) > 0:
        return None
    return (
        f"metadata alone, without the images, does about as well ({name} {metadata[metric]['value']:.2f}): "
        f"suspect a leak, and give --group the column that tells it"
    )


def card_of(report: dict[str, Any], facts: Iterable[str], predicted: str) -> dict[str, Any]:
    """A report as sections of a model card; `facts` are those of it that go beside its metrics."""
    return {
        "verdict": report["verdict"],
        "metrics": {
            **report["metrics"],
            **{k: report[k] for k in facts},
            "intervals": "95%: whole groups drawn 1,000 times",
        },
        "baselines": report["baselines"],
        "calibration": report["calibration"],
        "quantiles": {"of": f"held-out {predicted} of the {report['tested']:,} tested images", **report["quantiles"]},
    }
