"""Picture files: PNG that says in itself how it was drawn, numbered, never written over another."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from curate.store import UserError, scratch_path, sync, told

CHUNK = "tastemaker"
"""The PNG text chunk with the facts, as JSON."""


def read_picture(path: Path | str) -> Image.Image:
    """An image file upright, in sRGB, over white where it is transparent. Raises UserError where it can't be read."""
    from curate.images import decode
    from curate.ledger import RowError

    try:
        return Image.fromarray(decode(Path(path).read_bytes()))
    except OSError as e:
        raise UserError(f"the picture {path} can't be read: {e.strerror}") from e
    except RowError as e:
        raise UserError(f"the picture {path} can't be read: {e.detail or e.reason.value}") from e


def pixels_digest(image: Image.Image) -> str:
    """The sha256 of a picture's size and RGB values, however its file is encoded."""
    rgb = image.convert("RGB")
    return hashlib.sha256(b"%d %d " % rgb.size + rgb.tobytes()).hexdigest()


def png(image: Image.Image, facts: Mapping[str, Any]) -> bytes:
    """A PNG file with the facts in it: as JSON, and in a line as A1111's web UI writes it, which many programs read."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters(facts))
    info.add_text(CHUNK, json.dumps(facts, sort_keys=True))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def sheet(image: Image.Image, names: Sequence[str]) -> bytes:
    """A PNG file of several pictures, with their names in it."""
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, json.dumps({"pictures": list(names)}))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def read_facts(path: Path | str) -> dict[str, Any]:
    """What a PNG says of itself. Raises UserError where it says nothing."""
    try:
        with Image.open(path) as image:
            image.load()  # chunks may come after the pixels
            facts = json.loads(image.info[CHUNK])
            if not isinstance(facts, dict):
                raise ValueError("no JSON object")
            return facts
    except (OSError, SyntaxError) as e:
        raise UserError(f"the picture {path} can't be read: {e}") from e
    except (KeyError, ValueError) as e:
        raise UserError(
            f"{path} does not say how it was drawn: it holds no text chunk {CHUNK!r} (programs that edit or send "
            "pictures often drop it)"
        ) from e


def parameters(facts: Mapping[str, Any]) -> str:
    """Prompt and settings as AUTOMATIC1111's web UI writes them (`create_infotext` in modules/processing.py)."""
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
    return "\n".join(lines)


def save_numbered(data: bytes, folder: Path, prefix: str = "") -> Path:
    """Write a file under the next free number, as `000007.png`: whole or absent, never over another, also where several
    processes do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(folder / "picture.png")
    try:
        with open(scratch, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        number = next_number(folder, prefix)
        while not _claimed(scratch, path := folder / f"{prefix}{number:06d}.png"):
            number += 1
    except OSError as e:
        raise told(e, folder) from e
    finally:
        scratch.unlink(missing_ok=True)
    sync(folder)
    return path


def next_number(folder: Path, prefix: str = "") -> int:
    """One more than the highest number of a picture in a folder."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{6,}})\.png")
    found = [int(m[1]) for name in os.listdir(folder) if (m := pattern.fullmatch(name))]
    return max(found, default=-1) + 1


def _claimed(scratch: Path, path: Path) -> bool:
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
