"""What others' readers see in a data folder that the real stages made. docs/formats.md holds the snippets run here."""

from __future__ import annotations

import glob
import json
import re
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from curate.layout import Data
from curate.ledger.schema import FETCHED_COLUMNS, Reason
from curate.shards.export import export
from curate.sources.find import open_folder
from curate.store.files import read_json
from tests.conftest import ROOT
from tests.real_data import PACKED, SELECTION
from tests.side_environments import SideEnvironments

IMG2DATASET = {  # its columns and their types, as its own runs write them
    **{name: pa.string() for name in ("url", "caption", "key", "status", "error_message", "exif", "sha256")},
    **{name: pa.int32() for name in ("width", "height", "original_width", "original_height")},
}


@pytest.fixture(scope="module")
def fetched(real_data: Data) -> pd.DataFrame:
    """The rows that have an image, in the order of the list."""
    table = pads.dataset([str(real_data.table(s.shard)) for s in real_data.plan.shards]).to_table().to_pandas()
    return table[table.status == "success"].reset_index(drop=True)


@pytest.fixture(scope="module")
def packed(real_data: Data) -> Path:
    return real_data.root / "shards" / SELECTION


def tars(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.glob("*.tar"))


# ------------------------------------------------------------------------------------------------------- webdataset


@pytest.mark.parametrize("kind", ["fetched", f"shards/{SELECTION}"])
def test_webdataset(real_data: Data, fetched: pd.DataFrame, kind: str) -> None:
    import webdataset

    folder = real_data.root / kind
    dataset = webdataset.WebDataset(tars(folder), shardshuffle=False).decode("pil")
    samples = list(dataset)
    rows = pads.dataset(sorted(map(str, folder.glob("*.parquet")))).to_table().to_pylist()
    rows = [row for row in rows if row["status"] == "success"]
    assert [s["__key__"] for s in samples] == [row["key"] for row in rows] and len(rows) == len(fetched) == 36
    for sample, row in zip(samples, rows, strict=True):
        assert set(sample) - {"__key__", "__url__", "__local_path__"} == {"jpg", "json", "txt"}
        assert sample["jpg"].mode == "RGB" and sample["jpg"].size == (row["width"], row["height"])
        assert sample["txt"] == (row["caption"] or "")
        assert sample["json"] == row  # every column, the list's own and the scores included
    if kind != "fetched":
        assert {"WIDTH", "uid", "similarity", "aesthetic", "open_nsfw"} <= set(rows[0])


def test_webdataset_by_braces(packed: Path) -> None:
    import webdataset

    count = len(tars(packed))
    dataset = webdataset.WebDataset(f"{packed}/{{00000..{count - 1:05d}}}.tar", shardshuffle=False)
    pairs = list(dataset.decode("pil").to_tuple("jpg", "txt"))
    assert len(pairs) == 36 and all(isinstance(text, str) for _, text in pairs)


@pytest.mark.long
@pytest.mark.parametrize("version", ["0.2.86", "1.0.2"])
def test_other_versions_of_webdataset(
    real_data: Data, fetched: pd.DataFrame, side: SideEnvironments, version: str
) -> None:
    seen = side("read_webdataset.py", str(real_data.root), f"webdataset=={version}")
    assert seen.pop("version") == version
    expected = {r.key: [r.width, r.height, r.caption or "", r.key] for r in fetched.itertuples()}
    assert seen == {"fetched": expected, f"shards/{SELECTION}": expected}


# -------------------------------------------------------------------------------------------------------- open_clip


@pytest.mark.long
def test_open_clip(packed: Path, side: SideEnvironments) -> None:
    shards = f"{packed}/{{00000..{len(tars(packed)) - 1:05d}}}.tar"
    seen = side("read_open_clip.py", shards, "webdataset==0.2.86")
    assert seen["size"] == [36, 3] and seen["num_samples"] == 36  # by sizes.json
    assert seen["shapes"] == [[4, 3, 32, 32]]
    captions = pads.dataset(sorted(map(str, packed.glob("*.parquet")))).to_table(["caption"])["caption"].to_pylist()
    assert seen["valid"] == [caption or "" for caption in captions]
    assert sorted(seen["train"]) == sorted(seen["valid"])  # one epoch: each sample once


def test_sizes_are_even_and_right(packed: Path) -> None:
    sizes = json.loads((packed / "sizes.json").read_text())
    assert sizes == {f"{i:05d}.tar": 12 for i in range(3)} and PACKED >= 12
    for name, size in sizes.items():
        assert pq.read_metadata((packed / name).with_suffix(".parquet")).num_rows == size


# ------------------------------------------------------------------------------------------ readers of other trainers

ENERGON = """megatron-energon==7.4.1 multi-storage-client==1.3.1 bitstring==5.0.0 tibs==2.0.2 mfusepy==3.1.1
    filetype==1.2.0 rapidyaml==0.15.2 deprecation==2.1.0 lark==1.3.1 prettytable==3.18.0 wcmatch==10.2.1 bracex==3.2.3
    xattr==1.3.0 pyroute2==0.9.7 python-dateutil==2.9.0.post0 s3fs==2026.9.0 aiobotocore==3.10.0 botocore==1.43.117
    aioitertools==0.13.0 jmespath==1.1.0 wrapt==2.5.2 cffi==2.1.1 pycparser==3.0"""

SIMPLETUNER = """simpletuner==4.10.1 webshart==0.6.0 trainingsample==0.3.2 accelerate==1.15.0 atomicwrites==1.4.1
    annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 boto3==1.44.8 botocore==1.44.8 certifi==2026.10.18
    charset-normalizer==3.5.2 click==8.5.1 diffusers==0.42.1 fastapi==0.165.0 filelock==4.2.11 fsspec==2026.9.0
    h11==0.16.0 hf-xet==1.8.0
    httpcore2==2.16.2 httpx2==2.16.2 huggingface-hub==2.4.0 idna==3.20 importlib-metadata==10.2.0 jinja2==3.1.6
    jmespath==1.1.0 markupsafe==3.0.4 mpmath==1.3.0 networkx==3.6.1 numpy==2.5.5 opencv-python-headless==4.14.0.94
    opentelemetry-api==1.45.2 packaging==26.3 pandas==2.3.3 peft==0.21.2 pillow==13.0.0 psutil==7.2.2 pydantic==2.14.4
    pydantic-core==2.50.5 python-dateutil==4.0.0 pytz==2026.6 pyyaml==6.0.3 regex==2026.11.15 requests==2.34.2
    s3transfer==0.19.3 safetensors==0.8.0 setuptools==84.2.1 six==1.17.0 starlette==1.10.0 sympy==1.14.0
    tokenizers==0.23.3 torchvision==0.29.2 tqdm==4.70.1 transformers==5.23.0 truststore==0.10.5
    typing-extensions==4.16.0 typing-inspection==0.4.5 tzdata==2026.6 urllib3==2.8.0 zipp==4.1.2"""


def images_of(folder: Path) -> dict[str, list[str]]:
    """Key -> [sha256 of the image, caption], as our own reader has them."""
    return {s.key: [sha256(s.image).hexdigest(), s.caption or ""] for s in open_folder(folder)}


@pytest.mark.long
def test_webshart(packed: Path, side: SideEnvironments) -> None:
    """With which SimpleTuner reads tars, in a version that it takes (0.5.4 and later), which asks for Python 3.12."""
    seen = side("read_webshart.py", str(packed), "webshart==0.6.0 tqdm==4.70.1", "3.12")
    assert seen["shards"] == 3 and seen["buckets"] == 36
    assert {name.removesuffix(".jpg"): found for name, found in seen["samples"].items()} == images_of(packed)


@pytest.mark.long
def test_simpletuner(packed: Path, side: SideEnvironments) -> None:
    """Its own backend, buckets and sampler: each image that has a caption. It asks for Python 3.12."""
    torch = version("torch").partition("+")[0]
    seen = side("read_simpletuner.py", str(packed), f"torch=={torch} {SIMPLETUNER}", "3.12")
    rows = pads.dataset(sorted(map(str, packed.glob("*.parquet")))).to_table().to_pylist()
    images = images_of(packed)
    assert seen["samples"] == {
        f"{r['key']}.jpg": [images[r["key"]][0], r["width"], r["height"], r["caption"]] for r in rows if r["caption"]
    }


@pytest.mark.long
def test_megatron_energon(packed: Path, side: SideEnvironments) -> None:
    seen = side("read_energon.py", str(packed), ENERGON)["samples"]
    rows = pads.dataset(sorted(map(str, packed.glob("*.parquet")))).to_table().to_pylist()
    assert seen == {r["key"]: [r["caption"] or "", [3, r["height"], r["width"]]] for r in rows}


@pytest.mark.long
def test_mosaicml_streaming(packed: Path, side: SideEnvironments, tmp_path: Path) -> None:
    export(packed, "mds", tmp_path / "mds")
    seen = side(
        "read_mds.py",
        str(tmp_path / "mds"),
        "mosaicml-streaming==0.13.0 brotli==1.2.1 catalogue==2.0.10 cramjam==2.14.0 python-snappy==0.7.3 zstd==1.5.7.2",
    )
    assert seen["samples"] == {key: [*found, key] for key, found in images_of(packed).items()}


# --------------------------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("kind", ["fetched", f"shards/{SELECTION}"])
def test_hugging_face_datasets(real_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    folder = real_data.root / kind
    rows = pads.dataset(sorted(map(str, folder.glob("*.parquet")))).to_table().to_pylist()
    rows = [row for row in rows if row["status"] == "success"]
    files = {"train": tars(folder)}
    stored = load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path))
    streamed = load_dataset("webdataset", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
    for dataset in (stored, streamed):
        count = 0
        for sample, row in zip(dataset, rows, strict=True):
            assert sample["__key__"] == row["key"] and sample["txt"] == (row["caption"] or "")
            assert sample["jpg"].size == (row["width"], row["height"])
            assert sample["json"] == row
            count += 1
        assert count == 36


def test_hugging_face_datasets_takes_the_folder(packed: Path, tmp_path: Path) -> None:
    """By the card's header, which names the tars: there are tables and JSON beside them."""
    from datasets import load_dataset

    assert load_dataset(str(packed), split="train", cache_dir=str(tmp_path)).num_rows == 36


# ---------------------------------------------------------------------------------------------------- tables, counts


def test_tables_have_the_columns_of_img2dataset(real_data: Data) -> None:
    for s in real_data.plan.shards:
        schema = pq.read_schema(real_data.table(s.shard))
        assert {name: schema.field(name).type for name in IMG2DATASET} == IMG2DATASET
        assert schema.names[:2] == ["url", "caption"] and schema.names[-len(FETCHED_COLUMNS) :] == [
            name for name, _ in FETCHED_COLUMNS
        ]
        assert pd.read_parquet(real_data.table(s.shard)).key.is_monotonic_increasing


def test_duckdb_reads_all_tables_together(real_data: Data) -> None:
    root = real_data.root
    joined = duckdb.sql(
        f"""SELECT f.status, f.reason, a.aesthetic, m.similarity, f.caption
            FROM '{root}/fetched/*.parquet' f
            LEFT JOIN '{root}/embedded/metadata/*.parquet' m USING (key)
            LEFT JOIN '{root}/annotated/aesthetic/*.parquet' a USING (key)"""
    ).df()
    assert len(joined) == 40 and joined.status.value_counts().to_dict() == {
        "success": 36,
        "failed_to_download": 2,
        "failed_to_resize": 2,
    }
    good = joined.status == "success"
    assert (joined.aesthetic.notna() == good).all() and (
        joined.similarity.notna() == (good & joined.caption.notna())
    ).all()
    assert joined.reason[~good].value_counts().to_dict() == {"http_404": 2, "not_an_image": 2}


def test_counts_are_read_by_img2dataset(real_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    logger = pytest.importorskip("img2dataset.logger", reason="the extra img2dataset is not installed")
    process = logger.LoggerProcess(
        str(real_data.root / "fetched"), enable_wandb=False, wandb_project="", config_parameters={}
    )
    process.q.put("stop")
    process.run()  # in this process; it would sum the counts of a run that is going on
    told = capsys.readouterr().out
    assert "failed to parse" not in told and "logger error" not in told
    last = [line for line in told.splitlines() if line.startswith("total")][-1]
    assert re.search(
        r"success: 0.900 - failed to download: 0.050 - failed to resize: 0.050 - .* - count: 40", " ".join(last.split())
    )
    done = {int(Path(x).name.split("_")[0]) for x in glob.glob(f"{real_data.root}/fetched/*.json")}
    assert done == {0, 1, 2}  # what its incremental mode takes for finished


def test_counts_add_up(real_data: Data, fetched: pd.DataFrame) -> None:
    """`successes` is what DataComp's resharder sums over `*_stats.json`, before it looks for `uid` in each JSON."""
    records = [read_json(Path(p)) for p in sorted(glob.glob(f"{real_data.root}/fetched/*_stats.json"))]
    assert sum(r["successes"] for r in records) == len(fetched)
    for r, s in zip(records, real_data.plan.shards, strict=True):
        assert r["count"] == s.rows == r["successes"] + r["failed_to_download"] + r["failed_to_resize"]
        assert r["count"] == sum(r["status_dict"].values()) and r["status_dict"]["success"] == r["successes"]
        assert r["end_time"] >= r["start_time"] and r["duration"] == pytest.approx(
            r["end_time"] - r["start_time"], abs=0.01
        )


# ------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_in_the_layout_of_clip_retrieval(real_data: Data, fetched: pd.DataFrame) -> None:
    embedded = real_data.root / "embedded"
    parts = {kind: sorted((embedded / kind).iterdir()) for kind in ("img_emb", "text_emb", "metadata")}
    names = ["00000", "00001", "00002"]
    assert [p.name for p in parts["img_emb"]] == [f"img_emb_{n}.npy" for n in names]
    assert [p.name for p in parts["text_emb"]] == [f"text_emb_{n}.npy" for n in names]
    assert [p.name for p in parts["metadata"]] == [f"metadata_{n}.parquet" for n in names]
    images = np.concatenate([np.load(p, mmap_mode="r") for p in parts["img_emb"]])
    texts = np.concatenate([np.load(p, mmap_mode="r") for p in parts["text_emb"]])
    metadata = pd.concat([pd.read_parquet(p) for p in parts["metadata"]], ignore_index=True)
    assert images.dtype == texts.dtype == np.float16 and images.shape == texts.shape == (36, 1664)
    assert np.abs(np.linalg.norm(images.astype(np.float32), axis=1) - 1).max() < 1e-3
    assert metadata.image_path.tolist() == metadata.key.tolist() == fetched.key.tolist()
    told = metadata.caption.notna().to_numpy()
    assert (texts.any(axis=1) == told).all() and (metadata.similarity.notna() == told).all()
    cosines = np.einsum("nd,nd->n", images.astype(np.float32), texts.astype(np.float32))
    assert np.abs(cosines - metadata.similarity.fillna(0)).max() < 1e-3
    for part in parts["img_emb"]:
        stats = read_json(embedded / "stats" / f"{part.stem.removeprefix('img_emb_')}.json")
        assert stats["sample_count"] == len(np.load(part, mmap_mode="r"))


def test_embeddings_through_clip_retrievals_own_reader(
    real_data: Data, fetched: pd.DataFrame, side: SideEnvironments
) -> None:
    seen = side("read_embeddings.py", str(real_data.root), "embedding-reader==1.8.1")
    vectors = np.concatenate([np.load(real_data.image_vectors(s.shard)) for s in real_data.plan.shards])
    assert (seen["count"], seen["dimension"]) == vectors.shape
    assert seen["keys"] == fetched.key.tolist()
    assert seen["captions"] == [c if c is not None else None for c in fetched.caption]
    assert 0.999 < seen["norms"][0] <= seen["norms"][1] < 1.001
    assert seen["sum"] == pytest.approx(float(vectors.astype(np.float64).sum()))


# --------------------------------------------------------------------------------------------------------- the page


PAGE = (ROOT / "docs" / "formats.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_page_s_snippets_run(real_data: Data, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(real_data.root.parent)
    exec(SNIPPETS[number], {})


def test_the_page_names_every_column(real_data: Data, packed: Path) -> None:
    columns = set(pq.read_schema(real_data.table(0)).names) | set(pq.read_schema(real_data.metadata(0)).names)
    own = {"WIDTH", "uid"}  # of the list
    assert [r.value for r in Reason if f"`{r.value}`" not in PAGE] == []
    assert [c for c in sorted(columns - own) if f"`{c}`" not in PAGE] == []
