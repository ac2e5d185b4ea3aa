"""A training run as it is asked for: its options, what is refused before anything is written, and all defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from aesthetic.errors import UserError
from curate.store.mirror import store_at
from pipelines.options import REQUIRED, Options, argument, input_file, option, positive_int
from train.captions import CaptionMix
from train.places import local_folder, shown

if TYPE_CHECKING:
    from curate.sources.dataset import MapDataset
    from train.loop import LoopConfig

FROM_STEPS, FROM_BATCH = 1000, 8
"""Of training that goes on from a model, where nothing else is asked."""

SETTINGS = (
    *("preset", "text_encoder", "vae", "start", "lora", "objective", "size", "buckets", "weight_by", "caption"),
    *("captions", "steps", "batch", "lr", "seed"),
)
"""The options that train.json keeps: what must be the same for a run to go on."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """None: what the preset or the model suggests."""

    data: Path = argument(
        "SHARDS", "a folder of packed shards, of img2dataset's or webdataset's tars, or of images", type=local_folder
    )
    out: Path = option(
        "the model's folder, which diffusers loads when done", default=REQUIRED, metavar="MODEL", type=local_folder
    )
    preset: str | None = option(
        "a new model: debug, tiny (default without a GPU), small-64 (default with one), base-128, sd15; a transformer: "
        "debug-dit, dit-tiny, dit-256, dit-256-l, dit-256-xl",
        metavar="P",
    )
    text_encoder: str | None = option(
        "of a new transformer: a language model that stays as it is, a folder or a hub id (default: its own, trained)",
        metavar="MODEL",
    )
    vae: str | None = option(
        "of a new transformer: an AutoencoderKL, a folder or a hub id (default: its own, or none)", metavar="MODEL"
    )
    start: str | None = option("go on with a diffusers folder, or a hub id", flag="--from", metavar="MODEL")
    lora: int | None = option(
        "train only a LoRA on it (default rank 8)", metavar="RANK", nargs="?", const=8, type=positive_int
    )
    objective: str | None = option("of a new model: flow (default), v or eps", metavar="O")
    steps: int | None = option("default: the preset's; 1000 with --from", metavar="N", type=positive_int)
    batch: int | None = option("images a step, over all workers", metavar="N", type=positive_int)
    lr: float | None = option("highest learning rate of AdamW", metavar="X")
    size: int | None = option("side of the images (default: the model's own)", metavar="PX", type=positive_int)
    buckets: bool = option("keep images' aspect ratios: several shapes of one area", default=False)
    caption: str | None = option("of images without a caption of their own: 'a photo of sks dog'", metavar="TEXT")
    captions: str | None = option("columns to draw captions from, by weight: caption=0.5,recaption=0.5", metavar="MIX")
    weight_by: str | None = option("draw images in proportion to this score", metavar="COLUMN")
    record_loss: bool = option("at the end, write each image's loss to MODEL/losses.parquet", default=False)
    workers: int | None = option("default: one per GPU, or one", metavar="N", type=positive_int)
    prompts: Path | None = option(
        "drawn as training goes on, a line each (default: 4 captions)", metavar="FILE", type=input_file
    )
    save_every: int | None = option(
        "steps between checkpoints (default: a fifth of all)", metavar="N", type=positive_int
    )
    look_every: int | None = option("steps between images (default: at checkpoints)", metavar="N", type=positive_int)
    micro_batch: int | None = option("images at a time on a worker, to save memory", metavar="N", type=positive_int)
    shard: bool = option("share out the model among workers (FSDP): for one too large for one GPU", default=False)
    checkpointing: bool = option("recompute activations: less memory, a third slower", default=False)
    compile: bool = option("torch.compile: minutes at first, then faster on GPUs", default=False)
    tensorboard: bool = option("write MODEL/tensorboard too (extra `tensorboard`)", default=False)
    seed: int = option("of weights, order and noise", default=0, metavar="N")
    address: str | None = option("train on this Ray cluster (`auto` finds it)", flag="--ray-address", metavar="ADDRESS")


def check_options(options: TrainOptions) -> None:
    """What the options and the model's own files tell, without torch."""
    from curate.store.ownership import check_free
    from train.models.presets import OBJECTIVES

    start, objective = options.start, options.objective
    CaptionMix.parse(options.captions)
    if options.preset and start:
        raise UserError("--preset and --from exclude each other: a new model, or one to go on with")
    if options.lora and not start:
        raise UserError("--lora changes a model that is there already: say which with --from")
    if objective and start:
        raise UserError("--objective is for new models: one to go on with (--from) has its own")
    if objective and objective not in OBJECTIVES:
        raise UserError(f"there is no objective {objective!r}: {', '.join(OBJECTIVES)}")
    if options.preset:
        _check_preset(options)
    for flag, part in (("--text-encoder", options.text_encoder), ("--vae", options.vae)):
        if part is not None and not options.preset:
            raise UserError(f"{flag} is for new transformers: --preset dit-256, for one")
    if store_at(options.data).url is None:
        check_data(options.data)
    check_free(store_at(options.out), "model")
    if options.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: it is not installed here: `pip install 'tastemaker[tensorboard]'`")
    if options.shard and options.address and store_at(options.out).url is not None:
        raise UserError(
            f"--shard: each worker writes its part of a checkpoint, and all must see {shown(options.out)}: "
            "give a folder that the cluster's machines share"
        )
    if options.lr is not None and not options.lr > 0:
        raise UserError(f"--lr {options.lr}: a number above 0 is expected")
    if options.workers and options.batch and options.batch % options.workers:
        raise UserError(f"--batch {options.batch} can't be shared evenly by {options.workers} workers")
    if start is not None:
        from train.models.files import model_folder
        from train.models.info import check_trainable, read_model_info
        from train.models.release import LORA_FILE

        folder = model_folder(start)
        if (folder / LORA_FILE).is_file() and not (folder / "model_index.json").is_file():
            raise UserError(f"{start} is a LoRA: give --from the model that it was trained on (its README.md names it)")
        check_trainable(read_model_info(start), options.size, lora=options.lora is not None)


def _check_preset(options: TrainOptions) -> None:
    """That there is one, that what it is given is what it can use, and that images of the size fit it."""
    from train.models.presets import PRESETS, TransformerPreset

    name = str(options.preset)
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {"--text-encoder": options.text_encoder, "--vae": options.vae}
    if isinstance(preset, TransformerPreset):
        if options.objective not in (None, "flow"):
            raise UserError(f"--objective {options.objective}: {name} is a transformer, which learns by flow alone")
        from train.models.given import find_text_encoder, find_vae, with_vae

        if options.text_encoder:
            find_text_encoder(options.text_encoder)
        if options.vae:
            preset = with_vae(preset, find_vae(options.vae))
    elif flag := next((flag for flag, part in given.items() if part), None):
        raise UserError(f"{flag} is for transformers, and {name} is a UNet: --preset dit-256 is one")
    size = options.size or preset.size
    if size % preset.step:
        raise UserError(f"--size {size} does not fit {name}: sides are multiples of {preset.step}")


def check_data(folder: Path) -> None:
    """UserError where there is no folder, or nothing in it: what `open_samples` would say, without torch."""
    if not folder.is_dir():
        raise UserError(f"{shown(folder)} is no folder. A folder of packed shards, of tars or of images is expected.")
    if not any(folder.iterdir()):
        raise UserError(f"{shown(folder)}: holds neither tars nor images")


def resolve(options: TrainOptions, samples: MapDataset) -> TrainOptions:
    """The options with every default filled in, and whole paths."""
    from train.models.presets import PRESETS
    from train.run import further_lr

    start, name, preset = options.start, options.preset, None
    if start is None:
        if name is None:
            import torch

            name = "small-64" if torch.cuda.is_available() else "tiny"
            _check_preset(replace(options, preset=name))
        preset = PRESETS[name]
    workers, batch = options.workers or 1, options.batch
    if not batch:  # a usual one, halved until four fit into the data; a multiple of the workers
        batch = preset.batch if preset else FROM_BATCH
        while batch > workers and 4 * batch > len(samples):
            batch //= 2
        batch = max(workers, batch - batch % workers)
    if batch > len(samples):
        raise UserError(f"--batch {batch} is more than the {len(samples)} images in {samples.folder}")
    if options.shard and is_alone(options):
        raise UserError("--shard shares out a model among workers: say how many with --workers, or use torchrun")
    steps = options.steps or (preset.steps if preset else FROM_STEPS)
    return replace(
        options,
        data=options.data.absolute(),
        out=options.out.absolute(),
        preset=name,
        text_encoder=_whole_path(options.text_encoder),
        vae=_whole_path(options.vae),
        start=_whole_path(start),
        objective=options.objective or ("flow" if preset else None),
        captions=str(CaptionMix.parse(options.captions)) if options.captions else None,
        size=options.size or (preset.size if preset else None),
        steps=steps,
        batch=batch,
        lr=options.lr or (preset.lr if preset else further_lr(str(start), lora=options.lora is not None)),
        save_every=options.save_every or min(1000, max(10, steps // 5)),
    )


def is_alone(options: TrainOptions) -> bool:
    """Whether one process of this machine does it all."""
    import torch

    return options.address is None and (options.workers or torch.cuda.device_count()) <= 1


def _whole_path(name: str | None) -> str | None:
    """Of a folder; what is none is a hub id."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def loop_config(resolved: TrainOptions) -> LoopConfig:
    """Of options that `resolve` gave."""
    from train.loop import LoopConfig
    from train.models.presets import PRESETS, TransformerPreset

    steps, batch, lr = resolved.steps, resolved.batch, resolved.lr
    assert steps and batch and lr and resolved.save_every  # see `resolve`
    preset = PRESETS.get(str(resolved.preset))
    muon = preset.muon * lr / preset.lr if isinstance(preset, TransformerPreset) else 0.0
    return LoopConfig(
        steps=steps,
        batch=batch,
        micro_batch=resolved.micro_batch or 0,
        lr=lr,
        muon=muon,
        warmup=min(50, steps // 10),
        seed=resolved.seed,
        checkpointing=resolved.checkpointing,
        compile=resolved.compile,
        shard=resolved.shard,
        log_every=max(1, min(50, steps // 40)),
        preview_every=resolved.look_every or 0,
        save_every=resolved.save_every,
    )
