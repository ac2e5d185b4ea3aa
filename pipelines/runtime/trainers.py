"""The stages of a training run: in this process, or by Ray. The steps themselves are `train.loop`'s.

Workers see the model's folder on storage that they share with the driver: checkpoints and latents lie there. What else
they tell (records, counts, what went wrong) goes through one small actor.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from aesthetic.errors import UserError
from curate.store.files import read_json
from pipelines.runtime.channel import report_errors, start_progress, start_worker, stop_check, watch
from pipelines.runtime.cluster import quiet_ray_data, ray_cluster
from train.data import ImageDataset, Ints, Stream, crop_resize, decode_sample, open_samples, sampling_weights
from train.devices import default_device
from train.latents import LatentDataset, Tell, precompute_latents, shards_of, write_shard
from train.loop import LoopConfig, train
from train.models.unet import add_lora, load_model, size_step, tokenize
from train.tasks import Denoise, Reconstruct
from train.world import Distributed, PeerLost, World

RESTARTS = 8
"""Times that Ray starts all workers again after it lost one; then the driver ends, and the same command goes on."""

Record = dict[str, Any]
ShouldStop = Callable[[], bool]
"""Whether training is to end after this step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run, resolved to plain values, because Ray carries it to the workers."""

    data: Path
    out: Path
    start: str  # the pipeline that training begins with: a folder, or a hub id
    lora: int  # rank; 0: the whole model is trained
    text: bool  # whether the text encoder is trained too
    gamma: float | None  # of min-SNR
    size: int
    buckets: bool
    weight_by: str | None
    caption: str | None  # of pictures without one
    latents: bool  # whether they are precomputed
    vae: LoopConfig | None  # of the autoencoder's own training, where it has none behind it
    loop: LoopConfig
    prompts: tuple[str, ...]
    identity: dict[str, Any]  # what must be the same for a run to go on

    @property
    def vae_folder(self) -> Path:
        """Where the autoencoder is trained; its `vae/`, whole or absent, is the result."""
        return self.out / "vae-training"

    @property
    def latents_folder(self) -> Path:
        """Where latents are precomputed."""
        return self.out / "latents"


class Materials:
    """Model and data of a plan, opened once in each process."""

    def __init__(self, plan: Plan, device: torch.device, pipeline: Any = None) -> None:
        self.plan, self.device = plan, device
        self.pipeline = load_model(plan.start) if pipeline is None else pipeline
        self.pipeline.unet.register_to_config(sample_size=plan.size // self.pipeline.vae_scale_factor)  # what it draws
        if (plan.vae_folder / "vae").is_dir():
            self.adopt_vae()
        self.pipeline.to(device)
        self.samples = open_samples(plan.data, plan.caption)
        told = read_json(plan.out / "data.json")
        left_out = {*told["held_out"], *map(int, told["unreadable"])}
        self.held = np.array(told["held_out"], np.int64)
        self.chosen = np.array([i for i in range(len(self.samples)) if i not in left_out], np.int64)
        self.pictures = ImageDataset(
            self.samples,
            lambda captions: tokenize(self.pipeline, captions),
            plan.size,
            buckets=plan.buckets,
            step=size_step(self.pipeline),
            least=plan.loop.batch,
        )

    @property
    def encoded(self) -> Ints:
        """The pictures whose latents are wanted."""
        return np.sort(np.concatenate([self.chosen, self.held]))

    def adopt_vae(self) -> None:
        """Take the autoencoder that was trained for this model."""
        from diffusers import AutoencoderKL

        self.pipeline.vae = AutoencoderKL.from_pretrained(self.plan.vae_folder / "vae").to(self.device)

    def autoencoder(self, world: World, should_stop: ShouldStop) -> Iterator[Record]:
        """Train the autoencoder."""
        assert self.plan.vae is not None
        return self._train(
            Reconstruct(self.pipeline), self.pictures, self.plan.vae, self.plan.vae_folder, world, should_stop
        )

    def model(self, world: World, should_stop: ShouldStop) -> Iterator[Record]:
        """Train the model, or its LoRA."""
        plan = self.plan
        if plan.lora:
            add_lora(self.pipeline, plan.lora, plan.loop.seed)
        examples = LatentDataset(plan.latents_folder) if plan.latents else self.pictures
        real = self._real() if world.rank == 0 else {}
        task = Denoise(self.pipeline, text=plan.text, gamma=plan.gamma, real=real)
        return self._train(task, examples, plan.loop, plan.out, world, should_stop)

    def precompute(self, tell: Tell, write_shards: Callable[[dict[str, Any], list[int]], None] | None = None) -> None:
        """Write the latents that are missing."""
        precompute_latents(
            self.pipeline, self.pictures, self.encoded, self.plan.latents_folder,
            text=not self.plan.text, threads=_threads(), tell=tell, write_shards=write_shards,
        )  # fmt: skip

    def write_latents(self, shard: int, made: dict[str, Any], tell: Tell) -> None:
        """Write one shard of them."""
        indices = shards_of(self.pictures, self.encoded)[shard]
        write_shard(
            self.pipeline, self.pictures, indices, self.plan.latents_folder, shard, made,
            text=not self.plan.text, threads=_threads(), tell=tell,
        )  # fmt: skip

    def _real(self) -> dict[str, Any]:
        """The held-out picture of each prompt that is the caption of one, as the model would draw it."""
        found: dict[str, Any] = {}
        for number in self.held:
            caption = self.samples.facts(int(number))["caption"]
            if caption in self.plan.prompts and caption not in found:
                side = self.plan.size
                found[caption] = crop_resize(decode_sample(self.samples[int(number)], side), side, side)
        return found

    def _train(
        self, task: Any, examples: Any, config: LoopConfig, folder: Path, world: World, should_stop: ShouldStop
    ) -> Iterator[Record]:
        plan = self.plan
        weights = sampling_weights(self.samples, plan.weight_by) if plan.weight_by else None
        stream = Stream(
            examples,
            self.chosen,
            batch=config.batch,
            seed=config.seed,
            weights=weights,
            rank=world.rank,
            ranks=world.size,
            workers=_threads(),
        )
        return train(
            task,
            stream,
            config,
            folder,
            held_out=self.held,
            prompts=plan.prompts,
            identity=plan.identity,
            world=world,
            should_stop=should_stop,
        )


def _threads() -> int:
    """Threads that read and decode."""
    return max(2, min(16, os.cpu_count() or 1))


class Trainer(Protocol):
    """Who carries out the stages of a run."""

    about: str  # who that is, in a few words

    def train(self, stage: str, should_stop: ShouldStop) -> Iterator[Record]:
        """Train `autoencoder` or `model` to the end, or until `should_stop`; records as `train.loop.train` yields."""
        ...

    def precompute_latents(self, tell: Tell) -> None:
        """Write the latents that are missing; `tell` hears how many more images are done."""
        ...


class LocalTrainer:
    """This process, alone and without Ray."""

    def __init__(self, materials: Materials, about: str) -> None:
        self._materials, self.about = materials, about

    def train(self, stage: str, should_stop: ShouldStop) -> Iterator[Record]:
        run: Callable[[World, ShouldStop], Iterator[Record]] = getattr(self._materials, stage)
        return run(World(), should_stop)

    def precompute_latents(self, tell: Tell) -> None:
        self._materials.precompute(tell)


# ----------------------------------------------------------------------------------------------------------- with Ray

STARTED = "started"
"""The message that workers begin with."""


@contextlib.contextmanager
def ray_trainer(
    materials: Materials, workers: int | None, address: str | None, say: Callable[[str], None]
) -> Iterator[RayTrainer]:
    """Workers of a Ray cluster: of this machine's own, started here, or of the one at an address.

    Raises UserError where the cluster can't hold them or a node doesn't see the model's folder.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # torch on a cold disk takes its minute
    cpus = max(os.cpu_count() or 1, workers or 0)
    with ray_cluster(address, materials.plan.out, cpus=cpus, gpus=torch.cuda.device_count()):
        yield RayTrainer(materials, workers, say)


class RayTrainer:
    """One worker per GPU with nccl where there are GPUs; else gloo on CPUs. A worker that dies is replaced, and all go
    on from the last checkpoint."""

    def __init__(self, materials: Materials, workers: int | None, say: Callable[[str], None]) -> None:
        import ray

        self._materials, self._plan, self._say = materials, materials.plan, say
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._gpu = any(r.get("GPU", 0) >= 1 for r in alive)
        kind = "GPU" if self._gpu else "CPU"
        able = [r for r in alive if r.get(kind, 0) >= 1]
        room = sum(int(r[kind]) for r in able)
        self._workers = workers or (room if self._gpu else 1)
        if self._workers > room:
            raise UserError(f"--workers {workers}: the cluster has {room} {kind}s, and each worker needs one")
        if self._plan.loop.batch % self._workers:
            raise UserError(f"a batch of {self._plan.loop.batch} can't be shared evenly by {self._workers} workers")
        self._cpus = max(1, int(min(r.get("CPU", 1) for r in able)) // math.ceil(self._workers / len(able)))
        self.about = f"{self._workers} workers with {'a GPU' if self._gpu else f'{self._cpus} cores'} each"
        self._name, self._progress = start_progress()

    def train(self, stage: str, should_stop: ShouldStop) -> Iterator[Record]:
        """Train with Ray Train's TorchTrainer."""
        started = False
        for message in self._messages(lambda: self._fit(stage), should_stop):
            if message != STARTED:
                yield message
                if "stopped" in message:
                    return  # the other workers end with Ray
            elif started:
                self._say("a worker was lost: all go on from the last checkpoint")
            else:
                started = True

    def _fit(self, stage: str) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import WorkerGroupError

        plan, name = self._plan, self._name
        trainer = TorchTrainer(
            lambda: _train_worker(plan, stage, name),
            scaling_config=ScalingConfig(
                num_workers=self._workers,
                use_gpu=self._gpu,
                resources_per_worker={"CPU": self._cpus, **({"GPU": 1} if self._gpu else {})},
            ),
            run_config=RunConfig(
                name=f"{stage}-{time.time_ns()}",
                storage_path=str(plan.out / "logs" / "ray"),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
            torch_config=TorchConfig(backend="nccl" if self._gpu else "gloo"),
        )
        try:
            trainer.fit()
        except WorkerGroupError as e:
            last = next((str(f).strip().splitlines()[-1:] for f in e.worker_failures.values()), [])
            raise UserError(
                f"workers were lost {RESTARTS + 1} times, at last with: {''.join(last) or 'no word'}\n"
                f"The same command goes on from the last checkpoint; {plan.out / 'logs'} says more."
            ) from e

    def precompute_latents(self, tell: Tell) -> None:
        """As a Ray Data stage: an actor per worker, a row per shard."""

        def write_shards(made: dict[str, Any], missing: list[int]) -> None:
            for count in self._messages(lambda: self._map_shards(made, missing)):
                tell(count)

        self._materials.precompute(tell, write_shards)

    def _map_shards(self, made: dict[str, Any], missing: list[int]) -> None:
        import ray
        from ray.data import ActorPoolStrategy

        quiet_ray_data()
        rows: Any = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))
        rows = rows.map(
            LatentsActor,
            fn_constructor_args=(self._plan, self._name, made),
            compute=ActorPoolStrategy(size=min(self._workers, len(missing))),
            num_cpus=self._cpus,
            num_gpus=1 if self._gpu else None,
        )
        for _ in rows.iter_rows():
            pass

    def _messages(self, work: Callable[[], None], should_stop: ShouldStop = lambda: False) -> Iterator[Any]:
        """What workers send while the work is done."""
        import ray

        for _ in watch(work, self._progress, 0.3):
            if should_stop():
                self._progress.request_stop.remote()
            yield from ray.get(self._progress.take.remote())


def _train_worker(plan: Plan, stage: str, name: str) -> None:
    """One worker of a TorchTrainer, from the last checkpoint to the last step."""
    import ray
    import ray.train.torch

    progress = start_worker(plan.out, stage, name)
    world = Distributed()
    if world.rank == 0:
        ray.get(progress.put.remote(STARTED))
    lost: Exception | None = None
    with report_errors(progress):
        try:
            materials = Materials(plan, torch.device(ray.train.torch.get_device()))
            for record in getattr(materials, stage)(world, stop_check(progress)):
                if world.rank == 0:
                    ray.get(progress.put.remote(record))
        except (PeerLost, torch.distributed.DistError) as e:  # no error of ours: Ray starts all of them anew
            lost = e
    if lost is not None:
        raise lost


class LatentsActor:
    """Writes shards of latents."""

    def __init__(self, plan: Plan, name: str, made: dict[str, Any]) -> None:
        self._progress = start_worker(plan.out, "latents", name)
        self._made = made
        with report_errors(self._progress):
            self._materials = Materials(plan, default_device())

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with report_errors(self._progress):
            self._materials.write_latents(int(row["shard"]), self._made, self._progress.put.remote)
        return row
