"""A model of emoji, clip art and stamps from nothing, on one GPU in minutes: from packages to a grid of images.

    python -m examples.clipart collect FOLDER                      # where npm and apt-get are: 8,084 images
    python -m examples.clipart train FOLDER OUT [--minutes 9]      # where the GPU is: the preset small-64

`collect` writes an image folder of 64 x 64 images with captions (11 MB). `train` trains the preset's
autoencoder and then the model, as many steps as fit into the minutes, and writes into OUT: report.json (img/s, MFU,
memory, PSNR, held-out loss, times), curve.png, grid.png (PROMPTS, a row each), autoencoder.png, and the model in
model/checkpoints. Killed, it goes on when typed again. `--preset debug --minutes 1` tries it on a CPU.

Neither needs Ray, DuckDB nor open_clip. On a machine that has torch, transformers, opencv-python-headless, pyarrow,
peft and matplotlib, what has to be carried there is two wheels:

    pip download --no-deps -d wheels diffusers==0.42.1 simplejpeg==1.9.0
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import re
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from aesthetic.errors import UserError
from curate.images.decode import decode
from curate.ledger.schema import RowError
from curate.store.files import digest, read_json, write_json
from demo.pictures import STAMPS, caption_beside, readable, unpacked
from train.captions import Choose, first_caption
from train.data import ImageDataset, Stream, open_samples, ordered_batches
from train.latents import precompute_latents
from train.loop import LoopConfig, train
from train.metrics import format_record
from train.models.base import count_parameters
from train.models.family import new_model, tokenize
from train.models.presets import PRESETS
from train.split import split
from train.tasks import Denoise, Reconstruct, Task, fit_scale, generate_images, image_grid, psnr

SIDE = 64
EMOJI = "emoji-datasource-google@16.0.0"
CLIP_ART = "openclipart-png"

PROMPTS = [
    "red apple, emoji", "rocket, emoji", "dog face, emoji", "smiling face with sunglasses, emoji", "sailboat, emoji",
    "banana, fruit, clip art", "purple apple, emoji", "green rocket, emoji",
]  # fmt: skip
"""The last two are captions of no image."""

SEEDS = range(6)

# ----------------------------------------------------------------------------------------------------------- collect

_AUTHOR = re.compile(
    r"_+-?_*(archi|ganson|gerald|nicu|benji|jarno|jean|victor|linda|kim|juliane|krug|vasamaa|buculei|lumen|peterm|jon_"
    r"|phillips|luiz|sergio|fudriot|mimooh|mateya|joel|jonat|balin|jonadab|mike|michael|dave|aj_|frouke|rolland|dan_"
    r"|anthony|marcelo|matthew|daniel|francesc|karl).*"
)
"""In openclipart a file is named `title_author_01.png`: where the name of a frequent author begins."""

_DULL = ("shapes/stars/", "special/")
"""1,378 stars whose names are numbers, and patterns without a subject."""


def captioned() -> Iterator[tuple[str, bytes, str]]:
    """(source, image file, caption): every emoji, clip art and stamp. Downloads what is not there yet."""
    with tempfile.TemporaryDirectory() as scratch:
        for image, name in _emoji(Path(scratch)):
            yield "emoji", image, f"{name.lower()}, emoji"
    for source, path, caption in clip_art_and_stamps():
        yield source, path.read_bytes(), caption


def clip_art_and_stamps() -> Iterator[tuple[str, Path, str]]:
    """(source, image file, caption) of what Debian's packages hold; downloads them where they are not there yet."""
    home = unpacked(CLIP_ART)
    for path in sorted(home.rglob("*.png")):
        parts = path.relative_to(home).parts
        inner = "/".join(parts[parts.index("png") + 1 :])
        if not inner.startswith(_DULL):
            yield "clipart", path, clip_art_caption(inner)
    for path in sorted(unpacked(STAMPS).rglob("*.png")):
        if said := caption_beside(path):
            yield "stamps", path, f"{said.rstrip('.').lower()}, stamp"


def _emoji(scratch: Path) -> Iterator[tuple[bytes, str]]:
    """(PNG, Unicode name) of Google's emoji, from the npm package. Skin tones, which are near-duplicates, are left."""
    if not shutil.which("npm"):
        raise UserError("npm is needed to download the emoji: install Node.js, or collect on a machine that has it")
    done = subprocess.run(["npm", "pack", "--silent", EMOJI], cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"npm pack {EMOJI} failed: {done.stderr.strip()}")
    with tarfile.open(next(scratch.glob("*.tgz"))) as tar:
        files = {m.name: m for m in tar if m.name.startswith("package/img/google/64/") or m.name.endswith("emoji.json")}
        for row in json.load(tar.extractfile(files["package/emoji.json"])):  # type: ignore[arg-type]
            if row["has_img_google"]:
                image = tar.extractfile(files[f"package/img/google/64/{row['image']}"])
                assert image is not None
                yield image.read(), row["name"]


def clip_art_caption(path: str) -> str:
    """What openclipart's path says: `animals/mammals/lion_face_nicu_01.png` -> "lion face, mammals, clip art"."""
    *folders, name = path.removesuffix(".png").lower().split("/")
    words = re.sub(r"\d+", " ", readable(_AUTHOR.sub("", name))).lower().split()
    kind = folders[1] if len(folders) > 1 else folders[0]
    return ", ".join(part for part in (" ".join(words), kind.replace("_", " "), "clip art") if part)


def on_white(image: bytes, side: int = SIDE) -> np.ndarray | None:
    """The whole image in the middle of a white square, (side, side, 3) uint8; None where it is too small for that."""
    pixels = decode(image)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale > 2:
        return None
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = pixels
    return square


def collect(folder: Path) -> None:
    """Write FOLDER/SOURCE/00000.webp ... and metadata.csv, last."""
    counts: dict[str, int] = {}
    rows, left = [], 0
    for source, image, caption in captioned():
        try:
            square = on_white(image)
        except RowError:
            square = None
        if square is None:
            left += 1
            continue
        name = f"{source}/{counts.get(source, 0):05d}.webp"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".webp", square[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, 95])[1].tobytes())
        counts[source] = counts.get(source, 0) + 1
        rows.append((name, caption))
    with open(folder / "metadata.csv", "w", newline="") as f:
        csv.writer(f).writerows([("file_name", "text"), *rows])
    size = sum(p.stat().st_size for p in folder.rglob("*.*")) / 1e6
    found = ", ".join(f"{n} {source}" for source, n in counts.items())
    print(f"{folder}: {found}; {size:.0f} MB. Left out: {left} that are too small or broken")


# ------------------------------------------------------------------------------------------------------------- train


class Kept:
    """Images read once and kept in memory as bytes: a GPU trains a small autoencoder faster than files decode."""

    latent = False

    def __init__(self, images: ImageDataset) -> None:
        self.bucket, self.view = images.bucket, images.view
        with ThreadPoolExecutor() as pool:
            loaded = pool.map(lambda i: self._small(*images.load(i)), range(len(images)))
            self._keys, pixels, tokens = zip(*loaded, strict=True)
        self._pixels, self._tokens = torch.stack(pixels), torch.stack(tokens)

    @staticmethod
    def _small(key: str, pixels: Tensor, tokens: Tensor) -> tuple[str, Tensor, Tensor]:
        return key, ((pixels + 1) * 127.5).round().byte(), tokens

    def __len__(self) -> int:
        return len(self._keys)

    def load(self, index: int, choose: Choose = first_caption) -> tuple[str, Tensor, Tensor]:
        """As ImageDataset has it; captions, which an autoencoder does not read, are never dropped."""
        return self._keys[index], self._pixels[index].float().div_(127.5).sub_(1), self._tokens[index]


def make(folder: Path, out: Path, preset: str, minutes: float) -> dict[str, Any]:
    """Train the preset on a folder of captioned images for so many minutes, draw and report, all into `out`."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # the shapes of batches never change
    p = PRESETS[preset]
    samples = open_samples(folder)
    chosen, apart = split(samples)
    captions = [str(samples.facts(i)["caption"] or "") for i in range(len(samples))]
    learnt = [captions[i] for i in chosen]
    pipeline = new_model(preset, learnt).to(device)
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.channels_last)  # what a GPU's convolutions want
    images = ImageDataset(samples, lambda words: tokenize(pipeline, words), p.size)
    config = LoopConfig(steps=1, batch=min(p.batch, len(chosen)), lr=p.lr, compile=device.type == "cuda", keep=1)
    identity = {"preset": preset, "captions": digest(captions)}
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__,
        "preset": preset, "parameters": count_parameters([pipeline.unet, pipeline.text_encoder]),
        "pictures": len(chosen), "held_out": len(apart),
        "prompts": {prompt: "learnt" if prompt in learnt else "new" for prompt in PROMPTS},
    }  # fmt: skip

    def run(task: Task, examples: Any, home: Path, share: float) -> dict[str, Any]:
        """Train for a share of what is left of the minutes."""
        stream = Stream(examples, chosen, batch=config.batch)
        until = began + 60 * minutes
        settings = in_time(task, stream, config, lambda: share * (until - time.perf_counter()), home)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for record in train(
            task, stream, settings, home, held_out=apart, prompts=PROMPTS, seeds=SEEDS, identity=identity
        ):
            print(f"{home.name}  {format_record(record)}", flush=True)
        return summary(home, settings)

    if p.vae:
        if config.compile:  # the loop compiles what it calls by itself; of an autoencoder these are its two halves
            pipeline.vae.encoder.compile()
            pipeline.vae.decoder.compile()
        kept = Kept(images)
        report["autoencoder"] = run(Reconstruct(pipeline), kept, out / "autoencoder", 0.25)
        report["psnr_db"] = psnr(report["autoencoder"]["held_out"][-1]["ema"])
        with torch.compiler.set_stance("force_eager"):  # not compiled again for other shapes
            report["scale"] = fit_scale(pipeline, next(ordered_batches(kept, chosen, 512)))
        print(f"autoencoder: PSNR of held-out images {report['psnr_db']:.1f} dB")
        shutil.copyfile(sorted((out / "autoencoder" / "samples").glob("*.png"))[-1], out / "autoencoder.png")
    with torch.compiler.set_stance("force_eager"):
        latents = precompute_latents(pipeline, images, np.arange(len(samples)), out / "latents")
    report["model"] = run(Denoise(pipeline), latents, out / "model", 0.8)
    report["seconds"] = round(time.perf_counter() - began)

    with torch.compiler.set_stance("force_eager"):
        image_grid(generate_images(pipeline, PROMPTS, SEEDS, steps=30, guidance=4.0), len(SEEDS)).save(out / "grid.png")
    curve(report["model"], out / "curve.png")
    write_json(out / "report.json", report)
    return report


def in_time(task: Task, stream: Stream, config: LoopConfig, seconds: Callable[[], float], home: Path) -> LoopConfig:
    """The configuration with as many steps as fit into the seconds, told by some that are done aside and undone.

    What was decided is kept beside the run, so that a run that goes on keeps to it.
    """
    plan = home / "plan.json"
    if (decided := read_json(plan)) is None:
        before = {name: copy.deepcopy(module.state_dict()) for name, module in task.modules.items()}
        with tempfile.TemporaryDirectory() as aside:
            rehearsal = replace(config, steps=40, log_every=20)
            *_, last = train(task, stream, rehearsal, Path(aside), prompts=PROMPTS[:1], seeds=[0])
        for name, module in task.modules.items():
            module.load_state_dict(before[name])
        decided = {"steps": max(20, int(seconds() * last["img_s"] / config.batch))}
        home.mkdir(parents=True, exist_ok=True)
        write_json(plan, decided)
    steps = decided["steps"]
    return replace(
        config, steps=steps, warmup=min(200, steps // 10), log_every=max(1, steps // 50),
        held_out_every=max(1, steps // 12), preview_every=max(1, steps // 4), save_every=max(1, steps // 3),
    )  # fmt: skip


def summary(home: Path, config: LoopConfig) -> dict[str, Any]:
    """Of a run's log: speed as the median over its records, without the first, in which kernels are compiled."""
    records = [json.loads(text) for text in (home / "log.jsonl").read_text().splitlines()]
    steady = records[1:] or records

    def middle(name: str) -> float | None:
        values = [r[name] for r in steady if r[name] is not None]
        return statistics.median(values) if values else None

    return {
        "steps": config.steps, "batch": config.batch, "lr": config.lr,
        **{name: middle(name) for name in ("img_s", "tflop_s", "mfu", "data_wait")},
        "memory_gb": records[-1]["memory_gb"],
        "loss": [{"step": r["step"], "loss": r["loss"]} for r in records],
        "held_out": [{"step": r["step"], **r["held_out"]} for r in records if "held_out" in r],
    }  # fmt: skip


def curve(told: dict[str, Any], path: Path) -> None:
    """Loss over steps: of training, and held out, of the raw and of the averaged weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([r["step"] for r in told["loss"]], [r["loss"] for r in told["loss"]], color="0.7", label="training")
    for name, said in (("raw", "held out"), ("ema", "held out, averaged weights")):
        axes.plot([r["step"] for r in told["held_out"]], [r[name] for r in told["held_out"]], marker=".", label=said)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Collect, or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    collecting = parts.add_parser("collect")
    collecting.add_argument("folder", type=Path)
    training = parts.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--preset", default="small-64", choices=PRESETS)
    training.add_argument("--minutes", type=float, default=9.0)
    asked = parser.parse_args()
    if asked.part == "collect":
        collect(asked.folder)
    else:
        report = make(asked.folder, asked.out, asked.preset, asked.minutes)
        told = {k: report["model"][k] for k in ("steps", "img_s", "tflop_s", "mfu", "data_wait", "memory_gb")}
        print(json.dumps({**{k: v for k, v in report.items() if not isinstance(v, dict)}, **told}, indent=1))
        print(f"images: {asked.out / 'grid.png'}")


if __name__ == "__main__":
    main()
