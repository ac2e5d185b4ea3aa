"""Packed shards that were copied, renamed, or copied in part: verified, trained on, evaluated; what models then say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.ledger.whole import whole_row
from curate.shards.pack import PackConfig, pack
from curate.sources.find import open_folder
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from pipelines.cli import main
from tests.real_data import BUNDLED, embed_all, fetch_all
from tests.small_web import image

COUNT, SHARD = 160, 40
LEFT_OUT = "00001.tar"  # of the copy in part


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A data folder of parts of two photographs, packed as four shards."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("packed copies")
    (root / "images").mkdir()
    for number in range(COUNT):
        name, content, caption = image(number)
        (root / "images" / name).write_bytes(content)
        (root / "images" / name).with_suffix(".txt").write_text(caption or "")
    make_plan(str(root / "images"), Data(root / "data"), SourceConfig(shard_size=50))
    data = Data(root / "data")
    fetch_all(data)
    embed_all(data, BUNDLED, {})
    select(data, SelectConfig(name="all", rules={"seen": "width > 0"}))
    pack(data, "all", PackConfig(shard_size=SHARD))
    return data


@pytest.fixture(scope="module")
def copies(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("elsewhere")
    found = {"copied": root / "all", "renamed": root / "my good images", "in part": root / "part" / "all"}
    for folder in found.values():
        shutil.copytree(data.packed("all"), folder)
    for path in found["in part"].glob(f"{Path(LEFT_OUT).stem}.*"):
        path.unlink()
    return found


@pytest.fixture(scope="module")
def models(copies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each copy, by its name."""
    root = tmp_path_factory.mktemp("models of copies")
    for name, folder in copies.items():
        words = ["train", str(folder), "--out", str(root / name), "--preset", "debug", "--batch", "16", "--steps", "2"]
        assert main(words) == 0
    return root


def said_by(model: Path, name: str = "train") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / f"{name}.json").read_text())
    return found


@pytest.mark.long
def test_copies_are_verified_and_trained_on(
    data: Data, copies: dict[str, Path], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, folder in copies.items():
        assert main(["verify", str(folder), "--json"]) == 0
        missing = [LEFT_OUT] if name == "in part" else []
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["missing"] == missing
        about = said_by(models / name)["data"]
        assert about["folder"] == str(folder) and about.get("missing", []) == missing
        assert about["pictures"] == COUNT - SHARD * len(missing)
        assert any("not in this copy" in note for note in about.get("notes", [])) == bool(missing)
        assert (
            main(["sample", str(models / name), "a temple", "--out", str(models / f"drawn {name}"), "--steps", "2"])
            == 0
        )
        assert (models / f"drawn {name}" / "000000.png").is_file()
    one, other = (models / name for name in ("copied", "renamed"))
    for file in (p for p in one.rglob("*.safetensors") if "checkpoints" not in p.parts):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()  # the name of a folder changes nothing
    assert said_by(one, "data") == said_by(other, "data")


@pytest.mark.long
def test_copies_are_evaluated_on(copies: dict[str, Path], models: Path, tmp_path: Path) -> None:
    """A model's own data is known again under any name; of a copy in part it is known what it was trained on."""
    for model, folder in (("copied", "renamed"), ("in part", "in part")):
        out = tmp_path / model
        words = ["evaluate", str(models / model), str(copies[folder]), "--out", str(out), "--steps", "2"]
        assert main([*words, "--prompts", "8"]) == 0
        facts = json.loads((out / "evaluation.json").read_text())
        held = facts["figures"]["held_out_loss"]["held_out"]
        assert held["pictures"] == said_by(models / model)["data"]["held_out"] >= 8


@pytest.mark.long
def test_models_of_copies_are_found_and_say_what_they_saw(
    data: Data, copies: dict[str, Path], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their manifest; and the place of each sample in each copy is that which the trainer counted."""
    whole = open_folder(data.packed("all"))
    keys, lacked = [whole.key(i) for i in range(len(whole))], range(SHARD, 2 * SHARD)
    sides = {}
    for name, folder in copies.items():
        samples, split = open_folder(folder), said_by(models / name, "data")
        sides[name] = {samples.key(i): "held it out" for i in split["held_out"]}
    assert all(len(held) >= 8 for held in sides.values())
    for index in (*range(0, COUNT, 9), *(keys.index(key) for held in sides.values() for key in held)):
        found = whole_row(data, keys[index], models=[models]).models
        uses = {Path(use.model).name: use.use for use in found}
        expected = {name: held.get(keys[index], "trained on it") for name, held in sides.items()}
        if index in lacked:
            expected["in part"] = "its copy of the shards lacked it"
        assert uses == expected
    assert main(["remove", str(data.root), "--keys", keys[0], "--models", str(models), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {Path(p).name for p in facts["models"]["all"]} == copies.keys()
