"""open_clip's models as encoders: which weights are meant, whether they fit the architecture, and how they run."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import json
import logging
import pickle
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.errors import UserError
from curate.encoders.base import Encoder, name_by_digest, name_by_tag
from curate.hub import unreachable
from curate.store.files import sha256_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_WIDEST = 32
"""Long side over short side of what an open_clip transform gets to see. It resizes the short side to the model's input
before it crops, so 50000 x 1 pixels would get 11 million columns; what is cut off here, it would crop anyway."""


class OpenClipEncoder(Encoder):
    """A model of open_clip, its transform and its tokenizer. Weights stay in fp32; autocast gives fp16 and bf16."""

    def __init__(
        self,
        architecture: str,
        pretrained: str,
        weights: str | None,
        device: str | None,
        precision: str | None,
        threads: int | None,
    ) -> None:
        import open_clip
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {device}: torch sees no CUDA device here")
        on_gpu = self._device.type == "cuda"
        self.precision = precision or ("fp16" if on_gpu else "fp32")
        self.batch_size = 256 if on_gpu else 32

        found = find_weights(architecture, pretrained, weights)
        self.name = found.name
        assert found.file is not None
        self._sha256 = sha256_file(found.file)
        self._model = _build(architecture, found.file, found.published).to(self._device).eval()
        preprocessing = open_clip.transform.PreprocessCfg(**self._model.visual.preprocess_cfg)
        self._transform = open_clip.transform.image_transform_v2(preprocessing, is_train=False)
        self._resize_mode = preprocessing.resize_mode
        try:
            self._tokenizer: Callable[[list[str]], torch.Tensor] = open_clip.get_tokenizer(architecture)
        except (OSError, ImportError) as e:
            raise UserError(f"the tokenizer of {architecture} could not be loaded: {e}") from e
        self._activation = "quick_gelu" if found.quick_gelu else "gelu"
        self.dim = int(open_clip.get_model_config(architecture)["embed_dim"])

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """An image through open_clip's own transform for evaluation: (3, side, side) float32."""
        from PIL import Image

        if self._resize_mode == "shortest":  # then the middle of an extremely long image is enough
            height, width = image.shape[:2]
            longest = _WIDEST * min(height, width)
            top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
            image = np.ascontiguousarray(image[top : top + longest, left : left + longest])
        return self._transform(Image.fromarray(image)).numpy()

    def _vectors(self, batch: np.ndarray, exact: bool = False) -> np.ndarray:
        import torch

        try:
            return self._run(self._model.encode_image, torch.from_numpy(np.ascontiguousarray(batch)), exact)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        # outside the except: while the exception lives it holds the tensors of the failed attempt
        torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        self.batch_size, self.halved = min(self.batch_size, half), True
        log.warning("%s: out of memory at %d images, going on with %d", self.name, len(batch), half)
        return np.concatenate([self._vectors(batch[:half], exact), self._vectors(batch[half:], exact)])

    def _text_vectors(self, texts: list[str]) -> np.ndarray:
        return self._run(self._model.encode_text, self._tokenizer(texts), exact=False)

    def _run(self, part: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, exact: bool) -> np.ndarray:
        import torch

        if self._device.type == "cuda":
            batch = batch.pin_memory()
        with torch.inference_mode(), self._numerics(exact):
            return part(batch.to(self._device, non_blocking=True)).float().cpu().numpy()

    @contextlib.contextmanager
    def _numerics(self, exact: bool) -> Iterator[None]:
        """fp32 without TF32 where `exact`; else the precision of the run."""
        import torch

        if exact:
            settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
            before = [s.fp32_precision for s in settings]
            for s in settings:
                s.fp32_precision = "ieee"
            try:
                yield
            finally:
                for s, value in zip(settings, before, strict=True):
                    s.fp32_precision = value
        elif self.precision == "fp32":
            yield
        else:
            with torch.autocast(self._device.type, torch.float16 if self.precision == "fp16" else torch.bfloat16):
                yield

    def _details(self) -> dict[str, Any]:
        return {
            "weights": self._sha256,
            "activation": self._activation,
            "preprocessing": dict(self._model.visual.preprocess_cfg),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weights:
    """Which weights a name means, and what open_clip knows about them."""

    name: str  # the encoder's
    file: Path | None  # None where they are published and not on this machine
    quick_gelu: bool
    published: dict[str, Any]  # open_clip's entry for the tag, with its preprocessing; empty for a file of one's own


def find_weights(architecture: str, pretrained: str, weights: str | None) -> _Weights:
    """Resolve which weights are meant and get them; UserError before anything large is loaded."""
    meant = _resolve(architecture, pretrained, weights)
    if meant.file is not None:
        return meant
    _require_reachable(meant.name, meant.published)
    from open_clip.pretrained import download_pretrained

    try:
        return dataclasses.replace(meant, file=Path(download_pretrained(meant.published)))
    except OSError as e:
        raise _missing(meant.name, meant.published, f"they could not be downloaded ({e})") from e


def check_weights(architecture: str, pretrained: str, weights: str | None) -> bool:
    """Whether the weights are on this machine; UserError where they are not and can't be fetched. Loads no library."""
    meant = _resolve(architecture, pretrained, weights)
    if meant.file is None:
        _require_reachable(meant.name, meant.published)
        return False
    with open(meant.file, "rb") as f:
        head = f.read(10)
    # a page of a web site, or git's pointer to a large file, is neither of torch's formats nor safetensors
    safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < meant.file.stat().st_size
    if not (safetensors or head.startswith((b"PK", b"\x80"))):
        raise UserError(
            f"{meant.file} holds no weights: it begins with {head!r}, and is neither safetensors nor torch's"
        )
    _require_tokenizer(architecture)
    return True


def _require_tokenizer(architecture: str) -> None:
    """UserError where an architecture's tokenizer is one of the hub's (as SigLIP's), and can't be had."""
    repository = ((_config(architecture) or {}).get("text_cfg") or {}).get("hf_tokenizer_name")
    if not repository or Path(repository).is_dir():
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, "tokenizer_config.json"), str):
        return
    if why := unreachable(constants.ENDPOINT, hub=True):
        folder = f"models--{repository.replace('/', '--')}"
        raise UserError(
            f"the tokenizer of {architecture} is not on this machine, and {why}. On another machine: `hf download "
            f"{repository} --include '*token*'`; then copy the folder {folder} of its ~/.cache/huggingface/hub into "
            f"{constants.HF_HUB_CACHE} here"
        )


def _resolve(architecture: str, pretrained: str, weights: str | None) -> _Weights:
    """Resolve which weights are meant; UserError where there are none such, or the architecture is not theirs."""
    tables = _tables()
    config = _config(architecture)
    if config is None:
        near = difflib.get_close_matches(architecture, _architectures(), 3)
        raise UserError(f"open_clip has no architecture {architecture}; near: {', '.join(near) or 'none'}")
    quick_gelu = bool(config.get("quick_gelu", False))
    published = tables.get_pretrained_cfg(architecture, pretrained)
    if published:
        tag = pretrained.lower().replace("-", "_")  # as open_clip reads it
        _require_activation(architecture, quick_gelu, tag, published)
        file = Path(weights) if weights is not None else None
        repository, files = _place(published)
        if file is None and repository:
            from huggingface_hub import try_to_load_from_cache

            local = [try_to_load_from_cache(repository, candidate) for candidate in files]
            file = next((Path(path) for path in local if isinstance(path, str)), None)
        name = name_by_tag(architecture, pretrained)
        return _Weights(name=name, file=file, quick_gelu=quick_gelu, published=published)

    by_digest = pretrained.startswith("sha256-")
    own = weights if by_digest else pretrained
    if own is not None and Path(own).is_file() and (by_digest or weights is None):
        sha256 = sha256_file(Path(own))
        if by_digest and not sha256.startswith(pretrained.removeprefix("sha256-")):
            raise UserError(f"embed.weights: {own} has the sha256 {sha256[:12]}…, not {pretrained}")
        # OpenAI's addresses name the digests of their files: such a file's activation is known
        for _, tag in tables.list_pretrained():
            for known in {architecture, architecture.removesuffix("-quickgelu")}:
                its = tables.get_pretrained_cfg(known, tag)
                if sha256 in its.get("url", ""):
                    _require_activation(architecture, quick_gelu, tag, its)
        name = name_by_digest(architecture, sha256)
        return _Weights(name=name, file=Path(own), quick_gelu=quick_gelu, published={})

    elsewhere = tables.list_pretrained_models_by_tag(pretrained)
    tags = tables.list_pretrained_tags_by_model(architecture)
    hint = f"; it has {', '.join(tags)}" if tags else ""
    if elsewhere:
        near = difflib.get_close_matches(architecture, elsewhere, 3, cutoff=0)
        hint = f"; these have: {', '.join(f'{a}/{pretrained}' for a in near)}"
    raise UserError(f"{architecture} has no published weights called {pretrained}, nor is that a file{hint}")


# What open_clip says of architectures and weights, also where it is not loaded: `import open_clip` takes four seconds
# for torch's sake, and a name that is wrong is refused within one. Where it is, somebody may have added to it.


def _tables() -> ModuleType:
    """open_clip's module `pretrained`: its table of published weights."""
    return importlib.import_module("open_clip.pretrained") if "open_clip" in sys.modules else _tables_alone()


@cache
def _tables_alone() -> ModuleType:
    package = ModuleType("_open_clip_tables")
    package.__path__ = [str(_folder())]
    loaded = sys.modules.get("safetensors.torch")
    sys.modules[package.__name__] = package
    sys.modules["safetensors.torch"] = None  # type: ignore[assignment]  # it can do without, and this one needs torch
    try:
        return importlib.import_module(f"{package.__name__}.pretrained")
    finally:
        del sys.modules["safetensors.torch"]
        if loaded is not None:
            sys.modules["safetensors.torch"] = loaded


def _folder() -> Path:
    """Where open_clip lies; imports nothing."""
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise UserError("open_clip is not installed: `pip install open_clip_torch`, or `--recipe bundled`")
    return Path(found.submodule_search_locations[0])


def _architectures() -> list[str]:
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"].list_models()
    return sorted(path.stem for path in (_folder() / "model_configs").glob("*.json"))


def _config(architecture: str) -> dict[str, Any] | None:
    """open_clip's configuration of an architecture; None where it has none of that name."""
    if architecture not in _architectures():
        return None
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"].get_model_config(architecture)
    config = json.loads((_folder() / "model_configs" / f"{architecture}.json").read_text())
    return config if all(key in config for key in ("embed_dim", "vision_cfg", "text_cfg")) else None


def _require_activation(architecture: str, quick_gelu: bool, tag: str, published: dict[str, Any]) -> None:
    """Refuse an architecture whose activation is not that of its weights, where there is one that agrees.

    open_clip warns and goes on: vectors come out, and on OpenAI's weights scores move by a point of ten.
    """
    if bool(published.get("quick_gelu", False)) == quick_gelu:
        return
    right = architecture.removesuffix("-quickgelu") if quick_gelu else f"{architecture}-quickgelu"
    if right == architecture or _config(right) is None:
        return  # the only one there is (roberta-ViT-B-32): its own configuration says what it was trained with
    has, wants = ("QuickGELU", "GELU") if quick_gelu else ("GELU", "QuickGELU")
    raise UserError(
        f"the weights {tag} were trained with {wants}, and the architecture {architecture} has {has}: "
        f"write open_clip:{right}/{tag}"
    )


def _place(published: dict[str, Any]) -> tuple[str, list[str]]:
    """The hub's repository of published weights, empty where they are elsewhere, and the files that they may be in."""
    constants = importlib.import_module(f"{_tables().__package__}.constants")
    repository, _, file = published.get("hf_hub", "").rpartition("/")
    return repository, [file] if file else [constants.HF_SAFE_WEIGHTS_NAME, constants.HF_WEIGHTS_NAME]


def _missing(name: str, published: dict[str, Any], why: str) -> UserError:
    repository, files = _place(published)
    where = f"{files[0]} of the hub's repository {repository}" if repository else published.get("url", "")
    return UserError(
        f"the weights of {name} are not on this machine, and {why}. Two ways on: get {where} on another machine "
        f"and give the file, in a recipe as `embed.weights: FILE`, else in the name, {name.rpartition('/')[0]}/FILE; "
        "or use the encoder `bundled` (`--recipe bundled`), which needs no download."
    )


def _require_reachable(name: str, published: dict[str, Any]) -> None:
    """UserError where published weights can't be fetched from here."""
    from huggingface_hub import constants

    repository, _ = _place(published)
    server = constants.ENDPOINT if repository else published.get("url", "")
    if why := unreachable(server, hub=bool(repository)):
        raise _missing(name, published, why)


def _build(architecture: str, weights: Path, published: dict[str, Any]) -> Any:
    """The model with its weights, on the CPU in fp32."""
    import open_clip
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocessing = {f"image_{key}": published[key] for key in keys if key in published}
    with tempfile.TemporaryDirectory() as scratch:
        file, torchscript = weights, False
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as z:
                torchscript = any(name.endswith("/constants.pkl") for name in z.namelist())
        if torchscript:  # as OpenAI published them; open_clip reads plain weights only
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit is to go; such files will stay
                plain = torch.jit.load(file, map_location="cpu").state_dict()
            for key in ("input_resolution", "context_length", "vocab_size"):
                plain.pop(key, None)
            file = Path(scratch) / "weights.safetensors"
            safetensors.torch.save_file({k: v.contiguous() for k, v in plain.items()}, file)
        try:
            model, _, _ = open_clip.create_model_and_transforms(architecture, pretrained=str(file), **preprocessing)
        except (AssertionError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
            why = " ".join((str(e).strip().splitlines() or [repr(e)])[:2])
            raise UserError(f"{weights} does not hold weights of {architecture}: {why}") from e
    return model
