"""The embed and annotate stages of one shard: what is missing of its vectors and columns, each image decoded once.

A column is written as `annotated/NAME/NNNNN.parquet`: the key and the annotator's columns, one row for each fetched
image, in the order of the ledger. Batches are cut at fixed rows of the shard, so the same shard gives the same bytes
whoever computes it. After a retry only the images that it recovered go through the models, in batches of their own; the
rows of the others stay as they are.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import open_vectors
from curate.annotators.base import Annotator, ImageBatch, TableAnnotator, TableRun, column_name, column_specs
from curate.annotators.order import resolve_needs, wanted_keys, where_inputs
from curate.encoders.base import Encoder
from curate.encoders.embed import caption_vectors, images_of, recovered, similarity, write_vectors
from curate.estimate.spent import Spent, of_models, total_spent
from curate.fetch.ingest import Report, note_start
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.layout import ANNOTATED, Data
from curate.ledger.schema import Status
from curate.shards.tar import read_images
from curate.store.files import check_space
from curate.store.records import output_digests

STARTS = 3
"""How often a run begins a shard. Its images have been decoded before: what ends the process each time is no single
image, and whoever restarts it would do so for ever."""

_VECTORS = ""  # in place of an annotator's name: the encoder
_BATCH = 32  # images that are decoded together where no encoder says how many


class EndsItsProcess(Exception):
    """A shard whose embedding has killed its process again and again."""


def annotate_shard(
    data: Data,
    shard: int,
    annotators: Mapping[str, Annotator],
    *,
    encoder: Encoder | None,
    config: str,
    threads: Executor,
    report: Report,
    spent: Spent | None = None,
) -> None:
    """Compute what is missing of a fetched shard: its vectors by `encoder` (config: the hash of its settings), where
    one is given, then the columns of annotators that are loaded."""
    inputs = data.fetched_digests(shard)
    assert inputs is not None, f"shard {shard} is annotated before it is fetched"
    spent = spent or Spent()
    of_images = {name: a for name, a in annotators.items() if a.reads in ("pixels", "row", "captions")}
    records = {name: (data.annotations_record(name, shard), a.config) for name, a in of_images.items()}
    if encoder is not None:
        records[_VECTORS] = data.embedded_record(shard), config

    missing = dict[str, _Missing]()
    for name, (record, digest) in records.items():
        annotator = of_images.get(name)
        if annotator is not None and annotator.where is not None:
            there = column_inputs(data, shard, annotator)
            if there is not None and not data.is_done(record, config=digest, inputs=there):
                missing[name] = _missing_where(data, shard, name, annotator, there)
        elif not data.is_done(record, config=digest, inputs=inputs):
            added = recovered(data, shard, record, digest)
            if added == set():  # a retry that changed nothing but reasons
                data.recommit(record, inputs)
                continue
            file = data.annotations(name, shard) if annotator is not None and added is not None else None
            missing[name] = _Missing(inputs, added, None if file is None else pq.read_table(data.local(file)))
    if missing:
        check_space(data.root)
        if (starts := note_start(data, data.embed_starts(shard))) > STARTS:
            raise EndsItsProcess(
                f"embedding shard {shard:05d} has ended its process {starts - 1} times: out of memory, or a crash in a "
                f"library. {data.logs / 'embed.log'} or the system's log may say why; all that is done stays done."
            )
        _from_pixels(data, shard, annotators, encoder, config, missing, threads, report, spent)
        for name, annotator in of_images.items():
            if name not in missing or annotator.reads == "pixels":
                continue
            rows = images_of(data, shard, None if annotator.reads == "row" else ["key", "caption"])
            fresh = _only(rows, missing[name].keys)
            values = ask(annotator, ImageBatch(rows=fresh))
            took = spent.take(images=len(fresh))
            _write(data, shard, name, annotator, fresh["key"], values, missing[name], took)
        data.remove(data.embed_starts(shard))

    for name, annotator in annotators.items():
        if annotator.reads != "vectors":
            continue
        there, record = column_inputs(data, shard, annotator), data.annotations_record(name, shard)
        if there is None or data.is_done(record, config=annotator.config, inputs=there):
            continue  # there are none yet, or all is done
        data.bring(data.metadata(shard), data.image_vectors(shard))
        rows = pq.read_table(data.metadata(shard), columns=["key", "caption"])
        values = ask(annotator, ImageBatch(rows=rows, vectors=open_vectors(data.image_vectors(shard))))
        # heads are cheap, and the last bit of a product of matrices depends on what else is in them: so all are asked
        wanted = pc.is_in(rows["key"], wanted_keys(data, shard, annotator.where).combine_chunks())
        values = {suffix: value.filter(wanted.combine_chunks()) for suffix, value in values.items()}
        took = spent.take(images=len(rows))
        _write(data, shard, name, annotator, rows["key"].filter(wanted), values, _Missing(there), took)


def column_inputs(data: Data, shard: int, annotator: Annotator) -> dict[str, str] | None:
    """What an annotator's columns of a shard are computed from, with its sha256; None where it is not there."""
    if annotator.reads != "vectors":
        found = data.fetched_digests(shard)
    else:
        record = data.record(data.embedded_record(shard))
        name = str(data.image_vectors(shard).relative_to(data.root))
        digests = output_digests(record) if record else {}
        found = {name: digests[name]} if name in digests else None
    if found is None or annotator.where is None:
        return found
    more = where_inputs(data, shard, annotator.where)
    return None if more is None else found | more


@dataclass(frozen=True)
class _Missing:
    """What is missing of a shard's columns: the keys to compute (None: all), and the rows that stay as they are.

    inputs: the files from which they are computed, with their sha256.
    """

    inputs: Mapping[str, str]
    keys: set[str] | None = None
    stored: pa.Table | None = None


def _missing_where(data: Data, shard: int, name: str, annotator: Annotator, inputs: Mapping[str, str]) -> _Missing:
    """What is missing of an annotator with a `where`: the images that it holds for and that have no value yet.

    Values stay where the same annotator has computed them of the same images, whatever `where` was then.
    """
    from curate.fetch.ingest import recovered_since  # brings aiohttp, for which a recipe need not wait

    wanted = wanted_keys(data, shard, annotator.where).combine_chunks()
    path, fetched = data.annotations_record(name, shard), data.fetched_digests(shard)
    record = data.record(path)
    if not record or record.get("digest") != annotator.digest or not data.outputs_present(path):
        return _Missing(inputs, {*wanted.to_pylist()})
    then = {k: v for k, v in record["inputs"].items() if k in (fetched or {})}
    if then != fetched and recovered_since(data, shard, then) is None:
        return _Missing(inputs, {*wanted.to_pylist()})
    stored = pq.read_table(data.local(data.annotations(name, shard)))
    columns = [pc.is_valid(stored[column]) for column in stored.column_names if column != "key"]
    stored = stored.filter(pc.and_(pc.is_in(stored["key"], wanted), functools.reduce(pc.or_, columns)))
    return _Missing(inputs, {*wanted.to_pylist()}.difference(stored["key"].to_pylist()), stored)


def annotate_table(
    data: Data,
    name: str,
    annotators: Mapping[str, Annotator],
    *,
    encoder: Callable[[], Encoder],
    images: ImagesConfig | None = None,
    map: Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]] = map,
    say: Callable[[str], None] = print,
    show: Callable[[str], None] = lambda text: None,
) -> int:
    """Compute the columns of a TableAnnotator, of the fetched shards that lack them, or of all where it is `whole`;
    returns how many lacked them. The other arguments as TableRun has them.

    UserError where the columns that it needs are not there.
    """
    annotator = annotators[name]
    assert isinstance(annotator, TableAnnotator)
    needs = {need: entry for need, entry in resolve_needs(annotators, name).items() if entry is not None}
    if lacking := annotator.needs.keys() - needs.keys():
        raise UserError(f"columns.{name} needs the columns {', '.join(sorted(lacking))}")
    fetched = [s.shard for s in data.plan.shards if data.fetched_digests(s.shard) is not None]
    inputs = _table_inputs(data, annotator, [*needs.values()], fetched)
    missing = [
        shard
        for shard, there in inputs.items()
        if not data.is_done(data.annotations_record(name, shard), config=annotator.config, inputs=there)
    ]
    shards = fetched if annotator.whole and missing else missing
    if shards:
        run = TableRun(
            data=data,
            name=name,
            shards=shards,
            needs=needs,
            encoder=encoder,
            images=images or ImagesConfig(),
            wanted=lambda shard: wanted_keys(data, shard, annotator.where),
            map=map,
            say=say,
            show=show,
        )
        spent, began = Spent(), time.perf_counter()
        for shard, answer in zip(shards, annotator.annotate_all(run), strict=True):
            keys = wanted_keys(data, shard, annotator.where)
            values = _checked(annotator, answer, len(keys))
            took = spent.take(images=len(keys), seconds=time.perf_counter() - began)
            _write(data, shard, name, annotator, keys, values, _Missing(inputs[shard]), took)
            began = time.perf_counter()
    return len(missing)


def _table_inputs(
    data: Data, annotator: TableAnnotator, needs: Sequence[str], shards: Sequence[int]
) -> dict[int, dict[str, str]]:
    """What the columns of each shard are computed from, with its digest: whole tables, or the files of the shard.

    A shard that lacks a column which `where` names is not among them.
    """
    from curate.ledger.view import table_digests, tables

    if annotator.whole:
        names = {*annotator.inputs, *(f"{ANNOTATED}/{need}" for need in needs)}
        return dict.fromkeys(shards, table_digests([t for t in tables(data) if t.name in names]))
    found = {}
    for shard in shards:
        records = [data.fetched_record(shard)] if "fetched" in annotator.inputs else []
        records += [data.embedded_record(shard)] if "embedded" in annotator.inputs else []
        records += [data.annotations_record(need, shard) for need in needs]
        more = {} if annotator.where is None else where_inputs(data, shard, annotator.where)
        if more is not None:
            files = {k: v for r in records if (facts := data.record(r)) for k, v in output_digests(facts).items()}
            found[shard] = files | more
    return found


def ask(annotator: Annotator, batch: ImageBatch) -> dict[str, pa.Array]:
    """An annotator's columns for a batch, by suffix: null where `preprocess` gave None. ValueError where they are not
    what it says that they are."""
    count, seen = len(batch.rows), None
    if annotator.reads == "pixels" and any(i is None for i in batch.inputs):
        seen = [row for row, i in enumerate(batch.inputs) if i is not None]
        batch = ImageBatch(rows=batch.rows.take(seen), inputs=[batch.inputs[row] for row in seen])
    values = _checked(annotator, annotator.annotate(batch), len(batch.rows))
    if seen is not None:
        places = np.full(count, -1)
        places[seen] = np.arange(len(seen))
        taken = pa.array(places, mask=places < 0)
        values = {suffix: value.take(taken) for suffix, value in values.items()}
    return values


def _checked(annotator: Annotator, answer: Mapping[str, pa.Array], count: int) -> dict[str, pa.Array]:
    """The columns of so many images, of the types that they should have. ValueError where they are not what is said."""
    if answer.keys() != annotator.columns.keys():
        raise ValueError(f"{annotator.name} gave the columns {[*answer]}, not {[*annotator.columns]}")
    values = {}
    for suffix, spec in annotator.columns.items():
        value = answer[suffix].cast(spec.type)
        if len(value) != count:
            raise ValueError(f"{annotator.name} gave {len(value)} values for {count} images")
        if pa.types.is_floating(spec.type) and pc.any(pc.invert(pc.is_finite(value))).as_py():
            raise ValueError(f"{annotator.name}: a value of {suffix} is not a finite number")
        values[suffix] = value
    return values


def _from_pixels(
    data: Data,
    shard: int,
    annotators: Mapping[str, Annotator],
    encoder: Encoder | None,
    config: str,
    missing: Mapping[str, _Missing],
    threads: Executor,
    report: Report,
    spent: Spent,
) -> None:
    """One pass over the pixels of a shard: its vectors, and the columns of those that read pixels, and are missing."""
    models: dict[str, Any] = {n: a for n, a in annotators.items() if n in missing and a.reads == "pixels"}
    if _VECTORS in missing:
        models[_VECTORS] = encoder
    if not models:
        return
    began, inputs = time.time(), data.fetched_digests(shard)
    assert inputs is not None
    rows = images_of(data, shard, ["key", "caption"])
    added = [missing[name].keys for name in models]
    added_keys = None if None in added else set[str]().union(*(keys for keys in added if keys is not None))
    fresh = _only(rows, added_keys)

    # in batches that do not depend on what else is wanted (annotators cut them as they like)
    vectors, answers = list[np.ndarray](), {name: list[dict[str, pa.Array]]() for name in models if name != _VECTORS}
    size = _BATCH if encoder is None else encoder.batch_size
    wanted = {name: missing[name].keys for name in answers} | {name: None for name in models if name == _VECTORS}
    seen = {name: len(fresh) if name == _VECTORS else 0 for name in models}
    for start, batch in _prepared(data, shard, fresh["key"].to_pylist(), models, wanted, size, threads, spent):
        part = fresh.slice(start, len(batch))
        for name, model in models.items():
            if name == _VECTORS:
                with spent.model(name):
                    vectors.append(model.encode_prepared(np.stack([found[name] for found in batch])))
            elif chosen := [i for i, found in enumerate(batch) if name in found]:
                inputs_of = [batch[i][name] for i in chosen]
                with spent.model(name):
                    answers[name].append(ask(model, ImageBatch(rows=part.take(chosen), inputs=inputs_of)))
                seen[name] += len(chosen)
        for _ in range(len(part)):
            report("embed", Status.SUCCESS, "")

    images = texts = np.zeros((0, 0), np.float32)
    if encoder is not None and _VECTORS in models:
        images = np.concatenate(vectors) if vectors else np.zeros((0, encoder.dim), np.float32)
        with spent.model(_VECTORS):
            texts = caption_vectors(fresh["caption"].to_pylist(), encoder)
    took = of_models(spent.take(), seen)
    for name, parts in answers.items():
        annotator, own = annotators[name], _only(rows, missing[name].keys)
        parts = parts or [ask(annotator, ImageBatch(rows=own))]
        values = {suffix: pa.chunked_array([p[suffix] for p in parts]) for suffix in annotator.columns}
        _write(data, shard, name, annotator, own["key"], values, missing[name], took[name])
    if _VECTORS in models:
        assert encoder is not None
        captions = fresh["caption"].to_pylist()
        cosines = similarity(captions, images, texts)
        if added_keys is not None:
            data.bring(data.metadata(shard), data.image_vectors(shard), data.text_vectors(shard))
            stored = pq.read_table(data.metadata(shard), columns=["key", "similarity"])
            now = _joined(pa.table({"key": fresh["key"], "similarity": cosines}), stored, rows["key"])
            cosines = now["similarity"].combine_chunks()
            order = pc.index_in(rows["key"], pa.concat_arrays([*fresh["key"].chunks, *stored["key"].chunks])).to_numpy()
            images, texts = (
                np.concatenate([new, np.load(file, allow_pickle=False).astype(np.float32)])[order]
                for new, file in ((images, data.image_vectors(shard)), (texts, data.text_vectors(shard)))
            )
        facts = {"batch_halved": encoder.halved, "spent": took[_VECTORS]}
        if added_keys is not None:
            facts["spent"] = total_spent(data.record(data.embedded_record(shard)).get("spent"), took[_VECTORS])
        write_vectors(data, shard, rows, images, texts, cosines, config=config, inputs=inputs, facts=facts, began=began)


def _prepared(
    data: Data,
    shard: int,
    keys: list[str],
    models: Mapping[str, Any],
    wanted: Mapping[str, set[str] | None],
    size: int,
    threads: Executor,
    spent: Spent,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Batches (first row, and of each image the inputs of the models that want it: None, all), decoded and preprocessed
    in threads, two batches ahead."""

    def prepare(key: str, image: bytes) -> dict[str, Any]:
        with spent.thread("decode"):
            pixels, found = decode(image), dict[str, Any]()
            for name, model in models.items():
                own = wanted[name]
                if own is None or key in own:
                    found[name] = model.preprocess(pixels)
            return found

    ahead: deque[Future[dict[str, Any]]] = deque()
    known = set(keys)
    stored = (image for image in read_images(data.local(data.tar(shard))) if image[0] in known)
    for start in range(0, len(keys), size):
        count = min(size, len(keys) - start)
        while len(ahead) < 3 * size and (item := next(stored, None)) is not None:
            ahead.append(threads.submit(prepare, item[0], item[2]))
        yield start, [ahead.popleft().result() for _ in range(count)]
    assert not ahead and next(stored, None) is None, f"{data.tar(shard)} holds more images than its table"


def _only(rows: pa.Table, keys: set[str] | None) -> pa.Table:
    return rows if keys is None else rows.filter(pc.is_in(rows["key"], pa.array(sorted(keys), pa.string())))


def _joined(new: pa.Table, stored: pa.Table, keys: pa.ChunkedArray) -> pa.Table:
    """The rows of these keys, those just made before those that were stored."""
    both = pa.concat_tables([new, stored.cast(new.schema)])
    return both.take(pc.index_in(keys, both["key"].combine_chunks()))


def _write(
    data: Data,
    shard: int,
    name: str,
    annotator: Annotator,
    fresh: pa.ChunkedArray,
    values: Mapping[str, pa.Array | pa.ChunkedArray],
    missing: _Missing,
    spent: Mapping[str, Any],
) -> None:
    """Write and commit one shard of an annotator's columns: values of the keys `fresh` and those that are stored; null
    for all other images."""
    columns = {column_name(name, suffix, annotator): value for suffix, value in values.items()}
    table = pa.table({"key": fresh, **columns})
    file, record = data.annotations(name, shard), data.annotations_record(name, shard)
    if missing.stored is not None:
        table = pa.concat_tables([table, missing.stored.cast(table.schema)])
    keys = images_of(data, shard, ["key"])["key"]
    asked, nulls = len(table), max(table[column].null_count for column in columns)
    if not keys.equals(table["key"]):
        table = table.drop(["key"]).take(pc.index_in(keys, table["key"].combine_chunks()))
        table = table.add_column(0, "key", keys)
    before = data.record(record).get("spent") if missing.stored is not None else None
    data.invalidate(record)
    with atomic(file) as f:
        pq.write_table(table, f, compression="zstd")
    specs = {column: spec.facts() for column, spec in column_specs({name: annotator}).items()}
    facts = {"count": len(table), "annotator": annotator.name, "columns": specs, **annotator.facts}
    facts["spent"] = total_spent(before, spent)
    if annotator.null_says and nulls:
        facts["counts"] = {annotator.null_says: nulls}
    if annotator.where is not None:
        facts |= {"where": annotator.where, "asked": asked, "digest": annotator.digest}
    data.commit(record, config=annotator.config, inputs=missing.inputs, outputs=[file], facts=facts)
