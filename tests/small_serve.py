"""A real server in this process, with a real, very small model, or with a data folder."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from curate.hub import no_progress_bars
from curate.layout import Data
from pipelines.actions import DataCommands
from studio.app import LOOPBACK, new_app
from studio.data import StudioData
from studio.draw.service import GenerationService
from studio.gate import Gate
from studio.server import StudioServer, listen
from tests.small_train import COLOURS
from train.generate.sampler import Sampler
from train.models.unet import new_model

SEEN = {"prompt": "a red disc", "steps": 2}


def small_sampler(folder: Path) -> Sampler:
    """The debug model, 16 px, untrained: what it draws is noise that depends on prompt and seed."""
    torch.set_num_threads(1)
    with no_progress_bars("diffusers"):
        new_model("debug", [f"a {c} disc" for c in COLOURS]).save_pretrained(folder)
    return Sampler(folder)


@dataclass(frozen=True)
class Served:
    """A server that runs, and what is behind it."""

    url: str
    service: GenerationService
    said: list[str]
    faults: list[Exception]

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """A client that is known by a cookie of its own, as a browser is after it has seen the page."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            client.get("/")
            yield client


@contextlib.contextmanager
def running(app: Gate, stop: Callable[[], None], port: int = 0) -> Iterator[str]:
    """An app that is served on a port of this machine, a free one by default; its URL."""
    at = listen("127.0.0.1", port)
    ready = threading.Event()
    server = StudioServer(app, stop, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(sampler: Sampler, out: Path, token: str | None = None) -> Iterator[Served]:
    """A model that is drawn with on a free port of this machine."""
    said: list[str] = []
    faults: list[Exception] = []
    out.mkdir(parents=True, exist_ok=True)
    service = GenerationService(sampler, out, log=said.append, on_fault=faults.append)
    app = new_app(draw=service, hosts=None if token else LOOPBACK, token=token)
    with running(app, service.queue.stop) as url:
        yield Served(url, service, said, faults)


@dataclass(frozen=True)
class ServedData:
    """A data folder in a studio that runs."""

    url: str
    folder: StudioData
    said: list[str]
    faults: list[Exception]

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """A client that is known by a cookie of its own, as a browser is after it has seen the page."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            client.get("/")
            yield client


@contextlib.contextmanager
def serving_data(
    data: Data, *, token: str | None = None, draw: GenerationService | None = None, port: int = 0, **more: Any
) -> Iterator[ServedData]:
    """A data folder in a studio on a port of this machine, a free one by default; `more` are StudioData's arguments."""
    said: list[str] = []
    faults: list[Exception] = []
    line = DataCommands(data, str(data))
    folder = StudioData(data, command_line=line, log=said.append, on_fault=faults.append, **more)
    app = new_app(data=folder, draw=draw, hosts=None if token else LOOPBACK, token=token)
    with running(app, folder.stop, port) as url:
        yield ServedData(url, folder, said, faults)
    assert not faults, faults


def finished(client: httpx.Client, job: dict[str, Any], seconds: float = 60) -> dict[str, Any]:
    """A job when it is over."""
    deadline = time.monotonic() + seconds
    while (view := client.get(f"/api/jobs/{job['id']}").json())["state"] in ("queued", "drawing"):
        assert time.monotonic() < deadline, view
        time.sleep(0.02)
    return dict(view)
