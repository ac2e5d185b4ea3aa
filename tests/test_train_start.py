"""How training begins: what of packed shards is read before the first step, in which order shards of a store come."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from aesthetic.errors import UserError
from aesthetic.splits import groups_of
from bench.train_start import make_packed
from curate.sources import kept_tars, packed
from curate.sources.dataset import MapDataset
from curate.sources.packed import PackedShards
from curate.sources.tars import Tars
from curate.store.files import digest
from pipelines.cli import main
from tests.stores import Faults, Proxy, Server
from tests.test_places import put
from train.data import ImageDataset, Stream, aspect_ratios, open_samples, order_by_shards, sampling_weights
from train.places import bring_images, local_folder
from train.split import scan_images, split


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 samples in ten shards; some are copies, or nearly, of others."""
    folder = make_packed(tmp_path_factory.mktemp("packed") / "all", 500, 50)
    tables = [pq.read_table(folder / f"{i:05d}.parquet") for i in range(10)]
    rows = [row for table in tables for row in table.to_pylist()]
    rng = np.random.default_rng(1)
    for i in range(0, 200, 4):
        rows[i + 1]["sha256"] = rows[i]["sha256"]
        near = int(rows[i]["phash"], 16) ^ sum(1 << int(b) for b in rng.choice(64, i % 6, replace=False))
        rows[499 - i]["phash"] = f"{near:016x}"
    rows[7]["caption"], rows[8]["caption"] = None, "  \n"
    rows[9]["phash"] = rows[10]["phash"] = "0" * 16
    rows[11]["aesthetic"] = float("nan")
    return write(folder, rows)


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Such a folder again, with these rows."""
    import pyarrow as pa

    from bench import train_start

    made = train_start.made_up
    table = pa.Table.from_pylist(rows, made(np.random.default_rng(0), range(1)).schema)
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_start, "made_up", lambda rng, numbers: table.slice(numbers.start, len(numbers)))
        return make_packed(folder, len(rows), 50)


def as_tars(folder: Path, to: Path) -> Tars:
    """The same samples, read from the tars."""
    to.mkdir()
    for tar in folder.glob("*.tar"):
        shutil.copy(tar, to)
    return Tars(to)


def test_columns_say_what_the_tars_hold(shards: Path, tmp_path: Path) -> None:
    ours, theirs = PackedShards(shards), as_tars(shards, tmp_path / "tars")
    names = ("key", "caption", "sha256", "width", "aesthetic", "none such")
    both = [[list(itertools.chain(*column)) for column in zip(*s.columns(*names), strict=True)] for s in (ours, theirs)]
    assert ours.decoded and not theirs.decoded and both[0] == both[1]
    assert both[0][1].count(None) == 2 and both[0][5] == [None] * 500
    for default, mix in ((None, ("caption",)), ("a photo", ("url", "caption")), ("a photo", ("none such", "caption"))):
        ours.default_caption = theirs.default_caption = default
        ours.caption_columns = theirs.caption_columns = mix
        some = [3, 7, 8, 444]
        assert ours.captions_at(some) == theirs.captions_at(some) == [ours[i].captions for i in some]
        ours.read_fingerprint()
        assert ours.captioned == (498 if default is None else 500)
    ours.caption_columns = theirs.caption_columns = ("caption",)
    ours.default_caption = theirs.default_caption = "a photo"
    ours.read_fingerprint()
    assert [ours[i] for i in range(0, 500, 49)] == [theirs[i] for i in range(0, 500, 49)]
    assert [ours.path(i) for i in (0, 77)] == [theirs.path(i) for i in (0, 77)]
    assert (aspect_ratios(ours) == aspect_ratios(theirs)).all()
    assert (sampling_weights(ours, "aesthetic") == sampling_weights(theirs, "aesthetic")).all()
    facts = [ours.facts(i) for i in range(500)]
    captions = [[f["key"], f["caption"]] for f in facts]
    manifest = json.loads((shards / "manifest.json").read_text())["outputs"]
    manifest = {n: f for n, f in manifest.items() if not n.endswith((".json", ".idx"))}
    sizes = [[tar.name, tar.stat().st_size] for tar in sorted(shards.glob("*.tar"))]
    assert ours.fingerprint == digest([captions, sizes, manifest])  # as it was before there were columns


def test_what_tars_of_others_hold_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    folder = make_packed(tmp_path / "all", 24, 12)
    tars = as_tars(folder, tmp_path / "tars")
    for tar in tars.parts:
        os.utime(tar, (1e9, 1e9))  # what was written just now is not kept
    monkeypatch.setattr(kept_tars, "FROM", 10)
    first = Tars(tars.folder)
    names = ("key", "caption", "aesthetic", "none such")
    before, fingerprint = list(first.columns(*names)), first.fingerprint
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 2 and before == list(first.columns(*names))
    with monkeypatch.context() as patch:
        patch.setattr("curate.sources.tars.tar_members", None)  # whoever read a tar's headers would fail
        patch.setattr("curate.sources.tars.read_members", None)
        again = Tars(tars.folder)
        assert list(again.columns(*names)) == before and again.fingerprint == fingerprint
        assert [again.key(i) for i in (0, 13)] == [first.key(i) for i in (0, 13)]
    assert [again[i] for i in (3, 20)] == [first[i] for i in (3, 20)] and again.notes() == first.notes()
    shutil.copy(tars.parts[0], tars.parts[1])  # another tar under the name
    assert [Tars(tars.folder).key(i) for i in (0, 12)] == [first.key(0), first.key(0)]


def rule(samples: MapDataset, share: float) -> list[int]:
    """Which are held out, by the rule in words."""
    facts = [samples.facts(i) for i in range(len(samples))]
    hashes = {name: [f[name] for f in facts] for name in ("sha256", "phash")}
    groups = groups_of([f["key"] for f in facts], **hashes).names
    room, found = int(share * len(facts)), []
    for name in sorted(set(groups), key=lambda n: digest(["held out", n])):
        members = [i for i, group in enumerate(groups) if group == name]
        if len(members) <= room:
            found += members
            room -= len(members)
    return sorted(found)


def test_the_split_follows_from_columns_and_nothing_is_decoded(shards: Path, tmp_path: Path) -> None:
    samples = PackedShards(shards)
    for share in (0.1, 0.3):
        chosen, held = split(samples, share, known=scan_images(samples))
        assert held.tolist() == rule(samples, share) and len(held) >= share * 500 - 3
        assert sorted([*chosen, *held]) == list(range(500))
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    samples = PackedShards(copy)
    samples.image = None  # type: ignore[method-assign,assignment] # whoever asked for one would fail
    assert split(samples, 0.3)[1].tolist() == held.tolist()
    told: list[int] = []
    assert not scan_images(samples, told.append).unreadable and sum(told) == 500


def test_an_index_or_parquet_of_another_tar_is_not_believed(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    whole = [sample.key for sample in PackedShards(copy)]
    (copy / "00003.tar.idx").write_bytes((copy / "00003.tar.idx").read_bytes()[:-8])
    (copy / "00004.tar.idx").unlink()
    assert [sample.key for sample in PackedShards(copy)] == whole  # these tars are read themselves
    index = np.fromfile(copy / "00005.tar.idx", "<u8")
    index[1:-1] += 512
    index.tofile(copy / "00005.tar.idx")
    with pytest.raises(Exception, match=r"00005\.tar.*(holds no|damaged)"):
        [sample.key for sample in PackedShards(copy)]
    (copy / "00006.parquet").unlink()
    assert not PackedShards(copy).decoded


def test_other_bytes_in_a_large_folder_are_noticed_meanwhile(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    data = bytearray((copy / "00009.tar").read_bytes())
    data[600] ^= 1
    (copy / "00009.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"1 of its 10 tars hold other bytes than were packed: 00009\.tar"):
        scan_images(open_samples(copy))
    monkeypatch.setattr(packed, "AT_ONCE", 1000)
    for rank, found in ((0, False), (1, True)):
        samples = PackedShards(copy)
        scan_images(samples)
        samples.watch_bytes(rank, 2)
        for thread in threading.enumerate():
            if thread.name == "bytes":
                thread.join()
        if found:
            with pytest.raises(UserError, match=r"hold other bytes than were packed: 00009\.tar"):
                samples[0]
        else:
            assert samples[0].key == "000000000000"


# ---------------------------------------------------------------------------------------------------- order by shards


def test_batches_by_shard_need_few_of_them_at_a_time() -> None:
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(900, 1100, 60))
    count, batch = int(ends[-1]), 32
    bucket = rng.integers(0, 3, count)
    indices = np.random.default_rng([0, 1]).permutation(count)
    order = order_by_shards(np.random.default_rng(5), indices, bucket, ends, batch)
    assert (order == order_by_shards(np.random.default_rng(5), indices, bucket, ends, batch)).all()
    assert {*order.ravel().tolist()} == {*range(count)} and order.size < count + 3 * batch
    assert (bucket[order] == bucket[order][:, :1]).all()
    shard = np.searchsorted(ends, order, side="right")
    for ranks in (1, 2, 4, 8):
        for rank in range(ranks):
            own = shard[:-8, rank::ranks]  # the last ones may begin anew, to be full
            window = [len(np.unique(own[i : i + 64])) for i in range(0, len(own), 64)]
            assert max(window) <= 4 * 8 // ranks  # of 60: 8 lanes in all, each at one shard or between two
    assert min(len(np.unique(shard[i : i + 8])) for i in range(0, len(shard) - 8, 8)) >= 8  # and they are mixed
    assert not (order[:100] == np.sort(order[:100].ravel()).reshape(100, -1)).all()


@dataclass
class Remote:
    """Forty shards of 13 samples on a store, and which of its tars were asked for."""

    url: str
    folder: Path  # the same on a disk
    faults: Faults

    def tars(self, kind: str = "GET") -> list[str]:
        asked = [r.rpartition("/")[2] for r in self.faults.requests if r.startswith(kind)]
        return [name for name in asked if name.endswith(".tar")]


@pytest.fixture
def remote(
    s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Remote:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    proxy = Proxy(s3_server.port).__enter__()
    request.addfinalizer(lambda: proxy.__exit__())
    folder = make_packed(tmp_path / "shards", 520, 13)
    url = put(folder, s3_server.use(monkeypatch, proxy.port))
    proxy.faults.requests.clear()
    return Remote(url, folder, proxy.faults)


def letters(captions: list[str]) -> list[torch.Tensor]:
    return [torch.tensor([len(caption)]) for caption in captions]


@pytest.mark.long
def test_the_first_batch_of_a_store_comes_before_the_last_shards(remote: Remote) -> None:
    folder = bring_images(local_folder(remote.url), by_shard=True)
    samples, here = open_samples(folder), PackedShards(remote.folder)
    assert isinstance(samples, PackedShards) and samples.remote and not remote.tars()
    assert samples.fingerprint == here.fingerprint
    chosen, held = split(samples)
    assert held.tolist() == split(here)[1].tolist() and not remote.tars()
    assert samples[3] == here[3] and remote.tars() == ["00000.tar"]  # a range of it
    remote.faults.requests.clear()

    def stream(rank: int = 0, ranks: int = 1) -> Stream:
        return Stream(ImageDataset(samples, letters, 16), chosen, batch=16, seed=3, rank=rank, ranks=ranks)

    made = stream()
    batches = made.batches()
    first = next(batches)
    assert 8 <= len(set(remote.tars())) == len(remote.tars()) <= 24  # whole, of the first batches and some to come
    here_now = len(list(folder.glob("*.tar")))
    rest = [next(batches) for _ in range(len(made.epoch_order(0)) - 1)]
    assert len(set(remote.tars())) == 40 and here_now <= 24  # and of the next epoch, which come from the cache
    assert len(remote.tars()) == 40 and len(list(folder.glob("*.tar"))) <= 24
    assert {key for b in [first, *rest] for key in b.keys} == {here.key(int(i)) for i in chosen}
    batches.close()
    again = stream().batches(rest[9].cursor)
    for one, other in zip(rest[10:], again, strict=False):
        assert one.keys == other.keys and torch.equal(one.images, other.images) and one.cursor == other.cursor
    again.close()
    half = stream(1, 2).batches()
    parts = [next(half) for _ in range(5)]
    assert [part.keys for part in parts] == [b.keys[1::2] for b in [first, *rest][:5]]
    half.close()


@pytest.mark.long
def test_other_bytes_on_a_store_are_noticed_as_they_come(remote: Remote) -> None:
    tar = remote.folder / "00021.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    put(remote.folder, remote.url)
    samples = open_samples(bring_images(local_folder(remote.url), by_shard=True))
    scan_images(samples)  # of columns: it reads no tar
    batches = Stream(ImageDataset(samples, letters, 16), np.arange(520), batch=16).batches()
    with pytest.raises(UserError, match=r"hold other bytes than were packed: 00021\.tar"):
        list(itertools.islice(batches, 40))
    batches.close()


@pytest.mark.long
def test_training_from_a_store_goes_on_and_is_the_same(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run to its end, and one in two halves by two processes, of shards that are never here all at once."""
    words = ["train", remote.url, "--preset", "debug", "--batch", "8", "--steps", "20", "--save-every", "10"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    code = "import sys; from pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *words, "--out", str(tmp_path / "halves")])
    while process.poll() is None and not (tmp_path / "halves" / "checkpoints" / "000010").is_dir():
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert main([*words, "--out", str(tmp_path / "halves")]) == 0
    models = [tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors" for name in ("whole", "halves")]
    assert models[0].read_bytes() == models[1].read_bytes()
    here = shutil.copytree(tmp_path / "whole", tmp_path / "other", ignore=shutil.ignore_patterns("000020"))
    (here / "model_index.json").unlink()
    (here / "train.json").write_text((here / "train.json").read_text().replace('"finished"', '"once finished"'))
    assert main(["train", str(remote.folder), *words[2:], "--out", str(here)]) == 2
    assert "order" in capsys.readouterr().err  # which is another one
