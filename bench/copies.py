"""Which planted copies each mode of `near-duplicates` finds, and what it takes for a copy; beside other tools.

    python -m bench.copies PHOTOGRAPHS                          300 photographs, each kind of copy: half an hour
    python -m bench.copies PHOTOGRAPHS --kinds grey mirrored    only these; results add up in WORK/results.json
    python -m bench.copies PHOTOGRAPHS --imagededup PYTHON --fastdup PYTHON     interpreters that have these

Each kind has a folder of its own, which holds each photograph and one copy of it, and is curated and annotated by
`tastemaker` as anybody's would be. "together" is all photographs and all copies in one folder. Photographs whose names
differ in their last digits only are of one theme, and the trap: different images of one thing. "alike" and "chains" are
images that must not be found, or not all as one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.planted import BETWEEN, KINDS, alike, chain, plant
from curate.layout import Data
from curate.store.ownership import open_data
from train.evaluate.figures import share

MODES = {
    "equal bytes": "{use: near-duplicates}",
    "phash 4": "{use: near-duplicates, phash: 4}",
    "phash 8": "{use: near-duplicates, phash: 8}",
    "phash 8, pdq 60": "{use: near-duplicates, phash: 8, pdq: 60}",
    "phash 12, pdq 70": "{use: near-duplicates, phash: 12, pdq: 70}",
    "cosine 0.95": "{use: near-duplicates, cosine: 0.95}",
    "cosine 0.90": "{use: near-duplicates, cosine: 0.9}",
    "cosine 0.8, cosine_pdq 90": "{use: near-duplicates, cosine: 0.8, cosine_pdq: 90}",
    "phash 8, cosine 0.95": "{use: near-duplicates, phash: 8, cosine: 0.95}",
    "the same, mirror": "{use: near-duplicates, phash: 8, cosine: 0.95, mirror: true}",
    "widest": "{use: near-duplicates, phash: 12, pdq: 70, cosine: 0.8, cosine_pdq: 90, mirror: true}",
}
"""What is shown of a mode -> its spec."""

RECIPE = """\
images: {size: 512, mode: keep_ratio, only_if_bigger: true, quality: 95}
embed: {encoder: bundled}
columns: {pdq: {use: pdq, mirror: true}}
select: {name: all, rules: {}}
"""
TOGETHER, ALIKE, CHAINS = "together", "alike", "chains"

Found = list[set[str]]
"""Groups of file names; a peer's pairs are groups of two."""


def main() -> None:
    """Plant, curate, annotate, compare; print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, metavar="PHOTOGRAPHS", help="a folder of .jpg")
    parser.add_argument("--work", type=Path, default=Path("bench-copies"), help="where folders and results lie")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS, TOGETHER, ALIKE, CHAINS])
    parser.add_argument("--imagededup", metavar="PYTHON", help="a Python that has imagededup")
    parser.add_argument("--fastdup", metavar="PYTHON", help="a Python that has fastdup")
    asked = parser.parse_args()
    files = sorted(asked.photographs.glob("*.jpg"))
    files = [files[i * len(files) // asked.count] for i in range(min(asked.count, len(files)))]
    results = asked.work / "results.json"
    for kind in asked.kinds:
        folder = asked.work / re.sub(r"\W+", "-", kind)
        if not (folder / "images").exists():
            _make(kind, files, folder / "making")
            (folder / "making").rename(folder / "images")
        data = curated(folder)
        rows = data.ledger.df().sort_values("key")
        found = {mode: groups(rows, _column(mode)) for mode in MODES}
        if kind == CHAINS:
            result: dict[str, Any] = {mode: chained(data, rows, mode, _column(mode)) for mode in MODES}
        else:
            found |= peers(folder, data, rows, asked)
            score = kept_apart if kind == ALIKE else compared
            result = {who: score(where, rows["url"].tolist()) for who, where in found.items()}
        known = json.loads(results.read_text()) if results.exists() else {}
        results.write_text(json.dumps(known | {kind: result}, indent=1))
        print(kind, json.dumps(result), flush=True)
    print("\n" + tables(json.loads(results.read_text())))


def _make(kind: str, files: Sequence[Path], folder: Path) -> None:
    if kind == ALIKE:
        alike(folder)
    elif kind == CHAINS:
        chain(files[::30], folder)
    else:
        plant(files, folder, KINDS if kind == TOGETHER else [kind])


def curated(folder: Path) -> Data:
    """A folder's images, curated and annotated by the command line: what it has done before it does not do again."""
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "pipelines.cli"]
    curate = ["curate", str(folder / "images"), "--out", str(folder / "data"), "--recipe", str(folder / "recipe.yaml")]
    if not (folder / "data" / "selected").exists():
        subprocess.run([*command, *curate], check=True, stdout=subprocess.DEVNULL)
    specs = [f"{_column(mode)}={spec}" for mode, spec in MODES.items()]
    subprocess.run([*command, "annotate", str(folder / "data"), *specs], check=True, stdout=subprocess.DEVNULL)
    return open_data(folder / "data")


def _column(mode: str) -> str:
    return "m_" + re.sub(r"\W+", "_", mode)


def groups(rows: pd.DataFrame, column: str) -> Found:
    """The files of each group."""
    return [set(names) for _, names in rows[rows[column].notna()].groupby(column)["url"]]


def peers(folder: Path, data: Data, rows: pd.DataFrame, asked: argparse.Namespace) -> dict[str, Found]:
    """What others find in the same images; and faiss, used plainly on the same vectors."""
    import faiss

    vectors = np.concatenate([np.load(data.image_vectors(s.shard)) for s in data.plan.shards]).astype(np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    limits, _, near = index.range_search(vectors, 0.95)
    names = rows["url"].tolist()
    of = np.repeat(np.arange(len(vectors)), limits[1:].astype(np.int64) - limits[:-1].astype(np.int64))
    found = {"faiss IndexFlatIP, 0.95": [{names[a], names[b]} for a, b in zip(of, near, strict=True) if a < b]}
    for tool in ("imagededup", "fastdup"):
        python, out = getattr(asked, tool), folder / f"{tool}.json"
        if python:
            if not out.exists():
                script = str(Path(__file__).with_name("copies_peer.py"))
                command = [python, script, tool, str(folder / "images"), str(out)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found |= {who: [set(pair) for pair in pairs] for who, pairs in json.loads(out.read_text()).items()}
    return found


def photograph(name: str) -> str:
    """That of which a file is a copy."""
    return Path(name).stem.split(BETWEEN)[0]


def theme(name: str) -> str:
    return photograph(name).rstrip("0123456789")


def compared(found: Found, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """recall: copies that lie in a group (or a pair) with their photograph, of all.    precision: pairs of files in one
    group that are of one photograph, of all pairs in one group.    trap: pairs of photographs of one theme that lie in
    one group, of all such pairs."""
    pairs = {frozenset(p) for group in found for p in combinations(sorted(group), 2)}
    right = sum(len({photograph(n) for n in pair}) == 1 for pair in pairs)
    own = {photograph(n): n for n in names if BETWEEN not in n}
    copies = [n for n in names if BETWEEN in n]
    themes = defaultdict(list)
    for name in own.values():
        themes[theme(name)].append(name)
    trap = [frozenset(p) for members in themes.values() for p in combinations(members, 2)]
    return {
        "recall": (sum(frozenset((n, own[photograph(n)])) in pairs for n in copies), len(copies)),
        "precision": (right, len(pairs)),
        "trap": (sum(p in pairs for p in trap), len(trap)),
    }


def kept_apart(found: Found, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of each class of look-alikes, how many images lie in a group, of all."""
    grouped, counts = set[str]().union(*found), defaultdict[str, list[int]](lambda: [0, 0])
    for name in names:
        counts[photograph(name)][0] += name in grouped
        counts[photograph(name)][1] += 1
    return {name: (hits, n) for name, (hits, n) in counts.items()}


def chained(data: Data, rows: pd.DataFrame, mode: str, column: str) -> dict[str, int]:
    """Groups of the views, the size of the largest, and how many groups lack a member that all others are near."""
    asked = {what: float(value) for what, value in re.findall(r"(\w+): ([\d.]+)", MODES[mode])}
    vectors = np.concatenate([np.load(data.image_vectors(s.shard)) for s in data.plan.shards]).astype(np.float64)
    bits = {}
    for own, mirrored in (("phash", "pdq_mirror_phash"), ("pdq_hash", "pdq_mirror_hash")):
        here, there = (np.array([list(bytes.fromhex(h)) for h in rows[c]], np.uint8) for c in (own, mirrored))
        bits[own] = np.bitwise_count(here[:, None] ^ here[None]).sum(-1, dtype=np.int64)
        if "mirror: true" in MODES[mode]:
            bits[own] = np.minimum(bits[own], np.bitwise_count(here[:, None] ^ there[None]).sum(-1, dtype=np.int64))
    near = np.eye(len(rows), dtype=bool)
    if "cosine" in asked:
        near |= (vectors @ vectors.T >= asked["cosine"] - 1e-3) & (bits["pdq_hash"] <= asked.get("cosine_pdq", 256))
    if "phash" in asked:
        near |= (bits["phash"] <= asked["phash"]) & (bits["pdq_hash"] <= asked.get("pdq", 31))
    members = [np.flatnonzero(rows[column] == group) for group in rows[column].dropna().unique()]
    lacking = sum(not near[np.ix_(m, m)].all(1).any() for m in members)
    return {
        "images": len(rows),
        "groups": len(members),
        "largest": max(map(len, members), default=0),
        "no centre": lacking,
    }


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: recall by kind, and what was taken for copies, of our modes, of others; precision by kind; chains."""
    kinds = [kind for kind in [*KINDS, TOGETHER] if kind in results]
    found = list(results[kinds[0]]) if kinds else []
    sides = [[w for w in found if w in MODES], [w for w in found if w not in MODES]]
    parts = []
    for who in filter(None, sides):
        parts += [_line(["recall, %", *who]), "|---" * (len(who) + 1) + "|"]
        parts += [_line([kind, *(_share(*results[kind][w]["recall"]) for w in who)]) for kind in kinds]
        single = [kind for kind in kinds if kind != TOGETHER]
        pooled = [[sum(results[k][w]["precision"][side] for k in single) for side in (0, 1)] for w in who]
        parts.append(_line(["precision, %, of all kinds", *(_share(*p) for p in pooled)]))
        traps = [max(results[k][w]["trap"] for k in kinds) for w in who]
        parts.append(_line(["pairs of the trap taken for copies", *(f"{hits} of {n}" for hits, n in traps)]))
        for kind in next(iter(results[ALIKE].values())) if ALIKE in results else ():
            counts = [results[ALIKE][w][kind] for w in who]
            parts.append(_line([f"{kind}: in a group", *(f"{hits} of {n}" for hits, n in counts)]))
        parts.append("")
    for who in filter(None, sides):
        parts += [_line(["precision, %", *who]), "|---" * (len(who) + 1) + "|"]
        parts += [_line([kind, *(_share(*results[kind][w]["precision"]) for w in who)]) for kind in kinds] + [""]
    if CHAINS in results:
        modes = results[CHAINS]
        parts += [_line([CHAINS, *modes]), "|---" * (len(modes) + 1) + "|"]
        for figure in next(iter(modes.values())):
            parts.append(_line([figure, *(str(mode[figure]) for mode in modes.values())]))
    return "\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _share(hits: int, n: int) -> str:
    """A share with Wilson's interval, in per cent."""
    if n == 0:
        return "-"
    found = share(np.repeat([1, 0], [hits, n - hits]))
    value, low, high = (100 * (found[k] or 0.0) for k in ("value", "low", "high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


if __name__ == "__main__":
    main()
