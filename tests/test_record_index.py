"""Records of many shards are read from one file per stage; what it says is never more than what the records say."""

import json
import os
import time

import pytest

from curate.layout import Data
from curate.store.index import COMPACTED

SHARDS = 300


@pytest.fixture
def data(tmp_path):
    """A folder with so many shards, each of a file and its record, that were written a while ago."""
    data = Data(tmp_path / "data")
    (data.root / "fetched").mkdir(parents=True)
    for shard in range(SHARDS):
        data.table(shard).write_bytes(b"rows %d" % shard)
        data.commit(
            data.fetched_record(shard),
            config="c",
            inputs={"plan": "p"},
            outputs=[data.table(shard)],
            facts={"n": shard},
        )
        age(data.fetched_record(shard))
    return data


def age(path):
    then = time.time() - 60
    os.utime(path, (then, then))


def compacted(data):
    with Data(data.root).hold() as _:
        pass
    again = Data(data.root)
    with again.hold():
        for shard in range(SHARDS):
            assert again.is_done(again.fetched_record(shard), config="c", inputs={"plan": "p"})
    file = data.root / "fetched" / COMPACTED
    assert file.is_file()
    return file


def opened(data, monkeypatch):
    """The records that a fresh look at the folder opens, by name, while it asks about all of them."""
    from curate.store import disk

    read, names = disk.read_record, []
    monkeypatch.setattr(disk, "read_record", lambda path: [names.append(path.name), read(path)][1])
    fresh = Data(data.root)
    facts = [fresh.record(fresh.fetched_record(shard)).get("n") for shard in range(SHARDS)]
    monkeypatch.undo()
    return names, facts


def test_all_records_come_from_one_file(data, monkeypatch):
    compacted(data)
    assert opened(data, monkeypatch) == ([], list(range(SHARDS)))


def test_a_record_that_was_written_again_is_read_again(data, monkeypatch):
    compacted(data)
    data.invalidate(data.fetched_record(7))
    data.commit(data.fetched_record(7), config="d", inputs={}, outputs=[data.table(7)], facts={"n": 70})
    data.invalidate(data.fetched_record(9))
    names, facts = opened(data, monkeypatch)
    assert names == ["00007_stats.json"]
    assert facts == [*range(7), 70, 8, None, *range(10, SHARDS)]
    assert not Data(data.root).is_done(data.fetched_record(7), config="c", inputs={"plan": "p"})


def test_one_that_is_changed_by_hand_is_read_again(data, monkeypatch):
    compacted(data)
    value = json.loads(data.fetched_record(3).read_bytes())
    data.fetched_record(3).write_text(json.dumps({**value, "n": 33}))
    assert opened(data, monkeypatch)[1][3] == 33


def test_a_file_of_another_size_is_not_done(data):
    compacted(data)
    data.table(5).write_bytes(b"cut")
    data.table(6).unlink()
    fresh = Data(data.root)
    done = [fresh.is_done(fresh.fetched_record(s), config="c", inputs={"plan": "p"}) for s in range(SHARDS)]
    assert [s for s, yes in enumerate(done) if not yes] == [5, 6]


@pytest.mark.parametrize("content", [None, b"", b"no parquet", "half"])
def test_a_lost_or_damaged_index_is_made_anew(data, monkeypatch, content):
    file = compacted(data)
    whole = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    names, facts = opened(data, monkeypatch)
    assert (len(names), facts) == (SHARDS, list(range(SHARDS)))
    compacted(data)
    assert opened(data, monkeypatch) == ([], list(range(SHARDS)))


def test_what_is_young_is_not_compacted(data, monkeypatch):
    """A record that is written again at once may have the time and size of the one before."""
    os.utime(data.fetched_record(11))
    compacted(data)
    assert opened(data, monkeypatch)[0] == ["00011_stats.json"]


def test_a_copied_folder_reads_its_own_records(data, tmp_path, monkeypatch):
    import shutil

    compacted(data)
    copy = Data(tmp_path / "copy")
    shutil.copytree(data.root, copy.root)
    value = json.loads(copy.fetched_record(4).read_bytes())
    copy.fetched_record(4).write_text(json.dumps({**value, "n": 5}))
    assert opened(copy, monkeypatch)[1][4] == 5


def test_a_small_folder_has_no_index(tmp_path):
    data = Data(tmp_path / "data")
    (data.root / "fetched").mkdir(parents=True)
    data.commit(data.fetched_record(0), config="c", inputs={}, outputs=[], facts={})
    age(data.fetched_record(0))
    with Data(data.root).hold():
        assert Data(data.root).record(data.fetched_record(0))
    assert not (data.root / "fetched" / COMPACTED).exists()
