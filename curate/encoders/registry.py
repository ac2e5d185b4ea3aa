"""Encoders by name: open_clip's models, and one that pip packages carry.

>>> from curate import load_encoder
>>> encoder = load_encoder("bundled")
>>> vectors = encoder.encode_images([image])     # (1, encoder.dim) float32, unit length

Importing this module loads no model library; `load_encoder` does.
"""

from __future__ import annotations

from pathlib import Path

from aesthetic.chunks import cpus
from aesthetic.errors import UserError
from curate.encoders.base import PRECISIONS, Encoder, name_by_digest, name_by_tag
from curate.store.files import sha256_file


def load_encoder(
    name: str,
    weights: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
) -> Encoder:
    """Load an encoder: "bundled", or "open_clip:ARCH/PRETRAINED".

    PRETRAINED is a tag of open_clip's (its weights are fetched from the hub once) or a local file of weights; `weights`
    is a local copy of the weights that the tag means. `device` is torch's ("cpu", "cuda:1"); by default CUDA where
    there is one. `precision` is one of PRECISIONS; by default fp32 on CPU, fp16 on CUDA. `threads` are CPU threads for
    the model; by default every core that this process may use.

    Raises UserError where there is no such encoder, where an architecture disagrees with its weights, and, within
    seconds, where weights can't be had.
    """
    _check_file(weights)
    check_settings(name, weights, precision, device)
    if name == "bundled":
        from curate.encoders.bundled import BundledEncoder

        return BundledEncoder(threads or cpus())
    architecture, pretrained = _open_clip(name)
    if not architecture:
        raise UserError(
            f"embed.encoder: there is no encoder {name!r}; there are bundled and open_clip:ARCH/PRETRAINED, "
            "such as open_clip:ViT-L-14-quickgelu/openai"
        )
    from curate.encoders.openclip import OpenClipEncoder

    return OpenClipEncoder(architecture, pretrained, weights, device, precision, threads)


def _open_clip(name: str) -> tuple[str, str]:
    """Architecture and weights that a name of open_clip's form says; two empty strings where it has another form."""
    kind, _, spec = name.partition(":")
    architecture, _, pretrained = spec.partition("/")
    return (architecture, pretrained) if kind == "open_clip" and architecture and pretrained else ("", "")


def check_settings(name: str, weights: str | None, precision: str | None, device: str | None = None) -> None:
    """UserError where an encoder can't run with these settings; looks at no file."""
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"embed.precision: {precision!r} is none of {', '.join(PRECISIONS)}")
    if name == "bundled" and (weights is not None or device not in (None, "cpu") or precision not in (None, "fp32")):
        raise UserError(
            "the encoder bundled has its own weights and runs on the CPU in fp32: leave out weights, "
            "device and precision, or name an open_clip encoder"
        )


def _check_file(weights: str | None) -> None:
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"embed.weights: there is no file {weights}")


def check_available(name: str, weights: str | None = None) -> bool:
    """Whether an encoder's weights are on this machine; loads no model and no library, and fetches nothing.

    Raises UserError as load_encoder does, also where weights that are not here can't be fetched.
    """
    _check_file(weights)
    architecture, pretrained = _open_clip(name)
    if architecture:
        from curate.encoders.openclip import check_weights

        return check_weights(architecture, pretrained, weights)
    if name != "bundled":
        load_encoder(name)  # which says what names there are
    return True


def fetch_weights(name: str, weights: str | None = None) -> None:
    """Have an encoder's weights on this machine. Raises UserError as check_available does."""
    if not check_available(name, weights):
        from curate.encoders.openclip import find_weights

        find_weights(*_open_clip(name), weights)


def canonical_name(name: str) -> str:
    """The name that an encoder gives itself: a tag as open_clip spells it, a file of weights by its digest.

    Reads that file, and loads no library.
    """
    architecture, pretrained = _open_clip(name)
    if not architecture or pretrained.startswith("sha256-"):
        return name
    if Path(pretrained).is_file():
        return name_by_digest(architecture, sha256_file(Path(pretrained)))
    return name_by_tag(architecture, pretrained)


def check_named(name: str) -> None:
    """UserError where no encoder can be called so; looks for no weights and loads no library."""
    if name != "bundled" and not all(_open_clip(name)):
        raise UserError(
            f"--encoder {name}: no encoder is called that; there are bundled and open_clip:ARCH/PRETRAINED, "
            "such as open_clip:ViT-L-14-quickgelu/openai"
        )
