"""Image files: read with care; written as PNG that says how it was generated, numbered, never over another."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aesthetic.errors import UserError
from aesthetic.files import as_disk_full, scratch_path, sync
from aesthetic.untrusted import parse_json, printable, read_bytes
from curate.images.decode import decode, decode_alpha
from curate.ledger.schema import RowError
from curate.store.files import check_space
from curate.store.mirror import Mirror, store_at

CHUNK = "tastemaker"
"""The PNG text chunk with the facts, as JSON."""

MAX_FILE = 1 << 30
"""Bytes that an image file may have."""

MAX_PIXELS = 100_000_000
"""Pixels that are decoded of an image to begin with, or of one that says how it was generated."""

T = TypeVar("T")


def read_image(path: Path | str) -> Image.Image:
    """An image file upright, in sRGB, over white where it is transparent. Raises UserError where it can't be read."""
    return _read(path, decode_image)


def read_mask(path: Path | str) -> Image.Image:
    """An image file as a mask (see `decode_mask`). Raises UserError where it can't be read."""
    return _read(path, decode_mask)


def _read(path: Path | str, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(read_bytes(path, MAX_FILE))
    except RowError as e:
        why = printable(e.detail or e.reason.value)
    except UserError as e:
        why = str(e).removeprefix(f"{path}: ")
    raise UserError(f"the image {path} can't be read: {why}")


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The bytes of an image file upright, in sRGB, over white where it is transparent. Raises RowError."""
    return Image.fromarray(decode(data, max_pixels=max_pixels))


def decode_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The bytes of an image file as a mask, of mode L: what is white is regenerated, what is black stays.

    Where parts of it are transparent it is a layer of an image editor that somebody painted on, in whatever colour:
    what is painted, that is opaque, is regenerated. Raises RowError where it is no image, UserError where it leaves
    nothing to be regenerated.
    """
    alpha = decode_alpha(data, max_pixels)
    if alpha is None:
        mask = decode_image(data, max_pixels).convert("L")
        if mask.point(lambda value: 255 * (value >= 128)).getbbox() is None:  # pipelines take what is darker for black
            raise UserError("the mask is black everywhere: what is to be regenerated is white on it")
        return mask
    if not alpha.any():
        raise UserError("the mask is transparent everywhere: nothing is painted on it that could be regenerated")
    return Image.fromarray(alpha)


def pixels_digest(image: Image.Image) -> str:
    """The sha256 of an image's size and RGB values, however its file is encoded."""
    digest = hashlib.sha256(b"%d %d " % image.size)
    for top in range(0, image.height, 64):  # a few rows at once: while Pillow copies them no other thread runs
        digest.update(image.crop((0, top, image.width, min(top + 64, image.height))).convert("RGB").tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- PNG and its facts


def png(image: Image.Image, facts: Mapping[str, Any]) -> bytes:
    """A PNG file with the facts in it: as JSON, and as AUTOMATIC1111's web UI writes prompt and settings, which many
    programs read (`create_infotext` in its modules/processing.py)."""
    settings = {
        "Steps": facts["steps"],
        "Sampler": facts["scheduler"],
        "CFG scale": facts["guidance"],
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Model hash": facts["model"]["sha256"][:10],
        "Model": Path(facts["model"]["name"]).name,
        "Denoising strength": facts.get("strength"),
        "Version": f"tastemaker {facts['made_with'].get('tastemaker', '')}".strip(),
    }
    lines = [facts["prompt"]]
    if facts["negative"]:
        lines.append(f"Negative prompt: {facts['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return _png(image, {"parameters": "\n".join(lines), CHUNK: json.dumps(facts, sort_keys=True)})


def grid_png(image: Image.Image, names: Sequence[str]) -> bytes:
    """A PNG file of several images, with their names in it."""
    return _png(image, {CHUNK: json.dumps({"pictures": list(names)})})


def _png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Weights(_Facts):
    name: str
    sha256: str
    weight: float = 1.0


class _Input(_Facts):
    sha256: str
    path: str | None = None


class _Safety(_Facts):
    blurred: bool


class ImageFacts(_Facts):
    """What a PNG says of itself, as far as it takes to generate the same again. Ranges are GenerationRequest's."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str
    strength: float | None
    upscale: int
    image: _Input | None
    mask: _Input | None
    model: _Weights
    nsfw: _Safety
    loras: Annotated[list[_Weights], Field(max_length=100)] = []
    embeddings: Annotated[list[_Weights], Field(max_length=100)] = []
    upscaler: _Weights | None = None
    faces: _Weights | None = None
    made_with: dict[str, str] = {}
    device: str = ""
    dtype: str = ""


def read_facts(path: Path | str) -> dict[str, Any]:
    """What a PNG says of itself. Raises UserError where it says nothing, or not what our own say (`ImageFacts`)."""
    text = _read(path, _text_of)
    if not isinstance(text, str):
        raise UserError(
            f"{path} does not say how it was generated: it holds no text chunk {CHUNK!r} (programs that edit or send "
            "images often drop it)"
        )
    facts = parse_json(text, f"{path}, its text chunk {CHUNK!r}")
    if not isinstance(facts, dict):
        raise UserError(f"{path}, its text chunk {CHUNK!r}: a JSON object is expected")
    try:
        ImageFacts.model_validate(facts)
    except ValidationError as e:
        found = e.errors(include_url=False)[0]
        where = printable(".".join(map(str, found["loc"])), 60)
        raise UserError(f"{path}: its facts are incomplete or damaged: {where}: {found['msg'].lower()}") from None
    return facts


def _text_of(data: bytes) -> Any:
    """The text chunk with the facts; None where there is none."""
    decode(data, max_pixels=MAX_PIXELS)  # a bomb, or an image that is cut off
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()  # chunks may come after the pixels
            return image.info.get(CHUNK)
    except Exception as e:  # whatever a file that is none makes of a decoder
        raise UserError(printable(e, 200)) from e


# ----------------------------------------------------------------------------------------------------- numbered files


def check_out(folder: Path) -> None:
    """Raise UserError or DiskFull where images can't be written to a folder, which need not be there yet."""
    above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not above.is_dir():
        raise UserError(f"--out {folder} is a file: a folder for images is expected")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder} can't be written to: give another folder")
    check_space(above)


def save_numbered(data: bytes, folder: Path, prefix: str = "", suffix: str = ".png") -> Path:
    """Write a file under the next free number, as `000007.png`: whole or absent, never over another, also where several
    processes do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(store := store_at(folder), Mirror):
        return _put_numbered(store, data, folder, prefix, suffix)
    scratch = scratch_path(folder / "image.png")
    try:
        with open(scratch, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        number = next_number(folder, prefix, suffix)
        while not _claim(path := folder / f"{prefix}{number:06d}{suffix}", scratch):
            number += 1
    except OSError as e:
        raise as_disk_full(e, folder) from e
    finally:
        scratch.unlink(missing_ok=True)
    sync(folder)
    return path


def _put_numbered(store: Mirror, data: bytes, folder: Path, prefix: str, suffix: str) -> Path:
    number = next_number(folder, prefix, suffix)
    while True:
        path = folder / f"{prefix}{number:06d}{suffix}"
        with contextlib.suppress(FileExistsError):  # another process's, made since the folder was listed
            store.create(path, data)
            return path
        number += 1


def next_number(folder: Path, prefix: str = "", suffix: str = ".png") -> int:
    """One more than the highest number of an image in a folder, or of another kind of file."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{6,}}){re.escape(suffix)}")
    return max((int(m[1]) for name in store_at(folder).names(folder) if (m := pattern.fullmatch(name))), default=-1) + 1


def _claim(path: Path, scratch: Path) -> bool:
    """Give the scratch file its name, unless somebody else has it."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        try:  # a file system without hard links: take the name first
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(scratch, path)
    return True
