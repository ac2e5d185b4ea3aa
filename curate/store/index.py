"""What all records of a data folder say, without a file to open for each: compacted into one file per stage.

    STAGE/.records.parquet     name, size, stamp: of the record's file;  mark: of its outputs;  value: its JSON

It is made of the records and holds nothing that they don't: a line whose stamp is another is read again, a file that is
lost or damaged is made anew.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aesthetic.files import write_atomic
from curate.store.disk import Disk, Stamp
from curate.store.records import record_digest, record_value

COMPACTED = ".records.parquet"

_COLUMNS = ["name", "size", "stamp", "mark", "value"]

_FEW = 256
"""Records of a stage; so many are read one by one in less time than it takes to say so."""


@dataclass
class _Line:
    stamp: Stamp
    mark: str
    value: dict[str, Any] | bytes  # JSON, until somebody asks


class RecordIndex:
    """The records of one data folder, by path; each is read from its own file no more than once.

    compacted: whether what was compacted is read too: a worker, which asks about a few shards, does without.
    """

    def __init__(self, store: Disk, compacted: bool = True) -> None:
        self._store, self._compacted = store, compacted
        self._lines: dict[Path, _Line] = {}
        self._loaded: set[str] = set()  # stages
        self._changed: set[str] = set()

    def read(self, path: Path) -> dict[str, Any]:
        """What a record says; {} where there is none, or where it is none of ours. Not to be changed by who asks."""
        line = self._line(path)
        if line is None:
            return {}
        if isinstance(line.value, bytes):
            line.value = dict(json.loads(line.value))
        return line.value

    def is_done(self, path: Path, *, config: str, inputs: Mapping[str, str]) -> bool:
        """Whether a record still matches: same configuration, same inputs, every file there as it was written (at its
        size; on an object store by its ETag). Bytes are not read again here: that is `tastemaker verify`."""
        value = self.read(path)
        same = value.get("config") == config and value.get("inputs") == dict(inputs)
        return same and self.outputs_present(path)

    def outputs_present(self, path: Path) -> bool:
        """Whether every file that a record names is there, as it was written."""
        line = self._line(path)
        outputs = self.read(path).get("outputs", {})
        for name, fact in outputs.items():
            stamp = self._store.stamp(self._store.root / name)
            if stamp is None or stamp[0] != fact["bytes"]:
                return False
        return line is not None and line.mark in ("", self._store.mark(self._store.root / name for name in outputs))

    def commit(
        self,
        path: Path,
        *,
        config: str,
        inputs: Mapping[str, str],
        outputs: list[Path],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write the record that makes a shard done, last of all its files, and put them all where they belong.

        `config` is the hash of the part of the recipe that the stage reads, `inputs` maps names to sha256, `outputs`
        are the files just written, `facts` what else is worth knowing (counts, times).
        """
        value = record_value(self._store.root, config=config, inputs=inputs, outputs=outputs, facts=facts)
        self._store.write_record(path, value, outputs)
        self._lines.pop(path, None)
        return value

    def recommit(
        self, path: Path, inputs: Mapping[str, str], config: str | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write a record again for other inputs, or another configuration, from which the same files would come. Facts
        are laid over those that it has; None takes one away."""
        before, facts = self.read(path), facts or {}
        kept = {k: v for k, v in {**before, **facts}.items() if k != "self" and (k not in facts or v is not None)}
        value = {**kept, "config": config or before["config"], "inputs": dict(inputs)}
        outputs = [self._store.root / name for name in value["outputs"]]
        self._store.write_record(path, {**value, "self": record_digest(value)}, outputs)
        self._lines.pop(path, None)

    def invalidate(self, paths: Iterable[Path]) -> None:
        """Take records back before their files are replaced, so that none that is half replaced is taken for done."""
        paths = list(paths)
        self._store.remove(paths)
        for path in paths:
            self._lines.pop(path, None)

    def look(self, paths: Iterable[Path]) -> None:
        """Read the records among these that are not known, all together: on an object store many at a time."""
        unknown = [path for path in paths if not self._known(path)]
        for path, (value, stamp, mark) in self._store.read_records(unknown).items():
            self._lines[path] = _Line(stamp, mark, value)
            self._changed.add(self._stage(path))

    def compact(self) -> None:
        """Write the file of each stage in which records were read from their own files; whoever holds the lock may."""
        for stage in sorted(self._changed):
            self._write(stage)
        self._changed.clear()

    def _line(self, path: Path) -> _Line | None:
        if not self._known(path):
            self.look([path])
        return self._lines.get(path)

    def _known(self, path: Path) -> bool:
        if self._compacted and (stage := self._stage(path)) not in self._loaded:
            self._loaded.add(stage)
            self._load(stage)
        stamp = self._store.stamp(path)
        if stamp is None:
            self._lines.pop(path, None)
            return True
        line = self._lines.get(path)
        return line is not None and line.stamp == stamp

    def _stage(self, path: Path) -> str:
        return path.relative_to(self._store.root).parts[0]

    def _load(self, stage: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self._store.root / stage / COMPACTED
        self._store.bring([file])
        try:
            table = pq.ParquetFile(io.BytesIO(file.read_bytes())).read(columns=_COLUMNS, use_threads=False)
        except (FileNotFoundError, pa.ArrowException, OSError):
            return
        for name, size, stamp, mark, value in zip(*(column.to_pylist() for column in table.columns), strict=True):
            self._lines.setdefault(self._store.root / name, _Line((size, stamp), mark, value))

    def _write(self, stage: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        lines = [(path, line) for path, line in self._lines.items() if self._stage(path) == stage]
        lines = [(path, line) for path, line in lines if self._store.lasting(line.stamp)]
        if len(lines) < _FEW:
            return
        rows = sorted(
            (str(path.relative_to(self._store.root)), *line.stamp, line.mark, _json(line.value)) for path, line in lines
        )
        types = [pa.string(), pa.int64(), pa.string(), pa.string(), pa.binary()]
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True)]
        content = io.BytesIO()
        pq.write_table(pa.table(columns, names=_COLUMNS), content, compression="zstd")
        file = self._store.root / stage / COMPACTED
        write_atomic(file, content.getvalue())
        self._store.push([file])


def _json(value: dict[str, Any] | bytes) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()
