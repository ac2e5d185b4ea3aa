"""`make demo`: real images, a real web of fifty hosts on this machine, one command line.

Some 850 images are served over HTTP beside rows that fail in the ways the web does, and `tastemaker curate` makes a
training set of them with the bundled encoder: no network, no GPU, nothing to download but the images themselves.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from aesthetic.errors import UserError
from aesthetic.files import atomic
from demo.pictures import DemoImage, demo_images
from demo.web import Route, Web, address
from pipelines.options import from_here

PORT = 8790  # not any free one: the URLs are part of the list, and another list would start anew
HOSTS = 50  # one host would measure fetch.per_domain, not the fetcher
FAILING = 0.003  # the share of each way to fail
RECIPE = "bundled"
SHARD_SIZE = 200  # rows; small, so that fetching and embedding overlap

SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int32()),  # what the list claims, as LAION's lists do
        ("HEIGHT", pa.int32()),
        ("PACKAGE", pa.string()),
    ]
)

_HTML = b"<!doctype html><title>Sorry</title><p>This picture has moved. Sign in to see it.</p>"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="your own images instead of Debian's")
    parser.add_argument("--out", type=Path, metavar="DATA", help="default: demo-data, or demo-data-own with --images")
    parser.add_argument("--port", type=int, default=PORT, help="where the images are served (default: %(default)s)")
    options = parser.parse_args()
    try:
        out = options.out or Path("demo-data-own" if options.images else "demo-data")
        return demo(options.images, out, options.port)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def demo(images: Path | None, out: Path, port: int = PORT) -> int:
    """Serve the images, curate them into `out`, say where to look. Returns the command line's exit code."""
    found = demo_images(images)
    rows, routes = web_of(found, port)
    listed = out / "list.parquet"
    with Web(routes, hosts=HOSTS, port=port) as web:
        write_list(listed, rows)
        print(
            f"{len(found):,} images among {len(rows):,} rows of {listed}, "
            f"served at {web.host(0)} to {web.host(HOSTS - 1)}",
            flush=True,
        )
        command = ["curate", str(listed), "--out", str(out), "--recipe", RECIPE]
        for setting in (f"source.shard_size={SHARD_SIZE}", f'fetch.allow=["127.0.0.0/8:{port}"]'):
            command += ["--set", setting]
        print("$ tastemaker " + " ".join(_quoted(word) for word in command), flush=True)
        code = _run([sys.executable, "-m", "pipelines.cli", *command])
    if code == 0:
        print(_what_next(out))
    return code


def _run(command: list[str]) -> int:
    """Run a command on our terminal. On Ctrl-C it gets the signal as we do, and we wait for its clean end."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def _quoted(word: str) -> str:
    return f"'{word}'" if re.search(r"[^\w./=:-]", word) else word


def _what_next(out: Path) -> str:
    program = Path(sys.executable).with_name("tastemaker")
    typed = from_here(program) if program.exists() else "tastemaker"
    return f"""
try    {typed} query {out} "select reason, count(*) from ledger group by reason"
again  the same command does nothing the second time, in seconds; rm -r {out} starts over
look   {typed} studio {out}
       in the browser: what there is, what each rule turns down, and why; decide and rate by looking"""


# ----------------------------------------------------------------------------------------------------------- the list


def web_of(
    found: list[DemoImage], port: int = PORT
) -> tuple[list[dict[str, object]], dict[str | tuple[int, str], Route]]:
    """The list's rows and what their URLs answer: every image once, a few twice, and a few rows that fail.

    The same images give the same rows in the same order: which rows fail depends on nothing else.
    """
    routes: dict[str | tuple[int, str], Route] = {}
    rows: list[dict[str, object]] = []
    dice = random.Random(0)

    def add(image: DemoImage, route: Route, tag: str = "", folder: str = "") -> None:
        path = f"{folder}/{len(rows):05d}-{_slug(image.path.stem)}{tag}{image.path.suffix.lower()}"
        routes[path] = route
        rows.append(_row(f"http://{address(len(rows) % HOSTS)}:{port}{path}", image))

    for image in found:
        add(image, Route(file=str(image.path.resolve())))
    each = max(1, round(FAILING * len(found)))
    for image in dice.sample(found, min(2 * each, len(found))):  # the same bytes at another URL
        add(image, Route(file=str(image.path.resolve())), tag="-copy")

    def some(candidates: list[DemoImage] = found) -> Iterator[DemoImage]:
        return iter(dice.choices(candidates, k=each))

    for image in some():
        add(image, Route(status=404, body=_HTML, content_type="text/html"))
    for image in some():
        add(image, Route(status=410, body=b"gone", content_type="text/plain"))
    for image in some():
        add(image, Route(status=503, body=b"busy", content_type="text/plain"))
    for image in some():
        add(image, Route(body=_HTML, content_type="image/jpeg"))
    jpegs = [p for p in found if p.path.suffix.lower() in (".jpg", ".jpeg")]
    for image in some(jpegs or found):
        add(image, Route(file=str(image.path.resolve()), keep=0.5), tag="-half")
    for image in some():
        add(image, Route(file=str(image.path.resolve()), headers=(("X-Robots-Tag", "noai"),)))
    routes["/robots.txt"] = Route(body=b"User-agent: *\nDisallow: /members/\n", content_type="text/plain")
    for image in some():
        add(image, Route(file=str(image.path.resolve())), folder="/members")
    elsewhere = [
        f"http://10.0.0.1:{port}/a.jpg",  # a private network
        "http://127.0.0.1:6379/",  # a service of this machine: the recipe opens one port only
        "http://169.254.169.254/latest/meta-data/",  # where clouds keep credentials
        f"http://127.2.0.9:{port}/b.jpg",  # allowed, and nobody there
        "http://pictures.invalid/c.jpg",  # no such name, ever (RFC 6761)
        "file:///etc/hostname",
    ]
    rows += [_row(url, image) for url, image in zip(elsewhere, dice.choices(found, k=len(elsewhere)), strict=True)]
    dice.shuffle(rows)
    return rows, routes


def _row(url: str, image: DemoImage) -> dict[str, object]:
    width, height = _size(image.path)
    return {"URL": url, "TEXT": image.caption, "WIDTH": width, "HEIGHT": height, "PACKAGE": image.package}


def _size(path: Path) -> tuple[int | None, int | None]:
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning), Image.open(path) as i:
            return i.size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None, None  # what is wrong with it is for the run to find out


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "picture"


def write_list(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write the list, unless it is there already: the same bytes, untouched, are what a second run recognises."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), buffer)
    if path.is_file() and path.read_bytes() == buffer.getvalue():
        return
    with atomic(path) as f:
        f.write(buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
