"""What is missing of a file of a shard: of which images a column or a vector is wanted, and which are there.

Conditions (`where` of an entry, early rules) say of which images something is wanted. What was computed under another
condition counts, so that a wider one costs the new images alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.annotators.base import Annotator, TableAnnotator, all_of, config_of
from curate.annotators.order import wanted_keys, where_inputs
from curate.encoders.embed import images_of
from curate.layout import Data
from curate.store.files import digest
from curate.store.records import output_digests


def column_inputs(data: Data, shard: int, annotator: Annotator) -> dict[str, str] | None:
    """What an annotator's columns of a shard are computed from, with its sha256; None where it is not there."""
    if annotator.reads != "vectors":
        found = data.fetched_digests(shard)
    else:
        record = data.record(data.embedded_record(shard))
        name = str(data.image_vectors(shard).relative_to(data.root))
        digests = output_digests(record) if record else {}
        found = {name: digests[name]} if name in digests else None
        if found and record and "early" in record:  # the same vectors may be a part of other images', by other rules
            found |= {**(data.fetched_digests(shard) or {}), "early": digest(record["early"])}
    if found is None or annotator.condition is None:
        return found
    more = where_inputs(data, shard, annotator.condition)
    return None if more is None else found | more


@dataclass(frozen=True)
class Missing:
    """What is missing of a shard's columns: the keys to compute (None: all), and the rows that stay as they are.

    inputs: the files from which they are computed, with their sha256.    left_out: images that need not be looked at.
    """

    inputs: Mapping[str, str]
    keys: set[str] | None = None
    stored: pa.Table | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Wanted:
    """What is wanted of one file of a shard, whose record is this: of the images that `where` and early rules leave,
    what something with this digest says."""

    data: Data
    shard: int
    record: Path
    digest: str
    where: str | None = None
    early: Mapping[str, str] = field(default_factory=dict)

    def missing(self, columns: Path | None) -> Missing | None:
        """What is missing; None where nothing is, or it can't be known yet. columns: the file of an annotator's, None
        where it is vectors.

        Values stay where the same annotator or encoder has computed them of the same images, whatever `where` and
        early rules were then: a retry, or a condition that leaves more, computes those of the new images, and one that
        leaves fewer, nothing. `where` also takes values away, and early rules do not.
        """
        inputs, condition = self.data.fetched_digests(self.shard), all_of(self.where, self.early)
        assert inputs is not None
        if condition is not None:
            more = where_inputs(self.data, self.shard, condition)
            if more is None:
                return None
            inputs = inputs | more
        config = config_of(self.digest, self.where, self.early)
        if self.data.is_done(self.record, config=config, inputs=inputs):
            return None
        needed = wanted_keys(self.data, self.shard, condition)
        images = len(images_of(self.data, self.shard, ["key"]))
        stored = self._stored(columns)
        if stored is None:
            keys = None if condition is None else {*needed.to_pylist()}
            return Missing(inputs, keys, left_out=images - len(needed))
        kept = stored
        if self.where is not None:
            allowed = wanted_keys(self.data, self.shard, self.where)
            kept = stored.filter(pc.is_in(stored["key"], allowed.combine_chunks()))
        keys = {*needed.to_pylist()}.difference(kept["key"].to_pylist())
        whole = columns is None or pq.read_metadata(self.data.local(columns)).num_rows == images
        if not keys and len(kept) == len(stored) and whole:  # as after a retry that changed nothing but reasons
            facts: dict[str, Any] = dict.fromkeys(_CONDITIONAL)
            facts |= condition_facts(self.digest, self.where, self.early, len(kept))
            self.data.recommit(self.record, inputs, config=config, facts=facts)
            return None
        return Missing(inputs, keys, kept, left_out=images - len(kept) - len(keys))

    def _stored(self, columns: Path | None) -> pa.Table | None:
        """The rows that are there of the images that were looked at; None where they are not those of now."""
        from curate.fetch.ingest import recovered_since  # brings aiohttp, for which a recipe need not wait

        record, fetched = self.data.record(self.record), self.data.fetched_digests(self.shard) or {}
        if not record or record.get("digest", record.get("config")) != self.digest:
            return None
        then = {k: v for k, v in record["inputs"].items() if k in fetched}
        changed = then != fetched and recovered_since(self.data, self.shard, then) is None
        if changed or not self.data.outputs_present(self.record):
            return None
        if columns is None:
            return pq.read_table(self.data.local(self.data.metadata(self.shard)), columns=["key", "similarity"])
        stored = pq.read_table(self.data.local(columns))
        if "digest" not in record:  # all were looked at
            return stored
        valid = [pc.is_valid(stored[column]) for column in stored.column_names if column != "key"]
        return stored.filter(functools.reduce(pc.or_, valid))


def inherited_early(data: Data, shard: int, annotator: Annotator, needs: Sequence[str] = ()) -> dict[str, str]:
    """The early rules that left images of a shard out of what an annotator's columns are computed from: vectors, and
    the columns of the entries that it needs."""
    records = [data.annotations_record(need, shard) for need in needs]
    of_vectors = isinstance(annotator, TableAnnotator) and "embedded" in annotator.inputs
    records += [data.embedded_record(shard)] if of_vectors or annotator.reads == "vectors" else []
    return {name: sql for record in records for name, sql in (data.record(record).get("early") or {}).items()}


_CONDITIONAL = ("where", "early", "asked", "digest")


def condition_facts(own: str, where: str | None, early: Mapping[str, str], asked: int) -> dict[str, Any]:
    """What a record says of the images that were looked at, where these are not all."""
    facts: dict[str, Any] = {} if where is None else {"where": where}
    facts |= {"early": dict(early)} if early else {}
    return {**facts, "asked": asked, "digest": own} if facts else {}
