"""What a retry works on: the rows that it recovers, and where it recovers none, nothing at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate import verify
from curate.layout import Data
from curate.ledger.select import select
from demo.web import Route
from pipelines.commands.status import status
from pipelines.recipe import Recipe, load_recipe
from tests.small_web import image
from tests.stages import Served, choose, contents, embed_shards, fetch_shards, run_stages, serving

ROOT = Path(__file__).parents[1]


def then(number: int, first: Route, **later: object) -> Route:
    """An image that is answered after another answer."""
    name, data, _ = image(number)
    return Route(body=data, content_type=f"image/{name.rpartition('.')[2]}", first=(first,), **later)  # type: ignore[arg-type]


def files(data: Data) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """Every file of the stages, with when it was written, but for the records of what was fetched."""
    for path in sorted(data.root.rglob("*")):
        stage = path.relative_to(data.root).parts[0]
        ours = stage in ("fetched", "embedded", "annotated", "selected", "shards") and not path.name.startswith(".")
        if path.is_file() and ours and not path.name.endswith("_stats.json"):
            yield str(path.relative_to(data.root)), (path.read_bytes(), path.stat().st_mtime_ns)


def of_all(served: Served) -> Recipe:
    """The recipe without the rules."""
    return load_recipe("bundled", [*served.settings, "select.rules="])


def test_in_vain_it_leaves_all_as_it_was(tmp_path: Path) -> None:
    """Servers that are down say something else each time: a status first, then nothing."""
    down = {
        "/down.jpg": then(40, Route(status=503), drop=True),
        "/busy.jpg": then(41, Route(status=429), status=500),
    }
    with serving(8, down, shard_size=5) as served:
        data, recipe = Data(tmp_path / "data"), of_all(served)
        run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe)
        select(data, replace(recipe.select, name="other", rules={"large": "width > 10"}))
        before, asked = dict(files(data)), served.requests()
        for _ in range(2):
            fetch_shards(data, recipe, retry=True)
            assert embed_shards(data, recipe) == 0
            choose(data, recipe)
        assert dict(files(data)) == before
        assert served.requests() == {**asked, "/down.jpg": 3, "/busy.jpg": 3}
    for shard in range(2):
        retries = data.record(data.fetched_record(shard))["retries"]
        assert [(r["tried"], r["recovered"]) for r in retries] == [(1, [])], "the last in vain stands for all"
    assert not any(verify.verify(data))
    said: list[str] = []
    facts, _ = status(data, said.append)
    assert (facts["may_pass"], facts["tried_in_vain"]) == (2, 2)
    assert all(not selection["stale"] for selection in facts["selected"].values()), facts["selected"]
    assert facts["selected"]["other"]["kept"] == 8


def test_a_failure_that_has_become_final_is_written_down_and_nothing_is_computed(tmp_path: Path) -> None:
    with serving(8, {"/gone.jpg": then(40, Route(status=503), status=404)}, shard_size=20) as served:
        data, recipe = Data(tmp_path / "data"), of_all(served)
        run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe)
        before = dict(files(data))
        fetch_shards(data, recipe, retry=True)
        assert embed_shards(data, recipe) == 0
    rows = pq.read_table(data.table(0)).to_pylist()
    assert [r["reason"] for r in rows if r["status"] != "success"] == ["http_404"]
    now = dict(files(data))
    made = [name for name in before if name.startswith(("embedded/", "annotated/")) and not name.endswith(".json")]
    assert made and all(now[name] == before[name] for name in made if "/dup/" not in name)
    assert choose(data, recipe).not_fetched == {"http_404": 1}


EMBED = """
import sys
from pathlib import Path
from curate.layout import Data
from pipelines.recipe import Recipe, load_recipe
from tests.stages import embed_shards
embed_shards(Data(Path(sys.argv[1])), load_recipe("bundled", sys.argv[2:]))
"""


@pytest.mark.long
def test_killed_while_it_embeds_what_came_back(tmp_path: Path) -> None:
    """At six moments, as soon as another file of the shard is written; the next run goes on, to the same bytes."""
    flaky = {f"/flaky{i}.jpg": then(40 + i, Route(status=503)) for i in range(3)}
    with serving(20, flaky, shard_size=12) as served:
        data = Data(tmp_path / "data")
        settings = [*served.settings, "select.rules="]
        recipe = of_all(served)
        run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe)
        fetch_shards(data, recipe, retry=True)
    whole = Data(tmp_path / "whole")
    shutil.copytree(data.root, whole.root)
    assert embed_shards(whole, recipe) == 3
    expected, killed = contents(whole.root), 0
    for moment in range(6):
        copy = Data(tmp_path / f"killed{moment}")
        shutil.copytree(data.root, copy.root)
        before = dict(files(copy))
        command = [sys.executable, "-c", EMBED, str(copy.root), *settings]
        with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
            while process.poll() is None:
                if sum(changed(copy, name, when) for name, (_, when) in before.items()) > 2 * moment:
                    process.send_signal(signal.SIGKILL)
                    killed += process.wait() == -signal.SIGKILL
                time.sleep(0.002)
        embed_shards(copy, recipe)  # a shard whose vectors were just being written is embedded as a whole
        assert contents(copy.root) == expected
        assert not any(verify.verify(copy))
    assert killed >= 4


def changed(data: Data, name: str, when: int) -> bool:
    try:
        return (data.root / name).stat().st_mtime_ns != when
    except FileNotFoundError:
        return True


@pytest.mark.long
def test_the_command_in_vain_loads_no_model(tmp_path: Path) -> None:
    """With a file of the encoder's cache that can't be read, whoever loaded it would say so."""
    with serving(8, {"/down.jpg": Route(status=503)}, shard_size=5) as served:
        data, recipe = Data(tmp_path / "data"), of_all(served)
        run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe)
        before = dict(files(data))
        command = [sys.executable, "-m", "pipelines.cli", "retry", str(data.root)]
        (tmp_path / "file").write_text("no folder")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TASTEMAKER_CACHE": str(tmp_path / "file")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retry  0 more images" in done.stdout
    assert dict(files(data)) == before
