"""Training, beside diffusers' own loop and plain webdataset.

    python -m bench.train                       the step, from files to weights, the loader: some three minutes
    python -m bench.train --images FOLDER       with photographs of yours; else parts of scikit-learn's two

- The step: the same tensors in memory through our loop, and through the loop of diffusers' train_text_to_image example.
- From files to weights: ours from a folder of tars with latents computed once, and without; theirs from image files.
- The loader: images per second, ready for the model, from the same tars; beside what decoding alone takes.

All in one process, with the same weights and the same number of threads, in turns of some steps each: every figure is a
median over turns, every ratio the median of each round's ratios.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from curate.images.decode import decode
from curate.shards.tar import TarWriter
from train.data import Batch, ImageDataset, Stream, TrainDataset, open_samples
from train.latents import precompute_latents
from train.loop import LoopConfig, train
from train.models.base import count_parameters
from train.models.family import new_model, tokenize
from train.models.presets import PRESETS, UnetPreset
from train.tasks import Denoise

_SMALL: Any = PRESETS["small-64"]
MODEL: UnetPreset = replace(_SMALL, unet=(64, 128, 128), heads=2, text=128, text_layers=2, vocabulary=1000)
"""small-64 at a third of its width, with its autoencoder as it is: to encode an image costs 1.27 forward passes of the
UNet, for Stable Diffusion 1.39 (1.117 and 0.803 TFLOP at 512 px)."""

BATCH = 16
STEPS = 4  # of a turn
IMAGES = 256
SIDES = (512, 384)  # of an image in the tars
TRAINED = (64, 256)  # at which sides the loader is measured

Turn = Callable[[], float]
"""One turn of a contender: does a fixed amount of work, returns seconds."""


def main() -> None:
    """Make the data, measure all in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs to use")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, and workers of every loader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("step", "files", "loader"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore")  # of the peers'
    result: dict[str, Any] = {"threads": asked.threads, "rounds": asked.rounds, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = photographs(asked.images)
        write(folder, files)
        sizes = sum(map(len, files)) / len(files) / 1000
        print(f"{len(files)} photographs of {sizes:.0f} kB; {asked.threads} threads, {asked.rounds} rounds")
        for name, measure in (("step", step), ("files", from_files), ("loader", loader)):
            if asked.only in (None, name):
                result[name] = measure(folder, files, asked.threads, asked.rounds)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1))


# ------------------------------------------------------------------------------------------------------------ the data


def photographs(folder: Path | None) -> list[bytes]:
    """JPEG files: of a folder, or parts of 512 x 384 of scikit-learn's two photographs, a quarter of them upright."""
    if folder is not None:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:IMAGES]
        return [p.read_bytes() for p in paths]
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]  # (427, 640, 3) uint8
    files = []
    for i in range(IMAGES):
        photo, (width, height) = photos[i % 2], SIDES if i % 4 else SIDES[::-1]
        left, top = rng.integers(0, photo.shape[1] - width + 1), rng.integers(0, max(1, photo.shape[0] - height + 1))
        part = Image.fromarray(np.ascontiguousarray(photo[top : top + height, left : left + width]))
        data = io.BytesIO()
        part.save(data, "JPEG", quality=95)
        files.append(data.getvalue())
    return files


def write(folder: Path, files: Sequence[bytes]) -> None:
    """The same images as tars, for ours and webdataset, and as image files."""
    (folder / "tars").mkdir()
    (folder / "files").mkdir()
    for shard, start in enumerate(range(0, len(files), 64)):
        with open(folder / "tars" / f"{shard:05d}.tar", "wb") as f:
            tar = TarWriter(f)
            for number in range(start, min(start + 64, len(files))):
                tar.add_sample(f"{number:06d}", files[number], "jpg", caption(number), {"key": f"{number:06d}"})
                (folder / "files" / f"{number:06d}.jpg").write_bytes(files[number])
            tar.close()


def caption(number: int) -> str:
    return f"photograph {number} of a {('temple', 'flower')[number % 2]} by day"


def model() -> Any:
    """A pipeline of random weights, the same at each call."""
    return new_model(MODEL, [caption(n) for n in range(IMAGES)], "eps")


def batch_of(pipeline: Any, images: torch.Tensor, latent: bool, numbers: Sequence[int]) -> Batch:
    """These images with their captions."""
    tokens = tokenize(pipeline, [caption(n) for n in numbers])
    lengths = torch.tensor([len(t) for t in tokens])
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    views = torch.zeros(len(numbers), 6, dtype=torch.int64)  # which this model does not read
    return Batch([str(n) for n in numbers], list(numbers), images, latent, padded, lengths, views, (0, 0))


def in_turn(contenders: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's turns, one of each to warm up left out; every other round in the other order."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name in list(contenders)[:: 1 if i % 2 else -1]:
            time.sleep(0.3)  # until workers of the one before have filled their queues
            seconds = contenders[name]()
            if i:
                taken[name].append(seconds)
    return taken


def times_as_fast(taken: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of how many times faster `one` is than `other`."""
    return median(b / a for a, b in zip(taken[one], taken[other], strict=True))


# --------------------------------------------------------------------------------------------------- the two loops


def ours(stream: Any, folder: Path, pipeline: Any) -> Iterator[dict[str, Any]]:
    """Our loop with the example's choices: the text encoder frozen, all losses weighted alike. A record a turn."""
    config = LoopConfig(steps=10**6, batch=BATCH, schedule="constant", weight_decay=0.01, log_every=STEPS)
    return train(Denoise(pipeline, text=False), stream, config, folder)


def theirs(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], pipeline: Any, encode: bool = True) -> Iterator[None]:
    """What diffusers' examples/text_to_image/train_text_to_image.py does in a step, with its pieces and its defaults
    (--use_ema; without its progress bar, trackers and checkpoints). Yields after each turn.

    `batches`: (pixels, or latents where nothing is to `encode`; token ids).
    """
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    unet.train()
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rates = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10**6)
    unet, optimizer, rates = accelerator.prepare(unet, optimizer, rates)
    for number in itertools.count(1):
        images, tokens = next(batches)
        with accelerator.accumulate(unet):
            latents = images
            if encode:
                latents = vae.encode(images.to(torch.float32)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device).long()
            noisy = scheduler.add_noise(latents, noise, t)
            states = text_encoder(tokens)[0]
            said = unet(noisy, t, states).sample
            loss = F.mse_loss(said.float(), noise.float(), reduction="mean")
            accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
        loss.detach().item()  # for its progress bar
        if number % STEPS == 0:
            yield


def turn_of(loop: Iterator[Any], unmeasured: int = 0, records: list[Any] | None = None) -> Turn:
    """Turns of a loop; before each, `unmeasured` more, after which nothing loaded during others' turns is left over."""

    def turn() -> float:
        for _ in range(unmeasured):
            next(loop)
        before = time.perf_counter()
        record = next(loop)
        seconds = time.perf_counter() - before
        if records is not None:
            records.append(record)
        return seconds

    return turn


def step(folder: Path, files: Sequence[bytes], threads: int, rounds: int) -> dict[str, Any]:
    """The step alone, from pixels (both run the autoencoder) and from latents (neither does)."""
    contenders, loops = dict[str, Callable[[], float]](), list[Any]()
    for kind in ("pixels", "latents"):
        pipelines = model(), model()
        shape = (3, MODEL.size) if kind == "pixels" else (MODEL.latents, MODEL.size // MODEL.factor)
        images = torch.rand(BATCH, shape[0], shape[1], shape[1], generator=torch.Generator().manual_seed(0)) * 2 - 1
        batch = batch_of(pipelines[0], images, kind == "latents", range(BATCH))
        tokens = batch.tokens
        loops += [ours(_Again(batch), folder / kind, pipelines[0])]
        loops += [theirs(itertools.repeat((images, tokens)), pipelines[1], encode=kind == "pixels")]
        contenders |= {f"{kind}, ours": turn_of(loops[-2]), f"{kind}, diffusers' loop": turn_of(loops[-1])}
    print(
        f"\nThe step alone: UNet of {count_parameters([pipelines[0].unet]) / 1e6:.1f} M parameters on "
        f"{MODEL.size // MODEL.factor} x {MODEL.size // MODEL.factor} latents, batch {BATCH}"
    )
    taken = in_turn(contenders, rounds)
    _close(loops)
    rows = {name: {"ms": 1000 * median(seconds) / STEPS} for name, seconds in taken.items()}
    for name, row in rows.items():
        print(f"    {name:32} {row['ms']:8.1f} ms a step")
    for kind in ("pixels", "latents"):
        ratio = times_as_fast(taken, f"{kind}, ours", f"{kind}, diffusers' loop")
        rows[f"{kind}, ours"]["ratio"] = ratio
        print(f"    {kind}: {ratio:.3f} times as fast")
    return rows


class _Again:
    """A stream of the same tensors."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batches(self, cursor: tuple[int, int]) -> Iterator[Batch]:
        while True:
            yield self._batch


def from_files(folder: Path, files: Sequence[bytes], threads: int, rounds: int) -> dict[str, Any]:
    """From files to weights: a step with all that it takes to have its batch."""
    print(f"\nFrom files to weights at {MODEL.size} px, batch {BATCH}, {threads} loader workers each")
    samples = open_samples(folder / "tars")
    every = np.arange(len(samples))
    pipelines = [model() for _ in range(3)]
    images = ImageDataset(samples, lambda c: tokenize(pipelines[0], c), MODEL.size)
    before = time.perf_counter()
    latents = precompute_latents(pipelines[0], images, every, folder / "latents")
    once = time.perf_counter() - before

    def stream(examples: TrainDataset) -> Stream:
        return Stream(examples, every, batch=BATCH, workers=threads)

    # theirs first: its workers are forked, best while this process has no threads that read
    tokenizer = pipelines[2].tokenizer
    their = theirs(_endless(folder / "files", tokenizer, MODEL.size, threads), pipelines[2])
    loops = [
        ours(stream(latents), folder / "from-latents", pipelines[0]),
        ours(stream(images), folder / "from-images", pipelines[1]),
        their,
    ]
    names = ["ours, latents computed once", "ours, from the tars", "diffusers' loop, from image files"]
    records: dict[str, list[Any]] = {name: [] for name in names[:2]}
    drained = -(-2 * threads // STEPS)  # turns until what was loaded ahead is used up
    taken = in_turn({n: turn_of(loop, drained, records.get(n)) for n, loop in zip(names, loops, strict=True)}, rounds)
    _close(loops)
    rows: dict[str, Any] = {}
    for name, seconds in taken.items():
        rows[name] = {"img_s": BATCH * STEPS / median(seconds), "ratio": times_as_fast(taken, name, names[2])}
        more = ""
        if name in records:
            rows[name]["data_wait"] = median(r["data_wait"] for r in records[name][1:])
            more = f", data-wait {rows[name]['data_wait']:.1%}"
        print(f"    {name:36} {rows[name]['img_s']:7.1f} img/s, {rows[name]['ratio']:.2f} times theirs{more}")
    alone = stream(latents).batches()
    loaded = in_turn({"latents": _drawn(alone, threads)}, rounds)["latents"]
    alone.close()
    rows |= {"compute_latents_img_s": len(samples) / once, "load_latents_img_s": _LOADED / median(loaded)}
    print(f"    computing latents, once: {rows['compute_latents_img_s']:.0f} img/s")
    print(f"    loading latents alone: {rows['load_latents_img_s']:.0f} img/s")
    return rows


class _Files(torch.utils.data.Dataset):
    """Image files and captions as the example prepares them (of `datasets` it keeps only what takes no time)."""

    def __init__(self, folder: Path, size: int) -> None:
        from torchvision import transforms

        self._paths = sorted(folder.glob("*.jpg"))
        bilinear = transforms.InterpolationMode.BILINEAR
        self._prepare = transforms.Compose(
            [
                transforms.Resize(size, interpolation=bilinear),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        return self._prepare(Image.open(self._paths[number]).convert("RGB")), caption(number)


def _endless(folder: Path, tokenizer: Any, size: int, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    def collate(rows: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer(
            [text for _, text in rows],
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return torch.stack([pixels for pixels, _ in rows]), ids

    loader = torch.utils.data.DataLoader(
        _Files(folder, size), shuffle=True, drop_last=True, collate_fn=collate, batch_size=BATCH, num_workers=workers,
        persistent_workers=True,
    )  # fmt: skip
    while True:
        yield from loader


def _close(loops: Sequence[Any]) -> None:
    for loop in loops:
        loop.close()


# ---------------------------------------------------------------------------------------------------------- the loader


def loader(folder: Path, files: Sequence[bytes], threads: int, rounds: int) -> dict[str, Any]:
    """Images per second ready for the model, nothing else done; and decoding the same bytes alone."""
    found: dict[str, Any] = {}
    pipeline = model()
    samples = open_samples(folder / "tars")
    for size in TRAINED:
        images = ImageDataset(samples, lambda c: tokenize(pipeline, c), size)
        stream = Stream(images, np.arange(len(samples)), batch=BATCH, workers=threads)
        peer = _webdataset(folder, pipeline.tokenizer, size, threads)
        batches: dict[str, Any] = {"ours": stream.batches(), "webdataset": peer}
        contenders = {name: _drawn(source, threads) for name, source in batches.items()}
        contenders |= {
            "decoding alone, scaled in the decoder": _over(files, partial(decode, min_side=size), threads),
            "decoding alone, OpenCV": _over(files, _opencv, threads),
            "decoding alone, Pillow": _over(files, _pillow, threads),
        }
        print(f"\nThe loader at {size} px, {threads} workers, images a second")
        taken = in_turn(contenders, rounds)
        batches["ours"].close()
        rows = {}
        for name, seconds in taken.items():
            rows[name] = {"img_s": _LOADED / median(seconds), "ratio": times_as_fast(taken, name, "webdataset")}
            print(f"    {name:38} {rows[name]['img_s']:8.0f}   {rows[name]['ratio']:.2f} times webdataset")
        found[str(size)] = rows
    return found


_LOADED = 16 * BATCH  # images of a turn


def _webdataset(folder: Path, tokenizer: Any, size: int, workers: int) -> Iterator[Any]:
    """Plain webdataset: as its documentation reads such tars, shuffled and without end."""
    import webdataset
    from torchvision import transforms

    prepare = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def tokens(text: str) -> torch.Tensor:
        length = tokenizer.model_max_length
        return tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    tars = [str(p) for p in sorted((folder / "tars").glob("*.tar"))]
    samples = webdataset.WebDataset(tars, resampled=True, shardshuffle=False, empty_check=False).shuffle(100)
    samples = samples.decode("pil").to_tuple("jpg", "txt").map_tuple(prepare, tokens).batched(BATCH)
    return iter(torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers))


def _drawn(batches: Iterator[Any], threads: int) -> Turn:
    def turn() -> float:
        for _ in range(2 * threads + 2):  # what was loaded ahead while others had their turn
            next(batches)
        before = time.perf_counter()
        for _ in range(_LOADED // BATCH):
            next(batches)
        return time.perf_counter() - before

    return turn


def _over(files: Sequence[bytes], decoded: Callable[[bytes], Any], threads: int) -> Turn:
    def turn() -> float:
        before = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(decoded, itertools.islice(itertools.cycle(files), _LOADED)):
                pass
        return time.perf_counter() - before

    return turn


def _opencv(data: bytes) -> Any:
    import cv2

    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def _pillow(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).convert("RGB")


if __name__ == "__main__":
    main()
