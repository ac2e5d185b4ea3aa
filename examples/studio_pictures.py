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
import time
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
            rate(url)
            take(url, out)
        finally:
            studio.terminate()
            studio.wait()


def rate(url: str) -> None:
    """Rate images by where they are among all in the order of `aesthetic`."""
    with httpx.Client(base_url=url, timeout=120) as client:
        client.get("/rate")
        while client.get("/api/data").json()["index"]["state"] != "ready":
            time.sleep(0.2)
        query: dict[str, Any] = {"selection": client.post("/api/selections", json={"rules": []}).json()["id"]}
        query |= {"show": "all", "sort": "aesthetic", "limit": 200, "offset": 0}
        order: list[str] = []
        while rows := client.get("/api/rows", params=query | {"offset": len(order)}).json()["rows"]:
            order += [row["key"] for row in rows]
        client.post("/api/ratings", json={"name": "taste", "kind": "scores", "scale": [1, 7]}).raise_for_status()
        wanted: dict[str, Any] = {"rater": "Ada", "count": RATINGS}
        for image in client.get("/api/ratings/taste/next", params=wanted).json()["images"]:
            score = 1 + 7 * order.index(image["key"]) // len(order)
            said = {"rater": "Ada", "key": image["key"], "score": score}
            client.post("/api/ratings/taste", json=said).raise_for_status()
        while client.get("/api/ratings/taste/head").json()["state"] == "fitting":
            time.sleep(0.2)


def take(url: str, out: Path) -> None:
    """All screenshots."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        phone: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
        wide: dict[str, Any] = {"viewport": {"width": 1600, "height": 1000}}

        def shot(address: str, window: dict[str, Any], shape: float = 0) -> Image.Image:
            page = browser.new_context(**window).new_page()
            page.goto(url + address)
            page.wait_for_timeout(3000)
            if shape:
                show_one_of(page, shape)
            png = page.screenshot()
            page.close()
            return Image.open(io.BytesIO(png)).convert("RGB")

        phones = Image.new("RGB", (2 * 390 + 20, 844), "#8a8a8a")
        phones.paste(shot(EXPLORE, phone), (0, 0))
        phones.paste(shot(RATE, phone, 0.75), (410, 0))
        shots = {"explore": shot(EXPLORE, wide), "around": shot(AROUND, wide), "rate": shot(RATE, wide, 1.5)}
        for name, image in (shots | {"phone": phones}).items():
            (out / f"studio-{name}.png").write_bytes(small(image))
        browser.close()


def show_one_of(page: Any, shape: float) -> None:
    """Skip until there is a large image, about `shape` times as wide as it is high."""
    for _ in range(200):
        page.wait_for_selector(".photo.seen")
        width, height = page.evaluate(
            "(({naturalWidth: w, naturalHeight: h}) => [w, h])(document.querySelector('.photo img'))"
        )
        if max(width, height) >= 350 and abs(width / height / shape - 1) < 0.15:
            break
        page.keyboard.press("s")
    page.wait_for_timeout(1500)


def small(image: Image.Image) -> bytes:
    """As a PNG with fewer colours, as many as a file of LARGEST bytes may have."""
    for colours in (256, 128, 64):
        for dither in (Image.Dither.FLOYDSTEINBERG, Image.Dither.NONE):
            file = io.BytesIO()
            image.quantize(palette=image.quantize(colours), dither=dither).save(file, "PNG", optimize=True)
            if file.tell() <= LARGEST:
                return file.getvalue()
    return file.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2] if len(sys.argv) > 2 else "docs").absolute())
