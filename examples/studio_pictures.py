"""The screenshots of the studio in docs/: of a copy of a data folder, such as the one that `make demo` makes.

    python examples/studio_pictures.py demo-data [docs]

Somebody who likes what the column `aesthetic` likes rates 150 images there first, so that there is something learnt.
Needs playwright and a chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

RATINGS = 150
LARGEST = 400_000  # bytes of a file
EXPLORE = "/#show=kept&sort=aesthetic&descending=true"
AROUND = "/#show=around&rule=beautiful&sort=aesthetic"
RATE = "/rate#rating=now&set=taste&rater=Ada&how=random"


def main(data: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(data, Path(scratch) / data.name))
        command = [sys.executable, "-P", "-m", "pipelines.cli", "studio", copy.name, "--port", "0"]
        studio = subprocess.Popen(command, cwd=scratch, stderr=subprocess.PIPE, text=True)
        try:
            assert studio.stderr is not None
            url = next(filter(None, (re.search(r"http://\S+:\d+", line) for line in studio.stderr)))[0]
            rate(url, len(list(copy.glob("fetched/*.tar"))))
            take(url, out)
        finally:
            studio.terminate()
            studio.wait()


def rate(url: str, shards: int) -> None:
    """Rate images by where they are among all in the order of `aesthetic`."""
    with httpx.Client(base_url=url, timeout=120) as client:
        client.get("/rate")
        client.post("/api/ratings", json={"name": "taste", "kind": "scores", "scale": [1, 7]}).raise_for_status()
        query = {"rater": "Ada", "count": RATINGS}
        for image in client.get("/api/ratings/taste/next", params=query).json()["images"]:
            columns = client.get(f"/api/why/{image['key']}").json()["columns"]
            place = next(c["percentile"] for c in columns if c["name"] == "aesthetic")
            score = 1 + min(6, int(7 * place / 100))
            said = {"rater": "Ada", "key": image["key"], "score": score}
            client.post("/api/ratings/taste", json=said).raise_for_status()
        while client.get("/api/ratings/taste/head").json()["state"] == "fitting":
            pass


def take(url: str, out: Path) -> None:
    """All screenshots."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        wide = {"viewport": {"width": 1600, "height": 1000}}
        phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
        for name, address, window in (
            ("explore", EXPLORE, wide),
            ("around", AROUND, wide),
            ("rate", RATE, wide),
            ("phone", RATE, phone),
        ):
            page = browser.new_context(**window).new_page()
            page.goto(url + address)
            page.wait_for_timeout(3000)
            if address == RATE:
                show_a_photo(page)
            (out / f"studio-{name}.png").write_bytes(small(page.screenshot()))
            page.close()
        browser.close()


def show_a_photo(page: Any) -> None:
    """Skip until there is an image large enough to fill the stage."""
    for _ in range(60):
        page.wait_for_selector(".photo.seen")
        width, height = page.evaluate(
            "(({naturalWidth: w, naturalHeight: h}) => [w, h])(document.querySelector('.photo img'))"
        )
        if height >= 330 and width >= 1.2 * height:
            break
        page.keyboard.press("s")
    page.wait_for_timeout(1500)


def small(png: bytes) -> bytes:
    """The same with fewer colours, as many as a file of LARGEST bytes may have."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 192, 128, 96, 64):
        file = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE if colours > 128 else Image.Dither.FLOYDSTEINBERG).save(
            file, "PNG", optimize=True
        )
        if file.tell() <= LARGEST:
            break
    return file.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2] if len(sys.argv) > 2 else "docs").absolute())
