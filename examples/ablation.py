"""Does curating help? The same model trained on the same number of images, chosen from one raw set in several ways.

    python -m examples.ablation OUT --short        minutes: 2,000 images, three ways, one seed, 300 steps
    python -m examples.ablation OUT                a night on two cores: 7,000 images, nine ways, 3 seeds, 3,000 steps

The raw set is real captioned images of Debian's packages with faults planted at known rates (examples/faults.py).
`tastemaker` curates it with the bundled encoder, rules choose, packed shards are trained on (preset tiny, 32 pixels),
and every model is measured on the same clean images that no set holds. No network but apt-get's, no GPU.

OUT/report.md, figure.png, drawn.png, report.json    what came of it (examples/ablation_report.py)
    raw/ apart/    the raw set, and what is measured on
    data/          the data folder: a selection and packed shards for each way and seed
    models/        a model for each way and seed: log.jsonl, checkpoints, measured.npz

Killed, it goes on when typed again; with more --seeds or --ways what is there stays. Another OUT for other settings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.encoders.registry import load_encoder
from curate.layout import Data
from curate.ledger.rules import KEPT
from curate.ledger.select import SelectConfig, select
from curate.ledger.uids import UID, select_uids
from curate.ledger.view import query
from curate.shards.pack import PackConfig, pack
from curate.store.files import read_json, write_json
from examples import faults
from examples.ablation_report import write_report
from train.data import ImageDataset, Stream, crop_resize, decode_sample, open_samples
from train.devices import versions
from train.evaluate.evaluation import encode_images
from train.evaluate.figures import InDomainSpace
from train.evaluate.heldout import caption_of, distinct_captions, losses
from train.latents import precompute_latents
from train.loop import LoopConfig, train
from train.models.family import family_of, new_model, tokenize
from train.models.presets import PRESETS
from train.tasks import Denoise, eval_mode

RULES = {
    "size": "least(original_width, original_height) >= 64",
    "sharpness": "quality_sharpness > 10",
    "text": "text_area < 0.02 and not text_mark",
    "near_duplicates": "best_of(dup, original_width * original_height)",
    "topic": "topic >= 0.5",
    "caption": "top(similarity, 0.7)",
}
"""Each by itself, and all together. Cuts were set on a raw set of 400 images, before any model was trained."""

WAYS: dict[str, tuple[str, ...]] = {
    "chance": (),
    **{name: (name,) for name in RULES},
    "recipe": tuple(RULES),
    "clean": ("clean",),
}
"""Name -> rules. `clean` alone reads what was planted: nobody could choose better by faults."""

BY_SCORE = {"caption": "similarity", "recipe": "similarity"}
"""Of what the rules leave, the best by this are taken; after cuts some by chance, others for each seed."""

RECIPE = {
    "images": {"size": 256, "mode": "keep_ratio_largest", "only_if_bigger": True, "quality": 95},
    "embed": {"encoder": "bundled"},
    "columns": {"quality": "quality", "text": "text", "dup": {"use": "near-duplicates", "phash": 4}},
    "select": {"name": "raw", "rules": {}},
}

RATED, RATED_OFF = 100, 30  # images that the head `topic` learns from, and how many of them are off topic
PROMPTS, DRAWN = 256, 8  # captions drawn to measure, and images of them that are kept to be looked at


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for; the same to go on."""

    images: int
    apart: int  # clean images beside them
    share: float  # of the images, chosen in each way
    steps: int
    seeds: int
    ways: tuple[str, ...]
    preset: str = "tiny"
    batch: int = 32

    @property
    def chosen(self) -> int:
        return round(self.share * self.images)


GROWING = ("seeds", "ways")  # of which more may be asked for in the same folder

SHORT = Settings(images=2000, apart=600, share=0.3, steps=300, seeds=1, ways=("chance", "recipe", "clean"))
WHOLE = Settings(images=7000, apart=1000, share=0.3, steps=3000, seeds=3, ways=tuple(WAYS))


def run(out: Path, settings: Settings, jobs: int) -> dict[str, Any]:
    """All of it; what report.json holds."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(asdict(settings)))
    before = read_json(out / "settings.json") or asked
    other = [f"{k}: {before[k]} then, {v} now" for k, v in asked.items() if before[k] != v and k not in GROWING]
    if other:
        raise UserError(f"{out} holds an ablation with other settings ({', '.join(other)}). Give another folder.")
    write_json(out / "settings.json", asked)

    curate(out, settings)
    data = Data.at(out / "data")
    removed: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for way in WAYS:
        rows = judged(data, way)
        counts = rows.groupby("fault").kept.agg(["size", "sum"])
        removed[way] = {fault: {"rows": int(n), "kept": int(kept)} for fault, n, kept in counts.itertuples()}
        for seed in range(settings.seeds if way in settings.ways else 0):
            taken = choose(rows, way, seed, settings.chosen)
            pack_chosen(out, data, f"{way}-{seed}", taken.uid)
            chosen[f"{way}-{seed}"] = taken.fault.value_counts().to_dict()
        taken_too = f", {settings.chosen:,} of them taken" if way in settings.ways else ""
        print(f"{way}: {int(rows.kept.sum()):,} of {len(rows):,} images left{taken_too}", flush=True)

    measure_real(out, settings)
    train_all(out, settings, jobs)
    facts = {"settings": asked, "rules": RULES, "removed": removed, "chosen": chosen, "made_with": versions()}
    facts["minutes_of_this_call"] = round((time.monotonic() - began) / 60, 1)
    return write_report(out, facts)


# ------------------------------------------------------------------------------------------------------------- curate


def curate(out: Path, settings: Settings) -> None:
    """The raw set, and `tastemaker` on it: curate, a head on ratings, annotate. What is there stays."""
    if not (out / "planted.json").is_file():
        planted = faults.make(out, settings.images, settings.apart)
        write_json(out / "planted.json", planted)
    if (out / "curated.json").is_file():
        return
    write_json(out / "recipe.yaml", RECIPE)  # JSON is YAML
    data = out / "data"
    tastemaker("curate", out / "raw", "--out", data, "--recipe", out / "recipe.yaml")
    write_ratings(Data.at(data), out / "topic.csv")
    tastemaker("fit", out / "topic.csv", "--data", data, "--out", out / "topic.head", "--task", "topic")
    tastemaker("annotate", data, f"topic={out / 'topic.head'}")
    write_json(out / "curated.json", {"done": True})


def tastemaker(*words: Any) -> None:
    """One command of the command line, said before it runs."""
    print("$ tastemaker " + " ".join(map(str, words)), flush=True)
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *map(str, words)])
    if done.returncode:
        raise UserError(f"tastemaker {words[0]} ended with {done.returncode}")


def write_ratings(data: Data, path: Path) -> None:
    """What somebody says who looks at 100 images, 30 of them off topic, and calls them on topic (1) or off (0)."""
    rows = query(data, "SELECT key, source.fault AS fault FROM ledger WHERE status = 'success' ORDER BY key")
    rows = rows.sample(frac=1, random_state=0)
    off = rows[rows.fault == "off_topic"][:RATED_OFF]
    on = rows[rows.fault != "off_topic"][: RATED - len(off)]
    rated = pd.concat([off, on])
    pd.DataFrame({"key": rated.key, "label": (rated.fault != "off_topic").astype(int)}).to_csv(path, index=False)


# ------------------------------------------------------------------------------------------------------------- choose


def judged(data: Data, way: str) -> pd.DataFrame:
    """Every image of the raw set: key, uid, fault, scores, and whether the rules of this way keep it."""
    rules = {name: RULES.get(name, "source.fault = 'clean'") for name in WAYS[way]}
    select(data, SelectConfig(name=way, rules=rules))
    rows = query(
        data,
        "SELECT ledger.key, source.uid AS uid, source.fault AS fault, similarity, topic, verdict FROM ledger "
        f"JOIN verdicts ON ledger.key = verdicts.key AND selection = '{way}' ORDER BY ledger.key",
    )
    return rows.assign(kept=rows.verdict == KEPT)


def choose(rows: pd.DataFrame, way: str, seed: int, count: int) -> pd.DataFrame:
    """As many of the rows that the rules keep: the best by score where the way has one, else some by chance."""
    left = rows[rows.kept]
    if len(left) < count:
        raise UserError(
            f"the rules of {way} leave {len(left):,} images, and {count:,} are wanted: give a smaller --share"
        )
    if way in BY_SCORE:
        return left.sort_values(BY_SCORE[way], ascending=False, kind="stable")[:count]
    return left.sample(count, random_state=seed)


def pack_chosen(out: Path, data: Data, name: str, uids: Sequence[str]) -> None:
    """The selection of these rows as a subset file, as `tastemaker select --uids` takes one, and its packed shards."""
    values = np.sort(np.frombuffer(bytes.fromhex("".join(uids)), "S16"))
    path = out / "uids" / f"{name}.npy"
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as f:
        np.save(f, values.view(">u8").astype("<u8").view(UID))
    select_uids(data, name, path)
    pack(data, name, PackConfig())


# -------------------------------------------------------------------------------------------------------------- train


def train_all(out: Path, settings: Settings, jobs: int) -> None:
    """A model for each way and seed, `jobs` at a time, each in a process of one thread."""
    cells = [(way, seed) for seed in range(settings.seeds) for way in settings.ways]
    left = [cell for cell in cells if not measured_file(out, *cell).is_file()]
    if not left:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
    began, first = time.monotonic(), steps_done(out, left)
    total = len(left) * settings.steps
    with ProcessPoolExecutor(min(jobs, len(left)), mp_context=get_context("spawn")) as pool:
        waiting: set[Future[None]] = {pool.submit(train_cell, out, way, seed, settings) for way, seed in left}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=30, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                now = steps_done(out, left)
                rate = (now - first) / (time.monotonic() - began)
                eta = f", {(total - now) / rate / 60:.0f} min left" if rate > 0 else ""
                finished = len(cells) - sum(not measured_file(out, *cell).is_file() for cell in cells)
                print(f"{finished} of {len(cells)} models, {now:,} of {total:,} steps{eta}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measured_file(out: Path, way: str, seed: int) -> Path:
    """Of one model; there when all of it is done."""
    return out / "models" / f"{way}-{seed}" / "measured.npz"


def steps_done(out: Path, cells: Sequence[tuple[str, int]]) -> int:
    """Of all these models together, as their logs have it."""
    found = 0
    for cell in cells:
        log = measured_file(out, *cell).with_name("log.jsonl")
        lines = log.read_text().splitlines() if log.is_file() else []
        found += json.loads(lines[-1])["step"] if lines else 0
    return found


def train_cell(out: Path, way: str, seed: int, settings: Settings) -> None:
    """Train and measure one model. Of one seed all models begin with the same weights, and know the same words."""
    torch.set_num_threads(1)
    quiet()
    home, p = measured_file(out, way, seed).parent, PRESETS[settings.preset]
    samples = open_samples(out / "data" / "shards" / f"{way}-{seed}")
    raw = open_samples(out / "data" / "shards" / "raw")
    pipeline = new_model(settings.preset, [caption_of(raw, i) for i in range(len(raw))], seed=seed)
    images = ImageDataset(samples, lambda words: tokenize(pipeline, words), p.size)
    everything = np.arange(len(samples))
    latents = precompute_latents(pipeline, images, everything, home / "latents", threads=1)
    stream = Stream(latents, everything, batch=settings.batch, seed=seed, workers=1)
    steps = settings.steps
    config = LoopConfig(
        steps=steps, batch=settings.batch, lr=p.lr, seed=seed, keep=1, log_every=max(1, steps // 100),
        save_every=max(1, steps // 5), preview_every=2 * steps,
    )  # fmt: skip
    for _ in train(Denoise(pipeline), stream, config, home, seeds=[0], identity={"way": way}):
        pass
    found = measure(out, pipeline, p.size, seed)
    shutil.rmtree(home / "latents")
    with atomic(measured_file(out, way, seed)) as f:
        np.savez(f, **found)


def quiet() -> None:
    """Captions that are longer than the model reads are not news."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


# ------------------------------------------------------------------------------------------------------------ measure


def measure_real(out: Path, settings: Settings) -> None:
    """`apart.npz`: what the encoder says of the images apart, at the models' size, and of their captions.

    `prompts` are the indices of those whose captions are drawn; the in-domain space is fitted to the others.
    """
    if (out / "apart.npz").is_file():
        return
    samples, size = open_samples(out / "apart"), PRESETS[settings.preset].size
    encoder = load_encoder("bundled", threads=1)
    pixels = (crop_resize(decode_sample(samples[i], size), size, size) for i in range(len(samples)))
    found: dict[str, Any] = {"vectors": encode_images(pixels, {"vectors": encoder})["vectors"]}
    found["texts"] = encoder.encode_texts([caption_of(samples, i) for i in range(len(samples))])
    found["prompts"] = np.array(distinct_captions(samples, np.arange(len(samples)), min(PROMPTS, len(samples) // 3)))
    found["rank"], found["similarity"] = fidelity(found, found["vectors"][found["prompts"]])
    with atomic(out / "apart.npz") as f:
        np.savez(f, **found)


def measure(out: Path, pipeline: Any, size: int, seed: int) -> dict[str, Any]:
    """Of one model: loss of each image apart; vectors of what it draws, and the rank of each prompt for its image."""
    samples, real = open_samples(out / "apart"), np.load(out / "apart.npz")
    images = ImageDataset(samples, lambda words: tokenize(pipeline, words), size)
    loss = losses(pipeline, images, np.arange(len(samples)), seed=seed).mean(1)
    prompts = real["prompts"]
    drawn = draw(pipeline, [caption_of(samples, i) for i in prompts], seed)
    vectors = encode_images(drawn, {"vectors": load_encoder("bundled", threads=1)})["vectors"]
    rank, similarity = fidelity(real, vectors)
    return {"loss": loss, "vectors": vectors, "rank": rank, "similarity": similarity, "drawn": np.stack(drawn[:DRAWN])}


def fidelity(real: Any, vectors: Any) -> tuple[Any, Any]:
    """How many prompts are more like each image than its own, and the cosine to that: (n,) each, in-domain space."""
    rest = np.setdiff1d(np.arange(len(real["vectors"])), real["prompts"])
    space = InDomainSpace(real["vectors"][rest], real["texts"][rest])
    cosines = space.images(vectors) @ space.texts(real["texts"][real["prompts"]]).T
    own = cosines.diagonal()
    return (cosines > own[:, None]).sum(1), own


def draw(pipeline: Any, prompts: Sequence[str], seed: int) -> list[Any]:
    """One image, (h, w, 3) uint8, for each prompt, each from noise of its own: the same for all models of a seed."""
    images: list[Any] = []
    how = family_of(pipeline).drawing(pipeline, 3.0)
    with eval_mode(pipeline):
        for start in range(0, len(prompts), 32):
            part = list(prompts[start : start + 32])
            noise = [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(part))]
            images += map(np.asarray, pipeline(part, num_inference_steps=20, generator=noise, **how).images)
    return images


def main() -> None:
    """Run it, in short or whole, or in between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--short", action="store_true", help="smaller in everything, to see that it works")
    parser.add_argument("--images", type=int, help="of the raw set")
    parser.add_argument("--share", type=float, help="of them, chosen in each way (0.3)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all; chance and clean are always among them")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="models at a time")
    asked = vars(parser.parse_args())
    out, jobs, short = asked.pop("out"), asked.pop("jobs"), asked.pop("short")
    given = {k: v for k, v in asked.items() if v is not None}
    if "ways" in given:
        given["ways"] = tuple(way for way in WAYS if way in {"chance", "clean", *given["ways"]})
    settings = Settings(**{**asdict(SHORT if short else WHOLE), **given})
    try:
        run(out.absolute(), settings, jobs)
    except UserError as e:
        sys.exit(str(e))
    print(f"look: {out / 'report.md'}")


if __name__ == "__main__":
    main()
