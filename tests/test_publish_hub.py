"""Publishing to the hub: what is asked of a real server of its protocol, what it holds then, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.ledger.view import query
from curate.publish import hub_place
from curate.publish.publication import publish
from curate.publish.sending import RECORD
from curate.shards.pack import PackConfig, pack
from pipelines.cli import main
from tests.conftest import ROOT
from tests.hub_server import Hub, serve_datasets
from tests.real_data import SELECTION
from tests.side_environments import SideEnvironments
from tests.small_data import make_data
from tests.test_publish import data, read, read_croissant, request  # noqa: F401

TO = "hf://datasets/me/mine"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server, to which huggingface_hub in this process writes."""
    from huggingface_hub import constants

    with serve_datasets(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield server


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The small data folder with its packed shards."""
    small = Data(make_data(tmp_path_factory.mktemp("packed") / "data"))
    select(small, SelectConfig(name="s", rules={"wide": "width > 16"}))
    pack(small, "s", PackConfig(shard_size=20))
    return small


@pytest.fixture
def small(packed: Data, tmp_path: Path) -> Data:
    """A copy to publish."""
    return Data(Path(shutil.copytree(packed.root, tmp_path / "small")))


def test_to_the_hub_only_what_changed(data: Data, tmp_path: Path, hub: Hub) -> None:  # noqa: F811
    dry = publish(data, request(TO), dry_run=True)
    assert not hub.repositories and not any(method == "POST" for method, _ in hub.asked)
    first = publish(data, request(TO))
    assert first["sent"] == dry["sent"] and "which is private" in first["seen"]
    publish(data, request(tmp_path / "folder"))
    assert hub.files("me/mine") == read(tmp_path / "folder")
    assert hub.repositories["me/mine"].messages == ["initial commit", f"bundled: {first['kept']} images"]

    asked, uploads = len(hub.asked), len(hub.uploaded)
    again = publish(data, request(TO))
    assert again["sent"] == [] and len(hub.uploaded) == uploads and len(hub.repositories["me/mine"].messages) == 2
    assert not any(path.endswith("commit/main") for _, path in hub.asked[asked:])

    key = pq.read_table(data.packed(SELECTION) / "00001.parquet")["key"][0].as_py()
    assert main(["remove", str(data), "--keys", key]) == 0  # one of three shards is rewritten
    before, dry = hub.files("me/mine"), publish(data, request(TO), dry_run=True)
    changed = publish(data, request(TO))
    after = hub.files("me/mine")
    assert changed["sent"] == dry["sent"] == [n for n in changed["sent"] if before.get(n) != after[n]]
    assert {n for n in after if before.get(n) != after[n]} == {*changed["sent"], RECORD}
    assert [n for n in changed["sent"] if n.endswith(".tar")] == ["00001.tar"]
    assert len(hub.uploaded) == uploads + 2  # a tar and its table
    assert (changed["images_gone"], changed["images_added"], changed["images_removed"]) == (1, 0, 1)


@pytest.mark.long
def test_many_files_in_many_commits(small: Data, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are a hundredth of what they are, so that small files are past them."""
    monkeypatch.setattr(hub_place, "_SMALL", 3000)
    monkeypatch.setattr(hub_place, "_A_COMMIT", 5)
    publish(small, request(TO + "@v2", "s"))
    publish(small, request(tmp_path / "folder", "s"))
    assert hub.files("me/mine", "v2") == read(tmp_path / "folder")
    assert [*hub.files("me/mine")] == []
    messages = hub.repositories["me/mine"].messages
    assert len(messages) > 3 and all(m.startswith("on its way") for m in messages[1:-1])
    states = [c.get(RECORD) for c in hub.repositories["me/mine"].commits.values()]
    assert [json.loads(hub.content(s[1]))["complete"] for s in states if s] == [False] * (len(messages) - 2) + [True]


@pytest.mark.parametrize(
    ("token", "refuse", "message"),
    [
        (None, {}, r"wants a token that may write: `hf auth login`, or HF_TOKEN"),
        ("hf_wrong", {}, r"401|Invalid .*`hf auth login`, or HF_TOKEN"),
        ("hf_read", {}, r"You don't have the rights.* may not write there"),
        ("hf_write", {"/commit/": 412}, r"refused by a test. Was something else committed"),
        ("hf_write", {"/preupload/": 404}, r"It is not there, or the token may not see it"),
        ("hf_write", {"/upload/": 403}, r"may not write there"),
    ],
)
def test_what_the_hub_refuses(
    small: Data, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, refuse: Any, message: str
) -> None:
    hub.refuse = refuse
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as refused:
        publish(small, request(TO, "s"))
    assert str(refused.value).startswith(TO) and "secret" not in str(refused.value)
    if token:
        everything = b"".join(p.read_bytes() for p in small.root.rglob("*") if p.is_file())
        assert token.encode() not in everything and token not in str(refused.value)


_PUBLISH = """
import sys
from pathlib import Path
from curate.layout import Data
from curate.publish.publication import publish
from tests.test_publish import request
publish(Data(Path(sys.argv[1])), request(sys.argv[2]))
"""


@pytest.mark.long
def test_killed_in_the_middle_of_a_file_and_again(
    data: Data,  # noqa: F811
    tmp_path: Path,
    hub: Hub,
    side: SideEnvironments,
) -> None:
    """What came whole is not sent again; `datasets` and mlcroissant read what the server then holds."""
    hub.hang_at = 3
    home = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ROOT}
    environment = {**os.environ, **{name: str(value) for name, value in home.items()}}
    process = subprocess.Popen([sys.executable, "-c", _PUBLISH, str(data.root), TO], env=environment)
    assert hub.hangs.wait(100)
    end = time.monotonic() + 60
    while len(hub.uploaded) < 3 and time.monotonic() < end:  # those that began before
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hub.files("me/mine") == {} and len(hub.uploaded) >= 3
    first, hub.hang_at, hanging = len(hub.uploaded), -1, hub.begun[3]
    publish(data, request(TO))
    assert len({*hub.uploaded}) == len(hub.uploaded) == 6 and hanging in hub.uploaded[first:]  # of three shards
    publish(data, request(tmp_path / "folder"))
    assert hub.files("me/mine") == read(tmp_path / "folder")

    clone = hub.write("me/mine", tmp_path / "clone")
    truth = query(data, "SELECT key, url, sha256, width, height, caption FROM ledger WHERE status = 'success'")
    seen = read_croissant(side, clone, tmp_path)
    assert seen["errors"] == [] and sorted(row[0] for row in seen["rows"]) == sorted(truth.key)
    script = "import datasets, sys; d = datasets.load_dataset(sys.argv[1], split='train'); print(*sorted(d['__key__']))"
    for source in (str(clone), "me/mine"):  # a clone, and the server itself
        command = [sys.executable, "-c", script, source]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == sorted(truth.key)


def test_nobody_answers(small: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"hf://datasets/me/mine can't be reached: http://127.0.0.1:9 does not answer"):
        publish(small, request(TO, "s"))
    for wrong in ("hf://me/mine", "hf://datasets/mine", TO + "/inside"):
        with pytest.raises(UserError, match="hf://datasets/OWNER/NAME is expected"):
            publish(small, request(wrong, "s"))
