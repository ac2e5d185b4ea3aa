"""The contact sheet and the histograms, from a small data folder of real photographs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.rules import read_rules
from curate.ledger.schema import Reason, Status, fetched_schema, make_key
from curate.ledger.select import SelectConfig, select
from curate.report import KEPT, SHARDS, Report, _decoded, contact_sheet, score_charts, spread
from curate.shards.tar import TarWriter
from curate.sheets import _printable
from curate.store.files import write_json

SIZE = 10  # rows of a shard
RULES = {
    "large": "least(original_width, original_height) >= 110",  # rows 0 to 19
    "safe": "open_nsfw < 0.2 or aesthetic >= 6",  # rows 21, 22, 31, 32, ... 52
    "once": "first_of(phash)",  # rows 28 and 29, which repeat row 26
    "beautiful": "top(aesthetic, 0.7) and aesthetic >= 4.0",  # what is left of 30 to 39
}


def crops(n: int) -> list[bytes]:
    """Different parts of two real photographs, as JPEG."""
    dice = np.random.default_rng(0)
    photos = load_sample_images().images
    found = []
    for i in range(n):
        photo = photos[i % len(photos)]
        top, left = dice.integers(0, 200), dice.integers(0, 300)
        buffer = io.BytesIO()
        Image.fromarray(photo[top : top + 200, left : left + 240]).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def make_data(root: Path, rows: int, rules: dict[str, str] = RULES) -> Path:
    """A data folder in which row i has the aesthetic score i/10, and every seventh row was not fetched."""
    photos = crops(12)
    extra_columns = pa.schema([("WIDTH", pa.int32()), ("TEXT", pa.string())])
    for shard in range(-(-rows // SIZE)):
        table: list[dict[str, Any]] = []
        tar = io.BytesIO()
        writer = TarWriter(tar)
        scores: list[dict[str, Any]] = []
        for i in range(shard * SIZE, min(rows, (shard + 1) * SIZE)):
            key = make_key(shard, i % SIZE, SIZE)
            row: dict[str, Any] = {"key": key, "url": f"http://example.com/{i}.jpg", "caption": f"Tür {i}", "WIDTH": 7}
            table.append(row)
            if i % 7 == 6:
                row |= {"status": Reason.HTTP_404.status.value, "reason": Reason.HTTP_404.value}
                continue
            row |= {"status": Status.SUCCESS.value, "width": 240, "height": 200}
            row |= {"original_width": 100 + i, "original_height": 90 + i}
            row["phash"] = f"{26 if i in (28, 29) else i:016x}"
            writer.add_sample(key, photos[i % len(photos)], "jpg", row["caption"], {"key": key})
            scores.append({"key": key, "aesthetic": i / 10, "open_nsfw": {1: 0.9, 2: 0.3}.get(i % 10, 0.1)})
        writer.close()
        stem = f"{shard:05d}"
        (root / "fetched").mkdir(parents=True, exist_ok=True)
        (root / "fetched" / f"{stem}.tar").write_bytes(tar.getvalue())
        pq.write_table(pa.Table.from_pylist(table, fetched_schema(extra_columns)), root / "fetched" / f"{stem}.parquet")
        write_json(root / "fetched" / f"{stem}_stats.json", {"successes": len(scores)})
        for column, unsafe in (("aesthetic", False), ("open_nsfw", True)):
            (root / "annotated" / column).mkdir(parents=True, exist_ok=True)
            schema = pa.schema([("key", pa.string()), (column, pa.float32())])
            pq.write_table(pa.Table.from_pylist(scores, schema), root / "annotated" / column / f"{stem}.parquet")
            write_json(root / "annotated" / column / f"{stem}.json", {"columns": {column: {"unsafe": unsafe}}})
    select(Data(root), SelectConfig(name="mine", rules=rules))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("report") / "data", 120)


def test_sheet_is_the_same_each_time_and_shows_everything(data: Path) -> None:
    sheet = contact_sheet(Data(data), "mine")
    assert sheet == data / "report" / "mine" / "sheet.png"
    first = sheet.read_bytes()
    assert contact_sheet(Data(data), "mine", "aesthetic").read_bytes() == first
    with Image.open(io.BytesIO(first)) as image:
        assert image.width == 2480 and image.height > 2500  # 6 rows kept, 4 rules, what was not fetched
        colours = image.getcolors(1 << 24)
    assert colours is not None and len(colours) > 20_000  # photographs are on it, not only letters


def test_kept_images_are_shown_at_even_quantiles_worst_first(data: Path) -> None:
    report = Report(Data(data), "mine")
    assert report.default_column() == "aesthetic"
    tiles = report.kept("aesthetic")
    values = [float(t.value) for t in tiles]
    assert len(tiles) == KEPT and values == sorted(values)
    assert values[0] == 4.0 and values[-1] == 11.9  # the extremes are among them
    assert max(np.diff(values)) <= 0.45


def test_rejected_images_show_the_value_that_rejected_them_narrow_misses_first(data: Path) -> None:
    report = Report(Data(data), "mine")
    large = report.rejected("large")
    assert large[0].value == "119 x 109" and large[-1].value == "100 x 90"
    assert [t.value for t in report.rejected("once")] == [f"{26:016x}"] * 2
    assert [float(t.value) for t in report.rejected("beautiful")][:2] == [3.9, 3.8]


def test_a_width_in_the_list_is_not_our_width(data: Path) -> None:
    report = Report(Data(data), "mine")
    report.rules |= read_rules(
        {"stored": "least(width, \"HEIGHT\") > 300 and caption <> 'original_width'"}, report.columns
    )
    assert report.columns_of("stored") == ["width", "height", "caption"]
    assert report.db.sql("select distinct width, height from candidate").fetchall() == [(240, 200)]


def test_what_is_unsafe_is_blurred(data: Path) -> None:
    report = Report(Data(data), "mine")
    safe = report.rejected("safe")
    assert {t.key[-1] for t in safe} == {"1", "2"} and all(t.blurred for t in safe)  # at 0.3 too: the rule rejects it
    kept = report.kept("aesthetic")
    assert {t.key[-1] for t in kept if t.blurred} == {"1"}  # 0.9, though kept
    assert any(t.key[-1] == "2" for t in kept)
    assert not any(t.blurred for t in report.rejected("once"))
    photo = crops(1)[0]
    clear, blurred = _decoded(photo, False), _decoded(photo, True)
    assert clear is not None and blurred is not None
    assert _sharpness(blurred) < _sharpness(clear) / 20


@pytest.mark.parametrize(
    "rule",
    [
        "OPEN_NSFW < 0.2",
        '"Open_Nsfw" < .2',
        "0.2 > open_nsfw",
        "NOT open_nsfw >= 0.2",
        "open_nsfw NOT BETWEEN 0.2 AND 1",
        "open_nsfw BETWEEN 0 AND 0.19",
        "NOT top(OPEN_NSFW, 0.15)",
        "coalesce(open_nsfw, 1) * 10 < 1 + 1",
        "aesthetic >= 0 AND open_nsfw < 0.2 AND source.WIDTH = 7",
        "CASE WHEN open_nsfw < 2e-1 THEN true ELSE false END",
        "top(aesthetic, 1) and open_nsfw <> 0.3::float and open_nsfw <> 0.9::float",
    ],
)
def test_what_a_rule_calls_unsafe_is_blurred_however_it_is_written(data: Path, rule: str) -> None:
    """Also where an earlier rule rejected it: 0.3 in rows that end in 2, 0.9 in those in 1."""
    select(Data(data), SelectConfig(name="written", rules={"small": "original_width >= 160", "safe": rule}))
    report = Report(Data(data), "written")
    tiles = report.examples("true", "key", 200, [])
    assert {t.key[-1] for t in tiles if t.blurred} == {"1", "2"}, rule
    assert {t.key[-1] for t in tiles if not t.blurred} == set("03456789")
    assert all(t.blurred for t in report.rejected("safe"))
    if "top" not in rule:
        assert "open_nsfw" in report.columns_of("safe")


def test_rules_that_can_no_longer_be_asked_blur_at_the_strictest_cut(data: Path) -> None:
    select(Data(data), SelectConfig(name="old", rules={"a": "open_nsfw < 0.25", "b": "open_nsfw < 0.2 or true"}))
    record = data / "selected" / "old.json"
    record.write_text(record.read_text().replace("0.2 or true", "0.2 or gone > 5"))
    tiles = Report(Data(data), "old").examples("true", "key", 200, [])
    assert {t.key[-1] for t in tiles if t.blurred} == {"1", "2"}
    record.write_text(record.read_text().replace("0.2 or gone > 5", "0.2 or or"))  # no SQL of this DuckDB's
    assert {t.key[-1] for t in Report(Data(data), "old").examples("true", "key", 200, []) if t.blurred} == {"1", "2"}


def test_what_is_unsafe_is_known_by_its_record_whatever_its_column_is_called(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data", 20)
    for shard in range(2):
        write_json(root / "annotated" / "aesthetic" / f"{shard:05d}.json", {"columns": {"aesthetic": {"unsafe": True}}})
    assert sorted(Report(Data(root), "mine").unsafe) == ["aesthetic", "open_nsfw"]


def test_a_long_list_costs_few_tars(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data", SIZE * (SHARDS + 15))
    report = Report(Data(root), "mine")
    used = {t.shard for t in report.kept("aesthetic")} | {t.shard for t in report.kept(None)}
    assert used <= set(report.picked) and len(report.picked) == SHARDS
    assert report.picked[0] == 0 and report.picked[-1] == SHARDS + 14
    for tar in (root / "fetched").glob("*.tar"):
        if int(tar.stem) not in report.picked:
            tar.unlink()  # nobody misses them
    contact_sheet(Data(root), "mine", "aesthetic")


def test_sheets_of_nothing(tmp_path: Path) -> None:
    assert contact_sheet(Data(make_data(tmp_path / "none", 20)), "mine").is_file()  # nothing kept
    assert contact_sheet(Data(make_data(tmp_path / "all", 20, {})), "mine").is_file()  # nothing rejected


def test_an_image_that_cannot_be_decoded_has_its_place(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data", 8)
    tar = root / "fetched" / "00000.tar"
    damaged = tar.read_bytes().replace(b"\xff\xd8\xff\xe0", b"\x00\x00\x00\x00", 1)
    tar.write_bytes(damaged)
    assert contact_sheet(Data(root), "mine", "aesthetic").is_file()


def test_histograms_count_every_score_and_mark_the_cuts(data: Path) -> None:
    report = Report(Data(data), "mine")
    everything, kept, lo, hi = report.histogram("aesthetic")
    assert sum(everything) == report.selection.fetched and sum(kept) == report.selection.kept
    assert (lo, round(hi, 3)) == (0.0, 11.9)
    assert everything[0] == 2 and kept[0] == 0  # 0.0 and 0.1
    cuts = {words: at for at, words in report.cuts("aesthetic")}
    assert cuts[">= 4.0"] == 4.0 and cuts[">= 6"] == 6.0 and 3.3 < cuts["best 70%"] < 3.9
    assert report.cuts("open_nsfw") == [(0.2, "< 0.2")]
    path = score_charts(Data(data), "mine")
    assert path is not None
    first = path.read_bytes()
    score_charts(Data(data), "mine")
    assert path.read_bytes() == first


def test_errors_name_what_is_missing(data: Path) -> None:
    with pytest.raises(UserError, match="no selection other"):
        contact_sheet(Data(data), "other")
    with pytest.raises(UserError, match=r"no scores called 'laion_v2'. It has: aesthetic, open_nsfw"):
        contact_sheet(Data(data), "mine", "laion_v2")


def test_letters_that_the_font_lacks() -> None:
    assert _printable("Crème brûlée × 2 — ≥ 3\tweiß …") == "Creme brulee x 2 - >= 3 weiss ..."
    assert _printable("茶碗 bowl 🍵") == "bowl"


def testspread() -> None:
    assert spread(0, 5) == [] and spread(3, 5) == [0, 1, 2]
    assert spread(100, 4) == [0, 33, 66, 99]


def _sharpness(image: Image.Image) -> float:
    grey = np.asarray(image.convert("L"), np.float64)
    return float(np.abs(np.diff(grey, 2, axis=0)).mean() + np.abs(np.diff(grey, 2, axis=1)).mean())
