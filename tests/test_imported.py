"""Vectors that exist already, taken in place of the embed stage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate.encoders.embed import EmbedConfig
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.sources.vectors import ImportedVectors, open_vector_folder
from curate.store.files import read_json
from curate.workers import EmbedWorker
from pipelines.checks import has_encoder
from pipelines.recipe import Recipe
from tests.conftest import ROOT
from tests.real_data import BUNDLED, SCORE, SELECTION, SHARD_SIZE, embed_all, fetch_all


def vectors_of(data: Data) -> tuple[list[str], np.ndarray, np.ndarray, list[str | None]]:
    """Keys, image vectors, text vectors and captions of all shards."""
    keys, captions, images, texts = [], [], [], []
    for s in data.plan.shards:
        table = pq.read_table(data.metadata(s.shard))
        keys += table["key"].to_pylist()
        captions += table["caption"].to_pylist()
        images.append(np.load(data.image_vectors(s.shard)))
        texts.append(np.load(data.text_vectors(s.shard)))
    return keys, np.concatenate(images), np.concatenate(texts), captions


def clip_retrieval_folder(
    root: Path,
    names: list[str],
    images: np.ndarray,
    texts: np.ndarray | None,
    captions: list[str | None] | None,
    cut: int,
) -> EmbedConfig:
    """Write a folder as clip-retrieval does, `cut` rows a partition; returns the configuration that takes it."""
    for kind in ("img_emb", "metadata", *(["text_emb"] if texts is not None else [])):
        (root / kind).mkdir(parents=True)
    for part, start in enumerate(range(0, len(names), cut)):
        rows = slice(start, start + cut)
        np.save(root / "img_emb" / f"img_emb_{part}.npy", images[rows])
        if texts is not None:
            np.save(root / "text_emb" / f"text_emb_{part}.npy", texts[rows])
        columns = {"image_path": names[rows]} | ({"caption": captions[rows]} if captions is not None else {})
        pq.write_table(pa.table(columns), root / "metadata" / f"metadata_{part}.parquet")
    return EmbedConfig(encoder="bundled", embeddings=str(root))


def fetched_only(data: Data, root: Path) -> Data:
    """A copy of a data folder without what comes after fetching."""
    for name in ("plan", "fetched"):
        shutil.copytree(data.root / name, root / name)
    return Data(root)


@pytest.fixture
def fresh(real_data: Data, tmp_path: Path) -> Data:
    return fetched_only(real_data, tmp_path / "data")


def test_another_partitioning_gives_the_same_files(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, texts, captions = vectors_of(real_data)
    order = np.random.default_rng(1).permutation(len(keys))
    names = [f"/mnt/photos/{keys[i]}.jpg" for i in order]  # as clip-retrieval names files; shards are spread over parts
    told = [captions[i] for i in order]
    embed = clip_retrieval_folder(tmp_path / "emb", names, images[order], texts[order], told, 10)
    embed_all(fresh, embed, SCORE)
    for s in real_data.plan.shards:
        for name in (real_data.image_vectors, real_data.text_vectors):
            path = name(s.shard)
            assert path.read_bytes() == (fresh.root / path.relative_to(real_data.root)).read_bytes()
        ours, theirs = (pq.read_table(d.metadata(s.shard)) for d in (fresh, real_data))
        assert ours.drop_columns(["similarity"]).equals(theirs.drop_columns(["similarity"]))
        for a, b in zip(ours["similarity"].to_pylist(), theirs["similarity"].to_pylist(), strict=True):
            assert (a is None) == (b is None) and (a is None or abs(a - b) < 1e-3)
        for column in SCORE:  # the head on the vectors, the detector on the pixels
            a, b = (pq.read_table(d.annotations(column, s.shard)) for d in (fresh, real_data))
            assert a.equals(b)
        assert read_json(fresh.embedded_record(s.shard))["imported"] == str(tmp_path / "emb")
    before = fresh.image_vectors(0).stat().st_mtime_ns
    embed_all(fresh, embed, SCORE)
    assert fresh.image_vectors(0).stat().st_mtime_ns == before


def test_without_text_vectors_there_is_no_similarity(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, _, _ = vectors_of(real_data)
    embed_all(fresh, clip_retrieval_folder(tmp_path / "emb", keys, images.astype(np.float32), None, None, 100), {})
    table = pq.read_table(fresh.metadata(0))
    assert table["similarity"].null_count == len(table) and table.schema.field("similarity").type == pa.float32()
    assert not fresh.text_vectors(0).exists()
    assert fresh.ledger.filter("similarity IS NOT NULL").fetchall() == []


def test_our_own_folder_is_taken_without_its_encoder(real_data: Data, fresh: Data) -> None:
    config = EmbedConfig(encoder="bundled", embeddings=str(real_data.root / "embedded"))
    worker = EmbedWorker(fresh, config, {"aesthetic": "bundled-aesthetic"}, "c")
    assert worker.encoder is None
    for s in fresh.plan.shards:
        worker.run(s.shard)
        assert fresh.image_vectors(s.shard).read_bytes() == real_data.image_vectors(s.shard).read_bytes()
        assert (
            fresh.annotations("aesthetic", s.shard).read_bytes()
            == real_data.annotations("aesthetic", s.shard).read_bytes()
        )
    assert fresh.space.read_bytes() == real_data.space.read_bytes()


def test_words_need_the_encoder_of_imported_vectors(
    real_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    theirs = shutil.copytree(real_data.root / "embedded", tmp_path / "theirs")
    name = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    space = read_json(theirs / real_data.space.name)
    (theirs / real_data.space.name).write_text(json.dumps({**space, "encoder": name}))
    embed = EmbedConfig(encoder=name, embeddings=str(theirs))
    assert has_encoder(Recipe(embed=embed))
    words = {"cats": {"use": "zero-shot", "wanted": ["a cat"], "against": ["a dog"]}}
    with pytest.raises(UserError, match=r"columns\.cats has words.*not on this machine.*does not answer"):
        has_encoder(Recipe(embed=embed, columns=words))


def test_images_read_from_tars_are_found_by_their_names_there(real_data: Data, tmp_path: Path) -> None:
    """The packed shards as a list: its samples are shuffled, and get keys of their own."""
    keys, images, texts, captions = vectors_of(real_data)
    embed = clip_retrieval_folder(tmp_path / "emb", keys, images, texts, captions, 7)
    make_plan(
        str(real_data.root / "shards" / SELECTION), Data(tmp_path / "data"), SourceConfig(shard_size=SHARD_SIZE), None
    )
    data = Data(tmp_path / "data")
    fetch_all(data)
    embed_all(data, embed, {})
    told = dict(zip(keys, range(len(keys)), strict=True))
    total = 0
    for s in data.plan.shards:
        there = pq.read_table(real_data.root / "shards" / SELECTION / f"{s.shard:05d}.parquet")["key"].to_pylist()
        assert np.array_equal(np.load(data.image_vectors(s.shard)), images[[told[k] for k in there]])
        total += len(there)
    assert total == len(keys)


@pytest.mark.long
def test_the_command_line_takes_it(real_data: Data, tmp_path: Path) -> None:
    keys, images, texts, captions = vectors_of(real_data)
    embed = clip_retrieval_folder(tmp_path / "emb", keys, images, texts, captions, 10)
    out = tmp_path / "out"
    shards = str(real_data.root / "shards" / SELECTION)
    command = [sys.executable, "-m", "pipelines.cli", "curate", shards, "--out", str(out), "--recipe", "bundled"]
    for setting in ("images.size=96", "columns.open_nsfw=", "select.rules.safe=", "select.rules.large="):
        command += ["--set", setting]
    command += ["--set", f"embed.embeddings={embed.embeddings}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    data = Data(out)
    assert "imported" in read_json(data.embedded_record(0)) and not data.annotations("open_nsfw", 0).exists()
    assert (out / "shards" / "bundled" / "sizes.json").exists()
    command[-1] = f"embed.embeddings={tmp_path}"
    refused = subprocess.run(
        [*command, "--restart-from", "embed"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2 and "is not a clip-retrieval folder" in refused.stderr + refused.stdout


# ----------------------------------------------------------------------------------------------------------- refusals


def refused(fresh: Data, config: EmbedConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        embed_all(fresh, config, {})
    assert not list((fresh.root / "embedded").glob("img_emb/*"))


def test_missing_images_are_counted_and_the_first_is_named(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, _, _ = vectors_of(real_data)
    left = [i for i, key in enumerate(keys) if i not in (2, 5)]
    embed = clip_retrieval_folder(tmp_path / "emb", [keys[i] for i in left], images[left], None, None, 100)
    refused(fresh, embed, rf"no vector for 2 of the \d+ images of shard 0; the first is {keys[2]}")


def test_a_name_twice_is_refused(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, _, _ = vectors_of(real_data)
    names = [*keys[:-1], "elsewhere/" + keys[0] + ".png"]
    refused(fresh, clip_retrieval_folder(tmp_path / "emb", names, images, None, None, 100), f"2 rows .* {keys[0]}")


def test_vectors_of_other_images_are_refused(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, _, _ = vectors_of(real_data)
    embed = clip_retrieval_folder(tmp_path / "emb", keys, np.roll(images, 1, axis=0), None, None, 100)
    refused(fresh, embed, "does not hold bundled's vectors of these images: 8 of shard 0 .* 0.98 needed; the worst is")


def test_captions_of_another_list_are_refused(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, texts, captions = vectors_of(real_data)
    other = ["a cat" if caption else None for caption in captions]
    embed = clip_retrieval_folder(tmp_path / "emb", keys, images, texts, other, 100)
    shutil.copy(real_data.space, tmp_path / "emb")
    refused(fresh, embed, "made from another list: .* has the caption 'a cat' there")


def test_lengths_other_than_one_are_refused(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, _, _ = vectors_of(real_data)
    scaled = images.astype(np.float32)
    scaled[3] *= 1.001  # within what fp16 does
    scaled[4] *= 1.01
    embed = clip_retrieval_folder(tmp_path / "emb", keys, scaled, None, None, 100)
    refused(fresh, embed, f"the vector of {keys[4]} has the length 1.01, not 1 .1 of")


def test_folders_that_are_not_whole_are_refused(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, texts, captions = vectors_of(real_data)
    refused(fresh, EmbedConfig(encoder="bundled", embeddings=str(tmp_path / "none")), "not a clip-retrieval folder")
    root = tmp_path / "emb"
    embed = clip_retrieval_folder(root, keys, images, texts, captions, 10)
    (root / "metadata" / "metadata_2.parquet").rename(root / "metadata_2.parquet")
    refused(fresh, embed, "img_emb and metadata do not both have partition 2")
    (root / "metadata_2.parquet").rename(root / "metadata" / "metadata_2.parquet")
    np.save(root / "img_emb" / "img_emb_1.npy", images[:9])
    refused(fresh, embed, "img_emb_1.npy has 9 rows, metadata_1.parquet 10")
    np.save(root / "img_emb" / "img_emb_1.npy", images[10:20, :512])
    refused(fresh, embed, "not of one length: 512 in img_emb_1.npy, 1664 in")
    np.save(root / "img_emb" / "img_emb_1.npy", np.array(["x"] * 10, dtype=object))
    refused(fresh, embed, "img_emb_1.npy cannot be read")


def test_another_encoder_is_refused_by_name(real_data: Data, fresh: Data, tmp_path: Path) -> None:
    keys, images, _, _ = vectors_of(real_data)
    embed = clip_retrieval_folder(tmp_path / "emb", keys, images[:, :512], None, None, 100)
    refused(fresh, embed, "holds 512 numbers a row, and the vectors of bundled have 1664")
    theirs = EmbedConfig(encoder="open_clip:ViT-B-32/x", embeddings=str(real_data.root / "embedded"))
    refused(fresh, theirs, "1664 numbers a row, of bundled .1664., but embed.encoder is open_clip:ViT-B-32/x")


def test_a_shard_without_images(tmp_path: Path) -> None:
    """Empty partitions and an index without rows are no special case."""
    empty = clip_retrieval_folder(tmp_path / "emb", ["a"], np.zeros((0, 4), np.float16), None, None, 1)
    pq.write_table(pa.table({"image_path": pa.array([], pa.string())}), tmp_path / "emb/metadata/metadata_0.parquet")
    imported = ImportedVectors(open_vector_folder(empty))
    assert imported.find(["a"]).tolist() == [-1] and imported.find([]).tolist() == []
    assert imported.images(np.array([], int), []).shape == (0, 4)


def test_bundled_is_what_the_fixture_used(real_data: Data) -> None:
    assert read_json(real_data.space)["encoder"] == BUNDLED.encoder
