"""The stages of a training run: in this process, or by Ray. The steps themselves are `train.loop`'s.

Workers see the model's folder on storage that they share with the driver: checkpoints and latents lie there. What else
they tell (records, counts, what went wrong) goes through one small actor.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from aesthetic.errors import UserError
from curate.store.files import read_json
from curate.store.lock import hold_worker_lock
from pipelines.runtime.jobs import OBJECT_STORE, check_nodes, connect, log_to_file, report_errors
from train.data import ImageDataset, Ints, Stream, crop_resize, decode_sample, open_samples, sampling_weights
from train.devices import default_device
from train.latents import LatentDataset, precompute_latents, shards_of, write_shard
from train.loop import LoopConfig, train
from train.models.unet import add_lora, load_model, size_step, tokenize
from train.tasks import Denoise, Reconstruct
from train.world import Distributed, PeerLost, World

RESTARTS = 8
"""Times that Ray starts all workers again after it lost one; then the driver ends, and the same command goes on."""

Record = dict[str, Any]
Stop = Callable[[], bool]
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

    def autoencoder(self, world: World, stop: Stop) -> Iterator[Record]:
        """Train the autoencoder."""
        assert self.plan.vae is not None
        return self._train(Reconstruct(self.pipeline), self.pictures, self.plan.vae, self.plan.vae_folder, world, stop)

    def model(self, world: World, stop: Stop) -> Iterator[Record]:
        """Train the model, or its LoRA."""
        plan = self.plan
        if plan.lora:
            add_lora(self.pipeline, plan.lora, plan.loop.seed)
        examples = LatentDataset(plan.latents_folder) if plan.latents else self.pictures
        real = self._real() if world.rank == 0 else {}
        task = Denoise(self.pipeline, text=plan.text, gamma=plan.gamma, real=real)
        return self._train(task, examples, plan.loop, plan.out, world, stop)

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
        self, task: Any, examples: Any, config: LoopConfig, folder: Path, world: World, stop: Stop
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
            should_stop=stop,
        )


def _threads() -> int:
    """Threads that read and decode."""
    return max(2, min(16, os.cpu_count() or 1))


class Trainers(Protocol):
    """Who does the work."""

    about: str  # who that is, in a few words

    def records(self, stage: str, stop: Stop) -> Iterator[Record]:
        """Train `autoencoder` or `model` to the end, or until `stop`; records as `train.loop.train` yields them."""
        ...

    def latents(self, tell: Callable[[int], None]) -> None:
        """Precompute those that are missing; `tell` hears how many more there are."""
        ...

    def close(self) -> None:
        """Let go of what was started."""
        ...


class Here:
    """This process, alone and without Ray."""

    def __init__(self, materials: Materials, about: str) -> None:
        self._materials, self.about = materials, about

    def close(self) -> None:
        """Nothing was started."""

    def records(self, stage: str, stop: Stop) -> Iterator[Record]:
        run: Callable[[World, Stop], Iterator[Record]] = getattr(self._materials, stage)
        return run(World(), stop)

    def latents(self, tell: Callable[[int], None]) -> None:
        m = self._materials
        folder = m.plan.latents_folder
        precompute_latents(
            m.pipeline, m.pictures, m.encoded, folder, text=not m.plan.text, threads=_threads(), tell=tell
        )


# ----------------------------------------------------------------------------------------------------------- with Ray


class Post:
    """What workers send, until the driver takes it. Lives in an actor."""

    def __init__(self) -> None:
        self._letters: list[Any] = []
        self._failure: Exception | None = None
        self._stopping = False

    def put(self, letter: Any) -> None:
        self._letters.append(letter)

    def fail(self, error: Exception) -> None:
        """Keep what went wrong; the first error is the cause of those after it."""
        self._failure = self._failure or error

    def stop(self) -> None:
        """Ask the first worker to end after its step."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether it is asked to."""
        return self._stopping

    def take(self) -> tuple[list[Any], Exception | None]:
        """Letters since the last time, and what went wrong."""
        letters, self._letters = self._letters, []
        return letters, self._failure


STARTED = "started"
"""The letter that workers begin with."""


class RayWorkers:
    """Workers of a Ray cluster: of this machine's own, started here, or of the one at an address.

    One worker per GPU with nccl where there are GPUs; else gloo on CPUs. A worker that dies is replaced, and all go on
    from the last checkpoint. Raises UserError where the cluster can't hold them or a node doesn't see the folder.
    """

    def __init__(
        self, materials: Materials, workers: int | None, address: str | None, say: Callable[[str], None]
    ) -> None:
        import ray

        self._materials, self._plan, self._say = materials, materials.plan, say
        self._name = f"tastemaker-{os.getpid()}-{secrets.token_hex(4)}"
        asked_to_end = signal.getsignal(signal.SIGTERM)
        try:
            self._join(address, workers or 0)
            if callable(asked_to_end):  # Ray has put its own in place, which ends with a code that says nothing
                signal.signal(signal.SIGTERM, asked_to_end)
            self._find_room(workers)
            self._post: Any = ray.remote(Post).options(name=self._name, num_cpus=0).remote()
        except BaseException:
            ray.shutdown()
            raise

    def close(self) -> None:
        import ray

        ray.shutdown()

    def _join(self, address: str | None, workers: int) -> None:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # torch on a cold disk takes its minute
        if address is not None:
            connect(address)
            check_nodes(self._plan.out)
            return
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
            "0"  # keep to the loopback interface: see pipelines.runtime.jobs
        )
        ray.init(
            num_cpus=max(os.cpu_count() or 1, workers),
            num_gpus=torch.cuda.device_count(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )

    def _find_room(self, workers: int | None) -> None:
        """How many workers, of how many cores each."""
        import ray

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

    def records(self, stage: str, stop: Stop) -> Iterator[Record]:
        """Train with Ray Train's TorchTrainer."""
        plan, name = self._plan, self._name

        def job() -> None:
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchConfig, TorchTrainer

            TorchTrainer(
                lambda: _worker(plan, stage, name),
                scaling_config=ScalingConfig(
                    num_workers=self._workers, use_gpu=self._gpu, resources_per_worker=self._resources()
                ),
                run_config=RunConfig(
                    name=f"{stage}-{time.time_ns()}",
                    storage_path=str(plan.out / "logs" / "ray"),
                    failure_config=FailureConfig(max_failures=RESTARTS),
                ),
                torch_config=TorchConfig(backend="nccl" if self._gpu else "gloo"),
            ).fit()

        def fit() -> None:
            from ray.train.v2.api.exceptions import WorkerGroupError

            try:
                job()
            except WorkerGroupError as e:
                last = next((str(f).strip().splitlines()[-1:] for f in e.worker_failures.values()), [])
                raise UserError(
                    f"workers were lost {RESTARTS + 1} times, at last with: {''.join(last) or 'no word'}\n"
                    f"The same command goes on from the last checkpoint; {plan.out / 'logs'} says more."
                ) from e

        started = False
        for letter in self._listen(fit, stop):
            if letter != STARTED:
                yield letter
                if "stopped" in letter:
                    return  # the other workers end with Ray
            elif started:
                self._say("a worker was lost: all go on from the last checkpoint")
            else:
                started = True

    def latents(self, tell: Callable[[int], None]) -> None:
        """As a Ray Data stage: an actor per worker, a row per shard."""
        m, folder, text = self._materials, self._plan.latents_folder, not self._plan.text

        def write_shards(made: dict[str, Any], missing: list[int]) -> None:
            for count in self._listen(lambda: self._encode(made, missing)):
                tell(count)

        precompute_latents(m.pipeline, m.pictures, m.encoded, folder, text=text, tell=tell, write_shards=write_shards)

    def _encode(self, made: dict[str, Any], missing: Sequence[int]) -> None:
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        rows: Any = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))
        rows = rows.map(
            Encoder,
            fn_constructor_args=(self._plan, self._name, made),
            compute=ActorPoolStrategy(size=min(self._workers, len(missing))),
            num_cpus=self._cpus,
            num_gpus=1 if self._gpu else None,
        )
        for _ in rows.iter_rows():
            pass

    def _resources(self) -> dict[str, float]:
        return {"CPU": self._cpus, **({"GPU": 1} if self._gpu else {})}

    def _listen(self, job: Callable[[], None], stop: Stop = lambda: False) -> Iterator[Any]:
        """Do a job in a thread, and yield what its workers send meanwhile. Raises what ends it.

        In a thread, because Ray Train takes Ctrl-C for itself in the main one.
        """
        import ray

        ended: list[BaseException] = []

        def run() -> None:
            try:
                job()
            except BaseException as e:
                ended.append(e)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        alive = True
        while alive:
            thread.join(0.3)
            alive = thread.is_alive()
            if stop():
                self._post.stop.remote()
            letters, failure = ray.get(self._post.take.remote())
            yield from letters
            if failure is not None:
                raise failure
        if ended:
            raise ended[0]


def _worker(plan: Plan, stage: str, name: str) -> None:
    """One worker of a TorchTrainer, from the last checkpoint to the last step."""
    import ray
    import ray.train.torch

    hold_worker_lock(plan.out)
    log_to_file(plan.out / "logs", stage)
    post: Any = ray.get_actor(name)
    world = Distributed()
    broken: Exception | None = None
    if world.rank == 0:
        ray.get(post.put.remote(STARTED))
    with report_errors(post):
        try:
            materials = Materials(plan, torch.device(ray.train.torch.get_device()))
            for record in getattr(materials, stage)(world, _asked(post)):
                if world.rank == 0:
                    ray.get(post.put.remote(record))
        except (PeerLost, torch.distributed.DistError) as e:  # no error of ours: Ray starts all of them anew
            broken = e
    if broken is not None:
        raise broken


def _asked(post: Any) -> Stop:
    """Whether the driver wants an end, asked once a second at most."""
    import ray

    last = time.monotonic()

    def stop() -> bool:
        nonlocal last
        if time.monotonic() - last < 1:
            return False
        last = time.monotonic()
        return bool(ray.get(post.stopping.remote()))

    return stop


class Encoder:
    """Writes shards of latents, in an actor."""

    def __init__(self, plan: Plan, name: str, made: dict[str, Any]) -> None:
        import ray

        hold_worker_lock(plan.out)
        log_to_file(plan.out / "logs", "latents")
        self._plan, self._made = plan, made
        self._post: Any = ray.get_actor(name)
        with report_errors(self._post):
            self._m = Materials(plan, default_device())
            self._shards = shards_of(self._m.pictures, self._m.encoded)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        m, shard, plan = self._m, int(row["shard"]), self._plan
        with report_errors(self._post):
            write_shard(
                m.pipeline,
                m.pictures,
                self._shards[shard],
                plan.latents_folder,
                shard,
                self._made,
                text=not plan.text,
                threads=_threads(),
                tell=self._post.put.remote,
            )
        return row
