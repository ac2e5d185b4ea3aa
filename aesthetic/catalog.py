"""Which heads there are: those that come along, those that were imported, and what others have published."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aesthetic.errors import nearest
from aesthetic.head_files import read_head
from aesthetic.heads import HEAD_NAME, Head, HeadError
from aesthetic.untrusted import printable

SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class PublishedHead:
    """A published file, and what is known of it: an entry of published.toml."""

    name: str
    url: str
    sha256: str
    encoder: str
    sizes: tuple[int, ...]  # of the vectors and of each layer's output
    layers: tuple[str, ...]  # the prefixes of its linear layers, in order
    relu: bool  # between the layers; without it they are one affine map
    scale: tuple[float, float]
    card: dict[str, Any]

    @property
    def file(self) -> str:
        """The file's name as published."""
        return self.url.rpartition("/")[2].replace("%2B", "+")

    @property
    def by_hand(self) -> str:
        """What to do to have it here."""
        return f"download {self.url} and run: tastemaker heads import {self.file}"


@functools.cache
def _published_toml() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


@functools.cache
def published_heads() -> tuple[PublishedHead, ...]:
    """The heads of which the publisher's file is known by its sha256."""
    data, heads = _published_toml(), []
    for entry in data["head"]:
        family, relu = data["family"][entry["family"]], entry.get("relu", False)
        collapsed = len(entry["layers"]) > 1 and not relu
        done = "converted: the five layers multiplied out in float64" if collapsed else "converted, values unchanged"
        source = f"{entry['url']}, sha256 {entry['sha256']}; {family['publisher']}; {done}"
        head = PublishedHead(
            name=entry["name"],
            url=entry["url"],
            sha256=entry["sha256"],
            encoder=entry["encoder"],
            sizes=tuple(entry["sizes"]),
            layers=tuple(entry["layers"]),
            relu=relu,
            scale=tuple(family["scale"]),
            card={**family["card"], "source": source, **entry.get("card", {})},
        )
        heads.append(head)
    return tuple(heads)


def keras_files() -> dict[str, str]:
    """Published files that are Keras models, by sha256, in words: known, and refused."""
    return dict(_published_toml()["keras"])


def simulacra_encoder(file_name: str) -> str | None:
    """The encoder that one of Crowson and Pressman's ridge heads reads, as far as a file's name can say."""
    encoder = _published_toml()["simulacra"].get(file_name)
    return None if encoder is None else str(encoder)


def heads_folder() -> Path:
    """Where imported heads lie: the folder that TASTEMAKER_HEADS names, else ~/.cache/tastemaker/heads."""
    return Path(os.environ.get("TASTEMAKER_HEADS") or "~/.cache/tastemaker/heads").expanduser()


def list_heads() -> list[str]:
    """The names that `load_head` knows here: the shipped heads, then the imported ones."""
    shipped, imported = (sorted(p.parent.name for p in f.glob("*/head.json")) for f in (SHIPPED, heads_folder()))
    return shipped + [name for name in imported if name not in shipped]


def load_head(name_or_folder: str | Path) -> Head:
    """A head by the name of a shipped or an imported one, or by its folder; a shipped name goes before a folder's.

    Raises HeadError where there is no such head (with the nearest name) or where its files do not agree.
    """
    return read_head(find_head(name_or_folder))


def find_head(name_or_folder: str | Path) -> Path:
    """The folder of a head; raises HeadError where there is none."""
    text = str(name_or_folder)
    if isinstance(name_or_folder, str) and re.fullmatch(HEAD_NAME, text):
        for folder in (SHIPPED / text, heads_folder() / text):
            if os.path.isfile(folder / "head.json"):
                return folder
    folder = Path(os.path.expanduser(name_or_folder))
    if os.path.isfile(folder / "head.json"):  # unlike Path's, it takes any text for a path
        return folder
    if os.path.isdir(folder):
        raise HeadError(f"{folder} is a folder without head.json: not a head")
    if os.path.isfile(folder):
        raise HeadError(
            f"{folder} is a file; a head is a folder. A published .pth file: tastemaker heads import {folder}"
        )
    if published := next((p for p in published_heads() if p.name == text), None):
        raise HeadError(
            f"{text} is not here yet: `tastemaker heads import {text}` fetches it from its publisher. Where that can't "
            f"be reached: {published.by_hand}"
        )
    names = list_heads()
    near = nearest(text, names)
    raise HeadError(
        f"no head {printable(text, 200)}: neither a folder nor a name."
        + (f" Did you mean {near}?" if near else "")
        + f" Known: {', '.join(names)}"
    )
