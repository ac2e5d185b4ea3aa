"""The page's server: images, turns, cancelling, what is refused, and that it lives on."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, PngImagePlugin

from aesthetic.errors import UserError
from pipelines.cli import main
from studio import gate, server, streams
from studio import queue as queue_module
from studio.gate import TokenAttempts
from studio.queue import JobQueue, QueueFull, StudioJob
from studio.server import listen
from tests.small_serve import SEEN, Served, finished, serving, small_sampler
from train.generate.files import read_facts
from train.generate.sampler import Sampler
from train.generate.upscale import tiles_cost

TOKEN = "a-token-of-tests-0123456789"


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return small_sampler(tmp_path_factory.mktemp("model") / "debug")


@pytest.fixture(scope="module")
def served(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(sampler, tmp_path_factory.mktemp("served") / "samples") as served:
        yield served
        assert not served.faults


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def png(size: tuple[int, int] = (16, 16), colour: Any = (200, 30, 30), mode: str = "RGB") -> str:
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def opened(client: httpx.Client, link: dict[str, Any]) -> Image.Image:
    response = client.get(link["url"])
    assert response.status_code == 200 and response.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(response.content))


def refused(response: httpx.Response, status: int) -> str:
    """The message of an error, after its shape was checked."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert set(answer) == {"error", "hint"} and answer["error"]
    return str(answer["error"])


# --------------------------------------------------------------------------------------------------------- drawing


def test_an_image_is_drawn_kept_and_described(served: Served, client: httpx.Client) -> None:
    asked = client.post("/api/jobs", json={**SEEN, "seed": 5, "number": 2, "negative": "blue"})
    assert asked.status_code == 202 and asked.json()["state"] == "queued" and asked.json()["mine"]
    job = finished(client, asked.json())
    assert job["state"] == "done" and job["step"] == job["of"] == 4
    assert [json.loads(opened(client, p).info["tastemaker"])["seed"] for p in job["pictures"]] == [5, 6]
    facts = read_facts(served.service.out / f"{job['pictures'][0]['name']}.png")
    assert (facts["prompt"], facts["negative"], facts["steps"]) == ("a red disc", "blue", 2)
    newest = client.get("/api/images", params={"limit": 1}).json()
    assert newest["more"] and newest["pictures"][0] == {**job["pictures"][1], "facts": {**facts, "seed": 6}} | {
        "facts": newest["pictures"][0]["facts"]
    }
    older = client.get("/api/images", params={"before": int(newest["pictures"][0]["name"])}).json()
    assert older["pictures"][0]["name"] == job["pictures"][0]["name"]
    assert "'a red disc', seed 5" in "\n".join(served.said)


def test_the_same_request_draws_what_the_library_draws(served: Served, client: httpx.Client, sampler: Sampler) -> None:
    from train.generate.request import GenerationRequest

    job = finished(client, client.post("/api/jobs", json={**SEEN, "seed": 9, "guidance": 2.0}).json())
    (drawn,) = sampler.generate([GenerationRequest("a red disc", seed=9, steps=2, guidance=2.0)])
    assert opened(client, job["pictures"][0]).tobytes() == drawn.image.tobytes()


def test_images_are_begun_with_redrawn_in_part_and_enlarged(client: httpx.Client) -> None:
    half = Image.new("L", (16, 16), 0)
    half.paste(255, (8, 0, 16, 16))
    data = io.BytesIO()
    half.save(data, "PNG")
    mask = base64.b64encode(data.getvalue()).decode()
    for more, size in (
        ({"image": png(), "strength": 0.5}, (16, 16)),
        ({"image": png(), "mask": mask}, (16, 16)),
        ({"image": png(), "upscale": 2, "strength": 0.5}, (32, 32)),
    ):
        job = finished(client, client.post("/api/jobs", json={**SEEN, **more}).json())
        assert job["state"] == "done", job
        image = opened(client, job["pictures"][0])
        assert image.size == size
        if "mask" in more:  # where it is black nothing is regenerated
            assert {image.getpixel((x, y)) for x in range(8) for y in range(16)} == {(200, 30, 30)}


def test_a_mask_painted_on_a_transparent_layer_redraws_what_is_painted(client: httpx.Client) -> None:
    """Whatever the colour: editors save a layer as it is, and what is not painted is transparent black or white."""
    begun = Image.new("RGB", (16, 16), (200, 30, 30))
    for kind, paint, nothing in (
        ("PNG", (0, 0, 0, 255), (255, 255, 255, 0)),
        ("PNG", (255, 255, 255, 255), (0, 0, 0, 0)),
        ("WEBP", (240, 70, 160, 255), (0, 0, 0, 0)),
    ):
        layer = Image.new("RGBA", begun.size, nothing)
        layer.paste(paint, (8, 0, 16, 16))
        data = io.BytesIO()
        layer.save(data, kind, lossless=True)
        mask = base64.b64encode(data.getvalue()).decode()
        job = finished(client, client.post("/api/jobs", json={**SEEN, "image": png(), "mask": mask}).json())
        assert job["state"] == "done", job
        drawn = opened(client, job["pictures"][0])
        same = [drawn.getpixel((x, y)) == (200, 30, 30) for x in range(16) for y in range(16)]
        assert all(same[: 8 * 16]) and sum(same[8 * 16 :]) < 8, (kind, paint)
    assert "nothing is painted" in refused(
        client.post("/api/jobs", json={**SEEN, "image": png(), "mask": png(mode="RGBA", colour=(0, 0, 0, 0))}), 422
    )


def test_an_enlargement_takes_no_longer_than_the_longest_drawing(client: httpx.Client) -> None:
    large = {**SEEN, "image": png((400, 400)), "upscale": 4}
    assert "at most 9,600" in refused(client.post("/api/jobs", json={**large, "steps": 20}), 422)
    job = client.post("/api/jobs", json={**large, "strength": 0}).json()
    assert finished(client, job)["state"] == "done"


def test_streams_of_events_are_bounded(served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_STREAMS", 3)
    job = client.post("/api/jobs", json={**SEEN, "steps": 150, "number": 16}).json()
    paths = [f"/api/jobs/{job['id']}/events", "/api/events", "/api/events"]
    with contextlib.ExitStack() as open_streams:
        for path in paths:
            assert open_streams.enter_context(client.stream("GET", path)).status_code == 200
        for path in paths:
            refused(client.get(path), 429)
    client.delete(f"/api/jobs/{job['id']}")
    deadline = time.monotonic() + 20
    while client.get(paths[0]).status_code != 200:  # until the places are free again
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_an_enlargement_takes_is_said(client: httpx.Client) -> None:
    asked = client.post("/api/jobs", json={**SEEN, "image": png((24, 24)), "upscale": 2}).json()
    assert asked["cost"].startswith("25 tiles of 16 x 16 pixels")
    job = finished(client, asked)
    assert job["state"] == "done" and ", about " in job["cost"]
    assert finished(client, client.post("/api/jobs", json=SEEN).json())["cost"] == ""
    assert tiles_cost(19, (16, 16), 9.0) == "" and tiles_cost(7200, (512, 512), 2.5).endswith("about 5 h")
    assert [tiles_cost(20, (8, 8), s).rpartition("about ")[2] for s in (0.001, 1.2, 45, 90_000)] == [
        "1 s", "24 s", "15 min", "21 d"
    ]  # fmt: skip


def test_what_the_model_does_not_read_is_said(client: httpx.Client) -> None:
    job = finished(client, client.post("/api/jobs", json={**SEEN, "prompt": "a red disc " * 9}).json())
    assert "reads no further" in job["note"] and "disc" in job["note"]


def test_progress_comes_as_events_and_ends(client: httpx.Client) -> None:
    job = client.post("/api/jobs", json={**SEEN, "steps": 20}).json()
    with client.stream("GET", f"/api/jobs/{job['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
    assert events[-1]["state"] == "done" and len(events[-1]["pictures"]) == 1
    assert [e["step"] for e in events] == sorted(e["step"] for e in events) and len(events) >= 2
    with client.stream("GET", "/api/events") as response:  # nothing of this client's is under way
        assert [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")] == [
            {"jobs": [], "more": False}
        ]


def test_a_drawing_is_cancelled_in_its_midst_and_one_that_waits_at_once(served: Served, client: httpx.Client) -> None:
    long = client.post("/api/jobs", json={**SEEN, "steps": 150, "number": 16}).json()
    waiting = client.post("/api/jobs", json=SEEN).json()
    assert client.delete(f"/api/jobs/{waiting['id']}").json()["state"] == "cancelled"
    while client.get(f"/api/jobs/{long['id']}").json()["step"] < 3:
        time.sleep(0.01)
    with served.client() as other:
        assert "somebody else" in refused(other.delete(f"/api/jobs/{long['id']}"), 403)
    client.delete(f"/api/jobs/{long['id']}")
    view = finished(client, long, 10)
    assert view["state"] == "cancelled" and view["step"] < view["of"]
    assert finished(client, client.post("/api/jobs", json=SEEN).json())["state"] == "done"


def test_a_failing_model_fails_its_job_alone(served: Served, client: httpx.Client, monkeypatch: Any) -> None:
    """The unet of the real pipeline is broken for one job: the model is said to be at fault, not the server."""
    import torch

    weight = served.service.sampler._text.unet.conv_in.weight
    whole = weight.data
    told = ("can't be computed", "values that are no numbers")
    for broken, why in zip((torch.zeros(1), whole * float("nan")), told, strict=True):
        weight.data = broken
        job = finished(client, client.post("/api/jobs", json=SEEN).json())
        weight.data = whole
        assert job["state"] == "failed" and why in job["error"] and not job["pictures"]
        assert not served.faults
    assert finished(client, client.post("/api/jobs", json=SEEN).json())["state"] == "done"


def test_history_survives_a_restart_and_foreign_files_are_no_part_of_it(sampler: Sampler, tmp_path: Path) -> None:
    with serving(sampler, tmp_path) as served, served.client() as client:
        job = finished(client, client.post("/api/jobs", json={**SEEN, "seed": 1}).json())
        client.post("/api/jobs", json={**SEEN, "steps": 150, "number": 16})
        watched: list[str] = []
        mine = {"cookies": dict(client.cookies), "timeout": 30}
        events = threading.Thread(target=lambda: watched.append(httpx.get(f"{served.url}/api/events", **mine).text))
        events.start()
        while served.service.queue.jobs()[0].step < 3:
            time.sleep(0.01)
        began = time.monotonic()
    assert time.monotonic() - began < 5  # it ends although somebody watches and something is generated
    events.join()
    assert '"state":"drawing"' in watched[0]
    Image.new("RGB", (8, 8)).save(tmp_path / "000777.png")  # somebody's, without facts
    (tmp_path / "000778.png").write_bytes(b"no picture")
    (tmp_path / "secret.png").write_bytes((tmp_path / f"{job['pictures'][0]['name']}.png").read_bytes())
    with serving(sampler, tmp_path) as served, served.client() as client:
        assert client.get("/api/images").json()["pictures"][-1]["name"] == job["pictures"][0]["name"]
        assert client.get("/api/jobs").json() == {"jobs": [], "more": False}
        assert "before a restart" in refused(client.get(f"/api/jobs/{job['id']}"), 404)
        for path in ("000777.png", "000778.png", "secret.png", "%2e%2e/secret.png", "..%2f000000.png", "000000.PNG"):
            assert client.get(f"/api/images/{path}").status_code in (404, 422), path


# ------------------------------------------------------------------------------------------------------------ turns


def test_people_are_served_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue itself, with a drawing that only notes whose it is."""
    drawn: list[str] = []
    go = threading.Event()

    def draw(job: StudioJob, on_step: Any) -> Iterator[int]:
        go.wait(10)
        drawn.extend(job.requests)
        yield 0

    queue = JobQueue(draw, str, lambda: None)
    jobs = [queue.submit(StudioJob([name], name[0], {})) for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")]
    assert [queue.positions()[j.id] for j in jobs] == [0, 3, 5, 6, 1, 4, 2]
    queue.cancel(jobs[1])
    queue.start()
    go.set()
    deadline = time.monotonic() + 10
    while not all(j.is_over for j in jobs) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert drawn == ["a1", "b1", "c1", "a3", "b2", "a4"] and jobs[1].state == "cancelled"
    assert all(j.requests == () for j in jobs)  # the images that came with them are freed
    monkeypatch.setattr(queue_module, "REMEMBERED", 2)
    queue.cancel(queue.submit(StudioJob([], "a", {})))
    assert len(queue.jobs()) in (2, 3)  # it may have been drawn before it was cancelled
    queue.close()
    with pytest.raises(QueueFull):
        queue.submit(StudioJob([], "a", {}))


def test_the_queue_is_bounded_for_one_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "MAX_WAITING_OF_ONE", 2)
    monkeypatch.setattr(queue_module, "MAX_WAITING", 3)
    monkeypatch.setattr(queue_module, "MAX_BYTES", 100)
    queue = JobQueue(lambda job, on_step: iter(()), str, lambda: None)  # it does not draw: it is not started
    queue.submit(StudioJob([], "a", {}))
    with pytest.raises(QueueFull, match="room"):
        queue.submit(StudioJob([], "b", {}, bytes=101))
    queue.submit(StudioJob([], "a", {}))
    with pytest.raises(QueueFull) as own:
        queue.submit(StudioJob([], "a", {}))
    queue.submit(StudioJob([], "b", {}))
    with pytest.raises(QueueFull) as whole:
        queue.submit(StudioJob([], "b", {}))
    assert own.value.own and not whole.value.own


def test_one_address_cannot_take_all_places(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drops his cookie is somebody new each time, but comes from where he came."""
    queue = JobQueue(lambda job, on_step: iter(()), str, lambda: None)  # not started
    for n in range(queue_module.MAX_WAITING):
        try:
            queue.submit(StudioJob([], f"cookie {n}", {}, address="1.2.3.4"))
        except QueueFull as e:
            assert e.own and "address" in str(e) and n == queue_module.ADDRESS_SHARE * queue_module.MAX_WAITING
            break
    else:
        raise AssertionError("it took all")
    queue.submit(StudioJob([], "somebody", {}, address="5.6.7.8"))
    large = int(queue_module.ADDRESS_SHARE * queue_module.MAX_BYTES) + 1
    with pytest.raises(QueueFull, match="address"):
        queue.check_room("a", "9.9.9.9", large)
    queue.check_room("a", "9.9.9.9", large - 1)
    assert gate.address_of({"client": ("2001:db8::1", 1)}) == gate.address_of({"client": ("2001:db8::9:9", 1)})
    assert gate.address_of({"client": ("::ffff:10.0.0.1", 1)}) == gate.address_of({"client": ("10.0.0.1", 2)})
    long = {**SEEN, "steps": 150, "number": 16}
    monkeypatch.setattr(queue_module, "MAX_WAITING", 4)
    codes, ids = [], []
    for _ in range(6):
        with served.client() as client:  # a new cookie
            asked = client.post("/api/jobs", json=long)
            codes.append(asked.status_code)
            ids += [(client, asked.json()["id"])] if asked.status_code == 202 else []
    monkeypatch.undo()
    assert codes[0] == 202 and codes[-1] == 429
    for job in served.service.queue.jobs():
        served.service.queue.cancel(job)


def test_a_full_queue_is_said_with_when_to_try_again(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = client.post("/api/jobs", json={**SEEN, "steps": 150, "number": 16}).json()
    monkeypatch.setattr(queue_module, "MAX_WAITING", 0)
    full = client.post("/api/jobs", json=SEEN)
    assert "full" in refused(full, 503) and full.headers["retry-after"]
    client.delete(f"/api/jobs/{long['id']}")


# ---------------------------------------------------------------------------------------------------------- refusals


def bomb() -> str:
    """A PNG of 40 kB that says 30,000 x 30,000."""
    data = bytearray(base64.b64decode(png()))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return base64.b64encode(bytes(data)).decode()


WRONG: list[tuple[Any, str]] = [
    ({}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": "x" * 3000}, "prompt"),
    ({"prompt": "a\x00b"}, "character"),
    ({"prompt": "x", "steps": "7"}, "steps"),
    ({"prompt": "x", "steps": 0}, "steps"),
    ({"prompt": "x", "steps": True}, "steps"),
    ({"prompt": "x", "steps": 10**30}, "steps"),
    ({"prompt": "x", "number": 17}, "number"),
    ({"prompt": "x", "seed": -1}, "seed"),
    ({"prompt": "x", "seed": 2**32 - 1, "number": 2}, "seed"),
    ({"prompt": "x", "width": 17, "height": 16}, "multiples"),
    ({"prompt": "x", "width": 16}, "both"),
    ({"prompt": "x", "width": 4096, "height": 4096}, "pixels"),
    ({"prompt": "x", "scheduler": "../../etc/passwd"}, "scheduler"),
    ({"prompt": "x", "scheduler": "FlowMatchEulerDiscrete"}, "scheduler"),
    ({"prompt": "x", "colour": "red"}, "colour"),
    ({"prompt": "x", "strength": 0.5}, "strength"),
    ({"prompt": "x", "mask": png()}, "mask"),
    ({"prompt": "x", "image": "/etc/passwd"}, "base64"),
    ({"prompt": "x", "image": base64.b64encode(b"GIF89a").decode()}, "read"),
    ({"prompt": "x", "image": bomb()}, "pixels"),
    ({"prompt": "x", "image": png(), "mask": png((8, 8), colour=(255, 255, 255))}, "size"),
    ({"prompt": "x", "image": png((1200, 1200)), "upscale": 4}, "pixels"),
    ([], "body"),
    ("x", "body"),
]


def test_what_cannot_be_is_refused_in_words(served: Served, client: httpx.Client) -> None:
    before = len(client.get("/api/jobs").json()["jobs"])
    for wrong, word in WRONG:
        assert word in refused(client.post("/api/jobs", json=wrong), 422).lower(), wrong
    json_type = {"content-type": "application/json"}
    for text, status in (
        (b'{"prompt": "x", "guidance": NaN}', 422),
        (b'{"prompt": "x", "guidance": 1e999}', 422),
        (b'{"prompt": "\\ud800"}', 422),
        (b'{"prompt": "x"', 422),
        (b"\xff\xfe\x00", 400),
        (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 422),
        (b"", 422),
        (b"null", 422),
    ):
        refused(client.post("/api/jobs", content=text, headers=json_type), status)
    refused(client.post("/api/jobs", content=b"prompt=x", headers={"content-type": "text/plain"}), 415)
    refused(client.post("/api/jobs", data={"prompt": "x"}), 415)
    refused(client.get("/api/nothing"), 404)
    refused(client.put("/api/jobs", json={}), 405)
    refused(client.get("/api/jobs/0123456789abcdef"), 404)
    refused(client.get("/api/images", params={"limit": 1000}), 422)
    assert len(client.get("/api/jobs").json()["jobs"]) == before and not served.faults


NUMBERS: list[tuple[str, str]] = [
    ('"seed": ' + "9" * 5000, "seed"),
    ('"seed": -' + "9" * 400, "seed"),
    ('"seed": 1e400', "seed"),
    ('"seed": 7.0', "seed"),
    ('"seed": true', "seed"),
    ('"steps": NaN', "steps"),
    ('"steps": 1e3', "steps"),
    ('"number": false', "number"),
    ('"upscale": true', "upscale"),
    ('"width": 99999999999999999999, "height": 16', "width"),
    ('"guidance": true', "guidance"),
    ('"guidance": -Infinity', "guidance"),
    ('"guidance": 1e400', "guidance"),
    ('"guidance": ' + "9" * 5000, "guidance"),
    ('"strength": "0.5"', "strength"),
    ('"strength": NaN', "strength"),
    ('"image": 7', "image"),
    ('"mask": ["a"]', "mask"),
    ('"image": "\\u0000image 0"', "image"),
]


def test_numbers_that_cannot_be_are_refused_by_name(client: httpx.Client) -> None:
    for text, field in NUMBERS:
        body = b'{"prompt": "x", %s}' % text.encode()
        said = refused(client.post("/api/jobs", content=body, headers={"content-type": "application/json"}), 422)
        assert said.startswith(f"{field}: "), (text[:40], said)


def test_images_are_taken_however_base64_is_written_in_json(client: httpx.Client) -> None:
    """PHP escapes slashes, .NET signs; both are JSON."""
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(data, "PNG")
    image = base64.b64encode(data.getvalue()).decode()
    assert "/" in image and "+" in image and len(image) > 2000
    for written in (image, image.replace("/", r"\/"), image.replace("+", r"\u002B").replace("=", r"\u003D")):
        text = json.dumps({**SEEN, "width": 16, "height": 16, "image": "HERE"}).replace("HERE", written)
        asked = client.post("/api/jobs", content=text.encode(), headers={"content-type": "application/json"})
        assert asked.status_code == 202, asked.text
        assert finished(client, asked.json())["state"] == "done"


def test_large_bodies_hold_nobody_up(served: Served, client: httpx.Client) -> None:
    """What is no image is refused by its size, before it is parsed; the long form is in test_serve_hostile.py."""
    took: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        with served.client() as other:
            while not stop.wait(0.05):
                began = time.monotonic()
                assert other.get("/api/model").status_code == 200
                took.append(time.monotonic() - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    json_type = {"content-type": "application/json"}
    most = gate.MAX_BODY - 100
    for body in (
        b'{"prompt": [' + b"1," * (most // 2) + b"1]}",
        b'{"prompt": ["' + b'","' * (most // 3) + b'"]}',
        b'{"prompt": "x", "image": "' + b"A" * (most // 4 * 4) + b'"}',
    ):
        assert client.post("/api/jobs", content=body, headers=json_type).status_code in (413, 422)
    stop.set()
    watcher.join()
    assert max(took) < 1, took


def test_other_sites_are_refused(served: Served, client: httpx.Client) -> None:
    here = served.url.removeprefix("http://")
    for headers in (
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:7860"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": f"http://{here}.evil.example"},
        {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ):
        refused(client.post("/api/jobs", json=SEEN, headers=headers), 403)
    refused(client.get("/api/images", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}), 403)
    refused(client.get("/api/jobs", headers={"host": "evil.example"}), 403)
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    page = client.get("/", headers=link)
    assert page.status_code == 200 and "access-control-allow-origin" not in page.headers
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    own = {"origin": served.url, "sec-fetch-site": "same-origin"}
    assert finished(client, client.post("/api/jobs", json=SEEN, headers=own).json())["state"] == "done"


def test_large_many_and_slow_requests_end(served: Served, client: httpx.Client, monkeypatch: Any) -> None:
    assert client.get("/", headers={f"x-{i}": "y" for i in range(200)}).status_code == 431
    json_type = {"content-type": "application/json"}

    def endless() -> Iterator[bytes]:
        for _ in range(gate.MAX_BODY // 65536 + 2):
            yield b" " * 65536

    said = {**json_type, "content-length": str(10**12)}
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as raw:  # it says so, and sends nothing
        head = "".join(f"{k}: {v}\r\n" for k, v in {"host": "localhost", **said}.items())
        raw.sendall(f"POST /api/jobs HTTP/1.1\r\n{head}\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    refused(client.post("/api/jobs", content=endless(), headers=json_type), 413)
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    for begun, end in (
        (b"", b""),
        (b"GET / HTTP/1.1\r\nhost: loc", b""),
        (b"POST /api/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
         b"content-length: 9\r\n\r\n{", b"HTTP/1.1 408"),
        (b"\x16\x03\x01 no http \r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /api/images/../../../etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
         b"HTTP/1.1 404"),
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(begun)
            answer = b""
            try:
                while part := raw.recv(65536):
                    answer += part
                    if answer and end != b"HTTP/1.1 404":
                        break
            except ConnectionResetError:
                pass
            assert answer.startswith(end) and bool(answer) == bool(end), (begun[:60], answer[:200])
    monkeypatch.undo()
    assert served.service.queue is not None and client.get("/api/model").status_code == 200


def test_elsewhere_a_token_is_needed(sampler: Sampler, tmp_path: Path) -> None:
    with serving(sampler, tmp_path, TOKEN) as served, httpx.Client(base_url=served.url) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"cookie": f"{gate.COOKIE}={TOKEN}"},
            {"authorization": TOKEN},
        ):
            refused(client.get("/api/jobs", headers=headers), 401)
            refused(client.post("/api/jobs", json=SEEN, headers=headers), 401)
            refused(client.get("/api/openapi.json", headers=headers), 401)
        form = client.get("/")
        assert form.status_code == 401 and "password" in form.text and "<script" not in form.text
        assert client.get("/style.css").status_code == 200
        assert client.get("/draw.js").status_code == 401
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        assert (
            client.post("/login", data={"token": TOKEN}, headers={"origin": "https://evil.example"}).status_code == 403
        )
        entered = client.post("/login", data={"token": TOKEN})
        assert entered.status_code == 303 and TOKEN not in entered.headers["set-cookie"]
        assert all(word in entered.headers["set-cookie"] for word in ("HttpOnly", "SameSite=strict"))
        assert client.get("/").status_code == 200 and client.get("/api/jobs").status_code == 200
        bearer = httpx.get(f"{served.url}/api/openapi.json", headers={"authorization": f"Bearer {TOKEN}"})
        assert bearer.json()["security"] == [{"token": []}]


def test_wrong_tokens_are_looked_at_slowly_and_the_right_one_at_once() -> None:
    now = 0.0
    attempts = TokenAttempts(lambda: now)
    waits = [attempts.take("a") for _ in range(100)]
    assert waits[:10] == [0.0] * 10 and waits[10] == pytest.approx(0.2) and waits[58] == pytest.approx(9.8)
    assert waits[60:] == [None] * 40  # beyond ten seconds none is looked at
    assert attempts.take("b") == 0.0  # a newcomer waits for nobody
    others = [attempts.take(f"{i}") for i in range(1000) for _ in range(5)]
    assert attempts.take("c") == 0.0 and None in others  # of all together a few a second, beside each one's first
    now = 60.0
    assert attempts.take("a") == 0.0
    attempts.right("a", taken=True)
    assert attempts.is_known("a") and not attempts.is_known("b")


def test_a_guesser_is_slowed_and_locks_nobody_out(sampler: Sampler, tmp_path: Path) -> None:
    with serving(sampler, tmp_path, TOKEN) as served, httpx.Client(base_url=served.url) as holder:
        right = {"authorization": f"Bearer {TOKEN}"}
        assert holder.get("/api/jobs", headers=right).status_code == 200
        codes: list[int] = []
        end = time.monotonic() + 1.2

        def guess(n: int) -> None:
            with httpx.Client(base_url=served.url, timeout=30) as client:
                while time.monotonic() < end:
                    wrong = {"authorization": f"Bearer {n} {len(codes)}"}
                    codes.append(client.get("/api/jobs", headers=wrong).status_code)
                    codes.append(client.post("/login", data={"token": f"{n}"}).status_code)

        guessers = [threading.Thread(target=guess, args=(n,)) for n in range(4)]
        for thread in guessers:
            thread.start()
        while time.monotonic() < end:
            began = time.monotonic()
            assert holder.get("/api/jobs", headers=right).status_code == 200
            assert time.monotonic() - began < 0.5
            time.sleep(0.1)
        for thread in guessers:
            thread.join()
        assert set(codes) == {401} and 10 <= len(codes) < 40
        many = "&".join(f"a{i}=1" for i in range(99))
        form = {"content-type": "application/x-www-form-urlencoded"}
        refused(holder.post("/login", content=many, headers=form), 400)


def test_half_open_and_slow_connections_shut_nobody_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 20)
    port = int(served.url.rpartition(":")[2])
    post = b"POST /api/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    for begun in (b"", b"GET / HTTP/1.1\r\nhost: loc", post, b"GET /draw.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * 9):
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        try:
            for raw in held:
                with contextlib.suppress(OSError):
                    raw.sendall(begun)
            began = time.monotonic()
            assert httpx.get(f"{served.url}/api/model").status_code == 200
            assert time.monotonic() - began < 5 < server.HEAD_SECONDS
        finally:
            for raw in held:
                raw.close()


def test_half_a_request_and_what_is_none_leave_no_tracebacks(
    sampler: Sampler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else whoever likes fills the log, and the disk."""
    half = b"POST /api/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    socket_wanted = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    with contextlib.ExitStack() as held:
        with serving(sampler, tmp_path) as served:
            port = int(served.url.rpartition(":")[2])
            for sent in (b"nonsense\r\n\r\n", socket_wanted, half, half):
                raw = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                raw.sendall(sent)
                if sent is not half:
                    assert raw.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 200"))
            assert httpx.get(f"{served.url}/api/model").status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < 5
    assert not [r for r in caplog.records if r.name.startswith("uvicorn")]


def test_bodies_in_crumbs_and_answers_that_are_not_taken_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(served.url.rpartition(":")[2])
    head = b"POST /api/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(head + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 2000)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(b"GET /draw.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2000)  # some 30 MB
        time.sleep(1.5)
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while part := raw.recv(1 << 20):
                taken += len(part)
        assert taken < 2000 * 15_000


def test_prompts_are_never_markup(client: httpx.Client) -> None:
    """They are in the page as text alone: by the scripts' source, and as JSON that nothing takes for HTML."""
    for name in ("draw.js", "brush.js"):
        source = client.get(f"/{name}").text
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://"):
            assert way not in source, (name, way)
    job = finished(client, client.post("/api/jobs", json={**SEEN, "prompt": "<script>alert(1)</script>"}).json())
    answer = client.get(f"/api/jobs/{job['id']}")
    assert answer.headers["content-type"] == "application/json"
    assert job["asked"]["prompt"] == "<script>alert(1)</script>"


def test_a_busy_port_and_a_strange_host_are_said(served: Served) -> None:
    with pytest.raises(UserError, match="in use"):
        listen("127.0.0.1", int(served.url.rpartition(":")[2]))
    with pytest.raises(UserError, match="no such address"):
        listen("no.such.name.invalid", 0)


def test_a_damaged_file_in_the_folder_is_passed_over(served: Served, client: httpx.Client) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("tastemaker", "[1, 2]")
    Image.new("RGB", (8, 8)).save(served.service.out / "900000.png", pnginfo=info)
    assert "900000" not in [p["name"] for p in client.get("/api/images").json()["pictures"]]
    refused(client.get("/api/images/900000.png"), 404)


def test_hostile_files_and_a_lost_folder_do_not_break_the_history(sampler: Sampler, tmp_path: Path) -> None:
    out = tmp_path / "samples"

    def file(number: int, text: str, zipped: bool = False) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_text("tastemaker", text, zip=zipped)
        Image.new("RGB", (8, 8)).save(out / f"{number:06d}.png", pnginfo=info)

    with serving(sampler, out) as served, served.client() as client:
        job = finished(client, client.post("/api/jobs", json={**SEEN, "seed": 1}).json())
        own = read_facts(out / "000000.png")
        os.mkfifo(out / "900000.png")
        file(900001, "[" * 100_000)
        file(900002, '{"prompt": "x", "nested": ' + "[" * 400 + "]" * 400 + "}")
        file(900003, '{"prompt": "\\ud800", "seed": 1}')
        file(900004, '{"prompt": "x", "seed": ' + "9" * 4000 + "}")
        file(900005, '{"prompt": "x", "seed": ' + "9" * 5000 + "}")
        file(900006, '{"prompt": "x", "guidance": 1e400}')
        file(900007, json.dumps({**own, "nsfw": {"flagged": True, "score": "x"}}))
        file(900008, json.dumps({**own, "scheduler": 7}))
        file(900009, " " * 900_000, zipped=True)
        (out / "900010.png").mkdir()
        (out / "900011.png").symlink_to("/dev/zero")
        (out / "900012.png").symlink_to("900012.png")
        (out / "900013.png").symlink_to("nowhere")
        file(900014, json.dumps(own))
        listed = client.get("/api/images")
        assert listed.status_code == 200
        assert [p["name"] for p in listed.json()["pictures"]] == ["900014", "900003", "000000"]
        assert listed.json()["pictures"][1]["facts"]["prompt"] == "\ufffd"
        for number in (0, 1, 2, 10, 11, 12, 13):
            refused(client.get(f"/api/images/{900000 + number}.png"), 404)
        out.rename(tmp_path / "away")
        gone = client.get("/api/images")
        assert "moved or removed" in refused(gone, 503) and gone.headers["retry-after"]
        assert client.get("/").status_code == 200
        out.write_text("a file")
        assert "a file is in its place" in refused(client.get("/api/images"), 503)
        job = finished(client, client.post("/api/jobs", json=SEEN).json())
        assert job["state"] == "failed" and str(out) in job["error"]
        out.unlink()
        assert finished(client, client.post("/api/jobs", json=SEEN).json())["state"] == "done"
        assert len(client.get("/api/images").json()["pictures"]) == 1  # made anew
        shutil.rmtree(out)
        (tmp_path / "away").rename(out)
        assert len(client.get("/api/images").json()["pictures"]) == 3
    assert not served.faults


def test_what_is_wrong_is_said_before_the_model_loads(
    sampler: Sampler, tmp_path: Path, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sampler.info.folder
    busy = served.url.rpartition(":")[2]
    (tmp_path / "file").write_text("")
    out = ["--out", str(tmp_path / "new")]
    cases = [
        ([str(tmp_path / "nothing"), *out], "no diffusers pipeline"),
        ([str(model), *out, "--port", busy], "in use"),
        ([str(model), *out, "--port", "99999"], "65535"),
        ([str(model), *out, "--token", "short"], "16 characters"),
        ([str(model), *out, "--host", "no.such.name.invalid"], "no such address"),
        ([str(model), *out, "--lora", str(tmp_path / "none")], "LoRA"),
        ([str(model), *out, "--upscaler", str(tmp_path / "none")], "no such file"),
        ([str(model), "--out", str(tmp_path / "file")], "is a file"),
    ]
    for words, said in cases:
        assert main(["serve", *words]) == 2, words
        assert said in capsys.readouterr().err
        assert not (tmp_path / "new").exists(), words


def test_the_command_serves_into_a_folder_that_is_not_there_yet(sampler: Sampler, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    out, codes = tmp_path / "not" / "there", []

    def end() -> None:
        with contextlib.suppress(httpx.TransportError), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 60
            while not codes and time.monotonic() < deadline:
                with contextlib.suppress(httpx.ConnectError):
                    codes.append(client.get("/api/images").status_code)
                time.sleep(0.05)
        if codes:
            os.kill(os.getpid(), signal.SIGINT)

    ends = threading.Thread(target=end)
    ends.start()
    try:
        assert main(["serve", str(sampler.info.folder), "--out", str(out), "--port", str(port)]) == 0
    finally:
        codes.append(0)
        ends.join()
    assert codes[0] == 200 and (out / "logs" / "serve.log").is_file()
