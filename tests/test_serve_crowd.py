"""The server among many, against its own description, and as a command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.small_serve import Served, finished, serving, small_sampler
from train.generate.files import read_facts

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "debug"
    small_sampler(folder)
    return folder


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[Served]:
    from train.generate.sampler import Sampler

    with serving(Sampler(model), tmp_path / "samples") as served:
        yield served


def test_fifty_requests_of_ten_people_are_all_drawn_and_none_is_mixed_up(served: Served) -> None:
    got: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def person(n: int) -> None:
        with served.client() as client:
            asked = [{"prompt": f"person {n} image {i}", "seed": 1000 * n + i, "steps": 2} for i in range(5)]
            jobs = [client.post("/api/jobs", json=a).json() for a in asked]
            got.extend((a, finished(client, job, 120)) for a, job in zip(asked, jobs, strict=True))

    people = [threading.Thread(target=person, args=(n,)) for n in range(10)]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    assert len(got) == 50 and {job["state"] for _, job in got} == {"done"}
    names = [job["pictures"][0]["name"] for _, job in got]
    assert len(set(names)) == 50 == len(list(served.service.out.glob("*.png")))
    for (asked, _), name in zip(got, names, strict=True):
        facts = read_facts(served.service.out / f"{name}.png")
        assert (facts["prompt"], facts["seed"]) == (asked["prompt"], asked["seed"])
    assert all(job["mine"] for _, job in got) and not served.faults


def test_what_it_says_of_itself_holds_for_whatever_is_asked(served: Served) -> None:
    """Requests made up from its OpenAPI description: never a 500, and every answer is of a described kind."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra `test`)")
    from hypothesis import HealthCheck, Phase, given, settings, strategies
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as openapi

    wanted = [
        checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]
    seen: dict[str, set[int]] = {}

    def ask(case: Any) -> None:
        response = case.call(timeout=60)
        seen.setdefault(f"{case.operation.method} {case.operation.path}", set()).add(response.status_code)
        case.validate_response(response, checks=wanted)

    quickly = settings(
        max_examples=60, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for result in schemathesis.openapi.from_url(f"{served.url}/api/openapi.json").get_all_operations():
        modes = (result.ok().as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)
        quickly(given(case=strategies.one_of(*modes))(ask))()
    assert len(seen) == 9 and 202 in seen["post /api/jobs"] and not served.faults, seen


# ---------------------------------------------------------------------------------------------------------- command


def serve(*words: Any, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "serve", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def address(process: subprocess.Popen[str]) -> str:
    """Where it says that it is, when it is ready."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"draw at (http://\S+)", line):
            return found[1]
    raise AssertionError("it ended before it was ready")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_ended_in_mid_drawing(model: Path, tmp_path: Path, number: int) -> None:
    process = serve(model, "--out", tmp_path / "samples", "--port", "0", "--json")
    url = address(process)
    assert url.startswith("http://127.0.0.1:")
    with httpx.Client(base_url=url, timeout=30) as client:
        finished(client, client.post("/api/jobs", json={"prompt": "one", "steps": 2}).json())
        client.post("/api/jobs", json={"prompt": "many", "steps": 150, "number": 16})
    process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and time.monotonic() - began < 8, err
    assert json.loads(out.splitlines()[-1])["paths"]["pictures"] == str(tmp_path / "samples")
    assert read_facts(tmp_path / "samples" / "000000.png")["prompt"] == "one"
    assert not list((tmp_path / "samples").glob(".*.tmp"))


def test_elsewhere_it_makes_a_token_and_prints_it(model: Path, tmp_path: Path) -> None:
    process = serve(model, "--out", tmp_path / "samples", "--port", "0", "--host", "0.0.0.0")
    port = address(process).rstrip("/").rpartition(":")[2]
    assert process.stderr is not None
    token = process.stderr.readline().rpartition("token: ")[2].strip()
    try:
        assert httpx.get(f"http://127.0.0.1:{port}/api/jobs").status_code == 401
        known = {"authorization": f"Bearer {token}", "host": "some.name.of.this.machine"}
        assert httpx.get(f"http://127.0.0.1:{port}/api/jobs", headers=known).status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 0
