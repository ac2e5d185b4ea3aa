"""What people read of a head: its MODEL_CARD.md, and the same for a terminal. Both say what head.json says."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from aesthetic.heads import Head

_COLUMNS = 100  # of a terminal, for `describe`

_SECTIONS = {
    "data": "Data",
    "ratings": "Ratings it was fitted to",
    "verdict": "Verdict",
    "metrics": "How good it is",
    "baselines": "What it was compared with",
    "network": "A network, tried beside it",
    "noise": "The ratings' own noise",
    "sources": "Scales of the sources",
    "calibration": "Calibration",
    "learning_curve": "Learning curve",
    "quantiles": "Quantiles of its scores",
    "thresholds": "Thresholds in use",
    "unit": "Unit",
    "limits": "Limits",
    "source": "Source",
}
_DESCRIBED = [  # in this order
    *("verdict", "metrics", "baselines", "noise", "quantiles", "thresholds", "unit", "limits", "data", "source")
]


def model_card(head: Head) -> str:
    """MODEL_CARD.md, written from what head.json says."""
    card, lines = head.card, []
    if "licence" in card:
        lines += ["---", f"license: {str(card['licence']).lower()}", "---", ""]
    lines += [f"# {head.name}", ""]
    if "about" in card:
        lines += [str(card["about"]), ""]
    lines += [*(f"- {key}: {value}" for key, value in _facts(head).items()), ""]
    for key, title in _SECTIONS.items():
        if key not in card:
            continue
        lines += [f"## {title}", ""]
        value = card[key]
        if isinstance(value, dict):
            lines += ["| | |", "|---|---|"]
            lines += [f"| {k} | {_cell(value[k])} |" for k in sorted(value, key=_by_number)]
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            columns = sorted(set().union(*value))
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in value]
        elif isinstance(value, list):
            lines += [f"- {_cell(v)}" for v in value]
        else:
            lines.append(_cell(value))
        lines.append("")
    use = f'scores = load_head("{head.name}")(vectors)  # or this folder\'s path; (n, {head.space.dim}) -> (n,)'
    lines += ["## Use", "", "    from aesthetic import load_head", f"    {use}", ""]
    return "\n".join(lines)


def describe(head: Head) -> str:
    """What the model card says, as plain text for a terminal; what a good card has and this one lacks is said too.

    >>> describe(load_head("laion-v2")).splitlines()[0]
    'laion-v2'
    """
    missing = {
        "metrics": "not measured, as far as its card says: look at its best and worst images before you trust it",
        "quantiles": "not known: rules of the form top(COLUMN, 0.1) need none",
    }
    lines = [head.name, *_wrapped(str(head.card.get("about", "")), ""), ""]
    for key, fact in _facts(head).items():
        lines += _wrapped(fact.replace("`", ""), "", f"{key:10}")
    for key in _DESCRIBED:
        if (value := head.card.get(key, missing.get(key))) is None:
            continue
        lines += ["", _SECTIONS[key]]
        if isinstance(value, dict):
            width = min(24, max(map(len, value), default=0)) + 2
            # what was measured with an interval goes first
            for name in sorted(value, key=lambda n: (not isinstance(value[n], dict), _by_number(n))):
                lines += _wrapped(_cell(value[name]), "  ", f"{name:{width}}")
        else:
            for item in value if isinstance(value, list) else [value]:
                lines += _wrapped(_cell(item), "  ", "- " if isinstance(value, list) else "")
    return "\n".join(lines)


def _facts(head: Head) -> dict[str, str]:
    kind = "affine" if head.affine else "ReLU network " + "-".join(str(len(b)) for _, b in head.layers)
    kind += "" if head.link == "identity" else f", then a {head.link}"
    clipped = " (not clipped)" if head.link == "identity" else ""
    norm = "unit norm" if head.space.norm == "l2" else f"norm {head.space.norm}"
    declared = " (declared, no probes)" if head.space.probes is None else ""
    facts = {
        "scores": f"{head.task}, on a scale of {head.scale[0]:g} to {head.scale[1]:g}{clipped}",
        "reads": f"vectors of `{head.space.encoder}`, {head.space.dim} numbers, {norm}",
        "space": f"`{head.space.fingerprint}`{declared}",
        "kind": kind,
    }
    return facts | ({"licence": str(head.card["licence"])} if "licence" in head.card else {})


def _wrapped(text: str, indent: str, label: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=indent + label,
        subsequent_indent=indent + " " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _by_number(key: str) -> tuple[float, str]:
    """Orders "10%" after "5%", and words before both; head.json sorts keys as text."""
    number = re.search(r"\d+(\.\d+)?", key)
    return (float(number[0]) if number else -1.0, key)


def _cell(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
        interval = "" if value["low"] is None else f" [{_cell(value['low'])}, {_cell(value['high'])}]"
        return _cell(value["value"]) + interval
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(value[k])}" for k in sorted(value, key=_by_number))
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return str(value)
