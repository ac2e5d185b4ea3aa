"""bench.fetch's numbers as people read them."""

from __future__ import annotations

from statistics import median
from typing import Any

NAMES = {
    "one thread": "bare loop, 1 thread",
    "threads": "bare loop, threads",
    "ours": "ours",
    "img2dataset": "img2dataset",
}


def middle(rounds: list[dict[str, Any]], who: str, what: str) -> float:
    return median(found[who][what] for found in rounds)


def ratio(rounds: list[dict[str, Any]], what: str, who: str, over: str) -> float:
    """The median over the rounds of who / over, each within a round."""
    return median(found[who][what] / found[over][what] for found in rounds)


def line(name: str, rounds: list[dict[str, Any]]) -> str:
    cpu = {who: middle(rounds, who, "cpu_ms") for who in NAMES}
    return (
        f"{name:24} ms of CPU: bare {cpu['one thread']:.2f} / {cpu['threads']:.2f}, ours {cpu['ours']:.2f}, "
        f"img2dataset {cpu['img2dataset']:.2f}; img/s: ours {middle(rounds, 'ours', 'per_second'):.0f}, "
        f"img2dataset {middle(rounds, 'img2dataset', 'per_second'):.0f}"
    )


def table(rounds: dict[str, list[dict[str, Any]]], psnr: dict[str, Any]) -> str:
    """Markdown: a line per variant and contender, then the ratios that were promised."""
    lines = [
        "| list | contender | CPU-ms per image | images/s | peak memory, MB | CPU over bare loop | PSNR, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in rounds.items():
        for who, label in NAMES.items():
            quality = (psnr.get(name) or {}).get(who)
            lines.append(
                f"| {name} | {label} | {middle(found, who, 'cpu_ms'):.2f} | {middle(found, who, 'per_second'):.0f} "
                f"| {middle(found, who, 'peak_mb'):.0f} | {ratio(found, 'cpu_ms', who, 'one thread'):.2f} "
                f"| {quality or ''} |"
            )
    lines += [
        "",
        "| list | CPU: ours / bare loop | ours - bare loop, ms | ours / img2dataset | images/s: ours / img2dataset |",
    ]
    lines.append("|---|---|---|---|---|")
    for name, found in rounds.items():
        more = median(f["ours"]["cpu_ms"] - f["one thread"]["cpu_ms"] for f in found)
        lines.append(
            f"| {name} | {ratio(found, 'cpu_ms', 'ours', 'one thread'):.2f} | {more:.2f} "
            f"| {ratio(found, 'cpu_ms', 'ours', 'img2dataset'):.2f} "
            f"| {ratio(found, 'per_second', 'ours', 'img2dataset'):.2f} |"
        )
    return "\n".join(lines)
