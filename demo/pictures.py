"""Where the demo's images come from: four Debian packages, or a folder of one's own.

The packages are unpacked, never installed: `apt-get download` and `dpkg-deb -x` work as an ordinary user. They hold 785
captioned stamps (photographs and drawings) and 66 wallpapers, named by their files; free licences all, stated in
each package's copyright file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from aesthetic.errors import UserError
from curate.shards.tar import IMAGE_EXTENSIONS

STAMPS = "tuxpaint-stamps-default"
PACKAGES = (STAMPS, "gnome-backgrounds", "mate-backgrounds", "plasma-workspace-wallpapers")
DOWNLOAD_MB = 334

BOTH_WAYS = f"""\
The demo needs images, and there are two ways to them:
  make demo                  on Debian or Ubuntu: four packages ({DOWNLOAD_MB} MB) are fetched with apt-get and unpacked
                             into a cache, not installed; no root needed
  make demo IMAGES=folder    your own images, with captions from NAME.txt beside NAME.jpg, else from the names"""

_KEPT = {".png", ".jpg", ".jpeg", ".webp", ".txt", ".ttf"}
_SIZE = re.compile(r"[_-]?\d{3,5}x\d{3,5}$")


class DemoImage(NamedTuple):
    """An image on this disk, what is said about it, and the package or folder that it is from."""

    path: Path
    caption: str
    package: str


def demo_images(folder: Path | None = None) -> list[DemoImage]:
    """The demo's images, sorted by package and path: those of `folder`, or Debian's, fetched once into the cache.

    Raises UserError where a folder holds none, or where packages cannot be had.
    """
    if folder is not None:
        return _own(folder)
    found = [p for package in PACKAGES for p in _of_package(package, unpacked(package))]
    if not found:
        raise UserError(f"{cache()} holds no images: remove it and run again.")
    return found


def cache() -> Path:
    """Where packages are unpacked: $TASTEMAKER_CACHE, or ~/.cache/tastemaker, and in it demo-pictures."""
    root = os.environ.get("TASTEMAKER_CACHE") or Path.home() / ".cache" / "tastemaker"
    return Path(root).expanduser() / "demo-pictures"


# ------------------------------------------------------------------------------------------------------- packages


def unpacked(package: str) -> Path:
    """The folder of a package's images and texts; downloaded and unpacked if it is not there yet.

    It appears under its name only when it is whole, so the name is the marker.
    """
    home = cache() / package
    if home.is_dir():
        return home
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError(BOTH_WAYS)
    home.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package} (once, into {home.parent})", flush=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{package}.") as scratch:
        unpack(_download(package, Path(scratch)), Path(scratch) / "tree")
        try:
            (Path(scratch) / "tree").rename(home)
        except OSError:
            if not home.is_dir():  # else another run was quicker
                raise
    return home


def unpack(deb: Path, target: Path) -> None:
    """Unpack a package and keep only its images, texts and fonts: regular files, no links, no sounds."""
    done = subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{deb.name} cannot be unpacked: {done.stderr.strip()}")
    for path in sorted(target.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and path.suffix.lower() not in _KEPT):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _download(package: str, folder: Path) -> Path:
    """Download one package; where apt knows no package of that name and we may, refresh apt's lists first."""
    done = _apt("download", package, folder=folder)
    if done.returncode and os.geteuid() == 0:
        _apt("update", folder=folder)
        done = _apt("download", package, folder=folder)
    debs = list(folder.glob("*.deb"))
    if done.returncode or not debs:
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"
        hint = "" if os.geteuid() == 0 else "`sudo apt-get update` may help. "
        raise UserError(f"apt-get download {package}: {why}\n{hint}\n{BOTH_WAYS}")
    return debs[0]


def _apt(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["apt-get", "-q", *words], cwd=folder, capture_output=True, text=True)


def _of_package(package: str, home: Path) -> list[DemoImage]:
    files = sorted(p for p in home.rglob("*") if p.is_file() and p.suffix.lower() in _KEPT - {".txt", ".ttf"})
    if package == STAMPS:
        return [DemoImage(p, c, package) for p in files if (c := caption_beside(p))]  # a mirror image has no text
    return [DemoImage(p, wallpaper_name(p), package) for p in one_size_each(files)]


def one_size_each(files: list[Path]) -> list[Path]:
    """Of each wallpaper one file: landscape, the smallest that is at least 1024 high; no dark twin, no preview."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        if path.stem == "screenshot" or path.stem.endswith("-d") or path.parent.name == "images_dark":
            continue
        groups.setdefault((path.parent, _SIZE.sub("", path.stem)), []).append(path)
    return [min(group, key=_preference) for group in groups.values()]


def _preference(path: Path) -> tuple[bool, bool, int, str]:
    with Image.open(path) as image:
        width, height = image.size
    return width < height, height < 1024, width * height, path.name


def wallpaper_name(path: Path) -> str:
    """A wallpaper's name from its path: `nature/LadyBird.jpg` -> "Lady bird", `Kite/contents/images/…` -> "Kite"."""
    if path.parent.name == "images":
        return readable(path.parents[2].name)
    return readable(_SIZE.sub("", path.stem).removesuffix("-l"))


# ----------------------------------------------------------------------------------------------------- own images


def _own(folder: Path) -> list[DemoImage]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    found = [
        DemoImage(p, caption_beside(p) or readable(p.stem), p.relative_to(folder).parent.name or folder.resolve().name)
        for p in sorted(folder.rglob("*"))
        if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and p.is_file()
    ]
    if not found:
        raise UserError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}), nor does any folder in it.")
    return found


def caption_beside(path: Path) -> str:
    """The first line of NAME.txt beside NAME.png, "" where there is none. In stamps it is English; others follow."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return ""
    lines = text.read_text(encoding="utf-8-sig", errors="replace").split("\n", 1)
    return lines[0].strip()


def readable(name: str) -> str:
    """A file name as a caption: `fox_in-theSnow2` -> "Fox in the snow 2"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|[_\W]+", " ", name)
    words = [w if w.isupper() and len(w) > 1 else w.lower() for w in spaced.split()]
    text = " ".join(words)
    return text[:1].upper() + text[1:]
