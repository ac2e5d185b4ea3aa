"""The main job as people start it: the command line in a process of its own, with Ray, against a real server."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_web import SmallWeb, small_web

from curate.ledger.schema import Reason

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def command(*words: str | Path) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "pipelines.cli", *map(str, words)]


def tastemaker(*words: str | Path, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(command(*words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def settings(web: SmallWeb, shard_size: int, *more: str) -> list[str]:
    """The options that reach a server of ours, and others."""
    return [word for s in (*web.settings(shard_size), *more) for word in ("--set", s)]


def rows_of(data: Path) -> list[dict[str, Any]]:
    """The lines of `fetched/`, in the order of the list."""
    return [row for path in sorted((data / "fetched").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallWeb]:
    """40 images and every way to fail, on six hosts; and its list."""
    with small_web(40) as web:
        yield web


# ------------------------------------------------------------------------------------------------------ the whole job


@dataclass
class Done:
    """A run that ended, and what was seen of its processes while it ran."""

    data: Path
    words: list[str]
    code: int
    out: str
    err: str
    listening: set[str] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def done(web: SmallWeb, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The whole job once, watched."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data"
    listed = web.write_list(folder / "list.parquet")
    options = settings(web, 20, "fetch.timeout=2")
    words = ["curate", str(listed), "--out", str(data), "--recipe", "bundled", *options, "--json"]
    listening, commands = set[str](), set[str]()
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        process = subprocess.Popen(command(*words), cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=err)
        deadline = time.monotonic() + 150
        while process.poll() is None:
            assert time.monotonic() < deadline, "the run takes too long"
            for p in psutil.Process(process.pid).children(recursive=True):
                try:
                    commands.add(" ".join(p.cmdline()))
                    sockets = p.net_connections("inet")
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                listening |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
            time.sleep(0.3)
        out.seek(0)
        err.seek(0)
        return Done(data, words, process.returncode, out.read(), err.read(), listening, commands)


def test_every_row_ends_as_it_must(done: Done, web: SmallWeb) -> None:
    assert done.code == 0, done.out + done.err
    rows = rows_of(done.data)
    assert [(r["url"], r["reason"]) for r in rows] == [(w.url, w.reason) for w in web.rows]
    assert len({r["key"] for r in rows}) == len(rows)
    elsewhere = {
        Reason.DENIED,
        Reason.HASH_MISMATCH,
        Reason.CRASHED,
        Reason.BAD_LINE,
        Reason.REJECTED_EARLY,
        Reason.REMOVED,
    }
    assert {r["reason"] for r in rows} - {None} == set(Reason) - elsewhere


def test_the_funnel_adds_up(done: Done, web: SmallWeb) -> None:
    facts = json.loads(done.out.splitlines()[-1])
    assert facts["rows"] == len(web.rows) == sum(facts["funnel"].values())
    assert facts["funnel"]["not_fetched"] == sum(w.reason is not None for w in web.rows)
    assert facts["funnel"]["kept"] == facts["kept"] > 0
    verdicts = Counter(pq.read_table(done.data / "selected" / "bundled.parquet")["verdict"].to_pylist())
    assert {k: v for k, v in facts["funnel"].items() if v} == verdicts
    shown = re.findall(r"^(\w+) +([\d,]+)", done.out, re.M)
    assert {name: int(n) for name, n in shown if name in facts["funnel"]} == facts["funnel"]
    packed = sum(pq.read_metadata(p).num_rows for p in Path(facts["paths"]["shards"]).glob("*.parquet"))
    assert packed == facts["kept"]
    assert Path(facts["paths"]["look"]).stat().st_size > 1000


def test_the_terminal_is_ours_and_rays_words_are_in_a_log(done: Done) -> None:
    assert done.out.startswith("recipe bundled")
    ours = r"starting Ray \.\.\.|fetch  [\d,]+/\d+  .*|embed .*|text  .*|"
    for line in done.err.splitlines():
        assert re.fullmatch(ours, line), f"not one of our lines: {line}"
    assert "fetch  " in done.err and re.search(r"% ok +embed +\d+/\d+ .* \d+ s$", done.err.strip(), re.MULTILINE)
    for word in ("ray::", "raylet", "INFO", "WARNING", "Traceback", "(pid="):
        assert word not in done.out + done.err
    assert (done.data / "logs" / "ray.log").exists()


def test_ray_listens_on_this_machine_only_and_shows_no_dashboard(done: Done) -> None:
    assert any("gcs_server" in c for c in done.commands) and any("raylet" in c for c in done.commands)
    assert done.listening
    for address in done.listening:
        ip = ipaddress.ip_address(address)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        assert ip.is_loopback, f"something listens on {address}"
    for dashboard in [c for c in done.commands if "dashboard.py" in c]:  # Ray starts this process all the same
        assert "--host=127.0.0.1" in dashboard and "--minimal" in dashboard and "--disable-frontend" in dashboard


def test_again_does_nothing(done: Done, web: SmallWeb) -> None:
    asked = web.web.counts().requests.total()
    again = tastemaker(*done.words)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""  # no Ray, no progress
    assert web.web.counts().requests.total() == asked
    assert json.loads(again.stdout.splitlines()[-1]) == json.loads(done.out.splitlines()[-1])


def test_another_size_is_refused_and_nothing_changes(done: Done) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.data.rglob("*.*") if not p.name.startswith(".")}
    refused = tastemaker(*done.words, "--set", "images.size=128", "--set", "fetch.max_bytes=1MB")
    assert refused.returncode == 2
    assert "images.size: 256 there, 128 asked for" in refused.stderr
    assert "fetch.max_bytes: 400000 there, 1000000 asked for" in refused.stderr
    assert "--restart-from fetch" in refused.stderr
    assert before == {p: p.stat().st_mtime_ns for p in done.data.rglob("*.*") if not p.name.startswith(".")}


@pytest.mark.long
def test_a_sample_of_a_bad_list(web: SmallWeb, tmp_path: Path) -> None:
    """Most rows fail: that is said with reasons and hosts. And --limit says what the whole list would be."""
    good = [w for w in web.rows if w.reason is None][:16]
    urls = [w.url for w in good] + [web.web.url(4, f"/no.jpg?{i}") for i in range(64)]
    order = np.random.default_rng(0).permutation(len(urls))
    pq.write_table(pa.table({"url": [urls[i] for i in order]}), tmp_path / "bad.parquet")
    options = settings(web, 5)
    words = ["curate", tmp_path / "bad.parquet", "--out", tmp_path / "data", "--recipe", "everything", *options]
    run = tastemaker(*words, "--limit", "25", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert (facts["rows"], facts["shards"]) == (25, 5)
    failed = facts["funnel"]["not_fetched"]
    assert failed > 13
    assert f"warning: {failed / 25:.0%} of the first 25 rows failed: http_404 {failed}" in run.stderr
    assert f"hosts: 127.1.0.5 {failed}" in run.stderr
    said = r"^whole list: 80 rows, by these 25, which are spread at random over it"
    assert re.search(said, run.stdout, re.M), run.stdout
    whole = facts["whole"]
    assert round(whole["kept"]["value"]) == round((25 - failed) / 25 * 80)
    assert whole["kept"]["low"] <= 16 <= whole["kept"]["high"]  # the truth


# ---------------------------------------------------------------------------------------------------- errors of ours


def start(words: list[str | Path]) -> subprocess.Popen[str]:
    """Start the command line and wait until Ray is being started: all that can be refused before was not."""
    process = subprocess.Popen(
        command(*words), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line == "starting Ray ...\n", line + process.stderr.read()
    return process


@pytest.mark.long
def test_an_error_in_a_worker_ends_the_run_with_its_cause(web: SmallWeb, tmp_path: Path) -> None:
    listed = web.write_list(tmp_path / "list.parquet")
    shutil.copytree(ROOT / "aesthetic" / "shipped" / "bundled-aesthetic", tmp_path / "head")
    options = settings(web, 20, f"columns.aesthetic={tmp_path / 'head'}", "fetch.timeout=1")
    words = ["curate", listed, "--out", tmp_path / "data", "--recipe", "bundled", *options]
    with start(words) as process:
        with open(tmp_path / "head" / "head.safetensors", "r+b") as f:
            f.seek(200)
            f.write(b"damage")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert "head.safetensors" in err and "sha256" in err
    assert "Traceback" not in err and "ray" not in err.lower().replace("starting ray", "")

    # mended, the same command goes on
    shutil.copy(ROOT / "aesthetic" / "shipped" / "bundled-aesthetic" / "head.safetensors", tmp_path / "head")
    again = tastemaker(*words)
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.long
def test_a_folder_that_cannot_be_written_ends_the_run(web: SmallWeb, tmp_path: Path) -> None:
    listed = web.write_list(tmp_path / "list.parquet")
    words = ["curate", listed, "--out", tmp_path / "data", "--recipe", "bundled", *settings(web, 20)]
    with start(words) as process:
        (tmp_path / "data" / "fetched").write_text("in the way")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert re.search(r"^tastemaker: .*data/fetched\S*: (File exists|Not a directory) ", err, re.M), err
    assert "Traceback" not in err and "ray" not in err.lower().replace("starting ray", "")


@pytest.mark.long
def test_a_list_without_a_single_image_keeps_nothing(web: SmallWeb, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{web.web.url(0, '/no.jpg')}?{i},x\n" for i in "abc"))
    words = ["curate", tmp_path / "list.csv", "--out", tmp_path / "data", "--recipe", "bundled", *settings(web, 20)]
    run = tastemaker(*words)
    assert run.returncode == 3, run.stdout + run.stderr
    assert "Traceback" not in run.stderr and "100% of the first 3 rows failed" in run.stderr
    assert re.search(r"^kept +0 ", run.stdout, re.M)


# --------------------------------------------------------------------------------------------------------- open_clip


@pytest.mark.long
def test_an_open_clip_encoder_and_a_head_in_its_space(web: SmallWeb, tmp_path: Path) -> None:
    """The smallest architecture of open_clip's own, random weights from a file, a head fitted to random ratings."""
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-S-32-alt", pretrained=None).state_dict(), tmp_path / "small.pt")
    encoder = f"embed.encoder=open_clip:ViT-S-32-alt/{tmp_path / 'small.pt'}"
    listed, data = web.write_list(tmp_path / "list.parquet"), tmp_path / "data"
    (tmp_path / "mine.yaml").write_text("select: {name: mine, rules: {on_topic: 'top(similarity, 0.5)'}}\n")
    options = ["--recipe", tmp_path / "mine.yaml", *settings(web, 20, encoder, "fetch.timeout=1")]
    run = tastemaker("curate", listed, "--out", data, *options)
    assert run.returncode == 0, run.stdout + run.stderr
    vectors = np.load(data / "embedded" / "img_emb" / "img_emb_00000.npy")
    assert vectors.shape[1] == 256 and np.allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-2)

    keys = [row["key"] for row in rows_of(data) if row["status"] == "success"]
    dice = np.random.default_rng(0)
    ratings = "".join(f"{key},{dice.uniform(1, 7):.2f}\n" for key in keys)
    (tmp_path / "ratings.csv").write_text("key,score\n" + ratings)
    fit = tastemaker("fit", tmp_path / "ratings.csv", "--data", data, "--out", tmp_path / "taste.head")
    assert fit.returncode == 0, fit.stderr

    # the same list with the head in the recipe: only the missing column is computed
    asked = web.web.counts().requests.total()
    stamps = {p: p.stat().st_mtime_ns for p in (data / "embedded").rglob("*.npy")}
    taste = ["--set", f"columns.taste={tmp_path / 'taste.head'}", "--set", "select.rules.nice=top(taste, 0.5)"]
    more = tastemaker("curate", listed, "--out", data, *options, *taste, "--json")
    assert more.returncode == 0, more.stdout + more.stderr
    assert web.web.counts().requests.total() == asked
    assert stamps == {p: p.stat().st_mtime_ns for p in (data / "embedded").rglob("*.npy")}
    scores = pq.read_table(data / "annotated" / "taste" / "00000.parquet")["taste"].to_pylist()
    assert len(scores) == len(vectors) and np.isfinite(scores).all()
    facts = json.loads(more.stdout.splitlines()[-1])
    assert sum(facts["funnel"].values()) == len(web.rows) and facts["kept"] > 0

    wrong = tastemaker("curate", listed, "--out", tmp_path / "other", *options, "--set", "columns.taste=laion-v2")
    assert wrong.returncode == 2 and "laion-v2 reads vectors of open_clip:ViT-L-14-quickgelu/openai" in wrong.stderr
    assert not (tmp_path / "other").exists()
