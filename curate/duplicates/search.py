"""Near-duplicates of a data folder: pairs of all modes, groups of them, and what is nearest to each image.

What lies in `annotated/NAME/index/` between runs: rows/ and cells/ (what of each shard is compared), compared.* (the
pairs of vectors, which are not computed again), groups.* (the answer), and while a run lasts work-*/, so that one that
was ended goes on. Neither the number of workers nor a kill changes a byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from aesthetic.chunks import cpus
from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.groups import link_groups
from curate.annotators.base import TableRun
from curate.duplicates.compared import vector_pairs
from curate.duplicates.perceptual import confirmed, pdq_bits, proposed, read_hashes
from curate.duplicates.recall import measured_recall, recall_sentence
from curate.duplicates.rows import CAPTION, FLAT, SHA, Array, Modes, Table, make_rows, read_rows
from curate.duplicates.vectors import PAIR, as_pairs, check_vectors, pair_cosines, unique_pairs
from curate.encoders.embed import images_of
from curate.layout import Data
from curate.ledger.neighbours import FACT, FILE, write_neighbours
from curate.store.files import digest
from curate.store.records import output_digests

ANSWER = np.dtype([("group", "<i8"), ("size", "<i4"), ("nearest", "<f4"), ("of", "<i8")])
"""Of an image: the first image of its group, -1 where it is alone; images in the group; the distance to the nearest
other image, NaN where none was found; and which that is, -1 where none was."""

_ALL_PAIRS = 16  # images with one caption, up to which each is paired with each
_KNOWN_PAIRS = 64  # of an image, as many as are kept for certain (aesthetic.neighbours.cell_pairs; perceptual)
_TASK_PAIRS = 100_000


def find_groups(run: TableRun, modes: Modes, config: str) -> tuple[Table, Array, dict[str, Any]]:
    """The groups of all images: the table, its ANSWER (n,), and the facts of the record. config: of the annotator."""
    table = _table(run, modes)
    record = table.index / "groups.json"
    if not table.data.is_done(record, config=config, inputs={"images": table.digest}):
        check_memory(table, check_vectors(table) if modes.cosine is not None else 0)
        work = f"work-{digest([config, table.digest])}"
        _clear(table, keep=work)
        answer, facts = _search(run, table, work)
        before = table.data.record(record)
        facts["moved"] = moved = _moved(table, answer["group"], before, config)
        path = table.index / f"groups-{table.digest}-{config}.npy"
        with atomic(path) as f:
            np.save(f, answer)
        shards = [list(s) for s in zip(table.shards, table.counts, table.inputs, strict=True)]
        table.data.commit(
            record,
            config=config,
            inputs={"images": table.digest},
            outputs=[path, table.index / FILE],
            facts={"facts": facts, "shards": shards},
        )
        if moved:
            run.say(f"{run.name}: {moved:,} images that were in a group before are in another one, or in none")
    known = table.data.record(record)
    _clear(table, keep=None)
    for note in known["facts"]["notes"][:2]:
        run.say(f"{run.name}: {note}")
    return table, table.load(_answer_file(table, known), mapped=True), known["facts"]


def _answer_file(table: Table, record: dict[str, Any]) -> Path:
    return next(table.data.root / name for name in record["outputs"] if name.endswith(".npy"))


def answers(table: Table, answer: Array) -> Iterator[dict[str, pa.Array]]:
    """The columns of each shard in turn."""
    keys = pa.chunked_array([images_of(table.data, s, ["key"])["key"].combine_chunks() for s in table.shards])
    keys = keys.cast(pa.large_string()).combine_chunks()
    for low, high in zip(table.offsets[:-1].tolist(), table.offsets[1:].tolist(), strict=True):
        part = answer[low:high]
        alone = part["group"] < 0
        nearest = np.array(part["nearest"])
        yield {
            "": _taken(keys, part["group"]),
            "size": pa.array(np.array(part["size"]), pa.int32(), mask=alone),
            "nearest": pa.array(nearest, pa.float32(), mask=np.isnan(nearest)),
            "of": _taken(keys, part["of"]),
        }


def _taken(keys: pa.Array, images: Array) -> pa.Array:
    return keys.take(pa.array(np.array(images), pa.int64(), mask=images < 0)).cast(pa.string())


def _table(run: TableRun, modes: Modes) -> Table:
    data, pdq, counts, inputs = run.data, run.needs.get("pdq"), [], []
    for shard in run.shards:
        digests = data.fetched_digests(shard)
        records = [data.annotations_record(pdq, shard)] if pdq is not None else []
        records += [data.embedded_record(shard)] if modes.cosine is not None else []
        made = [sorted(output_digests(found).items()) for r in records if (found := data.record(r))]
        counts.append(int(data.record(data.fetched_record(shard))["successes"]))
        inputs.append(digest([digests, made]))
    return Table(
        data=data.without_plan(),  # without the plan, which would go along with every task
        name=run.name,
        modes=modes,
        shards=tuple(run.shards),
        counts=tuple(counts),
        inputs=tuple(inputs),
        pdq=pdq,
    )


def _clear(table: Table, *, keep: str | None) -> None:
    """Remove what runs that have ended left to work with."""
    data, index = table.data, table.index
    for name in data.store.folders(index):
        if name.startswith("work-") and name != keep:
            data.remove(*data.store.walk(index / name))
            shutil.rmtree(index / name, ignore_errors=True)
    kept = {data.root / name for name in data.record(index / "groups.json").get("outputs", {})}
    answers_there = {index / n for n in data.store.names(index) if n.startswith("groups-") and n.endswith(".npy")}
    data.remove(*answers_there - kept)


# -------------------------------------------------------------------------------------------------------------- memory


def check_memory(table: Table, dim: int) -> None:
    """UserError where the search would not fit the memory of this machine."""
    needed, there = memory_needed(table.modes, int(table.offsets[-1]), dim), memory()
    if needed > there:
        raise UserError(
            f"near-duplicates of {table.offsets[-1]:,} images take about {needed / 1e9:.1f} GB of memory, and here are "
            f"{there / 1e9:.1f} GB: use a larger machine, fewer modes, or fewer rows (source.where)"
        )


def memory_needed(modes: Modes, images: int, dim: int) -> int:
    """Bytes, about: of this process, and of a task on each core."""
    each = 150 + (150 if modes.hashes else 0) + (150 if modes.mirror else 0) + (60 if modes.captions else 0)
    task = (400 << 20) + 16 * images if dim else 16 * images
    return images * each + cpus() * task + (4 << 30 if dim and images > 10**6 else 500 << 20)


def memory() -> int:
    """Bytes of memory that this machine has, or its control group may use."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return found


# -------------------------------------------------------------------------------------------------------------- search


def _search(run: TableRun, table: Table, work: str) -> tuple[Array, dict[str, Any]]:
    modes, config, n = table.modes, digest([table.digest]), int(table.offsets[-1])
    for _ in run.map(make_rows, [(table, at) for at in range(len(table.shards))]):
        pass
    same = equal_files(table)
    copies = np.flatnonzero(same != np.arange(n))
    known = [as_pairs(same[copies], copies, 0.0 if modes.cosine is None else 1.0)]  # pairs whose distance is known
    open_pairs = [np.zeros(0, PAIR)]
    recalls: dict[str, tuple[Callable[[Array, Array], dict[str, Any]], str]] = {}  # how it is measured, and of what
    first = same.copy()
    own = same == np.arange(n)

    if modes.phash is not None:
        hashes = read_hashes(table)
        values, candidates = proposed(table, work, config, hashes.phash, run.map)
        near = confirmed(table, hashes, values, candidates)
        first[hashes.equal[:, 0]] = np.minimum(first[hashes.equal[:, 0]], hashes.equal[:, 1])
        equal = as_pairs(hashes.equal[:, 0], hashes.equal[:, 1], 0.0)
        (known if modes.cosine is None else open_pairs).extend([near, equal])
        distinct = np.zeros(n, np.bool_)
        distinct[hashes.first[~hashes.mirrored]] = True
        measure = partial(measured_recall, table, work, config, "bits", distinct, 0.0, run_map=run.map)
        recalls["pdq"] = measure, f"pairs with different PDQ hashes within {modes.pdq} bits"
    if modes.captions:
        open_pairs.append(equal_captions(table, own))
    if modes.cosine is not None:
        (flags,) = read_rows(table, "known")
        use = (first == np.arange(n)) & ((flags & FLAT) == 0)
        near, cost, config = vector_pairs(run, table, work, use)
        known.append(near)
        measure = partial(measured_recall, table, work, config, "cosine", use, cost, run_map=run.map)
        what = f"pairs with a cosine of {modes.cosine:g} or more"
        if modes.cosine_pdq is not None:
            what += f" and PDQ hashes within {modes.cosine_pdq} bits"
        recalls["cosine"] = measure, what
    pairs = _with_distances(run, table, known, open_pairs)
    while (again := first[first] != first).any():
        first[again] = first[first][again]
    group, size = grouped(first, pairs)
    answer = np.zeros(n, ANSWER)
    answer["group"], answer["size"] = group, size
    pairs["distance"] = np.minimum(pairs["distance"], 256.0 if modes.cosine is None else 1.0)  # halves may pass 1
    answer["nearest"], answer["of"] = nearest_of(n, pairs, largest=modes.cosine is not None)
    facts: dict[str, Any] = {"groups": _sizes(group, size), "recall": {}, "notes": []}
    facts["notes"].append(_group_note(facts["groups"], n))
    for name, (measured, what) in recalls.items():
        facts["recall"][name] = found = measured(pairs, group)
        facts["notes"].append(recall_sentence(found, what))
    facts["notes"] += _limits(modes)
    facts[FACT] = keep_neighbours(table, first, group, pairs)
    return answer, facts


def keep_neighbours(table: Table, first: Array, group: Array, pairs: Array) -> str:
    """Keep which members of groups are near each other, for `best_of`; the file's sha256.

    Not of groups with so many different images that not all of their pairs were looked for.
    """
    keys = np.concatenate([image_keys(table.data, s) for s in table.shards] or [np.zeros(0, np.uint64)])
    copies = np.flatnonzero(first != np.arange(len(first)))
    a, b = first[pairs["a"]], first[pairs["b"]]
    stands = np.flatnonzero((first == np.arange(len(first))) & (group >= 0))
    different = np.bincount(group[stands], minlength=len(first))
    near = (a != b) & (group[a] == group[b]) & (group[a] >= 0)
    near[near] = different[group[a[near]]] <= (_ALL_PAIRS if table.modes.captions else _KNOWN_PAIRS)
    low, high = np.minimum(a[near], b[near]), np.maximum(a[near], b[near])
    linked = np.stack(np.divmod(np.unique(low * len(first) + high), max(1, len(first))), 1)
    return write_neighbours(table.index / FILE, np.stack([keys[copies], keys[first[copies]]], 1), keys[linked])


def image_keys(data: Data, shard: int) -> Array:
    """The keys of a shard's images, as numbers (n,) uint64."""
    return images_of(data, shard, ["key"])["key"].cast(pa.uint64()).to_numpy()


def equal_files(table: Table) -> Array:
    """The first image with the same bytes, for each: (n,) int64."""
    known, sha = read_rows(table, "known", "sha")
    images = np.flatnonzero(known & SHA)
    return _first_of(len(known), images, sha[images])


def _first_of(n: int, images: Array, values: Array) -> Array:
    """The first image with the same values (m, 2), of some; each other image itself: (n,) int64."""
    order = np.lexsort((values[:, 1], values[:, 0]))
    values, images = values[order], images[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (values[1:] != values[:-1]).any(axis=1)
    found = np.arange(n)
    found[images] = images[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(images) else images
    return found


def equal_captions(table: Table, use: Array) -> Array:
    """PAIRs of images with equal captions, of distance NaN: each with each where they are few, else with the first."""
    known, caption = read_rows(table, "known", "caption")
    images = np.flatnonzero(use & ((known & CAPTION) != 0))
    first = _first_of(len(known), images, caption[images])[images]
    order = np.argsort(first, kind="stable")
    images, first = images[order], first[order]
    starts = np.searchsorted(first, first, side="left")
    sizes = np.searchsorted(first, first, side="right") - starts
    place = np.arange(len(images)) - starts
    found = [as_pairs(first[place > 0], images[place > 0], np.nan)]
    for step in range(1, _ALL_PAIRS):
        at = np.flatnonzero((sizes <= _ALL_PAIRS) & (place >= step))
        found.append(as_pairs(images[at - step], images[at], np.nan))
    return unique_pairs(np.concatenate(found))


def _with_distances(run: TableRun, table: Table, known: list[Array], rest: list[Array]) -> Array:
    """All pairs, each once, sorted; those of `rest` that are not known get their cosine, or their bits where there are
    PDQ hashes, else NaN."""
    cosine = table.modes.cosine is not None
    found = unique_pairs(np.concatenate(known), smallest=not cosine)
    other = unique_pairs(np.concatenate(rest))
    n = table.offsets[-1]
    other = other[~np.isin(other["a"] * n + other["b"], found["a"] * n + found["b"])]
    if len(other):
        pairs = np.stack([other["a"], other["b"]], 1)
        if cosine:
            parts = [(table, pairs[i : i + _TASK_PAIRS]) for i in range(0, len(pairs), _TASK_PAIRS)]
            other["distance"] = np.concatenate(list(run.map(pair_cosines, parts)))
        else:
            other["distance"] = pdq_bits(table, pairs) if table.modes.phash is not None else np.nan
    return unique_pairs(np.concatenate([found, other]), smallest=not cosine)


def grouped(first: Array, pairs: Array) -> tuple[Array, Array]:
    """(first image of the group, -1 for images alone; images in it, 0 for those alone), of pairs of images.

    first: (n,) which image stands for those equal to it: they share its group, whatever they are near to.
    """
    n = len(first)
    linked = np.stack([first[pairs["a"]], first[pairs["b"]]], 1)
    group = link_groups(n, linked[linked[:, 0] != linked[:, 1]])[first]
    several = np.bincount(first, minlength=n)[first] > 1
    group = np.where((group < 0) & several, first, group)
    together = np.flatnonzero(group >= 0)
    size = np.zeros(n, np.int32)
    size[together] = np.bincount(group[together], minlength=n)[group[together]]
    return group, size


def nearest_of(n: int, pairs: Array, *, largest: bool) -> tuple[Array, Array]:
    """(distance, which) of the nearest other image of each, of several the first; NaN and -1 where there is none."""
    pairs = pairs[~np.isnan(pairs["distance"])]
    one, other = np.concatenate([pairs["a"], pairs["b"]]), np.concatenate([pairs["b"], pairs["a"]])
    distance = np.tile(pairs["distance"], 2)
    order = np.lexsort((other, -distance if largest else distance, one))
    order = order[np.concatenate([[True], np.diff(one[order]) != 0])] if len(order) else order
    nearest, of = np.full(n, np.nan, np.float32), np.full(n, -1, np.int64)
    nearest[one[order]], of[one[order]] = distance[order], other[order]
    return nearest, of


# --------------------------------------------------------------------------------------------------------------- facts


def _sizes(group: Array, size: Array) -> dict[str, int]:
    return {
        "groups": int((group == np.arange(len(group))).sum()),
        "images": int((group >= 0).sum()),
        "largest": int(size.max(initial=0)),
    }


def _group_note(sizes: dict[str, int], n: int) -> str:
    share = 100 * sizes["images"] / max(1, n)
    largest = f"; the largest has {sizes['largest']:,}" if sizes["groups"] else ""
    groups = "1 group holds" if sizes["groups"] == 1 else f"{sizes['groups']:,} groups hold"
    return f"{groups} {sizes['images']:,} of {n:,} images ({share:.1f}%){largest}."


def _limits(modes: Modes) -> list[str]:
    """What the modes can't find."""
    found = []
    if modes.phash is not None:
        found.append(
            "Hashes don't find copies that were cropped by 5% or more, framed, rotated"
            + ("" if modes.mirror else ", mirrored")
            + " or largely written over, and of flat images there are none."
        )
    if modes.cosine_pdq is not None:
        found.append(
            "Vectors and PDQ hashes that must both be near don't find copies that were cropped or framed by more than "
            "about 5%" + ("" if modes.mirror else ", mirrored") + ", or that are small or grey in the encoder's eyes."
        )
    elif modes.cosine is not None:
        found.append(
            "A cosine says that two images show alike things in the encoder's eyes, not that one is a copy of the "
            "other; copies that are small, grey or strongly compressed may lie below it."
        )
    if modes.captions:
        found.append("Equal captions say that texts are alike, not images.")
    return found


def _moved(table: Table, group: Array, before: dict[str, Any], config: str) -> int:
    """How many images of shards that are as they were are in another group than before, or in none."""
    if before.get("config") != config or "shards" not in before:
        return 0
    path = _answer_file(table, before)
    if not table.data.exists(path):
        return 0
    old, numbers, offset = table.load(path, mapped=True)["group"], [], 0
    now = {s: (i, o) for s, i, o in zip(table.shards, table.inputs, table.offsets.tolist(), strict=False)}
    for shard, count, inputs in before["shards"]:  # an old number -> the number that it has now, -1 if it is gone
        same = shard in now and now[shard][0] == inputs
        numbers.append(now[shard][1] + np.arange(count) if same else np.full(count, -1))
        offset += count
    number = np.concatenate([np.zeros(0, np.int64), *numbers])
    images = np.flatnonzero((number >= 0) & (old >= 0))
    return int((number[old[images]] != group[number[images]]).sum())
