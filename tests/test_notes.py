"""What annotators ask to be repeated: in `status`, and in the card of what was chosen by their columns."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
from small_data import REASONS, SHARD_SIZE, make_data, uid_of, write_column

from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.shards.pack import PackConfig, pack
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from pipelines.commands.status import status

FOUND, MISSED = "recall 0.98 (0.95 to 0.99) on 300 images", "crops beyond 10% are not found"


def test_notes_are_in_status_and_in_the_card_of_what_they_decided(tmp_path: Path) -> None:
    data = Data(make_data(tmp_path / "data"))
    urls = [f"http://example.com/{n}.jpg\t{uid_of(n)}" for n in range(60)]
    (tmp_path / "list.tsv").write_text("\n".join(["url\tuid", *urls]) + "\n")
    make_plan(str(tmp_path / "list.tsv"), data, SourceConfig(shard_size=SHARD_SIZE))
    facts = {"notes": [FOUND, MISSED], "recall": {"value": 0.98, "low": 0.95, "high": 0.99}}
    write_column(data.root, "dup", pa.string(), lambda n: str(n // 5), facts=facts)
    write_column(data.root, "other", pa.int32(), lambda n: n, facts={"notes": ["of no concern | here"]})

    said: list[str] = []
    found, _ = status(data, said.append)
    at = next(i for i, line in enumerate(said) if line.startswith("annotated 3/3 shards   dup"))
    assert [line.strip() for line in said[at + 1 : at + 3]] == [FOUND, MISSED]
    assert found["notes"] == {"dup": [FOUND, MISSED], "other": ["of no concern | here"]}
    assert found["recall"] == {"dup": {"value": 0.98, "low": 0.95, "high": 0.99}}
    assert found["annotated"] == {"dup": 3, "laion_v2": 3, "other": 3} and json.dumps(found)

    for name, rule, there in (("a", "best_of(dup, width)", True), ("b", "width > 3", False)):
        select(data, SelectConfig(name=name, rules={"r": rule}))
        made = pack(data, name, PackConfig())
        card = (data.packed(name) / "README.md").read_text()
        assert (f"- `dup`: {FOUND}\n- `dup`: {MISSED}\n" in card) == there and "concern" not in card
        assert made["columns"]["dup"]["notes"] == [FOUND, MISSED]
        assert made["count"] == (12 if there else 60 - 3 * len(REASONS))
