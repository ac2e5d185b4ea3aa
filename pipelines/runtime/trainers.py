"""The stages of a training run: in this process, or by Ray. The steps themselves are `train.loop`'s.

Workers see the model's folder on storage that they share with the driver: checkpoints and latents lie there. What else
they tell (records, counts, what went wrong) goes through one small actor.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from aesthetic.errors import UserError
from curate.layout import shard_name
from curate.store.mirror import store_at
from pipelines.runtime.channel import report_errors, start_progress, start_worker, stop_check, watch
from pipelines.runtime.cluster import ray_cluster
from pipelines.runtime.nodes import Location, NodeCheck, versions
from pipelines.runtime.pool import Pool, Staff, Stage
from train.captions import CaptionMix
from train.data import open_samples
from train.devices import default_device
from train.latents import Tell
from train.loop import LoopConfig
from train.models.family import load_model
from train.models.presets import PRESETS
from train.parallel import PeerLost, rank_and_size
from train.places import bring, bring_images, push
from train.run import Record, ShouldStop, TrainRun

if TYPE_CHECKING:
    from pipelines.runtime.torchrun import TorchrunTrainer
    from pipelines.training import TrainOptions

RESTARTS = 8
"""Times that Ray starts all workers again after it lost one; then the driver ends, and the same command goes on."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training run, resolved; plain values, because Ray carries it to the workers."""

    options: TrainOptions  # with every default filled in
    loop: LoopConfig
    prompts: tuple[str, ...]
    identity: dict[str, Any]  # what must be the same for a run to go on
    data: Location
    model: Location

    def there(self) -> TrainJob:
        """In a worker: the same job, with the folders that this process has of data and model, and what lies there."""
        data, model = self.data.open(), self.model.open()
        bring_images(data.root, by_shard=True)
        bring(model.root)
        return replace(self, options=replace(self.options, data=data.root, out=model.root))

    def open(self, device: torch.device, pipeline: Any = None) -> TrainRun:
        """Open model and data; `pipeline` where the model is loaded already."""
        o = self.options
        if pipeline is None:
            pipeline = load_model(o.start or o.out / "start")
        return TrainRun(
            pipeline,
            open_samples(o.data, o.caption, o.captions),
            o.out,
            self.loop,
            device=device,
            new=o.start is None,
            text=o.start is None and o.text_encoder is None,
            own_vae=bool(o.preset and PRESETS[o.preset].vae and not o.vae),
            size=o.size,
            buckets=o.buckets,
            captions=CaptionMix.parse(o.captions),
            weight_by=o.weight_by,
            lora=o.lora,
            prompts=self.prompts,
            identity=self.identity,
        )


class LocalTrainer:
    """Carries out the stages of a run in this process, alone and without Ray; `about` says so in a few words."""

    def __init__(self, run: TrainRun, about: str) -> None:
        self._run, self.about = run, about

    def train(self, stage: str, should_stop: ShouldStop) -> Iterator[Record]:
        """Train `autoencoder` or `model` to the end, or until `should_stop`; records as `train.loop.train` yields."""
        for record in train_stage(self._run, stage, should_stop):
            if "checkpoint" in record:
                push(self._run.out)
            yield record

    def precompute_latents(self, tell: Tell) -> None:
        """Write the latents that are missing; `tell` hears how many more images are done."""
        self._run.precompute_latents(tell)


def train_stage(run: TrainRun, stage: str, should_stop: ShouldStop) -> Iterator[Record]:
    """Train the `autoencoder` or the `model` of a run."""
    return {"autoencoder": run.train_autoencoder, "model": run.train_model}[stage](should_stop)


# ----------------------------------------------------------------------------------------------------------- with Ray

STARTED = "started"
"""The message that workers begin with."""


Trainer: TypeAlias = "LocalTrainer | RayTrainer | TorchrunTrainer"


@contextlib.contextmanager
def ray_trainer(job: TrainJob, run: TrainRun, say: Callable[[str], None]) -> Iterator[RayTrainer]:
    """Workers of a Ray cluster: of this machine's own, started here, or of the one at an address.

    Raises UserError where the cluster can't hold them or a node doesn't see the model's folder.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # torch on a cold disk takes its minute
    options = job.options
    cpus = max(os.cpu_count() or 1, options.workers or 0)
    paths = () if job.data.url else (job.data.folder,)
    gloo = options.address is not None and not torch.cuda.is_available()
    check = NodeCheck(place=job.model, versions=versions(), paths=paths, gloo=gloo)
    with ray_cluster(options.address, check, cpus=cpus, gpus=torch.cuda.device_count()):
        yield RayTrainer(job, run, say)


class RayTrainer:
    """One worker per GPU with nccl where there are GPUs; else gloo on CPUs. A worker that dies is replaced, and all go
    on from the last checkpoint."""

    def __init__(self, job: TrainJob, run: TrainRun, say: Callable[[str], None]) -> None:
        import ray

        self._job, self._run, self._say = job, run, say
        workers = job.options.workers
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._gpu = any(r.get("GPU", 0) >= 1 for r in alive)
        kind = "GPU" if self._gpu else "CPU"
        able = [r for r in alive if r.get(kind, 0) >= 1]
        room = sum(int(r[kind]) for r in able)
        self._workers = workers or (room if self._gpu else 1)
        if self._workers > room:
            raise UserError(f"--workers {workers}: the cluster has {room} {kind}s, and each worker needs one")
        if job.loop.batch % self._workers:
            raise UserError(f"a batch of {job.loop.batch} can't be shared evenly by {self._workers} workers")
        self._cpus = max(1, int(min(r.get("CPU", 1) for r in able)) // math.ceil(self._workers / len(able)))
        self.about = f"{self._workers} workers with {'a GPU' if self._gpu else f'{self._cpus} cores'} each"
        self._name, self._progress = start_progress()

    def train(self, stage: str, should_stop: ShouldStop) -> Iterator[Record]:
        """Train with Ray Train's TorchTrainer."""
        started = False
        push(self._run.out)
        for message in self._messages(lambda: self._fit(stage), should_stop):
            if message != STARTED:
                yield message
                if "stopped" in message:
                    break  # the other workers end with Ray
            elif started:
                self._say("a worker was lost: all go on from the last checkpoint")
            else:
                started = True
        bring(self._run.out)

    def _fit(self, stage: str) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import WorkerGroupError

        job, name = self._job, self._name
        trainer = TorchTrainer(
            lambda: _train_worker(job, stage, name),
            scaling_config=ScalingConfig(
                num_workers=self._workers,
                use_gpu=self._gpu,
                resources_per_worker={"CPU": self._cpus, **({"GPU": 1} if self._gpu else {})},
            ),
            run_config=RunConfig(
                name=f"{stage}-{time.time_ns()}",
                storage_path=_ray_folder(job),
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
                f"The same command goes on from the last checkpoint; {job.options.out / 'logs'} says more."
            ) from e

    def precompute_latents(self, tell: Tell) -> None:
        """In a pool of as many workers, shard by shard."""

        def write_shards(made: dict[str, Any], missing: list[int]) -> None:
            stage = Stage(
                "latents",
                functools.partial(open_latents, self._job, self._name, made),
                lambda size: Staff(self._workers, self._cpus, 1.0 if self._gpu else 0.0, most=self._workers),
            )

            def map_shards() -> None:
                for _ in Pool([stage], missing, self._progress, say=self._say).results():
                    pass
                bring(self._run.out)

            push(self._run.out)
            for count in self._messages(map_shards):
                tell(count)

        self._run.precompute_latents(tell, write_shards)

    def _messages(self, work: Callable[[], None], should_stop: ShouldStop = lambda: False) -> Iterator[Any]:
        """What workers send while the work is done."""
        import ray

        for _ in watch(work, self._progress, 0.3):
            if should_stop():
                self._progress.request_stop.remote()
            yield from ray.get(self._progress.take.remote())


def _ray_folder(job: TrainJob) -> str:
    """Where Ray Train keeps what it knows of a run: checkpoints are ours, so nothing in it is for other machines."""
    if job.model.url is None:
        return str(job.options.out / "logs" / "ray")
    return str(Path(tempfile.gettempdir()) / f"tastemaker-{os.getuid()}" / "ray-train")


def _train_worker(job: TrainJob, stage: str, name: str) -> None:
    """One worker of a TorchTrainer, from the last checkpoint to the last step."""
    import ray
    import ray.train.torch

    job = job.there()
    progress = start_worker(store_at(job.options.out), stage, name)
    rank, _ = rank_and_size()
    if rank == 0:
        ray.get(progress.put.remote(STARTED))
    lost: Exception | None = None
    with report_errors(progress):
        try:
            run = job.open(torch.device(ray.train.torch.get_device()))
            for record in train_stage(run, stage, stop_check(progress)):
                if rank == 0:
                    if "checkpoint" in record:
                        push(run.out)
                    ray.get(progress.put.remote(record))
        except (PeerLost, torch.distributed.DistError) as e:  # no error of ours: Ray starts all of them anew
            lost = e
    if lost is not None:
        raise lost


def open_latents(job: TrainJob, name: str, made: dict[str, Any], threads: int) -> Callable[[int, int], None]:
    """Writes shards of latents, in an actor."""
    job = job.there()
    progress = start_worker(store_at(job.options.out), "latents", name)
    with report_errors(progress):
        run = job.open(default_device())
        run.latents_folder.mkdir(exist_ok=True)

    def write(shard: int, lost: int) -> None:
        with report_errors(progress):
            run.write_latents(shard, made, progress.put.remote)
            file = run.latents_folder / f"{shard_name(shard)}.safetensors"
            store_at(file).push([file, file.with_suffix(".json")])

    return write
