"""What a GPU makes of the large models here: embedding, training, drawing. No network, no weights, no images needed.

    python -m bench.accelerator                 on one GPU, ten minutes at most: accelerator.json and accelerator.md
    python -m bench.accelerator --small         small models, a minute: whether the program works, on a CPU too
    python -m bench.accelerator --only dit-256  what has this in its name

Weights are random and images made up: how fast they are does not depend on it. The most important comes first; what the
minutes do not suffice for is told as left out, what fails is told and ends nothing else. Measurements run one after the
other in a process beside this one, which is started anew where it is lost.

Operations are counted by torch (`train.metrics.flop_counter`), the share is that of the card's peak in bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from train.devices import default_device
from train.metrics import flop_counter, peak_flops

CAPTION = "a photograph of a red fox in the snow, early in the morning, with a forest and a lake behind it"

Measure = Callable[[], dict[str, Any]]


def measurements(small: bool) -> dict[str, tuple[Measure, int]]:
    """By name, the most important first: what measures it, and seconds that it may take at most."""
    on_gpu = torch.cuda.is_available()  # a CPU takes minutes to compile
    if small:
        return {
            "embed small": (partial(embed, "small", 8), 60),
            "train debug-dit": (partial(train, "debug-dit", 8), 60),
            "train debug": (partial(train, "debug", 8), 60),
            "draw debug": (partial(draw, "debug", 16, 1), 60),
            "draw debug-dit": (partial(draw, "debug-dit", 16, 1), 60),
            "annotate small": (partial(annotate, 32, 1, 8), 60),
            "shard debug-dit": (partial(train, "debug-dit", 8, shard=True), 60),
        } | ({"compile debug-dit": (partial(train, "debug-dit", 8, compile=True), 120)} if on_gpu else {})
    return {
        "embed ViT-B-32": (partial(embed, "ViT-B-32", 256), 60),
        "train dit-256": (partial(train, "dit-256", 128), 60),
        "train sd15": (partial(train, "sd15", 16), 90),
        "draw sd15": (partial(draw, "sd15", 512, 4), 90),
        "embed ViT-L-14": (partial(embed, "ViT-L-14", 256), 90),
        "train small-64": (partial(train, "small-64", 256), 60),
        "compile dit-256": (partial(train, "dit-256", 128, compile=True), 150),
        "train base-128": (partial(train, "base-128", 128), 60),
        "train dit-256-l": (partial(train, "dit-256-l", 128), 60),
        "draw dit-256-l": (partial(draw, "dit-256-l", 512, 4), 60),
        "shard dit-256": (partial(train, "dit-256", 128, shard=True), 60),
        "annotate ViT-B/16": (partial(annotate, 768, 12, 256), 60),
        "compile sd15": (partial(train, "sd15", 16, compile=True), 200),
        "compile small-64": (partial(train, "small-64", 256, compile=True), 150),
        "compile dit-256-l": (partial(train, "dit-256-l", 128, compile=True), 150),
        "compile base-128": (partial(train, "base-128", 128, compile=True), 150),
    }


def main() -> None:
    """Measure all there is time for, write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small models")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in its name")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where the two files go")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        child(asked.child, asked.small)
        return
    until = time.monotonic() + 60 * asked.minutes
    names = {n: limit for n, (_, limit) in measurements(asked.small).items() if asked.only in n}
    result: dict[str, Any] = {"device": machine(), "small": asked.small, "measured": {}}
    print(head(result["device"]))
    for name, found in supervised(names, asked.small, until):
        result["measured"][name] = found
        print(f"    {name:20} {found.get('error') or words(found)}", flush=True)
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "accelerator.json").write_text(json.dumps(result, indent=1))
        (asked.out / "accelerator.md").write_text(table(result))


def machine() -> dict[str, Any]:
    """What is measured here."""
    device = default_device()
    known: dict[str, Any] = {"kind": device.type, "name": platform.processor() or platform.machine()}
    if device.type == "cuda":
        known["name"] = torch.cuda.get_device_name(device)
        known["memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    known |= {"peak_tflop_s": (peak_flops(known["name"]) or 0) / 1e12 or None, "cores": os.cpu_count()}
    return known | {name: version(name) for name in ("torch", "diffusers", "transformers", "open_clip_torch")}


# ------------------------------------------------------------------------------------------- one after the other


def supervised(names: dict[str, int], small: bool, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each measurement, as it is done, what it found, or {"error"}: where it is too slow or its process dies too.

    Those that do not begin before `until` (of the monotonic clock), or would be ended by it, are left out.
    """
    left = dict(names)
    while left:
        if time.monotonic() > until - 15:
            yield from ((name, {"error": "left out: no time was left"}) for name in left)
            return
        command = [sys.executable, "-m", "bench.accelerator", *(["--small"] if small else []), "--child", *left]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            for name, found in answers(process, dict(left), until):
                del left[name]
                yield name, found
        finally:
            process.kill()
            process.wait()


def answers(
    process: subprocess.Popen[str], names: dict[str, int], until: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a process says of its measurements, until one is late or the process is gone: that one's answer is last."""
    import selectors

    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    for name, limit in names.items():
        began = time.monotonic()
        seconds = min(limit + 30, until - began)  # it imports the libraries too
        if seconds <= 0 or not selector.select(seconds):
            late = "no time was left" if began + limit + 30 > until else f"took more than {limit} s"
            yield name, {"error": f"ended: {late}"}
            return
        line = process.stdout.readline()
        if not line:
            yield name, {"error": f"its process died ({process.wait()})"}
            return
        yield name, json.loads(line)


def child(names: list[str], small: bool) -> None:
    """Do these measurements; a line of JSON on stdout of each. What libraries print goes nowhere."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    known = measurements(small)
    for name in names:
        began = time.perf_counter()
        try:
            found = known[name][0]()
        except Exception as e:  # one that fails does not end the others
            place = traceback.extract_tb(e.__traceback__)[-1]
            first = (str(e).splitlines() or [""])[0][:200]
            found = {"error": f"{type(e).__name__}: {first} ({Path(place.filename).name}:{place.lineno})"}
        found["seconds"] = time.perf_counter() - began
        said.write(json.dumps(found) + "\n")
        said.flush()
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def rate_of(work: Callable[[], object], seconds: float = 5.0) -> float:
    """Times a second that `work` is done, after two rounds to warm up; it ends when the device is done."""
    if torch.cuda.is_available():
        done: Callable[[], None] = torch.cuda.synchronize
    else:
        done = lambda: None  # noqa: E731
    for _ in range(2):
        work()
    done()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        done()
        count += 1
    return count / (time.perf_counter() - began)


def facts(images_per_s: float, flops: float) -> dict[str, Any]:
    """Rate, operations of one image and share of the peak; memory at most so far, None on a CPU."""
    device = default_device()
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "img_s": images_per_s,
        "gflop": flops / 1e9,
        "tflop_s": images_per_s * flops / 1e12,
        "mfu": images_per_s * flops / peak if peak else None,
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


# ----------------------------------------------------------------------------------------------- what is measured

SECONDS = 5.0 if torch.cuda.is_available() else 0.5
"""That a figure is measured over."""

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def embed(architecture: str, batch: int) -> dict[str, Any]:
    """Images a second that open_clip's model embeds: from the CPU's arrays as the embed stage hands them over; on the
    device alone (img_s); and that threads decode and prepare on this machine's cores, which has to keep up."""
    import io
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import open_clip
    from PIL import Image

    from curate.encoders.openclip import OpenClipEncoder
    from curate.images.decode import decode

    with tempfile.TemporaryDirectory() as folder:
        if architecture == "small":
            (Path(folder) / "small.json").write_text(json.dumps(TINY_CLIP))
            open_clip.add_model_config(folder)
        file = Path(folder) / "weights.pt"
        torch.save(open_clip.create_model(architecture).state_dict(), file)
        encoder = OpenClipEncoder(architecture, str(file), None, None, None, None)
    model, device = encoder._model, encoder._device
    rng = np.random.default_rng(0)
    jpeg = io.BytesIO()
    noise = Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8))
    noise.resize((640, 480), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
    one = encoder.preprocess(decode(jpeg.getvalue()))
    arrays = np.repeat(one[None], batch, 0)
    there = torch.from_numpy(arrays).to(device)

    def forward(images: torch.Tensor = there) -> None:
        with torch.inference_mode(), encoder._numerics(False):
            model.encode_image(images)

    with flop_counter() as counter:
        forward(there[:1])
    found = facts(batch * rate_of(forward, SECONDS), counter.get_total_flops())
    found |= {"batch": batch, "precision": encoder.precision}
    found["from_arrays_img_s"] = batch * rate_of(lambda: encoder.encode_prepared(arrays), SECONDS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = [jpeg.getvalue()] * 64
        prepare = lambda: list(pool.map(lambda data: encoder.preprocess(decode(data)), files))  # noqa: E731
        found["decoded_img_s"] = len(files) * rate_of(prepare, min(2.0, SECONDS))
    return found


def annotate(width: int, layers: int, batch: int) -> dict[str, Any]:
    """An image classifier in transformers' format (a ViT with 16-pixel patches), as the annotator runs it."""
    import numpy as np
    import pyarrow as pa
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from curate.annotators.base import ImageBatch, Resources
    from curate.annotators.registry import make_annotators

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": max(1, width // 64)}
        model = ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=layers, id2label={0: "no", 1: "yes"}))
        model.save_pretrained(folder)
        ViTImageProcessor().save_pretrained(folder)
        asked = {"use": "transformers", "model": folder, "label": "yes"}
        (annotator,) = make_annotators({"labelled": asked}).values()
        annotator.load(Resources(threads=os.cpu_count() or 1, space=None, encoder=lambda: None))  # type: ignore[arg-type, return-value]
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    images = ImageBatch(
        rows=pa.table({"key": [str(i) for i in range(batch)]}), inputs=[annotator.preprocess(pixels)] * batch
    )
    with flop_counter() as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return facts(batch * rate_of(lambda: annotator.annotate(images), SECONDS), counter.get_total_flops()) | {
        "batch": batch,
        "precision": "fp32",
    }


def train(preset: str, batch: int, *, compile: bool = False, shard: bool = False) -> dict[str, Any]:
    """The training loop as `tastemaker train` runs it, on one batch of latents in memory: fp32 weights, bf16 products.

    Of Stable Diffusion the UNet alone, as it is trained further; of the others the text encoder too.
    """
    from torch.nn.utils.rnn import pad_sequence

    from train.data import Batch
    from train.loop import LoopConfig
    from train.loop import train as loop
    from train.models.base import count_parameters
    from train.models.family import family_of, new_model, tokenize
    from train.models.presets import PRESETS
    from train.tasks import Denoise

    p = PRESETS[preset]
    pipeline = new_model(p, [CAPTION] * 4, "flow" if "dit" in preset else "eps").to(default_device())
    tokens = tokenize(pipeline, [CAPTION] * batch)
    side = p.size // p.factor
    latents = torch.randn(batch, p.latents, side, side, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([len(row) for row in tokens])
    one = Batch(
        [str(i) for i in range(batch)], list(range(batch)), latents, True, pad_sequence(tokens, batch_first=True),
        lengths, torch.zeros(batch, 6, dtype=torch.int64), (0, 0),
    )  # fmt: skip
    task = Denoise(pipeline, text=preset != "sd15")
    config = LoopConfig(
        steps=10**6, batch=batch, lr=p.lr, muon=getattr(p, "muon", 0.0), log_every=2 if SECONDS < 1 else 5, keep=0,
        compile=compile, shard=shard,
    )  # fmt: skip
    records = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder, one_rank(folder, shard):
        began = time.perf_counter()
        running: Any = loop(task, _Again(one), config, Path(folder) / "model")  # type: ignore[arg-type]
        while len(records) < 2 or sum(batch * config.log_every / r["img_s"] for r in records[1:]) < 2 * SECONDS:
            records.append(next(running))
            if len(records) == 1:
                first = time.perf_counter() - began
        running.close()
    best = records[-1]
    steps = sum(1 / r["img_s"] for r in records[1:]) / len(records[1:])  # the first have compiling in them
    found = facts(1 / steps, best["tflop_s"] * 1e12 / best["img_s"])
    network = family_of(pipeline).network(pipeline)
    return found | {
        "batch": batch,
        "micro_batch": best["micro_batch"],
        "step_ms": 1000 * batch * steps,
        "data_wait": best["data_wait"],
        "first_steps_s": first,
        "parameters": count_parameters([network]),
        "precision": "bf16" if default_device().type == "cuda" else "fp32",
    }


class _Again:
    """A stream of the same tensors."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def batches(self, cursor: tuple[int, int]) -> Iterator[Any]:
        while True:
            yield self._batch


class one_rank:
    """Within, where it is asked for, a process group of this process alone."""

    def __init__(self, folder: str, wanted: bool) -> None:
        self._file, self._wanted = Path(folder) / "meeting", wanted

    def __enter__(self) -> None:
        if self._wanted:
            kind = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(kind, init_method=f"file://{self._file}", rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            torch.distributed.destroy_process_group()


def draw(preset: str, size: int, batch: int) -> dict[str, Any]:
    """Images of `size` x `size` pixels by the pipeline, in half precision on a GPU: 20 steps with guidance, decoded."""
    from train.models.family import family_of, new_model
    from train.models.presets import PRESETS

    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = new_model(PRESETS[preset], [CAPTION] * 4, "flow" if "dit" in preset else "eps").to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    how = family_of(pipeline).drawing(pipeline, 5.0) | {"height": size, "width": size, "output_type": "np"}
    count = 20 if SECONDS > 1 else 2

    def images(steps: int = count) -> None:
        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
        with torch.no_grad():
            pipeline([CAPTION] * batch, num_inference_steps=steps, generator=seeds, **how)

    counted = []
    for steps in (1, 2):  # the same is done in each
        with flop_counter() as counter:
            images(steps)
        counted.append(counter.get_total_flops())
    flops = (counted[0] + (count - 1) * (counted[1] - counted[0])) / batch
    return facts(batch * rate_of(images, 2 * SECONDS), flops) | {
        "batch": batch,
        "steps": count,
        "precision": str(dtype).removeprefix("torch."),
    }


# ------------------------------------------------------------------------------------------------- how it is told


def head(device: dict[str, Any]) -> str:
    """The machine in a line; says so where the figures are of a CPU."""
    versions = ", ".join(f"{n} {device[n]}" for n in ("torch", "diffusers", "transformers", "open_clip_torch"))
    if device["kind"] != "cuda":
        cpu = f"A CPU, {device['cores']} cores; {versions}"
        return f"{cpu}. **These figures say that the program works, and nothing of a GPU.**"
    peak = f"{device['peak_tflop_s']:.0f} TFLOP/s in bf16" if device["peak_tflop_s"] else "its peak is not known"
    return f"{device['name']}, {device['memory_gb']:.0f} GB, {peak}; {versions}."


def words(found: dict[str, Any]) -> str:
    """A measurement in a line."""
    text = f"{found['img_s']:9.1f} img/s  {found['tflop_s']:8.3f} TFLOP/s"
    text += f"  {found['mfu']:4.0%} of the peak" if found["mfu"] is not None else ""
    text += f"  {found['step_ms']:.0f} ms a step" if "step_ms" in found else ""
    return text + (f"  {found['memory_gb']:.1f} GB" if found["memory_gb"] is not None else "")


def table(result: dict[str, Any]) -> str:
    """All of it in Markdown."""
    rows = ["| | img/s | GFLOP an image | TFLOP/s | of the peak | a step, ms | batch | GB | precision | more |"]
    rows += ["|---|--:|--:|--:|--:|--:|--:|--:|---|---|"]
    for name, f in result["measured"].items():
        if "error" in f:
            rows.append(f"| {name} | " + "| " * 8 + f"{f['error'].replace('|', '/')} |")
            continue
        share = f"{f['mfu']:.0%}" if f["mfu"] is not None else ""
        memory = f"{f['memory_gb']:.1f}" if f["memory_gb"] is not None else ""
        step = f"{f['step_ms']:.0f}" if "step_ms" in f else ""
        known = {
            "from_arrays_img_s": "from arrays {:.0f} img/s", "decoded_img_s": "decoded and prepared {:.0f} img/s",
            "parameters": "{:,} parameters", "first_steps_s": "first steps {:.0f} s", "steps": "{} steps",
            "data_wait": "data-wait {:.0%}",
        }  # fmt: skip
        more = ", ".join(form.format(f[key]) for key, form in known.items() if key in f)
        rows.append(
            f"| {name} | {f['img_s']:.1f} | {f['gflop']:.3g} | {f['tflop_s']:.3g} | {share} | {step} | {f['batch']} "
            f"| {memory} | {f['precision']} | {more} |"
        )
    return "\n".join([head(result["device"]), "", *rows, ""])


if __name__ == "__main__":
    main()
