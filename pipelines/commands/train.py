"""`tastemaker train`: captioned pictures to a diffusers pipeline, or a LoRA, in a folder that says how it was made.

MODEL/model_index.json unet/ ...    the finished pipeline (of a LoRA: pytorch_lora_weights.safetensors)
      README.md                     model card
      train.json                    what was asked, of which data, with which versions, and what came of it
      log.jsonl samples/ checkpoints/
      data.json                     which pictures are held out, and which can't be read
      start/ vae-training/ latents/ what training begins with, and what is computed before it
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aesthetic.errors import DiskFull, UserError
from aesthetic.files import scratch_path
from curate.store.disk import check_space
from curate.store.files import local_path, read_json, sweep, write_json
from curate.store.ownership import check_free, taken
from pipelines.options import REQUIRED, Options, Result, argument, option, positive_int
from pipelines.prompts import read_prompts
from pipelines.runtime.progress import ProgressBar, format_duration, redirect_output
from train.devices import FreeCores, default_device
from train.models.presets import OBJECTIVES, PRESETS
from train.models.release import LORA_FILE, is_released, release

if TYPE_CHECKING:
    from pipelines.runtime.trainers import Materials, Plan, Trainer
    from train.data import ImageScan, MapDataset

FROM_STEPS, FROM_BATCH = 1000, 8
"""Of training that goes on from a model, where nothing else is asked."""

SD_LR = 1e-4
"""What Stable Diffusion 1 was trained with (its model card): taken for a model that does not say."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """None: what the preset or the model suggests."""

    data: Path = argument("SHARDS", "a folder of packed shards, of img2dataset's or webdataset's tars, or of images")
    out: Path = option(
        "the model's folder, which diffusers loads when done", default=REQUIRED, metavar="MODEL", type=local_path
    )
    preset: str | None = option(
        "a new model: debug, tiny (default without a GPU), small-64 (default with one), base-128, sd15", metavar="P"
    )
    start: str | None = option("go on with a diffusers folder, or a hub id", flag="--from", metavar="MODEL")
    lora: int | None = option(
        "train only a LoRA on it (default rank 8)", metavar="RANK", nargs="?", const=8, type=positive_int
    )
    objective: str | None = option("of a new model: flow (default), v or eps", metavar="O")
    steps: int | None = option("default: the preset's; 1000 with --from", metavar="N", type=positive_int)
    batch: int | None = option("pictures a step, over all workers", metavar="N", type=positive_int)
    lr: float | None = option("highest learning rate of AdamW", metavar="X")
    size: int | None = option("side of the pictures (default: the model's own)", metavar="PX", type=positive_int)
    buckets: bool = option("keep pictures' aspect ratios: several shapes of one area", default=False)
    caption: str | None = option("of pictures without a caption of their own: 'a photo of sks dog'", metavar="TEXT")
    weight_by: str | None = option("draw pictures in proportion to this score", metavar="COLUMN")
    workers: int | None = option("default: one per GPU, or one", metavar="N", type=positive_int)
    prompts: Path | None = option("drawn as training goes on, a line each (default: 4 captions)", metavar="FILE")
    save_every: int | None = option(
        "steps between checkpoints (default: a fifth of all)", metavar="N", type=positive_int
    )
    look_every: int | None = option("steps between pictures (default: at checkpoints)", metavar="N", type=positive_int)
    micro_batch: int | None = option("pictures at a time on a worker, to save memory", metavar="N", type=positive_int)
    checkpointing: bool = option("recompute activations: less memory, a third slower", default=False)
    compile: bool = option("torch.compile: minutes at first, then faster on GPUs", default=False)
    tensorboard: bool = option("write MODEL/tensorboard too (extra `tensorboard`)", default=False)
    seed: int = option(default=0, metavar="N")
    address: str | None = option("train on this Ray cluster (`auto` finds it)", flag="--ray-address", metavar="ADDRESS")


def run(request: TrainOptions) -> Result:
    """Train up to the last step, from where an earlier run of the same request stopped.

    Raises UserError before anything is written where data, options or folder do not fit; DiskFull; Diverged.
    """
    free = FreeCores()
    _check(request)
    _check_start(request)
    prompts = tuple(read_prompts(request.prompts)) if request.prompts else ()
    from train.data import open_samples, sampling_weights

    samples = open_samples(request.data, request.caption)
    if request.weight_by:
        sampling_weights(samples, request.weight_by)
    settings = _settings(request, samples)
    before = _before(request.out, settings)
    if before and before.get("finished") and is_released(request.out):
        return _outcome(request, before)
    with (
        taken(request.out, "model", replaces=["train.json", "data.json"]) as folder,
        redirect_output(request.out / "logs" / "train.log") as terminal,
        contextlib.ExitStack() as stack,
    ):
        sweep(request.out)
        before = _before(request.out, settings)  # again: another run may have been at work until now
        if before and before.get("finished") and is_released(request.out):
            return _outcome(request, before)
        if before is None:
            shutil.rmtree(request.out / "start", ignore_errors=True)
        facts = before or {"settings": settings, "started": _now()}
        write_json(request.out / "train.json", facts)
        try:
            materials, trainer = _prepared(request, settings, facts, samples, prompts, free, terminal, stack)
        except (UserError, DiskFull):
            if before is None:
                folder.undo(["train.json", "data.json", "start", "logs"])
            raise
        return _carried_out(request, facts, materials, trainer, terminal)


# ---------------------------------------------------------------------------------------- before anything is written


def _check(request: TrainOptions) -> None:
    """What options alone tell, without torch."""
    if request.preset and request.start:
        raise UserError("--preset and --from exclude each other: a new model, or one to go on with")
    if request.lora and not request.start:
        raise UserError("--lora changes a model that is there already: say which with --from")
    if request.objective and request.start:
        raise UserError("--objective is for new models: one to go on with (--from) has its own")
    if request.objective and request.objective not in OBJECTIVES:
        raise UserError(f"there is no objective {request.objective!r}: {', '.join(OBJECTIVES)}")
    if request.preset:
        _check_preset(request.preset, request.size)
    check_data(request.data)
    check_free(request.out, "model")
    if request.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: it is not installed here: `pip install 'tastemaker[tensorboard]'`")
    if request.lr is not None and not request.lr > 0:
        raise UserError(f"--lr {request.lr}: a number above 0 is expected")
    if request.workers and request.batch and request.batch % request.workers:
        raise UserError(f"--batch {request.batch} can't be shared evenly by {request.workers} workers")


def _check_preset(name: str, size: int | None) -> None:
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: {', '.join(PRESETS)}")
    step = PRESETS[name].factor * 2 ** (len(PRESETS[name].unet) - 1)
    if size and size % step:
        raise UserError(f"--size {size} does not fit {name}: sides are multiples of {step}")


def check_data(folder: Path) -> None:
    """UserError where there is no folder, or nothing in it: what `open_samples` would say, without torch."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. A folder of packed shards, of tars or of images is expected.")
    if not any(folder.iterdir()):
        raise UserError(f"{folder}: holds neither tars nor images")


def _check_start(request: TrainOptions) -> None:
    """What the model to go on with says of itself, without torch."""
    if request.start is None:
        return
    from train.models.info import check_trainable, read_model_info

    start = Path(request.start)
    if (start / LORA_FILE).is_file() and not (start / "model_index.json").is_file():
        raise UserError(f"{start} is a LoRA: give --from the model that it was trained on (its README.md names it)")
    check_trainable(read_model_info(request.start), request.size)


def _settings(request: TrainOptions, samples: MapDataset) -> dict[str, Any]:
    """The request with every default filled in: what must be the same for a run to go on."""
    name = request.preset
    if request.start is None and name is None:
        import torch

        name = "small-64" if torch.cuda.is_available() else "tiny"
        _check_preset(name, request.size)
    preset = PRESETS[name] if name else None
    batch = request.batch or _fitting(preset.batch if preset else FROM_BATCH, len(samples), request.workers or 1)
    if batch > len(samples):
        raise UserError(f"--batch {batch} is more than the {len(samples)} pictures in {samples.folder}")
    return {
        "preset": name,
        "from": request.start and _absolute(request.start),
        "lora": request.lora,
        "objective": None if preset is None else request.objective or "flow",
        "size": request.size or (preset.size if preset else None),
        "buckets": request.buckets,
        "weight_by": request.weight_by,
        "caption": request.caption,
        "steps": request.steps or (preset.steps if preset else FROM_STEPS),
        "batch": batch,
        "lr": request.lr or (preset.lr if preset else _further_lr(str(request.start), request.lora is not None)),
        "seed": request.seed,
        "data": samples.fingerprint,
    }


def _absolute(start: str) -> str:
    """A folder's whole path, so that it is the same from everywhere; a hub id as it is."""
    return str(Path(start).absolute()) if Path(start).exists() else start


def _fitting(batch: int, pictures: int, workers: int) -> int:
    """A usual batch, halved until four fit into the data; a multiple of the workers."""
    while batch > workers and 4 * batch > pictures:
        batch //= 2
    return max(workers, batch - batch % workers)


def _further_lr(start: str, lora: bool) -> float:
    """The rate that a model was trained with for a LoRA, a tenth of it for all of its weights.

    For Stable Diffusion these are 1e-4 and 1e-5, the rates of diffusers' own examples.
    """
    from train.models.info import training_record

    place, facts = training_record(start) or (None, {})
    own = place == Path(start).expanduser().absolute()  # and not of the run whose checkpoint it is
    rate = float((facts["settings"].get("lr") if own else None) or SD_LR)
    return rate if lora else rate / 10


def _before(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What MODEL says of itself, where the same was asked; None where nothing was learnt yet. UserError otherwise."""
    before: dict[str, Any] | None = read_json(out / "train.json")
    if before is None:
        return None
    then = before["settings"]
    other = [f"{k}: {then.get(k)} then, {v} now" for k, v in settings.items() if then.get(k) != v and k != "data"]
    if then["data"] != settings["data"]:
        other.append("its pictures or captions were not those that are there now")
    if not other:
        return before
    if not (any(out.glob("checkpoints/*")) or any(out.glob("vae-training/*")) or is_released(out)):
        return None
    raise UserError(
        f"{out} holds a model that was trained otherwise ({'; '.join(other)}). Give the same settings to go on "
        f"with it, another --out for another model, or --from {out} to begin with what it has learnt."
    )


# ------------------------------------------------------------------------------------------------------------ the run


def _prepared(
    request: TrainOptions,
    settings: dict[str, Any],
    facts: dict[str, Any],
    samples: MapDataset,
    prompts: tuple[str, ...],
    free: FreeCores,
    terminal: IO[str],
    stack: contextlib.ExitStack,
) -> tuple[Materials, Trainer]:
    """All that can be refused, and all that is done once; adds to `facts` what is known then."""
    from pipelines.runtime.trainers import LocalTrainer, Materials, ray_trainer

    def say(text: str) -> None:
        terminal.write(text + "\n")

    for note in samples.notes():
        say(f"{samples.folder}: {note}")
    pipeline = _loaded(settings) if settings["from"] else None
    told = _surveyed(request, samples, settings, terminal)
    if pipeline is None:
        _write_start(settings, samples, told, request.out)
    plan = _plan(request, settings, samples, told, prompts, pipeline)
    alone = request.address is None and (request.workers or _gpus()) <= 1
    device = default_device() if alone else _cpu()
    by = f"cpu, {_set_threads(facts, free)}" if alone and device.type == "cpu" else str(device)
    materials = Materials(plan, device, pipeline)
    _check_room(plan, materials)
    trainer: Trainer = LocalTrainer(materials, by)
    if not alone:
        trainer = stack.enter_context(ray_trainer(materials, request.workers, request.address, say))
    facts |= {"data": _data_facts(samples, materials, told), "made_with": _versions(), "by": trainer.about}
    facts |= {"size": plan.size, "prompts": list(plan.prompts)}
    write_json(request.out / "train.json", facts)
    for text in _headline(request, settings, materials, trainer.about):
        say(text)
    return materials, trainer


def _carried_out(
    request: TrainOptions, facts: dict[str, Any], materials: Materials, trainer: Trainer, terminal: IO[str]
) -> Result:
    """All stages, as far as they are not done yet."""
    from train.metrics import format_record, log_to_tensorboard, plot_loss
    from train.tasks import psnr

    def say(text: str) -> None:
        terminal.write(text + "\n")

    plan, began = materials.plan, time.monotonic()
    if plan.vae and not (plan.vae_folder / "vae").is_dir():
        with _ending_after_a_step(terminal, plan.vae_folder) as stop:
            for record in trainer.train("autoencoder", stop):
                found = record.get("held_out")
                say("autoencoder " + format_record(record) + (f"  PSNR {psnr(found['ema']):.1f} dB" if found else ""))
        _settle_vae(materials)
    if plan.latents:
        count = ProgressBar(terminal, "latents", len(materials.encoded))
        trainer.precompute_latents(count)
        size = sum(p.stat().st_size for p in plan.latents_folder.iterdir())
        count.end(f", {size / 1e6:,.1f} MB in {plan.latents_folder}")
    with _ending_after_a_step(terminal, plan.out) as stop:
        records = trainer.train("model", stop)
        for record in log_to_tensorboard(records, plan.out) if request.tensorboard else records:
            say(format_record(record))
            if "checkpoint" in record:
                plot_loss(plan.out)
    facts["result"] = _result(plan)
    facts |= {"finished": _now(), "seconds": round(time.monotonic() - began)}
    _release(plan, facts)
    return _outcome(request, facts)


@contextlib.contextmanager
def _ending_after_a_step(terminal: IO[str], folder: Path) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM ends training after its step, with a checkpoint; the second ends it at once.

    What it gives says whether that was asked for; then KeyboardInterrupt is raised in the end. Says from where training
    goes on, if it does.
    """
    from train import checkpoint

    if there := checkpoint.checkpoints(folder):
        terminal.write(f"goes on from step {max(there):,}, {there[max(there)]}\n")
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(terminal.fileno(), b"\nending after this step, with a checkpoint; once more: at once\n")

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    were = [signal.signal(s, note) for s in signals]
    try:
        yield lambda: bool(asked)
    finally:
        for s, was in zip(signals, were, strict=True):
            signal.signal(s, was)
    if asked:
        raise KeyboardInterrupt


def _set_threads(facts: dict[str, Any], free: FreeCores) -> str:
    """Choose how many threads compute, by what others leave free; returns that in words.

    A run that goes on keeps the number that it began with: it changes the last bits of sums. OMP_NUM_THREADS is obeyed.
    """
    import torch

    count = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        began = facts.get("threads")
        facts["threads"] = int(began) if began else min(count, free())
        torch.set_num_threads(facts["threads"])
        if facts["threads"] < count:
            why = "as when it began" if began else "others are busy"
            count, cores = facts["threads"], count
            return f"{count} thread{'s' * (count > 1)} of {cores} ({why}; OMP_NUM_THREADS sets another number)"
        count = facts["threads"]
    return f"{count} thread{'s' * (count > 1)}"


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _loaded(settings: dict[str, Any]) -> Any:
    """The pipeline to go on with, checked."""
    from train.models.unet import check_size, default_size, load_model
    from train.objective import objective_of

    pipeline = load_model(settings["from"])
    objective_of(pipeline.scheduler)
    check_size(pipeline, settings["size"] or default_size(pipeline))
    return pipeline


def _surveyed(
    request: TrainOptions, samples: MapDataset, settings: dict[str, Any], terminal: IO[str]
) -> dict[str, Any]:
    """`data.json`: which pictures are held out, and which can't be read. Every picture is looked at once."""
    from train.data import MIN_IMAGES, sampling_weights, scan_images, split

    path = request.out / "data.json"
    told: dict[str, Any] | None = read_json(path)
    if told is not None and told["data"] == settings["data"]:
        return told
    count = ProgressBar(terminal, "pictures", len(samples))
    known: ImageScan = scan_images(samples, count)
    count.end(f", {len(known.unreadable):,} of them can't be read" if known.unreadable else "")
    chosen, held = split(samples, known=known)
    readable = len(chosen) + len(held)
    if readable < MIN_IMAGES:
        raise UserError(f"{readable} pictures in {samples.folder} can be read: at least {MIN_IMAGES} are needed")
    if settings["batch"] > len(chosen):
        raise UserError(f"--batch {settings['batch']} is more than the {len(chosen)} pictures to train on")
    if request.weight_by and not sampling_weights(samples, request.weight_by)[chosen].sum() > 0:
        raise UserError(f"no picture to train on has a {request.weight_by} above 0")
    told = {
        "data": settings["data"],
        "held_out": held.tolist(),
        "unreadable": {str(i): f"{known.keys[i]}: {why}" for i, why in known.unreadable.items()},
    }
    write_json(path, told)
    return told


def _write_start(settings: dict[str, Any], samples: MapDataset, told: dict[str, Any], out: Path) -> None:
    """The new model, whole or absent: random weights, and a tokenizer of the captions that are trained on."""
    from train.models.unet import new_model, no_progress_bars

    if (out / "start").is_dir():
        return
    held = set(told["held_out"])
    captions = [samples.facts(i)["caption"] or "" for i in range(len(samples)) if i not in held]
    preset = replace(PRESETS[settings["preset"]], size=settings["size"])
    pipeline = new_model(preset, captions, settings["objective"], settings["seed"])
    scratch = scratch_path(out / "start")
    with no_progress_bars():
        pipeline.save_pretrained(scratch)
    scratch.rename(out / "start")


def _plan(
    request: TrainOptions,
    settings: dict[str, Any],
    samples: MapDataset,
    told: dict[str, Any],
    prompts: tuple[str, ...],
    pipeline: Any,
) -> Plan:
    from pipelines.runtime.trainers import Plan
    from train.latents import weights_digest
    from train.loop import LoopConfig
    from train.models.unet import default_size
    from train.objective import GAMMA, objective_of

    steps, batch = settings["steps"], settings["batch"]
    preset = PRESETS[settings["preset"]] if pipeline is None else None
    objective = settings["objective"] if pipeline is None else objective_of(pipeline.scheduler).name
    pictures = len(samples) - len(told["held_out"]) - len(told["unreadable"])
    loop = LoopConfig(
        steps=steps,
        batch=batch,
        micro_batch=request.micro_batch or 0,
        lr=settings["lr"],
        warmup=min(50, steps // 10),
        seed=settings["seed"],
        checkpointing=request.checkpointing,
        compile=request.compile,
        log_every=max(1, min(50, steps // 40)),
        preview_every=request.look_every or 0,
        save_every=request.save_every or min(1000, max(10, steps // 5)),
    )
    vae = None
    if preset and preset.vae:  # a fifth of the steps, at twice the rate: no attention in it that could take offence
        few = max(1, steps // 5)
        vae = replace(loop, steps=few, lr=2 * loop.lr, preview_every=0, save_every=max(1, few // 4))
    identity = dict(settings)
    if pipeline is not None:
        identity["weights"] = weights_digest(pipeline.unet)
    return Plan(
        data=request.data.absolute(),
        out=request.out.absolute(),
        start=settings["from"] or str(request.out.absolute() / "start"),
        lora=settings["lora"] or 0,
        text=pipeline is None,
        gamma=GAMMA if objective == "eps" else None,
        size=settings["size"] or default_size(pipeline),
        buckets=settings["buckets"],
        weight_by=settings["weight_by"],
        caption=settings["caption"],
        latents=steps * batch > pictures,
        vae=vae,
        loop=loop,
        prompts=prompts or _captions(samples, told),
        identity=identity,
    )


def _captions(samples: MapDataset, told: dict[str, Any], count: int = 4) -> tuple[str, ...]:
    """Captions to draw: the first different ones of held-out pictures, and of others where these are too few."""
    found: dict[str, None] = {}
    for number in [*told["held_out"], *range(len(samples))]:
        if caption := samples.facts(number)["caption"]:
            found[caption] = None
        if len(found) == count:
            break
    return tuple(found)


def _check_room(plan: Plan, materials: Materials) -> None:
    """DiskFull before the first step where latents and checkpoints would not fit."""
    from train.latents import latents_size
    from train.models.unet import count_parameters

    p = materials.pipeline
    trained = 0 if plan.lora else count_parameters([p.unet, p.text_encoder] if plan.text else [p.unet])
    whole = count_parameters([p.unet, p.text_encoder, p.vae])
    latents = latents_size(p, materials.pictures, materials.encoded, not plan.text) if plan.latents else 0
    if not (plan.out / "checkpoints").is_dir():
        each = 4 * (4 * trained + (0 if plan.lora else whole))  # raw, average, two moments; the pipeline
        check_space(plan.out, latents + (plan.loop.keep + 2) * each)


def _settle_vae(materials: Materials) -> None:
    """Put the trained autoencoder where every stage after it looks, its latents scaled to unit variance."""
    from diffusers import AutoencoderKL

    from train import checkpoint
    from train.data import ordered_batches
    from train.tasks import fit_scale

    folder = materials.plan.vae_folder
    there = checkpoint.checkpoints(folder)
    materials.pipeline.vae = AutoencoderKL.from_pretrained(there[max(there)] / "vae").to(materials.device)
    fit_scale(materials.pipeline, next(ordered_batches(materials.pictures, materials.chosen, 64)))
    scratch = scratch_path(folder / "vae")
    materials.pipeline.vae.save_pretrained(scratch)
    scratch.rename(folder / "vae")


def _headline(request: TrainOptions, settings: dict[str, Any], materials: Materials, by: str) -> Iterator[str]:
    """What is trained, on what, and how."""
    from train.models.unet import count_parameters
    from train.objective import objective_of

    plan, p = materials.plan, materials.pipeline
    objective = objective_of(p.scheduler).name
    unet, text, vae = (count_parameters([m]) / 1e6 for m in (p.unet, p.text_encoder, p.vae))
    what = settings["from"] or settings["preset"]
    if not settings["from"] and request.preset is None:
        what += f" (the preset for a machine with{'' if what == 'small-64' else 'out'} a GPU; --preset names others)"
    yield f"model  {what} · {plan.size} px · {objective} · UNet {unet:.2f} M, text encoder {text:.2f} M parameters"
    if plan.lora:
        yield f"       a LoRA of rank {plan.lora} is trained, the model stays as it is"
    elif settings["from"]:
        yield "       the UNet is trained; text encoder and autoencoder stay as they are"
    if plan.vae:
        yield f"       its autoencoder of {vae:.2f} M parameters is trained first, {plan.vae.steps:,} steps"
    chosen, held = len(materials.chosen), len(materials.held)
    silent = sum(1 for i in materials.chosen if not materials.samples.facts(int(i))["caption"])
    lacking = len(materials.samples) - chosen - held
    yield (
        f"data   {chosen:,} pictures to train on, {held:,} held out"
        + (f", {lacking:,} can't be read (data.json names them)" if lacking else "")
        + (f", {silent:,} without a caption" if silent else "")
        + (f", in {len(materials.pictures.shapes)} shapes" if plan.buckets else "")
    )
    yield (
        f"steps  {plan.loop.steps:,} of {plan.loop.batch} pictures ({plan.loop.steps * plan.loop.batch / chosen:,.1f} "
        f"epochs) · lr {plan.loop.lr:g} · {by} · a checkpoint every {plan.loop.save_every:,}"
    )


# ---------------------------------------------------------------------------------------------------------- its result


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    names = ("tastemaker", "torch", "diffusers", "transformers", "peft")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            found[name] = version(name)
    return found


def _data_facts(samples: MapDataset, materials: Materials, told: dict[str, Any]) -> dict[str, Any]:
    from curate.store.files import sha256_file

    manifest = samples.folder / "manifest.json"
    return {
        "folder": str(samples.folder.absolute()),
        "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
        "pictures": len(samples),
        "trained_on": len(materials.chosen),
        "held_out": len(materials.held),
        "unreadable": len(told["unreadable"]),
        **({"notes": notes} if (notes := samples.notes()) else {}),
    }


def _result(plan: Plan) -> dict[str, Any]:
    """Held-out losses of the last checkpoint and of the best, from their records."""
    from train import checkpoint

    there = checkpoint.checkpoints(plan.out)
    last, best = max(there), checkpoint.best(plan.out)
    found = {"step": last, "held_out": read_json(there[last] / "record.json").get("held_out")}
    if best is not None:
        record = read_json(best / "record.json")
        found["best"] = {"step": record["step"], "held_out": record.get("held_out"), "checkpoint": str(best)}
    if plan.vae:
        from train.tasks import psnr

        measured = checkpoint.checkpoints(plan.vae_folder)
        held = read_json(measured[max(measured)] / "record.json").get("held_out")
        found["autoencoder_psnr_db"] = psnr(held["ema"]) if held else None
    return found


def _release(plan: Plan, facts: dict[str, Any]) -> None:
    """Put the averaged weights of the last step at the top of MODEL, with a model card: whole, or absent."""
    from train import checkpoint

    there = checkpoint.checkpoints(plan.out)
    release(there[max(there)], plan.out, facts)
    write_json(plan.out / "train.json", facts)
    shutil.rmtree(plan.out / "start", ignore_errors=True)


def _outcome(request: TrainOptions, facts: dict[str, Any]) -> Result:
    result, out = facts["result"], request.out
    held, best = result["held_out"], result.get("best")
    text = f"trained {result['step']:,} steps, the last run in {format_duration(facts['seconds'])}"
    if held:
        text += f" · held-out loss {held['ema']:.4f}"
        if best and best["step"] != result["step"]:
            text += f" (best {best['held_out']['ema']:.4f} at step {best['step']:,}: {best['checkpoint']})"
    if (decibel := result.get("autoencoder_psnr_db")) is not None:
        text += f" · autoencoder {decibel:.1f} dB"
    pictures = sorted((out / "samples").glob("*.png"))
    paths = {"model": out, **({"pictures": pictures[-1]} if pictures else {}), "card": out / "README.md"}
    if (out / "loss.png").is_file():
        paths["loss"] = out / "loss.png"
    model, lora = (facts["settings"]["from"], ["--lora", out]) if facts["settings"]["lora"] else (out, [])
    following = shlex.join(map(str, ["tastemaker", "sample", model, facts["prompts"][0], *lora]))
    return Result(text=text, facts=facts, paths=dict(paths), next=following)
