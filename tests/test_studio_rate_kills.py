"""The server is killed while two people rate: what the page was told is saved is on the disk."""

from __future__ import annotations

import csv
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from aesthetic.ratings import read_ratings
from bench import scale

pytestmark = pytest.mark.long

MOMENTS = 20


class StudioProcess:
    """A studio in a process of its own, on a port that it chooses."""

    def __init__(self, data: Path) -> None:
        command = [sys.executable, "-m", "pipelines.cli", "studio", str(data), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                return
        raise AssertionError("it does not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class RatingPerson:
    """Somebody who rates, rates again and takes back, until the server is gone.

    said: what the file must say of each image; asked: (image, what it may say as well), of the request without answer.
    """

    def __init__(self, name: str, keys: list[str]) -> None:
        self.name, self.keys, self.said = name, keys, dict[str, int]()
        self.asked: tuple[str, set[int | None]] | None = None
        self.confirmed, self.rng, self.failed = 0, random.Random(name), None

    def work(self, url: str) -> None:
        try:
            with httpx.Client(base_url=url, timeout=30) as client:
                while True:
                    self._act(client)
        except httpx.TransportError:
            pass
        except Exception as e:
            self.failed = e  # type: ignore[assignment]

    def _act(self, client: httpx.Client) -> None:
        if self.said and self.rng.random() < 0.15:
            # after a restart the server no longer knows what stood there before, so one rating may be gone or older
            key = list(self.said)[-1]
            self.asked = key, {None, *range(1, 8)}
            answer = self._post(client, "/undo", {"key": key})
            del self.said[key]
            if (restored := answer["restored"]) is not None:
                self.said[key] = int(restored["score"])
        else:
            again = self.said and self.rng.random() < 0.3
            key, score = self.rng.choice([*self.said] if again else self.keys), self.rng.randint(1, 7)
            self.asked = key, {score}
            assert self._post(client, "", {"key": key, "score": score})["saved"] is True
            self.said.pop(key, None)
            self.said[key] = score
        self.asked, self.confirmed = None, self.confirmed + 1

    def _post(self, client: httpx.Client, what: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = client.post(f"/api/ratings/taste{what}", json={"rater": self.name, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def check(self, rows: list[list[str]]) -> None:
        """What the file says is what was confirmed, but for the one request that had no answer."""
        found = {key: int(score) for key, score, rater in rows if rater == self.name}
        assert len(found) == sum(rater == self.name for _, _, rater in rows)
        if self.asked is not None:
            key, may = self.asked
            assert found.get(key) in may | {self.said.get(key)}
            self.said.pop(key, None)
            if key in found:
                self.said[key] = found[key]
            self.asked = None
        assert found == self.said


def test_no_confirmed_rating_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "DIMS", 32)
        scale.make(tmp_path / "made", 300, 38, True)
    data = tmp_path / "made" / "data"
    path = data / "ratings" / "taste.csv"
    people: list[RatingPerson] = []
    rng = random.Random(0)
    for moment in range(MOMENTS):
        studio = StudioProcess(data)
        try:
            with httpx.Client(base_url=studio.url, timeout=60) as client:
                if not people:
                    assert client.post("/api/ratings", json={"name": "taste", "kind": "scores"}).status_code == 201
                    found = client.get("/api/ratings/taste/next", params={"rater": "x", "count": 200}).json()
                    keys = [image["key"] for image in found["images"]]
                    people = [RatingPerson("anna", keys), RatingPerson("ben", keys)]
            before = sum(person.confirmed for person in people)
            threads = [threading.Thread(target=person.work, args=[studio.url]) for person in people]
            for thread in threads:
                thread.start()
            wanted, deadline = before + rng.randint(1, 20), time.monotonic() + 60
            while sum(person.confirmed for person in people) < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02 * rng.random())
        finally:
            studio.kill()
        for thread in threads:
            thread.join(30)
        assert not any(person.failed for person in people), [person.failed for person in people]
        assert sum(person.confirmed for person in people) > before, f"nothing happened before kill {moment}"
        rows = list(csv.reader(path.read_text().splitlines()))
        assert rows[0] == ["image", "score", "rater"]
        for person in people:
            person.check(rows[1:])
        ratings = read_ratings(path)
        assert ratings.kind == "scores" and len(ratings.table) == len({row[0] for row in rows[1:]})
    assert sum(person.confirmed for person in people) > 5 * MOMENTS
