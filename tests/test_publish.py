"""Publishing: what is sent, what is not, and that who has the list gets the same images."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.ledger.view import query
from curate.publish.publication import licence_id, publish
from curate.publish.sending import RECORD, PublishRequest
from curate.shards.pack import PackConfig, pack
from curate.sources.planner import make_plan
from curate.store.files import sha256_file
from curate.store.objects import ObjectStore
from demo.web import Route, Web
from pipelines.cli import main
from pipelines.commands.publish import recipe_to_publish
from pipelines.recipe import Recipe, load_recipe, parse_recipe, store_recipe
from tests.conftest import ROOT
from tests.real_data import SELECTION
from tests.side_environments import SideEnvironments
from tests.small_data import make_data, write_fetched
from tests.small_web import image
from tests.stages import fetch_shards

DOCUMENTS = {
    "README.md", "DATASHEET.md", "TRAINING-CONTENT.md", "croissant.json", "domains.csv", "recipe.yaml"
}  # fmt: skip


def request(to: Path | str, name: str = SELECTION, **more: Any) -> PublishRequest:
    return PublishRequest(name=name, to=str(to), recipe={}, recipe_text="source: {}\n", **more)


@pytest.fixture
def data(real_data: Data, tmp_path: Path) -> Data:
    """A copy to change."""
    return Data(Path(shutil.copytree(real_data.root, tmp_path / "copy")))


def read(folder: Path) -> dict[str, bytes]:
    """Every file that was published; hidden ones are what was left behind."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_shards_are_published_whole_and_only_once(data: Data, tmp_path: Path) -> None:
    to = tmp_path / "to"
    first = publish(data, request(to))
    there = read(to)
    record = json.loads(there[RECORD])
    packed = {p.name for p in data.packed(SELECTION).iterdir() if p.is_file()}
    assert there.keys() >= packed | DOCUMENTS | {RECORD}
    assert record["complete"] and record["files"].keys() == there.keys() - {RECORD} == {*first["sent"]}
    assert all(sha256_file(to / name) == facts["sha256"] for name, facts in record["files"].items())
    manifest = json.loads(there["manifest.json"])  # names the card that lies there, not the one of the pack
    assert {file: facts["sha256"] for file, facts in manifest["outputs"].items()} == {
        file: sha256_file(to / file.removeprefix(f"shards/{SELECTION}/")) for file in manifest["outputs"]
    }
    assert data.root.as_posix().encode() not in b"".join(b for n, b in there.items() if not n.endswith(".tar"))

    again = publish(data, request(to))
    assert again["sent"] == [] and again["images_added"] == again["images_gone"] == 0
    assert read(to) == there


def test_what_changed_is_sent_and_what_went_is_removed(data: Data, tmp_path: Path) -> None:
    to = tmp_path / "to"
    publish(data, request(to))
    before = read(to)
    kept = select(data, SelectConfig(name=SELECTION, rules={"large": "width > 0 and key < '0000100'"})).kept
    pack(data, SELECTION, PackConfig(shard_size=1000))
    dry = publish(data, request(to), dry_run=True)
    assert read(to) == before
    done = publish(data, request(to))
    assert (done["sent"], done["deleted"]) == (dry["sent"], dry["deleted"])
    tars = {name for name in before if name.endswith(".tar")}
    assert {n for n in done["deleted"] if n.endswith(".tar")} == tars - {"00000.tar"} and len(tars) > 1
    assert done["images_gone"] == 36 - kept and done["images_added"] == 0
    assert read(to).keys() == {*json.loads((to / RECORD).read_text())["files"], RECORD}


def test_what_is_removed_is_named_where_it_was_published(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A selection without packed shards, too; keys that no place has any more are removed."""

    def make(name: str, rule: str) -> dict[str, Any]:
        select(data, SelectConfig(name=name, rules={"one": rule}))
        return publish(data, request(tmp_path / name, name, list_only=True))

    for name, rule in {"s": "width > 0", "t": "key < '0000100'", "u": "width > 0"}.items():
        make(name, rule)
    keys = data.root / "published"
    assert len([*keys.glob("keys-*")]) == 2  # s and u keep the same
    assert make("u", "key < '0000100'")["images_gone"] > 0 and len([*keys.glob("keys-*")]) == 2
    make("s", "key >= '0000100'")
    assert len([*keys.glob("keys-*")]) == 2
    key = query(data, "SELECT key FROM ledger WHERE status = 'success' ORDER BY key").key[0]
    assert main(["remove", str(data), "--keys", key, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert {n for n in "stu" if f"published {tmp_path / n} holds them still" in said} == {"t", "u"}


def test_progress_is_of_what_is_to_be_sent(data: Data, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = publish(data, request(tmp_path / "to"), progress=lambda _, sent, whole: seen.append((sent, whole)))
    packed = sum(f.stat().st_size for f in data.packed(SELECTION).rglob("*") if f.is_file())
    assert all(abs(whole - packed) < 0.5 * packed for _, whole in seen[:3]) and sorted(seen) == seen
    assert seen[-1] == (first["bytes"], first["bytes"]) and len(seen) == first["files"]
    seen.clear()
    publish(data, request(tmp_path / "to"), progress=lambda _, sent, whole: seen.append((sent, whole)))
    assert seen[-1] == (0, 0)


def test_numbers_are_the_ledgers(data: Data, tmp_path: Path) -> None:
    publish(data, request(tmp_path / "to", list_only=True, license="CC-BY-4.0"))
    there = read(tmp_path / "to")
    rows = pq.read_table(tmp_path / "to" / "list")
    truth = query(data, "SELECT url, sha256, phash, aesthetic, bytes FROM ledger WHERE status = 'success' ORDER BY key")
    for column in ("url", "sha256", "phash", "aesthetic"):
        assert rows[column].to_pylist() == truth[column].tolist()
    assert {"uid", "WIDTH", "similarity", "open_nsfw", "original_width"} <= {*rows.column_names}
    assert there["domains.csv"].decode().splitlines()[1].startswith(f'"127.1.0.1",36,{truth.bytes.sum()},1')
    head = yaml.safe_load(there["README.md"].decode().split("---\n")[1])
    assert head["license"] == "cc-by-4.0" and head["size_categories"] == ["n<1K"]
    assert head["configs"][0]["data_files"][0]["path"] == "list/*.parquet"
    croissant = json.loads(there["croissant.json"])
    assert {f["source"]["extract"]["column"] for f in croissant["recordSet"][0]["field"]} == {*rows.column_names}
    assert "Image: less than 1 million (36 images," in there["TRAINING-CONTENT.md"].decode()
    assert not any(name.endswith(".tar") for name in there)


def test_licences_as_the_hub_names_them() -> None:
    named = {"CC-BY-NC-SA-4.0": "cc-by-nc-sa-4.0", "ODbL-1.0": "odbl", "mit": "mit", "CC-BY-9": None, "My own": None}
    assert {name: licence_id(name) for name in named} == named


def _routes(changed: Mapping[int, int]) -> dict[str | tuple[int, str], Route]:
    """Twelve images; `changed` serves another one in the place of a number."""
    routes: dict[str | tuple[int, str], Route] = {}
    for number in range(12):
        name, _, _ = image(number)
        routes[f"/{name}"] = Route(body=image(changed.get(number, number))[1])
    return routes


def _curate(listed: Path, data: Data, recipe: Recipe) -> None:
    make_plan(str(listed), data, recipe.source)
    store_recipe(data, recipe)
    fetch_shards(data, recipe)
    select(data, recipe.select)


def _kept(data: Data) -> dict[str, str]:
    rows = query(data, "SELECT url, sha256 FROM ledger SEMI JOIN verdicts v ON v.key = ledger.key AND verdict = 'kept'")
    return dict(zip(rows.url, rows.sha256, strict=True))


def test_who_has_the_list_gets_the_same_selection(tmp_path: Path) -> None:
    settings = ["source.shard_size=5", "fetch.retries=0", "images.size=64"]
    with Web(_routes({}), hosts=3) as web:
        urls = [web.url(i, f"/{image(i)[0]}") for i in range(12)]
        (tmp_path / "list.tsv").write_text(
            "url\tcaption\n" + "".join(f"{u}\tpicture {i}\n" for i, u in enumerate(urls))
        )
        allow = f'fetch.allow=["127.0.0.0/8:{web.port}"]'
        recipe = replace(load_recipe("bundled", [*settings, allow]), columns={})
        recipe = replace(recipe, select=SelectConfig(name="mine", rules={"best": "top(bytes, 0.5)"}))
        mine = Data(tmp_path / "mine")
        _curate(tmp_path / "list.tsv", mine, recipe)
        chosen = _kept(mine)
        assert 0 < len(chosen) < 12
        text = recipe_to_publish(mine, recipe)
        publish(mine, replace(request(tmp_path / "to", "mine", list_only=True), recipe_text=text))
        published = (tmp_path / "to" / "recipe.yaml").read_text()
        assert "127.0.0.0" not in published and "best: top(bytes, 0.5)" in published

        theirs = Data(tmp_path / "theirs")
        _curate(tmp_path / "to" / "list", theirs, parse_recipe(published, [allow]))
        assert _kept(theirs) == chosen
    number = next(i for i, url in enumerate(urls) if url in chosen)
    with Web(_routes({number: (number + 1) % 12}), hosts=3, port=web.port):
        later = Data(tmp_path / "later")
        _curate(tmp_path / "to" / "list", later, parse_recipe(published, [allow]))
        assert _kept(later) == {url: sha for url, sha in chosen.items() if url != urls[number]}
        assert query(later, "SELECT reason FROM ledger WHERE status <> 'success'").reason.tolist() == ["hash_mismatch"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from curate.layout import Data
from curate.publish.publication import licence_id, publish
from tests.test_publish import request
left = int(sys.argv[3])
def progress(name, sent, whole):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
publish(Data(Path(sys.argv[1])), request(sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize("files", [pytest.param(2, marks=pytest.mark.long), 9])
def test_killed_and_again(data: Data, tmp_path: Path, files: int) -> None:
    publish(data, request(tmp_path / "whole"))
    to = tmp_path / "to"
    command = [sys.executable, "-c", _KILLED, str(data.root), str(to), str(files)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert json.loads((to / RECORD).read_text())["complete"] is False
    again = publish(data, request(to))
    assert len(again["sent"]) == again["files"] - files  # what lies there is known by its bytes
    assert read(to) == read(tmp_path / "whole")


def test_to_an_object_store(data: Data, tmp_path: Path, s3_url: str) -> None:
    publish(data, request(tmp_path / "whole"))
    first = publish(data, request(s3_url))
    names = [o.name for o in ObjectStore(s3_url).list()]
    whole = read(tmp_path / "whole")
    assert {n: (ObjectStore(s3_url).get(n) or [b""])[0] for n in names} == whole
    assert {*first["sent"]} == whole.keys() - {RECORD}
    assert publish(data, request(s3_url))["sent"] == []


def test_refused(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = Data(make_data(tmp_path / "small"))
    select(small, SelectConfig(name="s", rules={"wide": "width > 16"}))
    with pytest.raises(UserError, match=r"no packed shards of s. `tastemaker pack .* --name s`"):
        publish(small, request(tmp_path / "to", "s"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis.tex, which was not published"):
        publish(small, request(tmp_path / "theirs", "s", list_only=True))
    publish(small, request(tmp_path / "to", "s", list_only=True))
    select(small, SelectConfig(name="other", rules={"wide": "width > 16"}))
    with pytest.raises(UserError, match="holds the published dataset s"):
        publish(small, request(tmp_path / "to", "other", list_only=True))
    write_fetched(small.root, 1, salt="!")
    with pytest.raises(UserError, match=r"`tastemaker select .* --name s` makes it anew"):
        publish(Data(small.root), request(tmp_path / "to", "s", list_only=True))

    select(data, SelectConfig(name=SELECTION, rules={"seen": "width > 1"}))
    with pytest.raises(UserError, match=r"older than the selection. `tastemaker pack"):
        publish(data, request(tmp_path / "to2"))
    url = query(data, "SELECT url FROM ledger WHERE status = 'success' LIMIT 1").url[0]
    data.deny_list.write_text(f"{url}\n")
    assert main(["publish", str(data), "--name", SELECTION, "--list-only", "--to", str(tmp_path / "to3")]) == 2
    assert "names what" in capsys.readouterr().err and not (tmp_path / "to3").exists()


MLCROISSANT = "mlcroissant==1.1.1 etils jsonpath-rw ply decorator rdflib absl-py pyparsing"
"""What loads records, and what of its requirements is not here: its stubs of pandas would change what mypy says."""


def read_croissant(side: SideEnvironments, folder: Path, home: Path) -> dict[str, Any]:
    """What mlcroissant makes of a folder. home: a new one, as it finds again what it extracted, by the tar's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home))
        return side("read_croissant.py", str(folder), MLCROISSANT)


@pytest.mark.long
@pytest.mark.parametrize("form", ["list", "shards", "packed", "packed, some removed"])
def test_mlcroissant_loads_the_records(data: Data, tmp_path: Path, side: SideEnvironments, form: str) -> None:
    """Of what is published, and of packed shards as they lie in the data folder."""
    folder = tmp_path / "to"
    if form in ("list", "shards"):
        publish(data, request(folder, list_only=form == "list"))
    else:
        folder = data.packed(SELECTION)
    if form.endswith("removed"):
        keys = query(data, "SELECT key FROM ledger WHERE status = 'success' ORDER BY key").key
        assert main(["remove", str(data), "--keys", *keys[[0, 7]]]) == 0
    seen = read_croissant(side, folder, tmp_path)
    truth = query(data, "SELECT key, url, sha256, width, height, caption FROM ledger WHERE status = 'success'")
    assert seen["errors"] == [] and len(truth) == (34 if form.endswith("removed") else 36)
    assert sorted(seen["rows"]) == sorted(truth[["key", "url", "sha256"]].values.tolist())
    sizes = truth.sort_values("key")[["key", "width", "height"]].values.tolist()
    assert [s[:3] for s in sorted(seen["samples"])] == ([] if form == "list" else sizes)
    captions = {key: caption for key, *_, caption in seen["samples"]}
    told = truth[truth.caption.notna()]
    assert form == "list" or {k: captions[k] for k in told.key} == dict(zip(told.key, told.caption, strict=True))
