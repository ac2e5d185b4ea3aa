"""A data folder: where each file of each stage lies. Everything that a run knows is under it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.ledger.schema import shard_name
from curate.store.files import local_path, read_json
from curate.store.ownership import clear, kind_of
from curate.store.records import invalidate, output_digests

if TYPE_CHECKING:
    import duckdb

    from curate.sources.plan import Plan


@dataclass(frozen=True)
class Data:
    """The paths of one data folder; opens nothing by itself."""

    root: Path

    # fetched/: img2dataset's layout

    def tar(self, shard: int) -> Path:
        return self.root / "fetched" / f"{shard_name(shard)}.tar"

    def table(self, shard: int) -> Path:
        return self.root / "fetched" / f"{shard_name(shard)}.parquet"

    def fetched_record(self, shard: int) -> Path:
        return self.root / "fetched" / f"{shard_name(shard)}_stats.json"

    def starts(self, shard: int) -> Path:
        """A byte for each time that the shard was begun; gone once it is committed."""
        return self.root / "fetched" / f".{shard_name(shard)}.starts"

    # embedded/: clip-retrieval's layout

    def image_vectors(self, shard: int) -> Path:
        return self.root / "embedded" / "img_emb" / f"img_emb_{shard_name(shard)}.npy"

    def text_vectors(self, shard: int) -> Path:
        return self.root / "embedded" / "text_emb" / f"text_emb_{shard_name(shard)}.npy"

    def metadata(self, shard: int) -> Path:
        return self.root / "embedded" / "metadata" / f"metadata_{shard_name(shard)}.parquet"

    def embedded_record(self, shard: int) -> Path:
        return self.root / "embedded" / "stats" / f"{shard_name(shard)}.json"

    def embed_starts(self, shard: int) -> Path:
        """A byte for each time that this run began to embed the shard; the next run sweeps it away as scratch."""
        return self.root / "embedded" / f".{shard_name(shard)}.starts.tmp"

    @property
    def space(self) -> Path:
        return self.root / "embedded" / "space.json"

    @property
    def space_record(self) -> Path:
        return self.root / "embedded" / "stats" / "space.json"

    # annotated/NAME/: the columns of an annotator

    def annotations(self, name: str, shard: int) -> Path:
        return self.root / "annotated" / name / f"{shard_name(shard)}.parquet"

    def annotations_record(self, name: str, shard: int) -> Path:
        return self.root / "annotated" / name / f"{shard_name(shard)}.json"

    def invalidate_from(self, stage: str) -> None:
        """Invalidate the records of a stage (source, fetch, images or embed) and of those after it, as far as they are
        a shard's. Files stay until they are replaced."""
        patterns = ["embedded/stats/*.json", "annotated/*/*.json"]
        if stage != "embed":
            patterns.append("fetched/*_stats.json")
        for pattern in patterns:
            for record in self.root.glob(pattern):
                invalidate(record)
        self.space.unlink(missing_ok=True)

    def old_columns(self) -> list[str]:
        """Columns in `scored/`, where they were before there was `annotated/`, that nobody has computed anew."""
        return sorted(
            p.name for p in (self.root / "scored").glob("*") if not (self.root / "annotated" / p.name).exists()
        )

    def clear_shards(self) -> None:
        """Remove what the stages from fetch to annotate wrote; what somebody else has put beside it stays."""
        embedded, annotated = self.root / "embedded", self.root / "annotated"
        clear(self.root / "fetched", r"\d{5,}(\.tar|\.parquet|_stats\.json)|\.\d{5,}\.starts")
        clear(embedded / "img_emb", r"img_emb_\d{5,}\.npy")
        clear(embedded / "text_emb", r"text_emb_\d{5,}\.npy")
        clear(embedded / "metadata", r"metadata_\d{5,}\.parquet")
        clear(embedded / "stats", r"\d{5,}\.json|space\.json")
        clear(embedded, r"space\.json")
        for folder in annotated.iterdir() if annotated.is_dir() else ():
            clear(folder, r"\d{5,}\.(parquet|json)")
        clear(annotated, "")

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @cached_property
    def plan(self) -> Plan:
        """The shard plan; UserError where the folder has none."""
        from curate.sources.plan import load_plan

        plan = load_plan(self.root)
        if plan is None:
            raise UserError(
                f"{self.root} is not a data folder: it has no plan. "
                f"`tastemaker curate LIST --out {self.root}` makes one."
            )
        return plan

    @cached_property
    def ledger(self) -> duckdb.DuckDBPyRelation:
        """One DuckDB relation over all tables, a line per row of the list: `.df()`, `.filter(...)`."""
        from curate.ledger.view import open_ledger

        return open_ledger(self.root).table("ledger")

    def fetched_digests(self, shard: int) -> dict[str, str] | None:
        """The sha256 of a fetched shard's files, from its record; None where it is not committed."""
        record = read_json(self.fetched_record(shard))
        return output_digests(record) if record and "outputs" in record else None

    def records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every record under the folder: what each stage says that it wrote."""
        patterns = (
            "fetched/*_stats.json",
            "embedded/stats/*.json",
            "annotated/*/*.json",
            "selected/*.json",
            "shards/*/manifest.json",
        )
        for pattern in patterns:
            for path in sorted(p for p in self.root.glob(pattern) if not p.parent.name.startswith(".")):
                record = read_json(path)
                yield path, record if isinstance(record, dict) else {}


def open_data(path: str | Path) -> Data:
    """Open an existing data folder. UserError where there is none."""
    root = local_path(str(path))
    if not (root / "plan").is_dir() or kind_of(root) != "data":
        around = next((p for p in root.parents if kind_of(p) == "data" and (p / "plan").is_dir()), None)
        if around is not None:
            raise UserError(f"{root} is not a data folder, but lies in one. Did you mean {around}?")
        if not root.is_dir():
            raise UserError(f"{root} is not a data folder: {'it is a file' if root.exists() else 'it is not there'}.")
        raise UserError(
            f"{root} is not a data folder (no plan/ in it). `tastemaker curate LIST --out {root}` makes one."
        )
    return Data(root)
