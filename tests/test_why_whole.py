"""`tastemaker why`: rows are found by key, URL and image, and all that is said of them is true."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_data import SHARD_SIZE, make_data, write_column

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.alike import Match
from curate.ledger.lookup import by_image, by_url
from curate.ledger.schema import RowError, make_key
from curate.ledger.select import SelectConfig, select
from curate.ledger.view import query, tables
from curate.ledger.whole import whole_row
from curate.shards.held import models_of
from curate.shards.tar import read_images
from curate.sources.find import open_folder
from curate.store.files import sha256_file, write_json
from curate.store.objects import ObjectStore
from pipelines.cli import main
from pipelines.commands.why import row_lines
from tests.real_data import IMAGES, SELECTION, image_files


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(make_data(tmp_path / "data"))


def key_of(number: int) -> str:
    return make_key(number // SHARD_SIZE, number % SHARD_SIZE, SHARD_SIZE)


def change_rows(data: Data, shard: int, **columns: Any) -> None:
    """Set values of a fetched shard's rows: column -> {row: value}."""
    path = data.table(shard)
    rows = pq.read_table(path)
    found = rows.to_pylist()
    for name, values in columns.items():
        for row, value in values.items():
            found[row][name] = value
    with atomic(path) as f:
        pq.write_table(pa.Table.from_pylist(found, schema=rows.schema), f)


# -------------------------------------------------------------------------------------------------------------- finding


def test_a_url_is_found_exactly_then_without_its_fragment_then_after_redirects(data: Data) -> None:
    url = "http://example.com/0.jpg"
    change_rows(data, 1, url={0: url, 1: f"{url}#a", 2: f"{url}?q", 3: None}, final_url={5: "http://b.org/x"})
    found = tables(data)

    def keys(asked: str) -> list[str]:
        return [match.key for match in by_url(found, asked)]

    assert keys(url) == [key_of(0), key_of(20)]
    assert keys(f"{url}#a") == [key_of(21)]
    assert keys(f"{url}#b") == [key_of(0), key_of(20), key_of(21)]
    assert keys("http://b.org/x") == [key_of(25)] and keys("http://b.org/x#y") == [key_of(25)]
    assert keys("http://example.com/") == [] and keys("http://example.com/0") == []
    assert {m.by for m in by_url(found, f"{url}#b")} == {"url without its fragment"}


def test_an_image_is_found_by_its_bytes_its_stored_bytes_and_what_it_shows(real_data: Data) -> None:
    found = tables(real_data)
    rows = query(real_data, "select key, sha256 from ledger where status = 'success' order by key")
    by_sha = dict(zip(rows["sha256"], rows["key"], strict=True))
    files = image_files()
    for file in files[::6]:
        key = by_sha[hashlib.sha256(file).hexdigest()]
        assert key in [m.key for m in by_image(real_data, found, file, IMAGES)]
    stored = {key: file for shard in found[0].shards for key, _, file in read_images(real_data.tar(shard))}
    told = 0
    for file in files[:20:4]:
        key = by_sha[hashlib.sha256(file).hexdigest()]
        matches = by_image(real_data, found, stored[key], IMAGES)
        assert key in [m.key for m in matches]
        told += {m.by for m in matches} == {"sha256 of the stored image"}
        with Image.open(io.BytesIO(file)) as image:
            copy = io.BytesIO()
            image.convert("RGB").resize((image.width * 3 // 4, image.height * 3 // 4)).save(copy, "PNG")
        near = by_image(real_data, found, copy.getvalue(), IMAGES)
        assert near[0].near and near[0].key == key and near[0].phash_bits is not None and near[0].phash_bits <= 7
        assert near[0].cosine is not None and near[0].cosine > 0.95
    assert told == 5
    with Image.open(io.BytesIO(files[0])) as image:
        turned = io.BytesIO()
        image.rotate(180).save(turned, "PNG")
    others = by_image(real_data, found, turned.getvalue(), IMAGES)
    assert len(others) == 3 and not any(m.near for m in others)
    with pytest.raises(RowError):
        by_image(real_data, found, b"no image", ImagesConfig())


# -------------------------------------------------------------------------------------------------------- what is known


def test_percentiles_are_those_of_sql(data: Data) -> None:
    rows = query(data, "select key, similarity, laion_v2, bytes, original_width from ledger")
    for number in (1, 8, 24, 25, 29, 59):
        whole = whole_row(data, key_of(number))
        for column in ("similarity", "laion_v2", "bytes", "original_width"):
            own = rows[rows["key"] == key_of(number)][column].item()
            values = rows[column].dropna()
            told = whole.columns[column].percentile if column in whole.columns else None
            if own is None or own != own:
                assert told is None
            else:
                expected = 100 * ((values < own).sum() + (values == own).sum() / 2) / len(values)
                assert told == pytest.approx(expected), (number, column)


def test_each_rule_is_told_whatever_the_verdict(data: Data) -> None:
    rules = {
        "large": "original_width >= 300",
        "best": "top(laion_v2, 0.7)",
        "once": "best_of(phash, -original_width)",
        "first": "first_of(sha256)",
        "similar": "similarity > 0.1",
    }
    select(data, SelectConfig(name="s", rules=rules))
    for name, condition in rules.items():
        select(data, SelectConfig(name=name, rules={name: condition}))
    for number in (0, 3, 10, 24, 28, 33, 46, 59):
        whole = whole_row(data, key_of(number))
        judged = whole.selections["s"]
        assert judged.verdict == whole.row.selections["s"] and not judged.stale
        if number == 3:
            assert judged.verdict == "not_fetched" and whole.can_be_done
            continue
        for state in judged.rules:
            alone = whole.row.selections[state.name] == "kept"
            assert (state.state == "true") == alone, (number, state)
    write_column(data.root, "laion_v2", pa.float32(), lambda n: 9.0)
    assert whole_row(data, key_of(59)).selections["s"].stale == ["annotated/laion_v2"]
    shutil.rmtree(data.root / "annotated" / "laion_v2")
    assert "laion_v2" in whole_row(data, key_of(59)).selections["s"].problem


def test_where_it_lies_and_which_models_saw_it(real_data: Data, tmp_path: Path) -> None:
    """The sample's place is that which train's own reader of packed shards gives it."""
    folder = real_data.packed(SELECTION)
    samples = open_folder(folder)
    places = {str(samples.facts(i)["key"]): i for i in range(len(samples))}
    models = tmp_path / "models"
    manifest = sha256_file(folder / "manifest.json")
    keys = sorted(places)

    def model(name: str, held_out: list[int], digest: str = manifest, place: Path = folder, lacks: str = "") -> None:
        there = sum(samples.locate(i)[0].name != lacks for i in range(len(samples)))
        about = {"folder": str(place), "manifest_sha256": digest, "pictures": there, "missing": [lacks]}
        write_json(models / name / "train.json", {"data": about, "finished": "2026-01-01"})
        write_json(models / name / "data.json", {"held_out": held_out, "unreadable": {str(places[keys[5]]): "x"}})

    model("a", [places[keys[0]], places[keys[3]]])
    model("copied", [], place=tmp_path / "elsewhere")
    model("in part", [0], lacks="00001.tar")  # of which the sample of index 0 is the first of 00000.tar
    model("deep/older", [], digest="0" * 64)
    model("deep/other", [], digest="0" * 64, place=tmp_path / "elsewhere")
    (models / "odd").mkdir()
    (models / "odd" / "train.json").write_text("[]")
    for key in (keys[0], keys[1], keys[3], keys[5]):
        whole = whole_row(real_data, key, models=[models])
        at = whole.packed[SELECTION]
        assert (at.index, at.count) == (places[key], len(samples)) and Path(at.tar).is_file()
        assert [k for k, _, _ in read_images(Path(at.tar)) if k == key]
        uses = {Path(use.model).name: use.use for use in whole.models}
        first = {keys[0]: "held it out", keys[3]: "held it out", keys[5]: "could not read it"}.get(key, "trained on it")
        copied = "could not read it" if key == keys[5] else "trained on it"
        part = uses.pop("in part")
        if Path(at.tar).name == "00001.tar":
            assert part == "its copy of the shards lacked it"
        elif key != keys[5]:  # of which it names another place
            assert part == ("held it out" if at.index == 0 else "trained on it")
        assert uses == {"a": first, "copied": copied, "older": "unknown"}
        tar = real_data.tar(whole.row.shard)
        with open(tar, "rb") as f:
            f.seek(whole.stored.offset)  # type: ignore[union-attr]
            image = f.read(whole.stored.bytes)  # type: ignore[union-attr]
        assert image == next(file for k, _, file in read_images(tar) if k == key)


def test_a_model_that_went_on_from_one_has_seen_what_that_saw(real_data: Data, tmp_path: Path) -> None:
    """By the base that train.json names: through several, from a checkpoint of it, outside the folder that is given."""
    folder = real_data.packed(SELECTION)
    samples, manifest = open_folder(folder), sha256_file(folder / "manifest.json")
    keys = [str(samples.facts(i)["key"]) for i in range(2)]
    models, outside = tmp_path / "models", tmp_path / "outside"

    def model(at: Path, start: Path | str | None, held_out: list[int] | None = None) -> None:
        about = {"folder": str(folder), "manifest_sha256": manifest, "pictures": len(samples)}
        data = about if held_out is not None else {"folder": "/other", "manifest_sha256": "0" * 64}
        write_json(at / "train.json", {"settings": {"from": str(start) if start else None}, "data": data})
        write_json(at / "data.json", {"held_out": held_out or [], "unreadable": {}})

    model(outside / "base", None, [1])
    model(models / "lora", outside / "base")
    model(models / "further", outside / "base" / "checkpoints" / "000010" / "pipeline")
    model(models / "third", models / "lora")
    model(models / "both", outside / "base", [0])
    model(models / "other", "org/name")
    model(models / "round", models / "round")
    uses = {Path(use.model).name: use for use in whole_row(real_data, keys[0], models=[models]).models}
    assert {name: use.use for name, use in uses.items()} == dict.fromkeys(
        ("lora", "further", "third", "both"), "trained on it"
    )
    assert all(f"went on from, {outside / 'base'}" in use.note for use in uses.values())
    uses = {Path(use.model).name: use for use in whole_row(real_data, keys[1], models=[models]).models}
    assert {name: use.use for name, use in uses.items()} == {"both": "trained on it"} and not uses["both"].note

    found = {h.folder.name: h.base for h in models_of(real_data, [models], {SELECTION: manifest})[SELECTION]}
    base = outside / "base"
    assert found == {"lora": base, "further": base, "third": base, "both": None}


def test_copies_and_deny_lists(data: Data, tmp_path: Path) -> None:
    write_column(
        data.root,
        "dup",
        pa.string(),
        lambda n: key_of(n - n % 2 if n % 20 != 4 else n),
        {"annotator": "near-duplicates"},
    )
    select(data, SelectConfig(name="s", rules={"once": "best_of(dup, original_width)"}))
    (group,) = whole_row(data, key_of(22)).copies
    assert (group.group, group.size, group.members) == (key_of(22), 1, [key_of(22)])  # 23 has no image
    (group,) = whole_row(data, key_of(29)).copies
    assert group.members == [key_of(28), key_of(29)]
    assert group.verdicts == {"s": {key_of(28): "once", key_of(29): "kept"}}

    assert whole_row(data, key_of(1)).denied == []
    data.deny_list.write_text(f"http://example.com/1.jpg  # image {key_of(1)}\n")
    (tmp_path / "other.txt").write_text("example.com\n")
    whole = whole_row(data, key_of(1), deny=[str(tmp_path / "other.txt")])
    assert [d.entry for d in whole.denied] == ["http://example.com/1.jpg", ""]
    assert whole_row(data, key_of(2)).denied == []
    sha256 = whole_row(data, key_of(2)).row.download["sha256"]
    data.deny_list.write_text(f"{sha256}\n")
    assert [d.entry for d in whole_row(data, key_of(2)).denied] == [sha256]


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_on_a_folder_that_the_stages_made(real_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    rows = query(real_data, "select key, url, status, caption from ledger order by key")
    for row in rows.iloc[::7].to_dict("records"):
        assert main(["why", str(real_data), row["url"], "--json"]) == 0
        out = capsys.readouterr().out
        facts = json.loads(out.splitlines()[-1])
        (found,) = facts["rows"]
        assert found["row"]["key"] == row["key"] and row["key"] in out.splitlines()[0]
        if row["status"] == "success":
            assert found["row"]["packs"] == {SELECTION: True} and "packed      bundled" in out
            assert "aesthetic" in found["columns"] and "keeps     seen: width > 0" in out
        else:
            assert found["stored"] is None and found["can_be_done"] in out
    assert main(["why", str(real_data), "http://nowhere.example/x"]) == 2
    assert "no row has this URL" in capsys.readouterr().err
    assert main(["why", str(real_data), "99999" + "00"]) == 2 and main(["why", str(real_data), "nothing"]) == 2
    assert main(["why", str(real_data), rows["key"][0], "--models", "/nowhere"]) == 2


def test_text_of_strangers_is_shown_and_does_nothing(data: Data) -> None:
    evil = "a\x1b[2Jb\r\n\x9b31m\u202ec"
    change_rows(data, 0, caption={1: evil}, url={1: f"http://x/{evil}"}, final_url={1: evil}, uid={1: evil})
    change_rows(data, 0, error_message={3: evil}, opt_out={1: evil})
    for number in (1, 3):
        lines = row_lines(whole_row(data, key_of(number)), Match(key=key_of(number), by="url"), True)
        text = "".join(lines)
        assert "\\x1b[2J" in text and "\\u202e" in text
        assert not [c for c in text if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c == "\u202e"]


def test_rows_that_failed_say_what_can_be_done(real_data: Data) -> None:
    rows = query(real_data, "select key, reason from ledger where status <> 'success'")
    assert len(rows) == 4
    for key, reason in rows.itertuples(index=False):
        whole = whole_row(real_data, key)
        assert whole.can_be_done and not whole.stored and not whole.packed, reason
        assert whole.fetched and whole.fetched[0] <= whole.fetched[1]
    with pytest.raises(KeyError):
        whole_row(real_data, "0000099")
    with pytest.raises(UserError):
        tables(Data(real_data.root / "nothing"))


def test_a_row_that_was_removed(real_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Data(shutil.copytree(real_data.root, tmp_path / "data"))
    rows = query(data, "select key, url from ledger where status = 'success' order by key")
    key, url = rows["key"][2], rows["url"][2]
    assert main(["remove", str(data), "--keys", key, "--yes"]) == 0
    capsys.readouterr()
    assert main(["why", str(data), key]) == 0
    out = capsys.readouterr().out
    assert (
        f"{key}  has no image: removed" in out and "removed on 20" in out and "keeps it out" in out and url not in out
    )
    assert main(["why", str(data), url]) == 2
    assert "deny.txt names it: it may have been removed" in capsys.readouterr().err


def test_a_folder_on_a_store(real_data: Data, s3_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Copied to a real S3 server: the same is said there as here."""
    store = ObjectStore(s3_url)
    for file in sorted(p for p in real_data.root.rglob("*") if p.is_file() and not p.name.startswith(".")):
        store.put_file(file, file.relative_to(real_data.root).as_posix())
    rows = query(real_data, "select key, url from ledger where status = 'success' order by key")
    for what in (rows["key"][3], rows["url"][20]):
        assert main(["why", str(real_data), what]) == 0
        here = capsys.readouterr().out
        assert main(["why", s3_url, what]) == 0
        assert capsys.readouterr().out == here.replace(str(real_data), s3_url)
