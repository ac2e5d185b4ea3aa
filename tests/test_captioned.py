"""Folders and tars of images as others leave them: curate and train read the same images, keys and captions."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.schema import RowError
from curate.ledger.select import SelectConfig, select
from curate.shards.pack import PackConfig, pack
from curate.sources.dataset import MapDataset
from curate.sources.find import open_folder
from curate.sources.image_tables import parquet_images
from curate.sources.packed import PackedShards
from curate.sources.plan import SourceConfig
from curate.sources.planner import inspect, make_plan
from curate.sources.tars import Tars
from tests.small_data import make_data
from tests.test_source import image, write
from train.data import open_samples, sampling_weights
from train.split import scan_images, split

JPEG, PNG = image(), image("PNG")


def images(folder: Path, count: int = 10, ending: str = "jpg") -> Path:
    for i in range(count):
        write(folder / f"{i:02d}.{ending}", JPEG)
    return folder


def curated(folder: Path) -> list[dict[str, Any]]:
    """The rows that curate makes of it, those with an image read: url, caption, what else there is."""
    scratch = folder.parent / f"{folder.name}.plan"
    shutil.rmtree(scratch, ignore_errors=True)
    plan = make_plan(str(folder), Data(scratch), SourceConfig())
    rows = []
    for shard in plan.shards:
        source = plan.read(shard.shard)
        for row, facts in zip(source.rows(), source.table.to_pylist(), strict=True):
            rows.append(facts | {"why": str(row.failure) if row.failure else None})
            if row.place:
                assert row.place.read() == JPEG
    return rows


def test_a_fingerprint_is_of_names_captions_and_files_as_json_has_them(tmp_path: Path) -> None:
    names = ["plain", 'with "quotes"', "ütf 日本", "back\\slash"]
    texts = ["a cat", 'a "cat"\tand a dog', "eine Gartentür \u2028 🚪", None]
    for name, text in zip(names, texts, strict=True):
        write(tmp_path / "given" / f"{name}.jpg", JPEG)
        if text:
            (tmp_path / "given" / f"{name}.txt").write_text(text)
    samples = open_folder(tmp_path / "given")
    whole = [[[s.key, s.caption] for s in samples], samples.file_sizes(), samples._manifest()]
    assert [s.caption for s in samples].count(None) == 1
    assert samples.fingerprint == hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]


def captions(folder: Path) -> list[str | None]:
    """Of the images of a folder, which curate and train must agree on."""
    samples = open_folder(folder)
    assert all(sample.image == JPEG for sample in samples)
    trained = [sample.caption for sample in samples]
    assert [row["caption"] for row in curated(folder) if row["why"] is None] == trained
    return trained


def notes(folder: Path) -> str:
    """What train says of a folder, where curate warns too."""
    samples = open_folder(folder)
    assert samples.fingerprint
    found = "\n".join(samples.notes())
    warnings = inspect(str(folder), SourceConfig()).warnings
    assert any(" caption" not in w or "captions are" in w for w in warnings) == bool(found)  # how many have none: below
    return found


def make_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# -------------------------------------------------------------------------------------------------------------- images


def test_captions_lie_beside_images_under_many_names(tmp_path: Path) -> None:
    folder = images(tmp_path / "a", 9)
    write(folder / "00.txt", "  zero\n")
    write(folder / "01.caption", "one")
    write(folder / "02.TXT", b"\xef\xbb\xbftwo")
    write(folder / "03.jpg.txt", "three")
    write(folder / "04.json", '{"text": "four"}')
    write(folder / "05.txt", b"\xff\xfe" + "five".encode("utf-16-le"))
    write(folder / "06.json", '{"caption": ["", "six", "more"], "n": NaN}')
    write(folder / "07.json", '{"alt_text": 7}')
    write(folder / "._00.jpg", "not an image")
    write(folder / "__MACOSX" / "00.jpg", "nor this")
    write(folder / "readme.txt", "http://a.test/1.jpg")
    assert captions(folder) == ["zero", "one", "two", "three", "four", "five", "six", "7", None]
    assert notes(folder) == ""
    assert [s.key for s in open_folder(folder)] == [f"{i:02d}.jpg" for i in range(9)]


@pytest.mark.parametrize("form", ["bom csv", "dots", "utf-16", "parquet", "splits", "deep"])
def test_metadata_is_found_however_it_is_written(tmp_path: Path, form: str) -> None:
    folder = images(tmp_path / "a", 2)
    names = [f"{i:02d}.jpg" for i in range(2)]
    if form == "bom csv":
        write(folder / "metadata.csv", "\ufefffile_name,text\r\n00.jpg,fox 0\r\n01.jpg,fox 1\r\n".encode())
    elif form == "parquet":
        pq.write_table(pa.table({"file_name": names, "caption": ["fox 0", "fox 1"]}), folder / "metadata.parquet")
    else:
        lines = [json.dumps({"file_name": f"./{n}", "text": f"fox {i}"}) for i, n in enumerate(names)]
        text = "\n".join(lines).encode("utf-16") if form == "utf-16" else "\n".join(lines)
        write(folder / "metadata.jsonl", text)
    if form in ("splits", "deep"):
        whole = tmp_path / "whole"
        folder.rename(tmp_path / "part")
        for name in ("test", "train/x") if form == "deep" else ("test", "train"):
            shutil.copytree(tmp_path / "part", whole / name)
        assert captions(whole) == ["fox 0", "fox 1"] * 2
        return
    assert captions(folder) == ["fox 0", "fox 1"] and notes(folder) == ""


def test_a_row_of_metadata_that_is_broken_costs_its_own_row(tmp_path: Path) -> None:
    folder = images(tmp_path / "a", 5)
    lines = [json.dumps({"file_name": f"{i % 5:02d}.jpg", "text": f"fox {i}"}) for i in range(300)]
    lines[7] = "not json"
    lines[9] = json.dumps({"file_name": "gone.jpg", "text": "x"})
    lines[290] = json.dumps({"file_name": "../secret.jpg"})
    write(folder / "metadata.jsonl", "\n".join(lines))
    rows = curated(folder)
    assert len(rows) == 300 and [i for i, row in enumerate(rows) if row["why"]] == [7, 9, 290]
    assert "bad_line: line 8: not JSON" in rows[7]["why"]
    assert "1 rows of the metadata name files that are not there" in notes(folder)
    assert "1 lines are broken" in notes(folder) and "is refused: it must be a path below" in notes(folder)
    lines[10:20] = ["{"] * 10
    write(folder / "metadata.jsonl", "\n".join(lines))
    for reader in (open_folder, curated):
        with pytest.raises(UserError, match=r"metadata\.jsonl: 11 of 300 lines are broken.*line 8"):
            reader(folder)


def test_captions_in_other_encodings_are_counted_and_named(tmp_path: Path) -> None:
    folder = images(tmp_path / "a")
    for i in range(5):
        write(folder / f"{i:02d}.txt", "caf\xe9".encode("cp1252") if i < 4 else "café")
    assert captions(folder) == [None] * 4 + ["café"] + [None] * 5
    assert notes(folder).startswith("4 captions are neither UTF-8 nor marked by a byte order mark, and are taken")
    assert "00.txt; 01.txt; 02.txt and 1 more. " in notes(folder) and "iconv" in notes(folder)


def test_formats_that_are_not_read_are_counted_and_their_captions_are_no_lists(tmp_path: Path) -> None:
    folder = images(tmp_path / "a")
    for i in range(3):
        write(folder / f"IMG_{i}.HEIC", b"\0\0\0\x18ftypheic")
        write(folder / f"IMG_{i}.txt", "my dog")
    write(folder / "old.tar.gz", gzip.compress(b"x"))
    write(folder / "one.txt", "")
    assert notes(folder).splitlines() == [
        "3 of 13 images cannot be read (3 .heic): convert them (to .jpg, .png or .webp)",
        "1 is compressed, and not read: unpack old.tar.gz",
    ]
    alone = tmp_path / "b"
    alone.mkdir()
    for path in folder.glob("IMG*"):
        path.rename(alone / path.name)
    for reader in (open_folder, lambda f: inspect(str(f), SourceConfig())):
        with pytest.raises(UserError, match=r"3 images cannot be read \(3 \.heic\): convert them"):
            reader(alone)
    with pytest.raises(UserError, match=r"old\.tar\.gz is compressed: unpack it"):
        inspect(str(folder / "old.tar.gz"), SourceConfig())


def test_what_is_no_file_is_passed_over_and_links_to_files_are_followed(tmp_path: Path) -> None:
    folder = images(tmp_path / "a", 3)
    other = images(tmp_path / "b", 1)
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "00.txt")
    os.mkfifo(folder / "manifest.json")
    os.symlink("/dev/zero", folder / "zero.png")
    os.symlink("nowhere.jpg", folder / "gone.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    os.symlink(folder, folder / "again")
    os.symlink(other / "00.jpg", folder / "linked.jpg")
    write(folder / "dir.jpg" / "inner.jpg", JPEG)
    write(folder / "01.txt", b"x" * (2 << 20))
    write(folder / "02.json", "[" * 100_000)
    write(folder / os.fsdecode(b"caf\xe9.jpg"), JPEG)
    began = time.monotonic()
    samples = open_folder(folder)
    assert [samples.key(i) for i in range(len(samples))] == [
        "00.jpg", "01.jpg", "02.jpg", "dir.jpg/inner.jpg", "linked.jpg",
    ]  # fmt: skip
    assert [s.caption for s in samples] == [None] * 5
    found = "\n".join(samples.notes())
    assert "6 are no regular file, and passed over (00.txt, gone.jpg, loop.jpg, ...)" in found
    assert "1 is a link to a folder, and not followed: give that folder itself (again)" in found
    assert "1 is not named in UTF-8, and passed over: rename caf\ufffd.jpg" in found
    assert "1 captions are no files of at most 1,048,576 bytes" in found and "nested too deep" in found
    with pytest.raises(UserError, match=r"1 of 5 samples have JSON that cannot be read"):
        curated(folder)
    (folder / "02.json").unlink()
    assert [row["url"] for row in curated(folder)] == [samples.key(i) for i in range(5)]
    assert time.monotonic() - began < 5


@pytest.mark.long
def test_a_folder_of_many_files_takes_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(20_000):
        (folder / f"{i}.jpg").touch()
        (folder / f"{i}.txt").touch()
    began = time.process_time()
    assert len(open_folder(folder)) == 20_000
    assert time.process_time() - began < 4


def test_img2datasets_files_are_samples_and_its_failures_rows(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for i in range(3):
        write(folder / "00000" / f"{i:09d}.jpg", JPEG)
        write(folder / "00000" / f"{i:09d}.txt", f"fox {i}")
        facts = {"url": f"http://a.test/{i}", "caption": f"fox {i}", "key": f"{i:09d}", "status": "success", "n": i}
        write(folder / "00000" / f"{i:09d}.json", json.dumps(facts))
    write(folder / "00000_stats.json", "{}")
    rows = [{"url": f"http://a.test/{i}", "caption": f"fox {i}", "n": i, "key": f"{i:09d}"} for i in range(4)]
    states = [{"status": "success", "error_message": None}] * 3
    states.insert(1, {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"})
    order = [0, 3, 1, 2]
    table = [rows[i] | state for i, state in zip(order, states, strict=True)]
    pq.write_table(pa.Table.from_pylist(table), folder / "00000.parquet")
    found = curated(folder)
    assert [(r["url"], r["caption"], r["n"]) for r in found] == [(f"http://a.test/{i}", f"fox {i}", i) for i in order]
    assert [r["why"] for r in found] == [None, "http_404: HTTP Error 404: Not Found", None, None]
    samples = open_folder(folder)
    assert [(s.key, s.caption, s.facts["n"]) for s in samples] == [
        (f"00000/{i:09d}.jpg", f"fox {i}", i) for i in range(3)
    ]


def test_what_a_folder_lacks_is_said_before_a_run(tmp_path: Path) -> None:
    def warnings(folder: Path, **config: Any) -> str:
        return "\n".join(inspect(str(folder), SourceConfig(**config)).warnings)

    folder = images(tmp_path / "a", 3)
    write(folder / "captions.txt", "image,caption\n00.jpg,a fox\n")
    assert "a: none of the 3 images has a caption. Captions are NAME.txt beside" in warnings(folder)
    assert warnings(folder, caption=None) == ""
    write(folder / "00.txt", "a fox")
    assert warnings(folder) == f"{folder}: 2 of 3 images have no caption"
    # a split with metadata beside one without
    write(folder / "train" / "x.jpg", JPEG)
    write(folder / "train" / "metadata.csv", "file_name,text\nx.jpg,a fox\n")
    assert "3 images lie in no folder with metadata, and are left out: 00.jpg, 01.jpg, 02.jpg" in warnings(folder)
    pq.write_table(pa.table({"image": [{"bytes": JPEG, "path": "x"}]}), tmp_path / "images.parquet")
    assert "none of the 1 images has a caption" in warnings(tmp_path / "images.parquet")
    write(tmp_path / "disk" / "data-00000-of-00001.arrow", "ARROW1")
    for reader in (open_folder, curated):
        with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow \(save it as parquet"):
            reader(tmp_path / "disk")


# ---------------------------------------------------------------------------------------------------------------- tars


def sample(key: str, caption: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", JPEG), (f"{key}.txt", caption.encode())]


def test_tars_have_captions_under_many_names_and_may_lie_deeper(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_tar(
        folder / "part" / "0.tar",
        [
            *sample("a", "  zero "),
            *[("b.jpg", JPEG), ("b.json", b'{"text": "one"}')],
            *[("c.jpg", JPEG), ("c.jpg.txt", b"two"), ("._c.jpg", b"mac"), ("__MACOSX/c.jpg", b"mac")],
            *[("d.jpg", JPEG), ("d.txt", b""), ("d.json", b'{"caption": ["three", "3"], "x": 1e400}')],
            *[("e.JPG", JPEG), ("e.caption", b"\xff\xfef\0o\0u\0r\0")],
            *[("f.heic", b"ftyp"), ("f.txt", b"no")],
            ("readme", b"x"),
        ],
    )
    make_tar(folder / "part" / "1.tar", sample("g", "five"), tarfile.PAX_FORMAT)
    assert captions(folder) == ["zero", "one", "two", "three", "four", "five"]
    assert notes(folder) == "1 samples have only images that are not read (.heic): convert them"


def test_one_kind_of_image_is_taken_of_samples_that_have_several(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    members = []
    for i in range(4):
        members += [(f"{i}.input.jpg", JPEG), (f"{i}.txt", b"fox"), *([(f"{i}.target.png", PNG)] if i != 2 else [])]
    make_tar(folder / "0.tar", members)
    make_tar(folder / "1.tar", [("9.target.png", PNG), ("9.txt", b"owl")])
    assert captions(folder) == ["fox"] * 4
    assert "3 samples have several images (KEY.input.jpg, KEY.target.jpg): KEY.input.jpg is taken" in notes(folder)
    assert curated(folder)[-1]["why"].startswith("not_an_image")
    own = make_tar(
        tmp_path / "c" / "0.tar", [(f"v1.{i}.{e}", b) for i in (0, 1) for e, b in (("jpg", JPEG), ("txt", b"x"))]
    )
    assert captions(own.parent) == ["x"]  # v1.0.txt, of v1.0.jpg
    assert "A key ends at the first dot" in notes(own.parent)
    dotted = make_tar(tmp_path / "b" / "0.tar", [(f"shot.v{i}.jpg", JPEG) for i in range(40)])
    for reader in (open_folder, curated):
        with pytest.raises(UserError, match=r"40 files share the key 'shot'.*keys end at the first dot"):
            reader(dotted.parent)


def test_tars_that_are_packed_or_hostile_are_refused_by_name(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", sample("a", "fox")).read_bytes()
    folder = tmp_path / "a"
    write(folder / "0.tar", gzip.compress(whole))
    for reader in (open_folder, curated):
        with pytest.raises(UserError, match=r"0\.tar: is compressed by gzip"):
            reader(folder)
    negative = bytearray(whole)
    negative[124:136] = b"-0000001000\0"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative[:512])
    write(folder / "0.tar", bytes(negative))
    for reader in (open_folder, curated):
        with pytest.raises(UserError, match=r"0\.tar.*the header at byte 0 is damaged"):
            reader(folder)
    samples = [s for i in range(150) for s in sample(f"k{i:03d}", "fox")]
    members = [("/etc/passwd.jpg", JPEG), ("../up.jpg", JPEG), ("k000.json", b'{"a": ' + b"9" * 5000 + b"}")]
    make_tar(folder / "0.tar", [*samples, *members, ("k001.jpg", JPEG)])
    assert len(captions(folder)) == 152
    assert "1 samples have JSON that cannot be read" in notes(folder)
    assert "1 files are in a tar twice under one name" in notes(folder)


def test_nothing_is_read_in_search_of_captions_where_there_can_be_none(tmp_path: Path) -> None:
    bare = make_tar(tmp_path / "a" / "0.tar", [(f"{i}.jpg", JPEG) for i in range(9)])
    make_tar(tmp_path / "a" / "1.tar", [("9.jpg", JPEG), ("9.txt", b"fox"), ("x.jpg", JPEG)])
    image = {"bytes": JPEG, "path": "x"}
    (tmp_path / "t").mkdir()
    pq.write_table(pa.table({"image": [image] * 3, "text": [None, "fox", None]}), tmp_path / "t" / "0.parquet")
    folder = images(tmp_path / "b", 3)
    write(folder / "01.json", "{}")
    for path, maybe in ((bare.parent, [9]), (tmp_path / "t", [1]), (folder, [1])):
        assert list(open_folder(path).maybe_captioned()) == maybe
    assert open_folder(bare.parent).has_captions() and not open_folder(folder).has_captions()
    assert open_folder(folder, "a fox").has_captions() and open_folder(folder, "a fox")[2].caption == "a fox"
    with pytest.raises(IndexError):
        open_folder(folder)[3]


# ------------------------------------------------------------------------------------------------------ packed folders


def test_a_packed_folder_is_whole_in_itself(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    select(Data(root), SelectConfig(name="all"))
    pack(Data(root), "all", PackConfig(shard_size=10))
    original = open_samples(root / "shards" / "all")
    copy = Path(shutil.copytree(original.folder, tmp_path / "renamed"))
    copied = open_samples(copy)
    assert type(copied) is PackedShards and copied.fingerprint == original.fingerprint
    assert [s.key for s in copied] == [s.key for s in original]
    for path in copy.glob("*.parquet"):  # which training does not read
        path.unlink()
    assert len(open_samples(copy)) == len(original)
    (copy / "00001.tar").unlink()
    partly = open_samples(copy)
    rest = [s.key for i, s in enumerate(original) if original.locate(i)[0].name != "00001.tar"]
    assert [s.key for s in partly] == rest and len(rest) < len(original)
    assert any("1 of the 5 shards that were packed are not in this copy" in note for note in partly.passed_over())
    assert any(
        "1 of the 5 shards that were packed are not" in said for said in inspect(str(copy), SourceConfig()).warnings
    )
    damaged = bytearray((copy / "00002.tar").read_bytes())
    damaged[600] ^= 1  # in an image; the length is the same
    (copy / "00002.tar").write_bytes(damaged)
    with pytest.raises(UserError, match=r"1 of its 5 tars hold other bytes than were packed: 00002\.tar"):
        scan_images(open_samples(copy))
    (copy / "manifest.json").unlink()
    assert type(open_samples(copy)) is Tars
    for reader in (open_folder, curated):
        with pytest.raises(UserError, match=r"Did you mean .*data/shards/all\?"):
            reader(root)


# -------------------------------------------------------------------------------------------------------------- parquet


def test_parquet_that_holds_the_images(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "beside.jpg.bin", JPEG)
    for part in range(2):
        cells: list[Any] = [{"bytes": JPEG, "path": None} for _ in range(12)]
        cells[3] = {"bytes": None, "path": "beside.jpg.bin"}
        table = pa.table({"image": cells, "text": [f"fox {part} {i}" for i in range(12)], "n": list(range(12))})
        pq.write_table(table, folder / "data" / f"train-{part}.parquet", row_group_size=5)
    expected = [f"fox {part} {i}" for part in range(2) for i in range(12)]
    assert captions(folder) == expected
    samples = open_samples(folder)
    assert [samples[int(i)].caption for i in np.random.default_rng(0).permutation(24)][:3]
    assert samples[23].facts["n"] == 11 and samples.key(23) == "data/train-1.parquet/11"
    single = make_plan(str(folder / "data" / "train-0.parquet"), Data(tmp_path / "plan"), SourceConfig(where="n < 2"))
    assert single.read(0).table.to_pylist()[1]["caption"] == "fox 0 1" and single.read(0).rows()[1].place.read() == JPEG
    pq.write_table(pa.table({"image": pa.array([None, b"", JPEG], pa.binary())}), tmp_path / "few.parquet")
    few = parquet_images(tmp_path / "few.parquet")
    assert few.read(2) == JPEG
    for row in (0, 1):
        with pytest.raises(RowError, match="holds no image"):
            few.read(row)


# ------------------------------------------------------------------------------------------- what facts are used for


def with_facts(folder: Path, facts: list[dict[str, Any]]) -> MapDataset:
    rng = np.random.default_rng(0)
    for i, more in enumerate(facts):
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i:02d}.png")
        write(folder / f"{i:02d}.json", json.dumps({"caption": "noise", **more}))
    return open_samples(folder)


@pytest.mark.parametrize("value", ["high", float("inf"), [1], {"a": 1}, 10**400])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, value: Any) -> None:
    facts: list[dict[str, Any]] = [{"taste": i} for i in range(1, 11)]
    facts[3]["taste"] = value
    facts[4]["taste"] = None
    facts[5]["taste"] = "6"
    samples = with_facts(tmp_path / "a", facts)
    with pytest.raises(UserError, match=r"taste is no finite number in 1 of 10 images \(03\.png: "):
        sampling_weights(samples, "taste")
    facts[3]["taste"] = 1e308
    facts[6]["taste"] = 1.7e308
    weights = sampling_weights(with_facts(tmp_path / "a", facts), "taste")
    assert np.isfinite(weights.sum()) and weights[4] == 0


def test_images_without_bytes_or_caption_are_counted(tmp_path: Path) -> None:
    folder = images(tmp_path / "a", 12)
    for i in range(9):
        write(folder / f"{i:02d}.txt", "fox" if i else " \n")
    write(folder / "03.jpg", b"")
    write(folder / "04.png", JPEG)  # what it is called is not what it is
    write(folder / "captions.json", "[]")
    samples = open_samples(folder)
    assert [samples.facts(i)["caption"] for i in range(13)].count(None) == 4
    known = scan_images(samples)
    assert list(known.unreadable) == [3] and "it is empty" in known.unreadable[3]
    assert "captions.json: not read; a table of captions is metadata.csv" in "\n".join(samples.notes())


def test_hashes_that_are_none_are_made_anew(tmp_path: Path) -> None:
    wrong: list[Any] = ["x", "-1", "f" * 40, 5, [1], "", None, {"a": 1}, "0123456789abcdef", True]
    samples = with_facts(tmp_path / "a", [{"phash": v, "sha256": v, "width": "w", "height": -1} for v in wrong])
    known = scan_images(samples)
    assert known.phash.all() and known.phash[8] == 0x0123456789ABCDEF
    assert not known.sha256.any()
    chosen, held = split(samples, 0.2, known=known)
    assert len(chosen) == 8 and len(held) == 2
