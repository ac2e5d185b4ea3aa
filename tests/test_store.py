"""Files are whole or absent, records tell, and a folder has one owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aesthetic.errors import DiskFull, UserError
from aesthetic.files import atomic
from curate.layout import Data
from curate.store.files import check_space, digest, local_path, sweep
from curate.store.lock import Lock
from curate.store.records import record_digest


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    with pytest.raises(RuntimeError), atomic(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert list(tmp_path.rglob("*.*")) == [] and not path.exists()
    with atomic(path) as f:
        f.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"


def test_a_record_matches_until_something_changes(tmp_path: Path) -> None:
    out, record = tmp_path / "out", tmp_path / "record.json"
    out.write_bytes(b"12345")
    Data(tmp_path).commit(record, config="c", inputs={"in": "1"}, outputs=[out], facts={"count": 5})

    def done(config: str = "c", given: str = "1") -> bool:
        return Data(tmp_path).is_done(record, config=config, inputs={"in": given})

    assert done()
    assert not done(config="d")
    assert not done(given="2")
    out.write_bytes(b"1234")
    assert not done()
    out.unlink()
    assert not done()


@pytest.mark.parametrize("text", ["", "{", '{"config": ', "[]", "null", "\xff"])
def test_a_torn_record_means_not_done(tmp_path: Path, text: str) -> None:
    record = tmp_path / "record.json"
    record.write_text(text, encoding="latin1")
    assert not Data(tmp_path).is_done(record, config="c", inputs={})


def test_a_record_carries_a_digest_of_itself(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    Data(tmp_path).commit(record, config="c", inputs={}, outputs=[], facts={"count": 5})
    value = json.loads(record.read_text())
    assert value["self"] == record_digest(value)
    assert value["self"] != record_digest({**value, "count": 6})


HOLDER = """
import sys, time
from pathlib import Path
from curate.store.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_are_refused_and_a_dead_owner_is_followed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"), Lock(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Lock(tmp_path):
        pass


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from aesthetic.files import atomic
with atomic(Path({str(tmp_path / "file.tar")!r})) as f:
    f.write(b"half"); f.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert [p.name.startswith(".file.tar.") for p in tmp_path.iterdir()] == [True]
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_object_stores_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="s3://bucket/data"):
        local_path("s3://bucket/data")


def test_a_disk_without_room_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="needed"):
        check_space(tmp_path, 1 << 60)


def test_the_digest_of_a_value_does_not_depend_on_the_order_of_its_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
