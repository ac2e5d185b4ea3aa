"""Protected sets: copies are found whatever a set is given as; what can't be compared is neither lost nor hidden."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageOps

from aesthetic.errors import UserError
from curate.annotators.base import column_name
from curate.annotators.registry import make_annotator, make_annotators
from curate.annotators.stage import annotate_table
from curate.duplicates.hash_lists import read_hashes
from curate.duplicates.nearest import nearest_hashes
from curate.duplicates.pdq import pdq, to_hex
from curate.encoders.registry import load_encoder
from curate.images.decode import decode
from curate.images.process import perceptual_hash, process
from curate.layout import Data
from curate.ledger.select import SelectConfig, load_selection, select
from curate.shards.pack import PackConfig, pack
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.store.files import read_json
from curate.workers import EmbedWorker
from pipelines.commands.status import status
from tests.real_data import BUNDLED, IMAGES, fetch_all, image_files

FLAT = Image.new("RGB", (240, 200), (250, 250, 250))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=quality)
    return data.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """20 parts of two photographs, (240, 200)."""
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in image_files()[:20]]


def make_data(root: Path, folder: Path, shard_size: int = 100) -> Data:
    """A data folder of a folder's images, embedded and hashed."""
    data = Data(root)
    make_plan(str(folder), data, SourceConfig(shard_size=shard_size), None)
    fetch_all(data)
    embed(data)
    return Data(root)


def embed(data: Data) -> None:
    worker = EmbedWorker(data, BUNDLED, {"pdq": "pdq"}, "c")
    for shard in data.plan.shards:
        worker.run(shard.shard)


@pytest.fixture(scope="module")
def module_data(tmp_path_factory: pytest.TempPathFactory, photos: list[Image.Image]) -> Data:
    """22 images, named by their number: 20 photographs, a flat image, and a blank with a small mark; 3 shards."""
    small = FLAT.copy()
    small.paste((40, 40, 40), (100, 80, 112, 92))
    files = {f"{i:02d}.jpg": jpeg(image) for i, image in enumerate([*photos, FLAT, small])}
    root = tmp_path_factory.mktemp("near")
    return make_data(root / "data", write(root / "images", files), shard_size=8)


@pytest.fixture
def data(module_data: Data, tmp_path: Path) -> Data:
    shutil.copytree(module_data.root, tmp_path / "data")
    return Data(tmp_path / "data")


def near(data: Data, said: list[str] | None = None, **options: Any) -> dict[str, list[Any]]:
    """Compute the columns of an entry `eval`; its values in the order of the images, and "shards": how many lacked."""
    columns = {"eval": {"use": "near", **options}, "pdq": "pdq"}
    annotators = make_annotators(columns)
    lines: list[str] = [] if said is None else said
    count = annotate_table(
        data, "eval", annotators, encoder=lambda: load_encoder("bundled"), images=IMAGES, say=lines.append
    )
    names = [column_name("eval", s, annotators["eval"]) for s in annotators["eval"].columns]
    found = Data(data.root).ledger.filter("status = 'success'").order("key").df()
    values = {name: [None if pd.isna(v) else v for v in found[name]] for name in names}
    return {**values, "shards": [count]}


def test_copies_are_found_mirrored_and_turned_too(data: Data, photos: list[Image.Image], tmp_path: Path) -> None:
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "half": lambda image: image.resize((120, 100)),
        "mirror": ImageOps.mirror,
        "turn": lambda image: image.rotate(90, expand=True),
        "grey": ImageOps.grayscale,
        "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
        "lossy": lambda image: image,
    }
    changed = {kind: change(photos[i]) for i, (kind, change) in enumerate(changes.items())}
    files = {f"{kind}.jpg": jpeg(image, 30 if kind == "lossy" else 90) for kind, image in changed.items()}
    folder = write(tmp_path / "set", files)
    found = near(data, against=folder)
    assert [found["eval_of"][i] for i in range(6)] == [f"{kind}.jpg" for kind in changes]
    assert max(found["eval_bits"][:6]) <= 31
    assert min(found["eval_bits"][6:20]) > 31
    assert "eval_cosine" not in found

    cosine = near(data, against=folder, cosine=True)
    assert cosine["eval_bits"] == found["eval_bits"]
    vectors = np.concatenate([np.load(data.image_vectors(s.shard)) for s in data.plan.shards]).astype(np.float32)
    encoder = load_encoder("bundled")
    stored = [decode(make_stored(files[f"{kind}.jpg"])) for kind in sorted(changes)]
    expected = (vectors @ encoder.encode_images(stored).T).max(1)
    np.testing.assert_allclose(cosine["eval_cosine"], np.clip(expected, -1, 1), atol=1e-5)
    assert cosine["eval_of"][:6] == found["eval_of"][:6]

    select(data, SelectConfig(name="clean", rules={"clean": "eval_bits > 31"}))
    assert load_selection(data, "clean").kept == 22 - 6  # the flat image is kept


def make_stored(file: bytes) -> bytes:
    return process(file, IMAGES).data


def test_an_equal_image_is_at_distance_0_in_a_tar_and_a_folder(
    data: Data, photos: list[Image.Image], tmp_path: Path
) -> None:
    folder = write(
        tmp_path / "set", {"a.jpg": jpeg(photos[3]), "flat.jpg": jpeg(FLAT), "broken.jpg": b"\xff\xd8nothing"}
    )
    found = near(data, against=folder, cosine=True)
    assert (found["eval_bits"][3], found["eval_of"][3]) == (0, "a.jpg")
    assert found["eval_cosine"][3] > 0.9995
    assert (found["eval_bits"][20], found["eval_of"][20]) == (0, "flat.jpg")  # the very file; it has no hash
    record = read_json(data.annotations_record("eval", 0))
    assert (record["protected"], record["unreadable"]) == (2, 1)
    assert any("broken.jpg" in note for note in record["notes"])
    assert any("no proof" in note or "proves no copy" in note for note in record["notes"])
    assert record["counts"]["within 31 bits of the protected set set"] == 1
    lines: list[str] = []
    status(data, lines.append)
    assert any("2 images within 31 bits of the protected set set" in line for line in lines)  # of all shards

    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "00000.tar", "w") as tar:
        for name in ("a.jpg", "flat.jpg"):
            tar.add(folder / name, f"k{name}")
    again = near(data, against=tars)
    assert again["eval_bits"] == found["eval_bits"]
    assert again["eval_of"][3] == "ka.jpg"


def test_flat_images_are_no_copies_unless_the_file_is_equal(
    data: Data, photos: list[Image.Image], tmp_path: Path
) -> None:
    found = near(data, against=write(tmp_path / "set", {"a.jpg": jpeg(photos[0])}))
    assert found["eval_bits"][20:] == [256, 256] and found["eval_of"][20:] == [None, None]
    other = near(data, against=write(tmp_path / "flat", {"f.png": png(FLAT.resize((99, 99)))}))  # flat, another file
    assert other["eval_bits"] == [256] * 22
    small = FLAT.copy()
    small.paste((40, 40, 40), (100, 80, 112, 92))
    marked = near(data, against=write(tmp_path / "small", {"s.png": png(small)}))
    assert marked["eval_bits"][21] <= 31 and marked["eval_of"][21] == "s.png"  # by the perceptual hash
    assert marked["eval_bits"][20] == 256


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_vectors(data: Data, tmp_path: Path) -> None:
    vectors = np.load(data.image_vectors(1))[:3].astype(np.float32)
    np.save(tmp_path / "v.npy", vectors * 7)  # of any length
    found = near(data, against=tmp_path / "v.npy")
    assert found["eval_of"][8:11] == ["row 0", "row 1", "row 2"] and min(found["eval_cosine"][8:11]) > 0.9995
    assert "eval_bits" not in found
    for write_names in (
        lambda: (tmp_path / "v.txt").write_text("a\nb\nc\n"),
        lambda: (tmp_path / "v.json").write_text(json.dumps(["a", "b", "c"])),
        lambda: pq.write_table(pa.table({"key": ["a", "b", "c"]}), tmp_path / "v.parquet"),
    ):
        write_names()
        assert near(data, against=tmp_path / "v.npy")["eval_of"][8:11] == ["a", "b", "c"]
        for name in ("v.txt", "v.json", "v.parquet"):
            (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "v.txt").write_text("a\n")
    with pytest.raises(UserError, match="3 vectors, and the file beside it 1 names"):
        near(data, against=tmp_path / "v.npy")
    np.save(tmp_path / "w.npy", vectors[:, :9])
    with pytest.raises(UserError, match="vectors of 9 numbers; those of bundled have 1664"):
        near(data, against=tmp_path / "w.npy")
    np.save(tmp_path / "z.npy", np.zeros_like(vectors))
    with pytest.raises(UserError, match="vector of row 0 is zero"):
        near(data, against=tmp_path / "z.npy")


def test_hash_lists(data: Data, photos: list[Image.Image], tmp_path: Path) -> None:
    stored = [decode(make_stored(jpeg(photo))) for photo in photos[:3]]
    pdqs = [to_hex(pdq(image)[0])[0] for image in stored]
    text = f"# of somebody\n\n{pdqs[0].upper()}, one # first\n{pdqs[1]}\ttwo\n{pdqs[2]}\n"
    (tmp_path / "pdq.txt").write_text(text)
    found = near(data, against=tmp_path / "pdq.txt")
    assert found["eval_of"][:3] == ["one", "two", "line 5"]
    assert found["eval_bits"][:3] == [0, 0, 0] and min(found["eval_bits"][3:]) > 31
    mirrors = [to_hex(pdq(np.ascontiguousarray(image[:, ::-1]))[0])[0] for image in stored]
    (tmp_path / "mirrored.txt").write_text("\n".join(mirrors))
    assert max(near(data, against=tmp_path / "mirrored.txt")["eval_bits"][:3]) <= 31
    (tmp_path / "phash.csv").write_text("".join(f"{perceptual_hash(image)},{i}\n" for i, image in enumerate(stored)))
    perceptual = near(data, against=tmp_path / "phash.csv")
    assert perceptual["eval_of"][:3] == ["0", "1", "2"] and max(perceptual["eval_bits"][:3]) <= 2
    assert perceptual["eval_bits"][20] == 64
    assert make_annotator("x", {"use": "near", "against": str(tmp_path / "phash.csv")}).needs == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "holds no hash"),
        ("# nothing\n", "holds no hash"),
        (f"{'a' * 64}\nabc\n{'b' * 64} x\n{'0' * 32}\n", r"no perceptual hash in lines 2, 4: .*fetch.deny"),
        (f"{'a' * 64}\n{'b' * 16}\n", "line 2: .*64 digits in each line as in the first"),
        ("hash,label\n" * 5, r"lines 1, 2, 3, \.\.\."),
    ],
)
def test_broken_hash_lists_name_the_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=f"columns.x: .*list.txt.*{match}") as e:
        make_annotator("x", {"use": "near", "against": str(tmp_path / "list.txt")})
    assert "b" * 16 not in str(e.value)  # what is on such a list isn't repeated


def test_a_list_of_sha256_is_no_list_of_pdq(tmp_path: Path) -> None:
    random = np.random.default_rng(0).bytes(32 * 50).hex()
    (tmp_path / "list.txt").write_text("\n".join(random[i : i + 64] for i in range(0, len(random), 64)))
    with pytest.raises(UserError, match=r"no PDQ hashes: .*fetch\.deny"):
        read_hashes(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"against": "nothing"}, "there is no such file"),
        ({"against": "empty"}, "holds neither tars nor images"),
        ({"against": "a.png"}, "give the folder that it lies in"),
        ({"against": "v.npy", "bits": True}, "holds vectors, which have no hashes"),
        ({"against": "v.npy", "deny": True}, "deny goes by hashes"),
        ({"against": "h.txt", "cosine": True}, "holds hashes, which have no vectors"),
        ({"against": "h.txt", "bits": False}, "nothing would be compared"),
        ({"against": "h.txt", "within": 500}, "within: "),
        ({}, r"near needs against"),
    ],
)
def test_what_can_not_be_is_refused_at_first(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(png(FLAT))
    np.save(tmp_path / "v.npy", np.ones((2, 4), np.float32))
    (tmp_path / "h.txt").write_text("a" * 64)
    if "against" in options:
        options = {**options, "against": str(tmp_path / options["against"])}
    with pytest.raises(UserError, match=f"columns.x: .*{match}"):
        make_annotator("x", {"use": "near", **options})


def test_what_has_not_changed_is_not_computed_again(data: Data, photos: list[Image.Image], tmp_path: Path) -> None:
    late = data.fetched_record(2)  # it is fetched later
    late.rename(tmp_path / "late.json")
    folder = write(tmp_path / "set", {"a.jpg": jpeg(photos[0]), "z.jpg": jpeg(ImageOps.mirror(photos[16]))})
    assert near(data, against=folder)["shards"] == [2]
    index = data.index("eval") / "hashes.npz"
    before = index.stat().st_mtime_ns
    assert near(data, against=folder)["shards"] == [0]

    data.annotations_record("eval", 1).unlink()
    assert near(data, against=folder)["shards"] == [1]
    assert index.stat().st_mtime_ns == before  # the set was not read again

    (tmp_path / "late.json").rename(late)
    old = data.annotations("eval", 0).stat().st_mtime_ns
    found = near(data, against=folder)
    assert found["shards"] == [1] and data.annotations("eval", 0).stat().st_mtime_ns == old
    assert found["eval_bits"][16] <= 31 and found["eval_of"][16] == "z.jpg"

    write(folder, {"b.jpg": jpeg(photos[1])})
    found = near(data, against=folder)
    assert found["shards"] == [3] and found["eval_bits"][1] <= 31
    moved = shutil.move(folder, tmp_path / "elsewhere")  # the same set
    assert near(data, against=moved)["shards"] == [0]


def test_deny(data: Data, photos: list[Image.Image], tmp_path: Path) -> None:
    stored = decode(make_stored(jpeg(photos[4])))
    (tmp_path / "never.txt").write_text(f"{to_hex(pdq(stored)[0])[0]} a name that nobody should read\n")
    said: list[str] = []
    found = near(data, said, against=tmp_path / "never.txt", deny=True)
    assert found["eval_denied"] == [i == 4 for i in range(22)]
    assert found.keys() == {"eval_bits", "eval_denied", "shards"}
    record = read_json(data.annotations_record("eval", 0))
    assert record["columns"]["eval_denied"]["hidden"] and not record["columns"]["eval_bits"]["hidden"]
    assert any("1 images within 31 bits of what must not be in" in line for line in said)
    told = json.dumps(record) + "".join(said)
    assert "nobody should read" not in told and "never.txt" not in told
    written = b"".join(p.read_bytes() for p in (data.root / "annotated" / "eval").rglob("*") if p.is_file())
    assert b"nobody should read" not in written
    select(data, SelectConfig(name="all", rules={"any": "width > 0"}))
    counts = load_selection(data, "all")
    assert counts.kept == 21 and pq.read_table(data.verdicts("all")).to_pydict()["verdict"].count("denied") == 1
    pack(data, "all", PackConfig())
    keys = Data(data.root).ledger.filter("eval_denied").df()["key"].tolist()
    packed = pq.read_table(data.packed("all") / "00000.parquet")["key"].to_pylist()
    assert len(packed) == 21 and len(keys) == 1 and keys[0] not in packed
    wide = near(data, against=tmp_path / "never.txt", deny=True, within=128)
    assert sum(wide["eval_denied"]) > 1

    folder = write(tmp_path / "folder", {"x.jpg": jpeg(ImageOps.mirror(photos[5]))})
    assert near(data, against=folder, deny=True)["eval_denied"] == [i == 5 for i in range(22)]


def test_nearest_hashes_are_exact() -> None:
    rng = np.random.default_rng(0)
    for shape in ((300,), (300, 4)):
        values, others = (rng.integers(0, 1 << 63, shape, dtype=np.uint64) for _ in range(2))
        others[7] = others[3] = values[0]  # of equals the first
        bits, whose = nearest_hashes(values, others, np.arange(300) * 2)
        differ = np.bitwise_count(values[:, None] ^ others[None]).astype(int)
        differ = differ if differ.ndim == 2 else differ.sum(-1)
        assert (bits == differ.min(1)).all() and (whose == 2 * differ.argmin(1)).all()
        bits, whose = nearest_hashes(values, others[:0], np.zeros(0, np.int64))
        assert (whose == -1).all() and (bits == 64 * values[0].size).all()
