"""How near the stored images are to a reference: decoded in full, averaged over areas, not compressed again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from bench.contend import Bench, Lists
from bench.pictures import entries
from curate.images.config import ImagesConfig
from curate.images.process import process
from curate.shards.tar import image_member, index_tar, read_range


def compare(bench: Bench, lists: Lists, count: int) -> dict[str, str]:
    """PSNR in dB, mean and worst, of what each contender stored; and of our pixels before they were compressed."""
    found, data = entries(bench.images), bench.images.read_bytes()
    ratios: dict[str, list[float]] = {"ours": [], "img2dataset": [], "pixels": []}
    stored = {"ours": _stored(bench.folder / "ours" / "fetched"), "img2dataset": _stored(bench.folder / "peer")}
    paths = sorted(set(stored["ours"]) & set(stored["img2dataset"]))[:count]
    config = ImagesConfig(size=bench.size, format="png")
    for path in paths:
        e = found[int(path.removeprefix("/p/"))]
        body = data[e.offset : e.offset + e.size]
        for who in ("ours", "img2dataset"):
            got = _pixels(stored[who][path])
            ratios[who].append(psnr(got, reference(body, got.shape[1::-1])))
        got = _pixels(process(body, config).data)
        ratios["pixels"].append(psnr(got, reference(body, got.shape[1::-1])))
    told = {who: f"{np.mean(seen):.1f} (worst {np.min(seen):.1f})" for who, seen in ratios.items()}
    told["ours"] += f", before compression {told['pixels']}"
    return told


def reference(data: bytes, size: tuple[int, int]) -> np.ndarray:
    image: Any = Image.open(io.BytesIO(data))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    full = np.asarray(image.convert("RGB"))
    return cv2.resize(full, size, interpolation=cv2.INTER_AREA) if full.shape[1::-1] != size else full


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB; 60 where there is no difference to speak of."""
    return min(60.0, float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2)))))


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _stored(folder: Path) -> dict[str, bytes]:
    """The stored images by the path of their URL."""
    images: dict[str, bytes] = {}
    for table in sorted(folder.glob("*.parquet")):
        index = index_tar(table.with_suffix(".tar"))
        with open(table.with_suffix(".tar"), "rb") as tar:
            for row in pq.read_table(table, columns=["key", "url", "status"]).to_pylist():
                if row["status"] == "success" and (member := image_member(index[row["key"]])):
                    images.setdefault(urlsplit(row["url"]).path, read_range(tar, member[1]))
    return images
