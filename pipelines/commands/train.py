"""`tastemaker train`: captioned images to a diffusers pipeline, or a LoRA, in a folder that says how it was made.

MODEL/model_index.json unet/ ...    the finished pipeline (of a LoRA: pytorch_lora_weights.safetensors)
      README.md                     model card
      train.json                    what was asked, of which data, with which versions, and what came of it
      log.jsonl samples/ checkpoints/
      data.json                     which images are held out, and which can't be read
      start/ vae-training/ latents/ what training begins with, and what is computed before it
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aesthetic.errors import DiskFull, UserError
from curate.store.files import read_json, sweep, write_json
from curate.store.mirror import store_at
from pipelines.options import Result, command, read_prompts
from pipelines.runtime.progress import ProgressBar, format_duration, redirect_output
from pipelines.runtime.torchrun import launched
from pipelines.training import SETTINGS, TrainOptions, check_data, check_options, is_alone, loop_config, resolve
from train.captions import describe_captions
from train.places import bring, bring_images, discard, push, shown

if TYPE_CHECKING:
    from curate.sources.dataset import MapDataset
    from pipelines.runtime.torchrun import ProcessGroup
    from pipelines.runtime.trainers import Trainer
    from train.devices import FreeCores
    from train.run import TrainRun


def run(options: TrainOptions) -> Result:
    """Train up to the last step, from where an earlier run of the same options stopped.

    Raises UserError before anything is written where data, options or folder do not fit; DiskFull; Diverged.
    """
    if (launch := launched()) is None:
        return _run(options, None)
    from pipelines.runtime.torchrun import ProcessGroup, follow

    rank, size = launch
    if options.address or options.workers not in (None, size):
        raise UserError(f"torchrun has started {size} processes: --workers and --ray-address are for Ray")
    group = ProcessGroup()
    if rank:
        follow(group)
        return Result(own_json=True)
    try:
        return _run(replace(options, workers=size), group)
    finally:
        group.close()


def _run(options: TrainOptions, group: ProcessGroup | None) -> Result:
    from train.devices import FreeCores, set_threads

    free = FreeCores()
    check_options(options)
    prompts = tuple(read_prompts(options.prompts)) if options.prompts else ()
    from curate.store.ownership import taken
    from train.data import open_samples, sampling_weights
    from train.models.release import is_released
    from train.run import earlier_run

    bring_images(options.data, by_shard=True)
    check_data(options.data)
    bring(options.out)
    samples = open_samples(options.data, options.caption, options.captions)
    if options.weight_by:
        sampling_weights(samples, options.weight_by)
    resolved = resolve(options, samples)
    settings = {"from" if name == "start" else name: getattr(resolved, name) for name in SETTINGS}
    count = ProgressBar(sys.stderr, "captions", len(samples))
    settings["data"] = samples.read_fingerprint(count)
    count.clear()
    record = earlier_run(options.out, settings)
    if record and _is_done(options, record):
        return _result(options.out, record)
    with (
        taken(store_at(options.out), "model", replaces=["train.json", "data.json"]) as folder,
        redirect_output(options.out / "logs" / "train.log") as terminal,
        contextlib.ExitStack() as stack,
    ):
        sweep(options.out)
        bring(options.out)
        record = earlier_run(options.out, settings)  # again: another run may have been at work until now
        if record and record.get("finished") and is_released(options.out):
            if not _is_done(options, record):
                set_threads(record.get("threads"), free)
                _record_losses(options.out, samples, record, terminal)
            return _result(options.out, record)
        if record is None:
            discard(options.out, "start")
        facts = record or {"settings": settings, "started": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(options.out / "train.json", facts)
        try:
            train_run, trainer = _prepare(resolved, samples, prompts, facts, free, terminal, stack, group)
        except (UserError, DiskFull):
            if record is None:
                folder.undo(["train.json", "data.json", "data", "start", "logs"])
            raise
        lines = _headline(train_run, resolved, trainer.about, facts["captions"], preset_given=bool(options.preset))
        terminal.writelines(line + "\n" for line in lines)
        try:
            _train(train_run, trainer, facts, terminal, tensorboard=options.tensorboard)
            if options.record_loss:
                train_run.pipeline.to("cpu")  # it is read again, as it was saved
                _record_losses(options.out, samples, facts, terminal)
            return _result(options.out, facts)
        finally:
            push(options.out)


def _is_done(options: TrainOptions, record: dict[str, Any]) -> bool:
    """Whether nothing is left to do for a run of this record."""
    from train.evaluate.losses import FILE
    from train.models.release import is_released

    lacks_losses = options.record_loss and not ("losses" in record and (options.out / FILE).is_file())
    return bool(record.get("finished")) and is_released(options.out) and not lacks_losses


def _record_losses(out: Path, samples: MapDataset, facts: dict[str, Any], terminal: IO[str]) -> None:
    """Write losses.parquet of a finished model, and say so in train.json."""
    from train.evaluate.losses import record_losses

    count = facts["data"]["trained_on"] + facts["data"]["held_out"]
    steps = 8 * count / (3 * facts["settings"]["batch"])  # a step computes forwards once, and backwards twice that
    terminal.write(f"losses  of {count:,} images at eight times each, about as much work as {steps:,.0f} steps\n")
    bar = ProgressBar(terminal, "losses", count)
    facts["losses"] = record_losses(out, samples, facts, bar)
    bar.end(f", in {shown(out)}/{facts['losses']['file']}")
    write_json(out / "train.json", facts)
    push(out)


# ------------------------------------------------------------------------------------------------------------ the run


def _prepare(
    resolved: TrainOptions,
    samples: MapDataset,
    prompts: tuple[str, ...],
    facts: dict[str, Any],
    free: FreeCores,
    terminal: IO[str],
    stack: contextlib.ExitStack,
    group: ProcessGroup | None,
) -> tuple[TrainRun, Trainer]:
    """All that can be refused, and all that is done once; adds to `facts` what is known then."""
    import torch

    from pipelines.runtime.nodes import place_of
    from pipelines.runtime.torchrun import TorchrunTrainer
    from pipelines.runtime.trainers import LocalTrainer, TrainJob, ray_trainer
    from train.data import sampling_weights
    from train.devices import default_device, set_threads, versions
    from train.latents import weights_digest
    from train.models.family import family_of, load_model
    from train.models.given import find_text_encoder, find_vae
    from train.models.presets import PRESETS
    from train.run import default_prompts, hold_out, trained_captions, write_new_model
    from train.split import without

    def say(text: str) -> None:
        terminal.write(text + "\n")

    out, settings = resolved.out, facts["settings"]
    for note in samples.passed_over():
        say(f"{samples.folder}: {note}")
    pipeline = load_model(resolved.start) if resolved.start else None

    count = ProgressBar(terminal, "images", len(samples))
    scanned = (read_json(out / "data.json") or {}).get("data") == samples.fingerprint
    data = hold_out(samples, out, count)
    if not scanned:
        count.end(f", {len(data['unreadable']):,} of them can't be read" if data["unreadable"] else "")
    chosen = without(len(samples), data["held_out"], map(int, data["unreadable"]))
    if resolved.batch and resolved.batch > len(chosen):
        raise UserError(f"--batch {resolved.batch} is more than the {len(chosen)} images to train on")
    if resolved.weight_by and not sampling_weights(samples, resolved.weight_by)[chosen].sum() > 0:
        raise UserError(f"no image to train on has a {resolved.weight_by} above 0")

    if resolved.preset:
        captions = trained_captions(samples, data["held_out"])
        preset = replace(PRESETS[resolved.preset], size=resolved.size or PRESETS[resolved.preset].size)
        write_new_model(
            out / "start", preset, captions, str(resolved.objective), resolved.seed,
            vae=find_vae(resolved.vae) if resolved.vae else None,
            text_encoder=find_text_encoder(resolved.text_encoder) if resolved.text_encoder else None,
        )  # fmt: skip

    identity = dict(settings)
    if pipeline is not None:
        identity["weights"] = weights_digest(family_of(pipeline).network(pipeline))
    prompts = prompts or default_prompts(samples, data["held_out"])
    job = TrainJob(
        options=resolved,
        loop=loop_config(resolved),
        prompts=prompts,
        identity=identity,
        data=place_of(store_at(resolved.data)),
        model=place_of(store_at(out)),
    )
    alone = is_alone(resolved)
    device = default_device() if alone else group.device if group else torch.device("cpu")
    by = str(device)
    if alone and device.type == "cpu":
        threads, words = set_threads(facts.get("threads"), free)
        by = f"cpu, {words}"
        if "OMP_NUM_THREADS" not in os.environ:
            facts["threads"] = threads
    train_run = job.open(device, pipeline)
    train_run.check_space()
    trainer: Trainer = LocalTrainer(train_run, by)
    push(out)  # workers begin with it
    if group:
        trainer = TorchrunTrainer(group, job, train_run, resolved.workers or 1)
    elif not alone:
        trainer = stack.enter_context(ray_trainer(job, train_run, say))
    facts |= {"data": train_run.data_facts(), "made_with": versions(), "by": trainer.about}
    facts |= {"size": train_run.size, "prompts": list(prompts)}
    facts |= {"pipeline": train_run.family.pipeline, "muon": job.loop.muon, "captions": train_run.caption_facts()}
    write_json(out / "train.json", facts)
    return train_run, trainer


def _headline(
    run: TrainRun, resolved: TrainOptions, by: str, captions: dict[str, Any], *, preset_given: bool
) -> Iterator[str]:
    """What is trained, on what, and how."""
    from train.models.base import count_parameters

    p, loop, what = run.pipeline, run.loop, run.family.title
    parts = run.family.network(p), run.family.text_encoder(p), p.vae
    net, text, vae = (count_parameters([m]) / 1e6 for m in parts)
    name = str(resolved.start or resolved.preset)
    if run.new and not preset_given:
        name += f" (the preset for a machine with{'' if name == 'small-64' else 'out'} a GPU; --preset names others)"
    yield f"model  {name} · {run.size} px · {run.objective} · {what} {net:.2f} M, text encoder {text:.2f} M parameters"
    if run.lora:
        yield f"       a LoRA of rank {run.lora} is trained, the model stays as it is"
    elif run.new and not run.text:
        yield "       the transformer is trained; the text encoder stays as it is"
    elif not run.new:
        yield f"       the {what} is trained; text encoder and autoencoder stay as they are"
    if run.vae_loop:
        yield f"       its autoencoder of {vae:.2f} M parameters is trained first, {run.vae_loop.steps:,} steps"
    uncaptioned = 0 if run.captioned is None else len(run.samples) - run.captioned
    yield (
        f"data   {len(run.chosen):,} images to train on, {len(run.held_out):,} held out"
        + (f", {run.unreadable:,} can't be read (data.json names them)" if run.unreadable else "")
        + (f", {uncaptioned:,} without a caption" if uncaptioned else "")
        + (f", in {len(run.images.shapes)} shapes" if resolved.buckets else "")
    )
    yield from (f"       {line}" for line in describe_captions(captions, run.captions))
    yield (
        f"steps  {loop.steps:,} of {loop.batch} images ({loop.steps * loop.batch / len(run.chosen):,.1f} "
        f"epochs) · lr {loop.lr:g} · {by} · a checkpoint every {loop.save_every:,}"
    )


def _train(run: TrainRun, trainer: Trainer, facts: dict[str, Any], terminal: IO[str], *, tensorboard: bool) -> None:
    """All stages, as far as they are not done yet."""
    from train.metrics import format_record, log_to_tensorboard, plot_loss
    from train.tasks import psnr

    def say(text: str) -> None:
        terminal.write(text + "\n")

    began = time.monotonic()
    if run.vae_loop and not (run.vae_folder / "vae").is_dir():
        with _stop_on_signal(terminal, run.vae_folder) as should_stop:
            for record in trainer.train("autoencoder", should_stop):
                held_out = record.get("held_out")
                quality = f"  PSNR {psnr(held_out['ema']):.1f} dB" if held_out else ""
                say(f"autoencoder {format_record(record)}{quality}")
        run.finish_autoencoder()
        push(run.out)
    if run.uses_latents:
        count = ProgressBar(terminal, "latents", len(run.chosen) + len(run.held_out))
        trainer.precompute_latents(count)
        push(run.out)
        size = sum(p.stat().st_size for p in run.latents_folder.iterdir())
        count.end(f", {size / 1e6:,.1f} MB in {shown(run.latents_folder)}")
    with _stop_on_signal(terminal, run.out) as should_stop:
        records = trainer.train("model", should_stop)
        for record in log_to_tensorboard(records, run.out) if tensorboard else records:
            say(format_record(record))
            if "checkpoint" in record:
                bring(run.out, "log.jsonl")
                plot_loss(run.out)

    facts["result"] = run.result()
    facts |= {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.monotonic() - began)}
    run.release(facts)


@contextlib.contextmanager
def _stop_on_signal(terminal: IO[str], folder: Path) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM ends training after its step, with a checkpoint; the second ends it at once.

    What it gives says whether that was asked for; then KeyboardInterrupt is raised in the end. Says from where training
    goes on, if it does.
    """
    from train import checkpoint

    if last := checkpoint.last(folder):
        terminal.write(f"goes on from step {int(last.name):,}, {last}\n")
    received: list[float] = []  # when

    def receive(number: int, frame: object) -> None:
        if received and not (launched() and time.monotonic() - received[0] < 2):  # Ctrl-C comes from torchrun as well
            raise KeyboardInterrupt
        if received:
            return
        received.append(time.monotonic())
        os.write(terminal.fileno(), b"\nending after this step, with a checkpoint; once more: at once\n")

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(s, receive) for s in signals]
    try:
        yield lambda: bool(received)
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)
    if received:
        raise KeyboardInterrupt


def _result(out: Path, facts: dict[str, Any]) -> Result:
    result = facts["result"]
    held_out, best = result["held_out"], result.get("best")
    text = f"trained {result['step']:,} steps, the last run in {format_duration(facts['seconds'])}"
    if held_out:
        text += f" · held-out loss {held_out['ema']:.4f}"
        if best and best["step"] != result["step"]:
            text += f" (best {best['held_out']['ema']:.4f} at step {best['step']:,}: {best['checkpoint']})"
    if (decibel := result.get("autoencoder_psnr_db")) is not None:
        text += f" · autoencoder {decibel:.1f} dB"
    if losses := facts.get("losses"):
        text += f" · losses of {losses['images']:,} images, median {losses['median']:.4f}"
    previews = sorted((out / "samples").glob("*.png"))
    place = shown(out)
    paths = {"model": place, **({"pictures": shown(previews[-1])} if previews else {}), "card": f"{place}/README.md"}
    if losses:
        paths["losses"] = f"{place}/{losses['file']}"
    if (out / "loss.png").is_file():
        paths["loss"] = f"{place}/loss.png"
    model, lora = (facts["settings"]["from"], ["--lora", place]) if facts["settings"]["lora"] else (place, [])
    following = command("sample", model, facts["prompts"][0], *lora)
    return Result(text=text, facts=facts, paths=dict(paths), next=following)
