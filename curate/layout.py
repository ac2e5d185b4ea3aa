"""A data folder: where each file of each stage lies. Every path and every pattern of one is here.

plan/         plan.json                   the record;  shards.parquet: the shards;  what of the list was cut or copied
fetched/      NNNNN.tar, NNNNN.parquet    images and rows;  NNNNN_stats.json: the record (img2dataset's layout)
embedded/     img_emb/, text_emb/         vectors;  metadata/: similarities;  stats/: records (clip-retrieval's layout)
annotated/N./ NNNNN.parquet, NNNNN.json   columns of an annotator and their record;  index/, answers/: what it keeps
selected/     NAME.parquet, NAME.json     verdicts and their record
shards/NAME/  NNNNN.tar, NNNNN.parquet    the chosen images;  manifest.json: the record
report/NAME/  sheet.png, scores.png
published/    NAME.json                   what of a selection was published where, and when;  keys-*.parquet: its keys
studio/       index/: columns as the studio maps them into memory, search/: codes of vectors, images/: where they lie in
              tars; made of the above, and never needed
deny.txt      what people denied while they looked, and what was removed: every run heeds it
removing/     what.json: a removal that is under way;  the records that it took back
merging.json  a merge that is under way
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.store.disk import Disk
from curate.store.files import clear, read_json
from curate.store.index import RecordIndex
from curate.store.records import output_digests

if TYPE_CHECKING:
    import duckdb

    from curate.sources.plan import Plan

PLAN, FETCHED, EMBEDDED, ANNOTATED, SELECTED, PACKED = "plan", "fetched", "embedded", "annotated", "selected", "shards"
"""The folders of the stages, in the order in which they are made."""

RATINGS, HEADS = "ratings", "heads"
"""What people made by hand: it stays when everything else is made anew."""

STAGES = (PLAN, FETCHED, EMBEDDED, ANNOTATED, SELECTED, PACKED)

_RECORDS = {
    PLAN: "plan.json",
    FETCHED: "*_stats.json",
    EMBEDDED: "stats/*.json",
    ANNOTATED: "*/*.json",
    SELECTED: "*.json",
    PACKED: "*/manifest.json",
}


def shard_name(shard: int) -> str:
    """How files of a shard are called: five digits, more where five do not suffice."""
    return f"{shard:05d}"


@dataclass(frozen=True)
class Data:
    """The paths of one data folder; opens nothing by itself.

    On an object store `root` is a mirror here, of which only those files are there that were brought.
    """

    root: Path
    url: str | None = None

    @property
    def name(self) -> str:
        """The last part of its path or URL."""
        return str(self).rstrip("/").rpartition("/")[2]

    @staticmethod
    def at(place: str | Path) -> Data:
        """The data folder at a path or a URL, whether there is one or not. UserError where that is neither."""
        from curate.store.mirror import open_store

        store = open_store(str(place))
        return Data(store.root, store.url)

    def __str__(self) -> str:
        return self.url or str(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker go the place and the plan; a mirror is its own, and it reads the records of its shards alone."""
        plan = {"plan": self.plan} if "plan" in self.__dict__ else None
        return _in_worker, (None if self.url else self.root, self.url, self.store.token), plan

    def shown(self, path: Path) -> str:
        """Where a file of the folder is, for people: its path or its URL."""
        return f"{self}/{path.relative_to(self.root).as_posix()}"

    @cached_property
    def store(self) -> Disk:
        """Where the files are."""
        if self.url is None:
            return Disk(self.root)
        from curate.store.mirror import open_mirror

        return open_mirror(self.url)

    def without_plan(self) -> Data:
        """The same folder, light enough to go along with each of many tasks."""
        return Data(self.root, self.url)

    @cached_property
    def _index(self) -> RecordIndex:
        return RecordIndex(self.store)

    @contextlib.contextmanager
    def hold(self, *, removing: bool = False) -> Iterator[None]:
        """Be the only run at work on the folder while the block runs. UserError where another one is, or where a
        removal or a merge has not ended, unless it is that removal which goes on."""
        with self.store.lock():
            self.require_finished(removing=removing)
            yield
            self.compact()

    def require_finished(self, *, removing: bool = False) -> None:
        """UserError where a merge, or a removal unless it is that which goes on, was broken off."""
        if not removing and self.exists(self.removal):
            again = f"tastemaker remove {shlex.quote(str(self))}"
            raise UserError(f"a removal of images from {self} was broken off: `{again}` goes on with it")
        if self.exists(self.merging):
            folders = [*(read_json(self.local(self.merging)) or {}).get("folders", ["FOLDER", "FOLDER"])]
            again = shlex.join(["tastemaker", "merge", *folders, "--out", str(self)])
            raise UserError(f"{self} is not whole yet, as a merge was broken off: `{again}` goes on with it")

    def compact(self) -> None:
        """Have the next run read all records from one file per stage; of whoever holds the folder."""
        self._index.compact()

    # files and records; on a disk nothing is moved

    def bring(self, *paths: Path) -> None:
        """Have these files here, whole and as they are now, before they are read."""
        self.store.bring(paths)

    def local(self, path: Path) -> Path:
        """The path of a file to read, which is brought where it is not here."""
        self.store.bring([path])
        return path

    def push(self, *paths: Path) -> None:
        """Put these files where they belong, as they are here."""
        self.store.push(paths)

    def release(self, *paths: Path) -> None:
        """Let go of what lies there as well: its room here may be used for others."""
        self.store.release(paths)

    def exists(self, path: Path) -> bool:
        """Whether there is such a file, here or not."""
        return self.store.stamp(path) is not None

    def remove(self, *paths: Path) -> None:
        """Remove these files, as far as they are there."""
        self.store.remove(paths)

    def record(self, path: Path) -> dict[str, Any]:
        """What a record says; {} where there is none, or where it is none of ours. Not to be changed by who asks."""
        return self._index.read(path)

    def is_done(self, record: Path, *, config: str, inputs: Mapping[str, str]) -> bool:
        """Whether a record still matches: same configuration, same inputs, every file there as it was written."""
        return self._index.is_done(record, config=config, inputs=inputs)

    def outputs_present(self, record: Path) -> bool:
        """Whether every file that a record names is there, as it was written."""
        return self._index.outputs_present(record)

    def commit(
        self, record: Path, *, config: str, inputs: Mapping[str, str], outputs: list[Path], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the record that makes a shard done, last of all its files; see RecordIndex.commit."""
        return self._index.commit(record, config=config, inputs=inputs, outputs=outputs, facts=facts)

    def recommit(
        self, record: Path, inputs: Mapping[str, str], config: str | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write a record again for other inputs, or another configuration; see RecordIndex.recommit."""
        self._index.recommit(record, inputs, config, facts)

    def invalidate(self, *records: Path) -> None:
        """Take records back before their files are replaced, so that none that is half replaced is taken for done."""
        self._index.invalidate(records)

    def look(self, records: Iterable[Path]) -> None:
        """Read these records all together, before they are asked about one by one."""
        self._index.look(records)

    # plan/

    @property
    def plan_folder(self) -> Path:
        return self.root / PLAN

    @property
    def plan_record(self) -> Path:
        return self.root / PLAN / "plan.json"

    # fetched/: img2dataset's layout. Paths are joined once: of 10,000 shards each join is 0.1 s

    def tar(self, shard: int) -> Path:
        return self.root / f"{FETCHED}/{shard_name(shard)}.tar"

    def table(self, shard: int) -> Path:
        return self.root / f"{FETCHED}/{shard_name(shard)}.parquet"

    def fetched_record(self, shard: int) -> Path:
        return self.root / f"{FETCHED}/{shard_name(shard)}_stats.json"

    def starts(self, shard: int) -> Path:
        """A byte for each time that the shard was begun; gone once it is committed."""
        return self.root / f"{FETCHED}/.{shard_name(shard)}.starts"

    # embedded/: clip-retrieval's layout

    def image_vectors(self, shard: int) -> Path:
        return self.root / f"{EMBEDDED}/img_emb/img_emb_{shard_name(shard)}.npy"

    def text_vectors(self, shard: int) -> Path:
        return self.root / f"{EMBEDDED}/text_emb/text_emb_{shard_name(shard)}.npy"

    def metadata(self, shard: int) -> Path:
        return self.root / f"{EMBEDDED}/metadata/metadata_{shard_name(shard)}.parquet"

    def embedded_record(self, shard: int) -> Path:
        return self.root / f"{EMBEDDED}/stats/{shard_name(shard)}.json"

    def embed_starts(self, shard: int) -> Path:
        """A byte for each time that this run began to embed the shard; the next run sweeps it away as scratch."""
        return self.root / EMBEDDED / f".{shard_name(shard)}.starts.tmp"

    @property
    def space(self) -> Path:
        return self.root / EMBEDDED / "space.json"

    @property
    def space_record(self) -> Path:
        return self.root / EMBEDDED / "stats" / "space.json"

    # annotated/NAME/: the columns of an annotator

    def annotations(self, name: str, shard: int) -> Path:
        return self.root / f"{ANNOTATED}/{name}/{shard_name(shard)}.parquet"

    def annotations_record(self, name: str, shard: int) -> Path:
        return self.root / f"{ANNOTATED}/{name}/{shard_name(shard)}.json"

    def annotated(self) -> list[str]:
        """The names under which there are columns."""
        return self._folders(self.root / ANNOTATED)

    def index(self, name: str) -> Path:
        """A folder for what an annotator that reads the whole table keeps between runs, such as pairs."""
        return self.root / ANNOTATED / name / "index"

    def answers(self, name: str, shard: int) -> Path:
        """What a server was paid to say of a shard's images; it stays when everything else is made anew."""
        return self.root / ANNOTATED / name / "answers" / f"{shard_name(shard)}.jsonl"

    def old_columns(self) -> list[str]:
        """Columns in `scored/`, where they were before there was `annotated/`, that nobody has computed anew."""
        return [name for name in self._folders(self.root / "scored") if name not in self.annotated()]

    def release_shard(self, shard: int, columns: Iterable[str] = ()) -> None:
        """Let go of the files of a shard that lie there as well: of whole lists there is no room here."""
        made = (self.annotations(name, shard) for name in columns)
        vectors = self.image_vectors(shard), self.text_vectors(shard), self.metadata(shard)
        self.release(self.tar(shard), self.table(shard), *vectors, *made)

    # selected/, shards/, report/

    def verdicts(self, name: str) -> Path:
        return self.root / SELECTED / f"{name}.parquet"

    def selection_record(self, name: str) -> Path:
        return self.root / SELECTED / f"{name}.json"

    def selections(self) -> list[str]:
        """The names of the selections that are there."""
        return [record.stem for record in self.records(SELECTED)]

    # ratings/, heads/: what people said in the studio, and what was learnt from it; no stage makes or removes them

    def ratings(self, name: str) -> Path:
        """What people said of images, as `tastemaker fit` reads it."""
        return self.root / RATINGS / f"{name}.csv"

    @property
    def ratings_lock(self) -> Path:
        """Held by whoever writes ratings on a disk."""
        return self.root / RATINGS / ".lock"

    def ratings_record(self, name: str) -> Path:
        """What was asked in a set of ratings: its kind, its scale."""
        return self.root / RATINGS / f"{name}.json"

    def rated(self) -> list[str]:
        """The names of the sets of ratings that are there."""
        names = self.store.names(self.root / RATINGS)
        return [name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")]

    def head(self, name: str) -> Path:
        """The folder of a head that was fitted to the ratings of that name."""
        return self.root / HEADS / f"{name}.head"

    def packed(self, name: str) -> Path:
        return self.root / PACKED / name

    def manifest(self, name: str) -> Path:
        return self.root / PACKED / name / "manifest.json"

    def packs(self) -> list[str]:
        """The names of the selections that are packed."""
        return [name for name in self._folders(self.root / PACKED) if self.exists(self.manifest(name))]

    def sheet(self, name: str) -> Path:
        return self.root / "report" / name / "sheet.png"

    def diff_sheet(self, a: str, b: str) -> Path:
        """What two selections keep differently, in images."""
        return self.root / "report" / a / f"without-{b}.png"

    def column_sheet(self, name: str) -> Path:
        """What an annotator says, in images; a selection of the same name has a folder beside it."""
        return self.root / "report" / f"{name}.png"

    def charts(self, name: str) -> Path:
        return self.root / "report" / name / "scores.png"

    def published(self, name: str) -> Path:
        """What of a selection was published where: place -> when, kind, count, the digest of its keys."""
        return self.root / "published" / f"{name}.json"

    def published_keys(self, digest: str) -> Path:
        """The keys of what was published, by their digest."""
        return self.root / "published" / f"keys-{digest}.parquet"

    def published_names(self) -> list[str]:
        """The selections of which something was published."""
        names = self.store.names(self.root / "published")
        return [name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")]

    @property
    def studio_index(self) -> Path:
        """The columns as the studio maps them into memory: made of the tables, on this machine alone."""
        return self.root / "studio" / "index"

    @property
    def search_index(self) -> Path:
        """The codes by which the studio searches many vectors: made of `embedded/`, on this machine alone."""
        return self.root / "studio" / "search"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    def image_places(self, shard: int) -> Path:
        """Where the images of a shard lie in its tar, as the studio found out."""
        return self.root / "studio" / "images" / f"{shard_name(shard)}.places"

    @property
    def deny_list(self) -> Path:
        """The folder's own deny-list: what the studio was told to deny, and what was removed (fetch.deny_file)."""
        return self.root / "deny.txt"

    @property
    def removal(self) -> Path:
        """What `tastemaker remove` is about to take out; gone once it is."""
        return self.root / "removing" / "what.json"

    @property
    def merging(self) -> Path:
        """What `tastemaker merge` is about to make of which folders; gone once it is made."""
        return self.root / "merging.json"

    def taken_back(self, name: str) -> Path:
        """Where a removal keeps records while it rewrites their files: those of a shard, a selection or a pack."""
        return self.root / "removing" / f"{name}.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def rates(self) -> Path:
        """What the last run measured, for `tastemaker plan`."""
        return self.root / "logs" / "rates.json"

    # what is there

    def shards(self, record: Callable[[int], Path]) -> list[int]:
        """The shards that have a record, in order: `data.shards(data.fetched_record)`."""
        example = record(0)
        before, after = example.name.split(shard_name(0))
        name = re.compile(re.escape(before) + r"(\d{5,})" + re.escape(after))
        return sorted(int(match[1]) for found in self.store.names(example.parent) if (match := name.fullmatch(found)))

    def records(self, stage: str) -> list[Path]:
        """The records of a stage, in the order of their names: of its shards, of its selections, of its packs."""
        *folders, pattern = _RECORDS[stage].split("/")
        within = [self.root / stage]
        for folder in folders:
            within = [at / name for at in within for name in (self._folders(at) if folder == "*" else [folder])]
        names = ((at, name) for at in within for name in self.store.names(at) if not name.startswith("."))
        return [at / name for at, name in names if fnmatch.fnmatchcase(name, pattern)]

    def _folders(self, parent: Path) -> list[str]:
        return [name for name in self.store.folders(parent) if not name.startswith(".")]

    def stage_of(self, record: Path) -> tuple[str, str]:
        """The stage of a record, and the name of the selection or columns that it is of ("" for shards alone)."""
        stage, *rest = record.relative_to(self.root).parts
        return stage, rest[0].removesuffix(".json") if stage in (ANNOTATED, SELECTED, PACKED) else ""

    @cached_property
    def plan(self) -> Plan:
        """The shard plan; UserError where the folder has none."""
        from curate.sources.plan import load_plan

        plan = load_plan(self)
        if plan is None:
            raise UserError(
                f"{self} is not a data folder: it has no plan. `tastemaker curate LIST --out {self}` makes one."
            )
        return plan

    def forget_plan(self) -> None:
        """It was written again: read it anew when it is asked for."""
        self.__dict__.pop("plan", None)

    @cached_property
    def ledger(self) -> duckdb.DuckDBPyRelation:
        """One DuckDB relation over all tables, a line per row of the list: `.df()`, `.filter(...)`."""
        from curate.ledger.view import open_ledger

        return open_ledger(self).table("ledger")

    def fetched_digests(self, shard: int) -> dict[str, str] | None:
        """The sha256 of a fetched shard's files, from its record; None where it is not committed."""
        record = self.record(self.fetched_record(shard))
        return output_digests(record) if "outputs" in record else None

    def invalidate_from(self, stage: str) -> None:
        """Invalidate the records of a stage (source, fetch, images or embed) and of those after it, as far as they are
        a shard's. Files stay until they are replaced."""
        for made in (EMBEDDED, ANNOTATED) if stage == "embed" else (FETCHED, EMBEDDED, ANNOTATED):
            self.invalidate(*self.records(made))
        self.remove(self.space)

    # what goes, where all is made anew; what somebody else has put beside it stays

    def clear_plan(self) -> None:
        """Remove the plan, whole or not."""
        clear(self.plan_folder, r"plan\.json|shards(-[0-9a-f]{8})?\.parquet|\d{5,}(-\d{5,})?\.parquet|list-\d{5,}-.*")

    def clear_shards(self) -> None:
        """Remove what the stages from fetch to annotate wrote."""
        embedded, annotated = self.root / EMBEDDED, self.root / ANNOTATED
        clear(self.root / FETCHED, r"\d{5,}(\.tar|\.parquet|_stats\.json)|\.\d{5,}\.starts|\.records\.parquet")
        clear(embedded / "img_emb", r"img_emb_\d{5,}\.npy")
        clear(embedded / "text_emb", r"text_emb_\d{5,}\.npy")
        clear(embedded / "metadata", r"metadata_\d{5,}\.parquet")
        clear(embedded / "stats", r"\d{5,}\.json|space\.json")
        clear(embedded, r"space\.json|\.records\.parquet")
        for name in self.annotated():
            shutil.rmtree(self.index(name), ignore_errors=True)
            clear(annotated / name, r"\d{5,}\.(parquet|json)")
        clear(annotated, r"\.records\.parquet")


def _in_worker(root: Path | None, url: str | None, token: str | None) -> Data:
    """As a Data is read from a pickle."""
    if url is not None:
        from curate.store.mirror import open_mirror

        root = open_mirror(url).root
    assert root is not None
    data = Data(root, url)
    data.store.token = token
    data.__dict__["_index"] = RecordIndex(data.store, compacted=False)
    return data
