"""Fitting and scoring, beside scikit-learn and beside plainly reading the file.

    python -m bench.fit                         250,000 x 768: ours and scikit-learn's, and ours on 4 Ray workers
    python -m bench.fit --score                 2,000,000 x 768 fp16 from a .npy file, beside reading it

Each contender runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DIM = 768
PENALTY = 1e-4


def main() -> None:
    """Make the data, run each contender, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contender:
        CONTENDERS[asked.contender](asked.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        if asked.score:
            _score(Path(folder), asked.rows or 2_000_000, asked.rounds)
        else:
            _fit(Path(folder), asked.rows or 250_000, asked.rounds)


def _run(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.fit", "--contender", name, "--folder", str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def _say(began: float, cpu: float, **more: float) -> None:
    """What a contender prints last: its seconds, its CPU seconds and its peak memory."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    taken = used.ru_utime + used.ru_stime - cpu
    print(json.dumps({"s": time.perf_counter() - began, "cpu": taken, "mb": used.ru_maxrss / 1024, **more}))


def _began() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


# Fitting -------------------------------------------------------------------------------------------------------------


def _fit(folder: Path, rows: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, DIM), np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = x @ rng.standard_normal(DIM) + 0.03 * rng.standard_normal(rows)
    np.save(folder / "x.npy", x.astype(np.float16))
    np.save(folder / "y.npy", y)
    print(f"ridge on {rows:,} x {DIM}, fp16 vectors; median of {rounds}")
    answers = {}
    for name in (
        "scikit-learn, one penalty",
        "ours, one penalty",
        "ours, 33 penalties in 5 folds",
        "the same on 4 Ray workers",
    ):
        runs = [_run(name, folder) for _ in range(rounds)]
        found = {k: float(np.median([r[k] for r in runs])) for k in ("s", "cpu", "mb")}
        print(f"{name:32} {found['s']:7.1f} s  {found['cpu']:7.1f} s of CPU  peak {found['mb']:,.0f} MB")
        answers[name] = np.load(folder / "answer.npy")
    ours, theirs = answers["ours, one penalty"], answers["scikit-learn, one penalty"]
    print(f"largest difference of a weight, of the largest: {np.abs(ours - theirs).max() / np.abs(theirs).max():.1g}")
    one, four = answers["ours, 33 penalties in 5 folds"], answers["the same on 4 Ray workers"]
    print(f"on 4 Ray workers the bits are {'the same' if np.array_equal(one, four) else 'OTHERS'}")


def _sklearn(folder: Path) -> None:
    from sklearn.linear_model import Ridge

    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    began, cpu = _began()
    model = Ridge(alpha=PENALTY * len(y), solver="cholesky").fit(x.astype(np.float64), y)
    _say(began, cpu)
    np.save(folder / "answer.npy", np.append(model.coef_, model.intercept_))


def _ours_once(folder: Path) -> None:
    from aesthetic.ridge import Ridge

    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    began, cpu = _began()
    weights, constant = Ridge(x, y, np.ones(len(y)), np.zeros(len(y), int)).path(frozenset({0})).solution(PENALTY)
    _say(began, cpu)
    np.save(folder / "answer.npy", np.append(weights, constant))


def _ours(folder: Path) -> None:
    from aesthetic.ridge import Ridge

    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    began, cpu = _began()
    ridge = Ridge(x, y, np.ones(len(y)), np.arange(len(y)) % 5)
    fitted = ridge.fit(ridge.folds)
    _say(began, cpu)
    np.save(folder / "answer.npy", np.append(fitted.weights, fitted.constant))


def _ours_ray(folder: Path) -> None:
    from functools import partial

    import ray

    from aesthetic.ridge import Ridge
    from pipelines.runtime.cluster import ray_map

    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    began, cpu = _began()
    ridge = Ridge(x, y, np.ones(len(y)), np.arange(len(y)) % 5, partial(ray_map, "auto"))
    fitted = ridge.fit(ridge.folds)
    _say(began, cpu)
    np.save(folder / "answer.npy", np.append(fitted.weights, fitted.constant))


# Scoring -------------------------------------------------------------------------------------------------------------


def _score(folder: Path, rows: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    with open(folder / "x.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "<f2", "fortran_order": False, "shape": (rows, DIM)})
        for start in range(0, rows, 50_000):
            x = rng.standard_normal((min(50_000, rows - start), DIM), np.float32)
            f.write((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).tobytes())
    print(f"{rows:,} x {DIM} fp16, {rows * DIM * 2 / 1e9:.1f} GB in the page cache; rounds in turn")
    for i in range(rounds):
        read, scored = _run("reading", folder), _run("scoring", folder)
        print(
            f"round {i + 1}: reading {read['s']:.2f} s, scoring {scored['s']:.2f} s "
            f"({scored['cpu']:.2f} s of CPU, peak {scored['mb']:,.0f} MB): {read['s'] / scored['s']:.2f} of its speed"
        )


def _reading(folder: Path) -> None:
    buffer = bytearray(1 << 24)
    began, cpu = _began()
    with open(folder / "x.npy", "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass
    _say(began, cpu)


def _scoring(folder: Path) -> None:
    from aesthetic.heads import Head
    from aesthetic.space import Space

    weight = np.random.default_rng(1).standard_normal((1, DIM)).astype(np.float32)
    space = Space(encoder="bench", dim=DIM)
    head = Head(name="bench", task="aesthetic", space=space, scale=(0, 10), layers=((weight, np.ones(1, np.float32)),))
    head(np.load(folder / "x.npy", mmap_mode="r")[:10])
    began, cpu = _began()
    head(np.load(folder / "x.npy", mmap_mode="r"))
    _say(began, cpu)


CONTENDERS = {
    "scikit-learn, one penalty": _sklearn,
    "ours, one penalty": _ours_once,
    "ours, 33 penalties in 5 folds": _ours,
    "the same on 4 Ray workers": _ours_ray,
    "reading": _reading,
    "scoring": _scoring,
}


if __name__ == "__main__":
    main()
