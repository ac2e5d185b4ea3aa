"""The embed and annotate stages of one shard: what is missing of its vectors and columns, each image decoded once.

A column is written as `annotated/NAME/NNNNN.parquet`: the key and the annotator's columns, one row for each fetched
image, in the order of the ledger. Batches are cut at fixed rows of the shard, so the same shard gives the same bytes
whoever computes it. After a retry only the images that it recovered go through the models, in batches of their own; the
rows of the others stay as they are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import open_vectors
from curate.annotators.base import (
    Annotator,
    ImageBatch,
    TableAnnotator,
    TableRun,
    column_name,
    column_specs,
    config_of,
)
from curate.annotators.missing import Missing, Wanted, column_inputs, condition_facts, inherited_early
from curate.annotators.order import ENCODER, resolve_needs, steps, wanted_keys, where_inputs
from curate.encoders.base import Encoder
from curate.encoders.embed import caption_vectors, images_of, similarity, write_vectors
from curate.estimate.spent import Spent, of_models, total_spent
from curate.fetch.ingest import Report, note_start
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.layout import ANNOTATED, Data
from curate.ledger.schema import Status
from curate.shards.tar import read_images
from curate.store.files import check_space, read_table
from curate.store.records import output_digests

STARTS = 3
"""How often a run begins a shard. Its images have been decoded before: what ends the process each time is no single
image, and whoever restarts it would do so for ever."""

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
    early: Mapping[str, str] | None = None,
    spent: Spent | None = None,
) -> None:
    """Compute what is missing of a fetched shard: its vectors by `encoder` (config: the hash of its settings), where
    one is given, then the columns of annotators that are loaded.

    early: rules, NAME -> condition, that leave out images which need no vector; those of annotators are their own. An
    image is reported once: where the encoder sees it, or need not, or else where pixels are seen last.
    """
    assert data.fetched_digests(shard) is not None, f"shard {shard} is annotated before it is fetched"
    begun, spent = False, spent or Spent()
    order = steps(annotators, None if encoder is None else early or {})
    seeing = [names for names in order if any(n == ENCODER or annotators[n].reads == "pixels" for n in names)]
    reported = next((names for names in order if ENCODER in names), seeing[-1] if seeing else None)
    for names in order:
        missing = dict[str, Missing]()
        for name in names:
            if name == ENCODER:
                wanted = Wanted(data, shard, data.embedded_record(shard), config, early=early or {})
            elif annotators[name].reads == "vectors":
                continue
            else:
                a = annotators[name]
                wanted = Wanted(data, shard, data.annotations_record(name, shard), a.digest, a.where, a.early)
            if found := wanted.missing(None if name == ENCODER else data.annotations(name, shard)):
                missing[name] = found
        if missing:
            check_space(data.root)
            if not begun and (starts := note_start(data, data.embed_starts(shard))) > STARTS:
                raise EndsItsProcess(
                    f"embedding shard {shard:05d} has ended its process {starts - 1} times: out of memory, or a crash "
                    f"in a library. {data.logs / 'embed.log'} or the system's log may say why; all that is done stays "
                    "done."
                )
            begun = True
            say = report if names is reported else lambda *_: None
            for _ in range(missing[ENCODER].left_out if ENCODER in missing else 0):
                say("embed", Status.SUCCESS, "")
            _from_pixels(data, shard, annotators, encoder, config, early or {}, missing, threads, say, spent)
            for name in missing.keys() - {ENCODER}:
                annotator = annotators[name]
                if annotator.reads != "pixels":
                    rows = images_of(data, shard, None if annotator.reads == "row" else ["key", "caption"])
                    fresh = _only(rows, missing[name].keys)
                    values = ask(annotator, ImageBatch(rows=fresh))
                    took = spent.take(images=len(fresh))
                    _write(data, shard, name, annotator, fresh["key"], values, missing[name], took)
        for name in names:
            if name != ENCODER and annotators[name].reads == "vectors":
                _from_vectors(data, shard, name, annotators[name], spent)
    if begun:
        data.remove(data.embed_starts(shard))


def _from_vectors(data: Data, shard: int, name: str, annotator: Annotator, spent: Spent) -> None:
    """The columns of one that reads vectors, where they are not done and there are vectors."""
    there, record = column_inputs(data, shard, annotator), data.annotations_record(name, shard)
    if there is None or data.is_done(record, config=annotator.config, inputs=there):
        return
    data.bring(data.metadata(shard), data.image_vectors(shard))
    rows = read_table(data.metadata(shard), ["key", "caption"])
    values = ask(annotator, ImageBatch(rows=rows, vectors=open_vectors(data.image_vectors(shard))))
    # heads are cheap, and the last bit of a product of matrices depends on what else is in them: so all are asked
    keys, took = rows["key"], spent.take(images=len(rows))
    if annotator.condition is not None:
        wanted = pc.is_in(keys, wanted_keys(data, shard, annotator.condition).combine_chunks())
        keys, values = keys.filter(wanted), {k: value.filter(wanted.combine_chunks()) for k, value in values.items()}
    left_out = inherited_early(data, shard, annotator)
    _write(data, shard, name, annotator, keys, values, Missing(there), took, left_out)


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
            wanted=lambda shard: wanted_keys(data, shard, annotator.condition),
            map=map,
            say=say,
            show=show,
        )
        spent, began = Spent(), time.perf_counter()
        for shard, answer in zip(shards, annotator.annotate_all(run), strict=True):
            keys, every = wanted_keys(data, shard, annotator.condition), images_of(data, shard, ["key"])["key"]
            if all(len(value) == len(every) for value in answer.values()):
                chosen = pc.is_in(every, keys.combine_chunks()).combine_chunks()
                answer = {suffix: value.filter(chosen) for suffix, value in answer.items()}
            values = _checked(annotator, answer, len(keys))
            left_out = inherited_early(data, shard, annotator, [*needs.values()])
            took = spent.take(images=len(keys), seconds=time.perf_counter() - began)
            _write(data, shard, name, annotator, keys, values, Missing(inputs[shard]), took, left_out)
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
        more = {} if annotator.condition is None else where_inputs(data, shard, annotator.condition)
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
    early: Mapping[str, str],
    missing: Mapping[str, Missing],
    threads: Executor,
    report: Report,
    spent: Spent,
) -> None:
    """One pass over the pixels of a shard: its vectors, and the columns of those that read pixels, and are missing."""
    models: dict[str, Any] = {n: annotators[n] for n in missing if n != ENCODER and annotators[n].reads == "pixels"}
    if ENCODER in missing:
        models[ENCODER] = encoder
    if not models:
        return
    began = time.time()
    rows = images_of(data, shard, ["key", "caption"])
    added = [missing[name].keys for name in models]
    added_keys = None if None in added else set[str]().union(*(keys for keys in added if keys is not None))
    fresh = _only(rows, added_keys)

    # annotators cut batches as they like; the encoder's do not depend on what else is wanted
    vectors, waiting = list[np.ndarray](), list[Any]()
    answers = {name: list[dict[str, pa.Array]]() for name in models if name != ENCODER}
    size = _BATCH if encoder is None else encoder.batch_size
    wanted, seen = {name: missing[name].keys for name in models}, dict.fromkeys(models, 0)
    for start, batch in _prepared(data, shard, fresh["key"].to_pylist(), models, wanted, size, threads, spent):
        part = fresh.slice(start, len(batch))
        for name, model in models.items():
            chosen = [i for i, found in enumerate(batch) if name in found]
            inputs_of = [batch[i].pop(name) for i in chosen]
            seen[name] += len(chosen)
            with spent.model(name):
                if name == ENCODER:
                    waiting += inputs_of
                    while len(waiting) >= size:
                        vectors.append(model.encode_prepared(np.stack(waiting[:size])))
                        del waiting[:size]
                elif chosen:
                    answers[name].append(ask(model, ImageBatch(rows=part.take(chosen), inputs=inputs_of)))
        for _ in range(len(part)):
            report("embed", Status.SUCCESS, "")
    images = texts = np.zeros((0, 0), np.float32)
    if encoder is not None and ENCODER in models:
        with spent.model(ENCODER):
            vectors += [encoder.encode_prepared(np.stack(waiting))] if waiting else []
            texts = caption_vectors(_only(rows, missing[ENCODER].keys)["caption"].to_pylist(), encoder)
        images = np.concatenate(vectors) if vectors else np.zeros((0, encoder.dim), np.float32)
    took = of_models(spent.take(), seen)
    for name, parts in answers.items():
        annotator, own = annotators[name], _only(rows, missing[name].keys)
        parts = parts or [ask(annotator, ImageBatch(rows=own))]
        values = {suffix: pa.chunked_array([p[suffix] for p in parts]) for suffix in annotator.columns}
        _write(data, shard, name, annotator, own["key"], values, missing[name], took[name])
    if ENCODER in models:
        assert encoder is not None
        facts = {"batch_halved": encoder.halved, "spent": took[ENCODER]}
        _write_vectors(data, shard, images, texts, missing[ENCODER], config, early, facts, began)


def _write_vectors(
    data: Data,
    shard: int,
    images: np.ndarray,
    texts: np.ndarray,
    missing: Missing,
    config: str,
    early: Mapping[str, str],
    facts: dict[str, Any],
    began: float,
) -> None:
    """Write and commit the vectors just made of a shard's images and captions, and those that are stored."""
    rows = images_of(data, shard, ["key", "caption"])
    fresh = _only(rows, missing.keys)
    cosines = similarity(fresh["caption"].to_pylist(), images, texts)
    if missing.stored is None:
        rows = fresh
    else:
        data.bring(data.image_vectors(shard), data.text_vectors(shard))
        stored = missing.stored
        new = pa.table({"key": fresh["key"], "similarity": cosines})
        rows = _only(rows, {*fresh["key"].to_pylist(), *stored["key"].to_pylist()})
        cosines = _joined(new, stored, rows["key"])["similarity"].combine_chunks()
        order = pc.index_in(rows["key"], pa.concat_arrays([*fresh["key"].chunks, *stored["key"].chunks])).to_numpy()
        images, texts = (
            np.concatenate([new, np.load(file, allow_pickle=False).astype(np.float32)])[order]
            for new, file in ((images, data.image_vectors(shard)), (texts, data.text_vectors(shard)))
        )
        facts["spent"] = total_spent(data.record(data.embedded_record(shard)).get("spent"), facts["spent"])
    write_vectors(
        data,
        shard,
        rows,
        images,
        texts,
        cosines,
        config=config_of(config, None, early),
        inputs=dict(missing.inputs),
        facts={**facts, **condition_facts(config, None, early, len(rows))},
        began=began,
    )


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
    missing: Missing,
    spent: Mapping[str, Any],
    inherited: Mapping[str, str] | None = None,
) -> None:
    """Write and commit one shard of an annotator's columns: values of the keys `fresh` and those that are stored; null
    for all other images. inherited: the early rules that left images out of what the values are computed from."""
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
    early = {**(inherited or {}), **annotator.early}
    facts |= condition_facts(annotator.digest, annotator.where, early, asked)
    data.commit(record, config=annotator.config, inputs=missing.inputs, outputs=[file], facts=facts)
