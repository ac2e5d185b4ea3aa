"""Models of others in transformers' format: a folder here, or a repository of the Hugging Face hub at one commit.

What others made is read, never run: configurations, tokenizers, and weights in safetensors. A folder or a repository
that has pickles alone, or wants code of its own to be run (`auto_map`), is refused before anything is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, printable, read_json_file
from curate.store.files import sha256_once
from curate.weight_files import read_header, weight_files

PATIENCE = 5.0
"""Seconds to wait for the first sign of life of a server that has weights: the hub's client would try for minutes."""

_CONFIGS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "*processor_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
)  # fmt: skip
_WORDS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "*.spm", "spiece.model",
    "sentencepiece*.model", "chat_template.jinja",
)  # fmt: skip
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")

_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelFiles:
    """The files of the transformers model that an option `model` names: a folder, or a repository of the hub.

    name: the folder's whole path, or the repository.    revision: of a repository; a commit where it is known.
    folder: where its files lie, or at least its configurations; None where nothing is on this machine yet.
    complete: whether the weights are there, too.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        """Asks no server. UserError for a folder that is not there, and for a model that can't be used, as far as its
        files are on this machine."""
        path = Path(name).expanduser()
        self.folder: Path | None = path.absolute()
        if path.is_dir() or not _is_repository(name, path):
            if revision is not None:
                raise UserError(f"revision: {printable(name, 200)} is a folder, and only the hub's models have them")
            if not path.is_dir():
                raise UserError(_no_folder(name, path))
            self.name, self.revision, self.complete = str(self.folder), None, True
            check_configs(path)
            check_weights(path)
        else:
            self.name, self.revision = name, revision
            self._look_in_cache()

    @property
    def digest(self) -> list[str]:
        """What values depend on: the repository and its commit, or the sha256 of each file in the folder."""
        if self.revision is not None or self.folder is None:
            return [self.name, self.revision or ""]
        return [f"{name} {sha256}" for name, sha256 in self.sha256.items()]

    @property
    def sha256(self) -> dict[str, str]:
        """The sha256 of each file that matters. One is read once in a process, unless its size or time changes."""
        patterns = (*_CONFIGS, *_WORDS, *_WEIGHTS)
        files = sorted(self.folder.iterdir()) if self.folder is not None else []
        wanted = [path for path in files if any(fnmatch(path.name, pattern) for pattern in patterns)]
        return {path.name: sha256_once(path) for path in wanted}

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"model": self.name, "revision": self.revision, "sha256": self.sha256}

    @property
    def config(self) -> dict[str, Any] | None:
        """What its config.json says; None where that is not on this machine."""
        return None if self.folder is None else read_json_file(self.folder / "config.json")

    def pinned(self) -> dict[str, str]:
        """The options `model` and `revision` that mean the same model on another day: a whole path, or the commit that
        the hub's cache has, else that of the hub now. UserError where the hub has to be asked and can't be."""
        if self.revision is None and self.complete:
            return {"model": self.name}
        if not _COMMIT.fullmatch(self.revision or ""):
            from huggingface_hub import hf_hub_download

            self._require_reachable()
            try:  # which also notes in the cache which commit the revision is
                hf_hub_download(self.name, "config.json", revision=self.revision)
            except (OSError, ValueError) as e:
                raise self._unavailable(e) from e
            self._look_in_cache()
        assert self.revision is not None
        return {"model": self.name, "revision": self.revision}

    def fetch(self) -> Path:
        """Have all its files on this machine; returns their folder. UserError within seconds where they can't be had:
        the hub does not answer, has no such model, or has it as pickles or with code alone."""
        if not self.complete:
            self.pinned()
            self._require_reachable()
            try:
                self.folder = self._download()
            except (OSError, ValueError) as e:
                raise self._unavailable(e) from e
            check_weights(self.folder)
            self.complete = True
        assert self.folder is not None
        return self.folder

    def _download(self) -> Path:
        """Fetch what is wanted, weights last. Raises what the hub's client raises."""
        from huggingface_hub import list_repo_files, snapshot_download

        there = list_repo_files(self.name, revision=self.revision)
        if not {"model.safetensors", "model.safetensors.index.json"} & {*there}:
            raise UserError(
                f"{self.name} has no model.safetensors{_pickles(there)}. Its page may have a pull request with "
                "one: then give `revision: refs/pr/NUMBER`"
            )
        wanted = [name for name in there if any(fnmatch(name, p) for p in (*_CONFIGS, *_WORDS)) and "/" not in name]
        folder = Path(snapshot_download(self.name, revision=self.revision, allow_patterns=wanted))
        check_configs(folder)
        snapshot_download(self.name, revision=self.revision, allow_patterns=[*_WEIGHTS], ignore_patterns="*/*")
        return folder

    def load(self, kind: Any, **options: Any) -> Any:
        """What a class of transformers, such as AutoProcessor, makes of the files; UserError where it can't.

        Nothing is fetched but what `fetch` does, no code beside the files is run, and no file that builds objects read.
        """
        folder = self.fetch()
        try:
            with no_progress_bars(), no_warnings():
                return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        except MemoryError:
            raise
        except Exception as e:  # whatever files of others make of a constructor
            raise UserError(f"{self.name}: no {kind.__name__} can be made of it: {error_line(e)}") from e

    def load_model(self, kind: Any, **options: Any) -> Any:
        """As `load`, a model with its weights, in the mode for evaluation. UserError where some of them are missing,
        which transformers would make up at random."""
        model, report = self.load(kind, use_safetensors=True, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise UserError(f"{self.name}: its weights lack {missing[0]}{more}, so it can't be used as {kind.__name__}")
        return model.eval()

    def _look_in_cache(self) -> None:
        """What the hub's cache has of the repository at this revision."""
        from huggingface_hub import try_to_load_from_cache

        self.complete, self.folder = False, None
        found = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        if isinstance(found, str):
            self.folder = Path(found).parent
            self.revision = self.folder.name
            check_configs(self.folder)
            files = weight_files(self.folder)
            self.complete = bool(files) and all(file.suffix == ".safetensors" for file in files)

    def _require_reachable(self) -> None:
        from huggingface_hub import constants

        if why := unreachable(constants.ENDPOINT, hub=True):
            raise self._missing(why)

    def _missing(self, why: str) -> UserError:
        at = f" --revision {self.revision}" if self.revision else ""
        return UserError(
            f"the model {self.name} is not on this machine, and {why}. Two ways on: `hf download {self.name}{at}` on "
            "another machine prints a folder: copy it here and give it as `model: FOLDER`; or set HF_ENDPOINT to a "
            "mirror of the hub that answers"
        )

    def _unavailable(self, error: Exception) -> UserError:
        """What the hub's refusal means."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return UserError(f"{self.name} is gated: accept its terms on its page, then `hf auth login`")
        if isinstance(error, errors.RepositoryNotFoundError):
            return UserError(f"the hub has no model {self.name}, or it is private: then `hf auth login`")
        if isinstance(error, errors.RevisionNotFoundError):
            return UserError(f"{self.name} has no revision {printable(self.revision, 200)}")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return UserError(f"{self.name} has no config.json: it is no model in transformers' format")
        return self._missing(f"it could not be fetched ({error_line(error)})")


@contextlib.contextmanager
def no_progress_bars(*libraries: str) -> Iterator[None]:
    """Without the progress bars that transformers, and further `libraries` with a module utils.logging such as its,
    draw while they load and save."""
    found = [importlib.import_module(f"{library}.utils.logging") for library in ("transformers", *libraries)]
    drawing = [log for log in found if log.is_progress_bar_enabled()]
    for log in drawing:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in drawing:
            log.enable_progress_bar()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Without what transformers warns of while it loads: a processor that has no variant on torchvision, say."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def unreachable(server: str, *, hub: bool) -> str | None:
    """Why a server that has weights, the `hub` perhaps, can't be asked; None where it answers anything in seconds."""
    from huggingface_hub import constants

    if hub and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass
    except OSError as e:
        # one that is not trusted is there: that is for the client to say
        if not (isinstance(e, urllib.error.URLError) and isinstance(e.reason, ssl.SSLError)):
            return f"{server} does not answer"
    return None


def check_configs(folder: Path) -> None:
    """UserError where a folder is no model of transformers, or one that wants code of its own to be run."""
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent for path in folder.glob("*/config.json"))
        pipeline = "it is a diffusers pipeline, and" if (folder / "model_index.json").is_file() else "there is"
        hint = f"; did you mean {inner[0]}?" if inner and pipeline == "there is" else ""
        raise UserError(
            f"{folder}: {pipeline} no config.json: a model is expected as transformers saves it (save_pretrained){hint}"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is an adapter: merge it into its base model, and save that (`merge_and_unload`)")
    for path in sorted(folder.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in _CONFIGS):
            continue
        content = read_json_file(path, finite=False)
        if not isinstance(content, dict):
            raise UserError(f"{path} is no configuration: an object is expected")
        if _has(content, "auto_map"):
            raise UserError(
                f"{path}: the model wants code of its own to be run (auto_map), and what others wrote is not run here. "
                "Give a model of a kind that transformers has itself, or export it to ONNX: {use: onnx, file: FILE}"
            )
        if _has(content, "transformers_weights"):
            raise UserError(f"{path}: weights under another name (transformers_weights) are not read")


def check_weights(folder: Path) -> None:
    """UserError where a folder has no weights in safetensors, or a file of them is cut or a pointer."""
    files = weight_files(folder)
    if not files or any(file.suffix != ".safetensors" for file in files):
        why = _pickles([path.name for path in folder.iterdir()])
        way = ". Where you trust it, load it with transformers: `save_pretrained` writes safetensors" if why else ""
        raise UserError(f"{folder} has no model.safetensors, nor all files of an index of such{why}{way}")
    for file in files:
        read_header(file)


def _pickles(names: Iterable[str]) -> str:
    """What to say of files of weights that are no safetensors; empty where there are none."""
    found = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".pkl", ".msgpack")))
    return f", only {found[0]}, and to load such a file may run code that is in it" if found else ""


def _has(value: Any, key: str) -> bool:
    """Whether an object in a JSON value has this key."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if key in one:
                return True
            left += one.values()
        elif isinstance(one, list):
            left += one
    return False


def _is_repository(name: str, path: Path) -> bool:
    """Whether a name that is no folder's may be one of the hub: ORG/NAME, where no folder ORG is here."""
    return _ID.fullmatch(name) is not None and not path.exists() and not path.parent.is_dir()


def _no_folder(name: str, path: Path) -> str:
    shown = printable(name, 200)
    if path.exists():
        return f"{shown} is a file: a folder with config.json and model.safetensors is expected, or a hub's ORG/NAME"
    if _ID.fullmatch(name):
        return (
            f"{shown} is not there: {path.parent} is a folder here. Is a model of the hub meant? `hf download {shown}` "
            "prints the folder to give"
        )
    return f"{shown}: there is no such folder, nor is it a hub's ORG/NAME"
