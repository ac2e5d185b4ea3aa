"""Models, images, heads and evaluations on an object store: the same bytes as on a disk, and called by their URLs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from aesthetic.catalog import load_head
from aesthetic.errors import UserError
from curate.annotators.registry import make_annotator
from curate.layout import Data
from curate.store.mirror import store_at
from curate.store.objects import ObjectStore
from pipelines.cli import main
from pipelines.recipe import parse_recipe
from tests.small_train import make_images
from tests.stores import Server
from train.generate.files import read_facts
from train.models.unet import new_model
from train.places import bring, local_folder, push

TRAINING = ("--preset", "debug", "--batch", "16", "--steps", "60", "--save-every", "20", "--seed", "3")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(folder: Path, url: str) -> str:
    """A copy of a folder on a store."""
    store = ObjectStore(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(path, path.relative_to(folder).as_posix())
    return url


def on_store(url: str) -> dict[str, bytes]:
    store = ObjectStore(url)
    return {name: data for name, data, *_ in store.get_many(found.name for found in store.list())}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What a command prints, which went well."""
    code = main([*map(str, words)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out + said.err


def test_a_model_on_a_store_draws_images_onto_it(
    s3_url: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    new_model("debug", ["a red disc", "a blue disc on white"] * 4).save_pretrained(tmp_path / "discs")
    (tmp_path / "discs" / "checkpoints").mkdir()
    (tmp_path / "discs" / "checkpoints" / "large").write_bytes(b"not wanted")
    model, out = put(tmp_path / "discs", f"{s3_url}/models/discs"), f"{s3_url}/drawn"
    words = ["a red disc", "--seed", 40, "--steps", 2, "--n", 2, "--grid", "--out"]
    run(capsys, "sample", tmp_path / "discs", *words, tmp_path / "drawn")
    said = run(capsys, "sample", model, *words, out)
    assert f"{out}/000000.png  seed 40" in said and f"tastemaker sample --again {out}/000001.png" in said
    assert "mirrors" not in said and str(cache) not in said
    there = on_store(out)
    assert sorted(there) == ["000000.png", "000001.png", "grid-000000.png"]
    for name, data in there.items():
        (tmp_path / name).write_bytes(data)
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / name)), np.asarray(Image.open(tmp_path / "drawn" / name))
        )
    own, other = read_facts(tmp_path / "000001.png"), read_facts(tmp_path / "drawn" / "000001.png")
    assert own["model"]["name"] == model and own["model"]["sha256"] == other["model"]["sha256"]

    # what another process has put there since keeps its number
    ObjectStore(out).put(b"another's", "000002.png")
    said = run(capsys, "sample", "--again", f"{out}/000001.png", "--out", out)
    assert "bit for bit" in said and on_store(out)["000003.png"] == there["000001.png"]
    assert on_store(out)["000002.png"] == b"another's"
    assert not list(cache.glob("mirrors/*/*/checkpoints/large"))


@pytest.mark.long
def test_a_head_on_a_store_is_that_of_a_disk(
    s3_url: str, cache: Path, real_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = put(real_data.root, f"{s3_url}/data")
    tables = [pq.read_table(real_data.metadata(s)) for s in real_data.shards(real_data.embedded_record)]
    lines = [f"{key},{i * 7 % 10 + 1}" for i, key in enumerate(k for t in tables for k in t["key"].to_pylist())]
    (tmp_path / "r.csv").write_text("\n".join(["key,score", *lines[:-6]]) + "\n")
    ObjectStore(s3_url).put_file(tmp_path / "r.csv", "r.csv")
    run(capsys, "fit", tmp_path / "r.csv", "--data", real_data.root, "--out", tmp_path / "taste", "--suggest", 3)
    out = f"{s3_url}/heads/taste"
    said = run(capsys, "fit", f"{s3_url}/r.csv", "--data", data, "--out", out, "--suggest", 3)
    assert f"head  {out}" in said and str(cache) not in said
    there, here = on_store(out), on_disk(tmp_path / "taste")
    assert sorted(there) == sorted(here) and "suggest.csv" in there
    report = json.loads(there.pop("report.json")), json.loads(here.pop("report.json"))
    assert report[0].pop("asked") != report[1].pop("asked") and report[0] == report[1]
    assert there == here

    for spec in (out, {"use": "head", "head": out}):  # as a recipe names it
        assert make_annotator("taste", spec).digest == load_head(tmp_path / "taste").digest
    parse_recipe(f"columns: {{taste: '{out}'}}")
    with pytest.raises(UserError, match="a file or folder on a disk"):
        parse_recipe(f"embed: {{weights: '{out}'}}")
    said = run(capsys, "heads", "show", out)
    assert f"tastemaker annotate DATA taste={out}" in said
    assert main(["fit", str(tmp_path / "r.csv"), "--data", data, "--out", out]) == 2
    assert f"{out} holds a head already" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images in two tars."""
    images = make_images(tmp_path_factory.mktemp("images") / "discs", 60)
    folder = tmp_path_factory.mktemp("packed") / "discs"
    folder.mkdir()
    files = sorted(images.iterdir())
    for i in range(2):
        with tarfile.open(folder / f"{i:05d}.tar", "w") as tar:
            for file in files[i * 60 : (i + 1) * 60]:
                tar.add(file, file.name)
    return folder


def train(cache: Path, *words: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TASTEMAKER_CACHE": str(cache)}
    command = [sys.executable, "-m", "pipelines.cli", "train", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture(scope="module")
def on_a_disk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "discs"
    process = train(out.parent / "cache", shards, "--out", out, *TRAINING)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return out


@pytest.fixture(scope="module")
def killed(shards: Path, s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """URLs of images and of a model, trained by a process that was killed and by another that knew nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        url, folder = s3_server.use(patch), tmp_path_factory.mktemp("caches")
        data, model = put(shards, f"{url}/discs"), f"{url}/model"
        process = train(folder / "a", data, "--out", model, *TRAINING)
        while ObjectStore(model).head("checkpoints/000020/record.json") is None:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.communicate()
        there = on_store(model)
        assert "model_index.json" not in there and "checkpoints/000060/record.json" not in there
        process = train(folder / "b", data, "--out", model, *TRAINING)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert str(folder) not in said, said
        return data, model, said


def test_what_was_removed_here_is_removed_there_and_nothing_of_others(s3_url: str, cache: Path) -> None:
    folder = local_folder(f"{s3_url}/model")
    for step in ("000010", "000020"):
        (folder / "checkpoints" / step).mkdir(parents=True)
        (folder / "checkpoints" / step / "record.json").write_text(step)
    push(folder)
    ObjectStore(f"{s3_url}/model").put(b"a worker's", "checkpoints/000030/record.json")
    store_at(folder).refresh()
    shutil.rmtree(folder / "checkpoints" / "000010")
    push(folder)
    found = on_store(f"{s3_url}/model")
    assert found == {"checkpoints/000020/record.json": b"000020", "checkpoints/000030/record.json": b"a worker's"}
    bring(folder)
    assert (folder / "checkpoints" / "000030" / "record.json").read_text() == "a worker's"


def test_a_run_that_is_refused_leaves_nothing_on_a_store(
    s3_url: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images(tmp_path / "discs", 8)
    (images / "003.png").write_bytes(b"\x89PNG")
    data, model = put(images, f"{s3_url}/discs"), f"{s3_url}/model"
    assert main(["train", data, "--out", model, "--preset", "debug"]) == 2
    said = capsys.readouterr().err
    assert f"7 images in {data} can be read" in said and str(cache) not in said
    assert [found.name for found in ObjectStore(model).list()] == [".lease"]


@pytest.mark.long
def test_a_model_on_a_store_goes_on_on_another_machine(
    killed: tuple[str, str, str], on_a_disk: Path, s3_url: str
) -> None:
    data, model, said = killed
    assert "goes on from step 20, " in said or "goes on from step 40, " in said
    assert f"{model}/checkpoints/0000" in said and f"model  {model}" in said
    there, here = on_store(model), on_disk(on_a_disk)
    own = {"train.json", "log.jsonl", "README.md", "loss.png", "logs/train.log"}  # times, and where things are
    assert {n for n in there if not n.startswith(".")} == {n for n in here if not n.startswith(".")}  # leases, locks
    states = {n for n in here if "/trainer/" in n}  # equal in what they hold: their metadata come in any order
    assert [n for n in sorted(here.keys() - own - states - {".lock", ".workers"}) if there[n] != here[n]] == []
    for name in states:
        a, b = (load(found[name]) for found in (there, here))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    facts = json.loads(there["train.json"])
    assert facts["data"]["folder"] == data and facts["result"]["best"]["checkpoint"].startswith(f"{model}/checkpoints/")
    log = [json.loads(line) for line in there["log.jsonl"].splitlines()]
    assert [r["step"] for r in log] == [json.loads(line)["step"] for line in here["log.jsonl"].splitlines()]
    assert log[-1]["checkpoint"] == f"{model}/checkpoints/000060"


@pytest.mark.long
def test_an_evaluation_on_a_store_is_that_of_a_disk(
    killed: tuple[str, str, str],
    on_a_disk: Path,
    shards: Path,
    s3_url: str,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, model, _ = killed
    (tmp_path / "prompts.txt").write_text("\n".join(f"a disc number {i}" for i in range(8)))
    words = ["--prompts", tmp_path / "prompts.txt", "--steps", 2]
    run(capsys, "evaluate", on_a_disk, shards, "--out", tmp_path / "evaluation", *words)
    said = run(capsys, "evaluate", model, data, *words)
    assert f"evaluation  {model}/evaluation/evaluation.json" in said and str(cache) not in said
    there, here = on_store(f"{model}/evaluation"), on_disk(tmp_path / "evaluation")
    figures = [json.loads(found["evaluation.json"])["figures"] for found in (there, here)]
    assert figures[0] == figures[1]
    assert json.loads(there["evaluation.json"])["asked"]["model"]["name"] == model
    drawn = [n for n in there if n.startswith("samples/")]
    assert len(drawn) == 8 and there.keys() - {".lease"} == here.keys() - {".lock", ".workers"}
    for name in drawn:
        a, b = (np.asarray(Image.open(io.BytesIO(found[name]))) for found in (there, here))
        assert np.array_equal(a, b)
    began = time.monotonic()
    assert "evaluated in" in run(capsys, "evaluate", model, data, *words)  # what is done is found
    assert time.monotonic() - began < 60 and on_store(f"{model}/evaluation") == there


@pytest.mark.long
def test_a_lora_and_its_model_are_on_a_store(
    killed: tuple[str, str, str], s3_url: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model, _ = killed
    lora = f"{s3_url}/lora"
    said = run(capsys, "train", data, "--from", model, "--lora", 2, "--out", lora, "--steps", 2, "--batch", 8)
    assert f"tastemaker sample {model} " in said and f"--lora {lora}" in said
    assert "base_model" not in on_store(lora)["README.md"].decode()
    words = ["a red disc", "--lora", f"{lora}:0.5", "--seed", 1, "--steps", 2, "--out", tmp_path / "drawn"]
    run(capsys, "sample", model, *words)
    facts = read_facts(tmp_path / "drawn" / "000000.png")
    assert facts["loras"][0]["name"] == lora and facts["model"]["name"] == model
    assert "bit for bit" in run(capsys, "sample", "--again", tmp_path / "drawn/000000.png", "--out", tmp_path / "drawn")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["train", "{}/data", "--out", "{}/model"], "{}/data is a data folder of ours: give packed shards in it"),
        (["train", "{}/nothing", "--out", "{}/model"], "{}/nothing"),
        (["sample", "{}/nothing", "a fox", "--out", "{}/drawn"], "{}/nothing holds no diffusers pipeline"),
        (["serve", "{}/nothing", "--out", "{}/drawn"], "keeps its images on a disk"),
        (["fit", "{}/r.csv", "--data", "{}/data", "--out", "{}/head"], "there is no such file"),
    ],
)
def test_what_is_not_on_a_store_is_said(
    s3_url: str, cache: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    ObjectStore(f"{s3_url}/data").put(b"{}", "plan/plan.json")
    assert main([word.format(s3_url) for word in words]) == 2
    said = capsys.readouterr().err
    assert why.format(s3_url) in said and str(cache) not in said, said
    assert [found.name for found in ObjectStore(s3_url).list()] == ["data/plan/plan.json"]
