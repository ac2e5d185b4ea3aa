"""Models of others: which folders and repositories are read, at which commit, and what is refused at once."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from aesthetic.errors import UserError
from curate import hub
from curate.hub import ModelFiles
from tests.small_hub import COMMIT, save_classifier, serve_hub


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "tiny", ["cat", "dog"])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which nobody answers."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def _ask(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    import huggingface_hub
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)


def test_a_folder_is_itself_and_its_digest_that_of_its_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ModelFiles(str(model))
    assert files.fetch() == model and files.revision is None and files.config is not None
    assert files.pinned() == {"model": str(model)}
    assert set(files.sha256) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("# not what values depend on")
    monkeypatch.chdir(tmp_path)
    assert ModelFiles("copy").pinned() == {"model": str(copy)}
    assert ModelFiles("copy").digest == files.digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    assert ModelFiles("copy").digest != files.digest


def test_a_repository_is_pinned_to_its_commit_and_fetched_without_what_runs(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = shutil.copytree(model, tmp_path / "there")
    for name in ("pytorch_model.bin", "optimizer.pt", "modeling_tiny.py", "model.fp16.safetensors", "README.md"):
        (there / name).write_bytes(b"not wanted")
    (there / "onnx").mkdir()
    (there / "onnx" / "preprocessor_config.json").write_text("{}")
    with serve_hub({"someone/tiny": there}) as (address, asked):
        _ask(monkeypatch, address)
        files = ModelFiles("someone/tiny")
        assert not asked and files.config is None and files.revision is None
        assert files.pinned() == {"model": "someone/tiny", "revision": COMMIT}
        assert files.config is not None and files.config["id2label"] == {"0": "cat", "1": "dog"}
        folder = files.fetch()
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in model.iterdir())
        assert files.facts == {"model": "someone/tiny", "revision": COMMIT, "sha256": ModelFiles(str(model)).sha256}
        wanted = ModelFiles("someone/absent"), ModelFiles("someone/tiny", "v9")
        for missing, told in zip(wanted, ("no model someone/absent", "no revision v9"), strict=True):
            with pytest.raises(UserError, match=told):
                missing.fetch()
    # what is in the cache needs nobody, by its name, branch or commit: and they are one
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    _ask(monkeypatch, "http://127.0.0.1:9")
    again = [ModelFiles("someone/tiny", revision) for revision in (None, "main", COMMIT)]
    assert [m.fetch() for m in again] == [folder] * 3
    assert all(m.digest == files.digest == ["someone/tiny", COMMIT] for m in again)


def test_a_repository_of_pickles_or_code_is_refused_before_weights_are_fetched(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickles, code = shutil.copytree(model, tmp_path / "pickles"), shutil.copytree(model, tmp_path / "code")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    with serve_hub({"someone/pickles": pickles, "someone/code": code}) as (address, asked):
        _ask(monkeypatch, address)
        with pytest.raises(UserError, match=r"someone/pickles.*pytorch_model\.bin.*refs/pr"):
            ModelFiles("someone/pickles").fetch()
        with pytest.raises(UserError, match="auto_map"):
            ModelFiles("someone/code").fetch()
        with pytest.raises(UserError, match="auto_map"):
            ModelFiles("someone/code")
    assert not [path for path in asked if path.endswith((".bin", ".safetensors"))]


def test_out_of_reach_the_ways_on_are_told_within_seconds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        for address in ("127.0.0.1:9", f"127.0.0.1:{silent.getsockname()[1]}"):
            monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
            began = time.monotonic()
            for ask in (ModelFiles("someone/tiny").pinned, ModelFiles("someone/tiny", "f" * 40).fetch):
                with pytest.raises(UserError, match=r"someone/tiny.*does not answer.*hf download.*model: FOLDER"):
                    ask()
            assert time.monotonic() - began < 5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        ModelFiles("someone/tiny").fetch()


def _auto_map(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "deep": [{"auto_map": {}}]}))


def _renamed_weights(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_weights": "evil.bin"}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_auto_map, r"preprocessor_config\.json.*auto_map"),
        (_renamed_weights, "transformers_weights"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"model\.bin.*may run code.*save_pretrained",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "nor all files of an index"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "is cut"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is no configuration"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "merge_and_unload"),
    ],
)
def test_a_folder_that_can_not_be_used(model: Path, tmp_path: Path, spoil: Any, told: str) -> None:
    folder = shutil.copytree(model, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(UserError, match=told):
        ModelFiles(str(folder))


def test_names_that_are_neither(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    for name, told in [
        ("./absent", "no such folder"),
        ("absent", "no such folder"),
        (f"{model.parent.name}/absent", "hf download"),
        (str(model / "config.json"), "is a file"),
        ("https://huggingface.co/a/b", "ORG/NAME"),
    ]:
        with pytest.raises(UserError, match=told):
            ModelFiles(name)
    with pytest.raises(UserError, match=r"revision: .* is a folder"):
        ModelFiles(str(model), "main")


def test_weights_that_are_missing_are_not_made_up(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageClassification

    folder = shutil.copytree(model, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack classifier\.weight"):
        ModelFiles(str(folder)).load_model(AutoModelForImageClassification)
