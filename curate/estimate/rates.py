"""What each stage takes for a row, an image or a kept image: measured in a data folder, or from a file.

Rates are plain JSON (docs/estimate.md): files are laid one over another, so that of two figures for the same thing the
later one counts. Each figure says where it comes from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from aesthetic.errors import UserError
from aesthetic.untrusted import printable, read_text
from curate.estimate import intervals

if TYPE_CHECKING:
    from curate.layout import Data

SHARDS = 400
"""Shards whose records are read, evenly over the plan; more say nothing new."""

HOSTS = 100_000
"""Rows whose domains are counted."""

STARTS_UP = 100_000
"""Rows or images from which on the time of select and pack grows with them; below, what others took of a long list
says more."""

Unit = Literal["listed", "fetched", "images", "kept"]
"""What a stage's figures are for one of: a row of the list, one that is asked for, an image, an image that is kept."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number and where it comes from; `low` and `high` are the ends of a 95% interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    origin: Literal["measured", "published", "assumed", "given"] = "given"
    source: str = ""

    def times(self, count: float) -> Figure:
        """So many of it."""
        low, high = (None if end is None else end * count for end in (self.low, self.high))
        return Figure(value=self.value * count, low=low, high=high, origin=self.origin, source=self.source)


AnyFigure = Annotated[Figure, pydantic.BeforeValidator(lambda v: {"value": v} if isinstance(v, (int, float)) else v)]
"""In a file, a bare number too."""


@dataclass(frozen=True, kw_only=True)
class StageRates:
    """What a stage takes for one `per`: seconds of a core (`cpu`) and of a GPU of the kind `device`; requests, bytes
    received and seconds for which a request is open; bytes and files that it leaves (files: per shard)."""

    per: Unit
    share: AnyFigure | None = None  # of the images, how many the stage looks at
    cpu: AnyFigure | None = None
    gpu: AnyFigure | None = None
    device: str = ""
    requests: AnyFigure | None = None
    received: AnyFigure | None = None
    in_flight: AnyFigure | None = None
    bytes: AnyFigure | None = None
    files: AnyFigure | None = None


@dataclass(frozen=True, kw_only=True)
class DomainShares:
    """The hosts of a sample of a list, and the largest of their registered domains."""

    rows: int
    hosts: int
    once: int  # of them in one row
    twice: int
    rules: AnyFigure = Figure(value=1.0, origin="assumed")  # requests for robots.txt and its like, for each host
    largest: AnyFigure  # share of the rows
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A kind of machine, or the part of one with one GPU."""

    cpus: int
    gpus: int = 0
    gpu: str = ""  # a key of `gpus`
    dollars: AnyFigure  # an hour
    gbit: float | None = None  # a second, of its network


@dataclass(frozen=True, kw_only=True)
class StorePrices:
    """What an object store costs, in dollars: a million puts or lists, a million gets, and a GB for a month."""

    put: AnyFigure
    get: AnyFigure
    month: AnyFigure
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """All that a plan is made from."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # no key that nothing reads

    made: str = ""  # the day
    of: str = ""  # which list
    listed: int = 0
    taken: int = 0  # rows of it that were measured
    machine: str = ""
    encoder: str = ""
    shares: dict[str, AnyFigure] = field(default_factory=dict)  # fetched, images and kept, per row of the list
    stages: dict[str, StageRates] = field(default_factory=dict)
    domains: DomainShares | None = None
    settings: dict[str, float] = field(default_factory=dict)  # concurrency, per_domain, rate; shard_size
    wall: dict[str, dict[str, float]] = field(default_factory=dict)  # how the run went by the clock, for `whole`
    nodes: dict[str, NodeType] = field(default_factory=dict)
    gpus: dict[str, AnyFigure] = field(default_factory=dict)  # speed of a kind of GPU beside the others
    encoders: dict[str, dict[str, AnyFigure]] = field(default_factory=dict)  # encoder -> gpu -> seconds an image
    store: StorePrices | None = None
    busy: AnyFigure | None = None  # share of the time that cores and GPUs work

    def to_json(self) -> dict[str, Any]:
        """As `read_rates` takes it; what is not known is left out."""
        return _without_nothing(asdict(self))


def _without_nothing(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    found = {k: _without_nothing(v) for k, v in tree.items()}
    return {k: v for k, v in found.items() if v not in (None, "", {})}


def published() -> dict[str, Any]:
    """The figures that come along: of others' reports and list prices, each with its source and date."""
    text = (resources.files("curate.estimate") / "published.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def published_late() -> dict[str, Any]:
    """Those of select and pack, of which a short trial shows the start-up alone."""
    return {"stages": {name: stage for name, stage in published()["stages"].items() if name in ("select", "pack")}}


def read_rates_file(path: Path) -> dict[str, Any]:
    """A file of rates or prices. UserError where it is no JSON object."""
    try:
        tree = json.loads(read_text(path))
    except (UserError, ValueError) as e:
        raise UserError(f"{path} can't be read as rates: {printable(str(e), 300)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} can't be read as rates: a JSON object is expected, as docs/estimate.md shows it")
    return tree


def lay_over(trees: Sequence[tuple[str, Mapping[str, Any]]]) -> Rates:
    """Rates from trees (whose, tree), the later over the earlier. UserError names the file and the key at fault."""
    merged: dict[str, Any] = {}
    checked = pydantic.TypeAdapter(Rates)
    rates = Rates()
    for name, tree in trees:
        merged = _merge(merged, tree)
        try:
            rates = checked.validate_python(merged)
        except pydantic.ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{name}: {where or 'rates'}: {first['msg']} (docs/estimate.md shows what can be said)"
            ) from None
    return rates


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        whole = isinstance(value, Mapping) and "value" in value  # a figure is taken as a whole
        found[key] = (
            _merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) and not whole else value
        )
    return found


# ------------------------------------------------------------------------------------------------------------ measured


@dataclass
class _Sums:
    """Amounts of one stage, a number for each shard."""

    cpu: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    more: dict[str, list[float]] = field(default_factory=dict)
    files: int = 0
    device: str = ""


def measure(
    data: Data,
    *,
    kept: Sequence[int] | None = None,
    spent: Mapping[str, Mapping[str, float]] | None = None,
    settings: Mapping[str, float] | None = None,
    **more: Any,
) -> Rates | None:
    """The rates that a data folder's records hold; None where none says what it took.

    Of several lists, of which more or less was taken, each counts by its length.

    kept: images of the recipe's selection, of each of the plan's lists.  spent: what select and pack took
    (`Spent.take`), which have no records of shards.  more: other fields of Rates.
    """
    plan = data.plan
    shards = [s.shard for s in plan.shards]
    shards = shards[:: max(1, -(-len(shards) // SHARDS))]
    records = {s: data.record(data.fetched_record(s)) for s in shards}
    shards = [s for s in shards if "spent" in records[s]]
    if not shards:
        return None
    rows = [float(records[s]["count"]) for s in shards]
    images = [float(records[s]["successes"]) for s in shards]
    asked = [_asked(data, s, records[s]) for s in shards]
    of, lists = [plan.list_index(s) for s in shards], plan.lists
    whole = {i: int(lists[i]["listed_rows"]) for i in sorted({*of})}
    listed = sum(whole.values())
    # how many rows one that was taken stands for, beside what one does on the average
    average = listed / sum(lists[i]["rows"] for i in whole)
    weights = [whole[i] / lists[i]["rows"] / average for i in of]
    taken = min(lists[i]["rows"] / whole[i] for i in whole)

    def figure(amounts: Sequence[float], units: Sequence[float]) -> Figure | None:
        if not sum(units) or not sum(amounts):
            return None
        amounts = [amount * weight for amount, weight in zip(amounts, weights, strict=True)]
        units = [unit * weight for unit, weight in zip(units, weights, strict=True)]
        found = intervals.ratio(amounts, units, taken) or (None, None)
        return Figure(value=sum(amounts) / sum(units), low=found[0], high=found[1], origin="measured")

    def share(counts: Sequence[float]) -> Figure:
        parts = [
            tuple(int(sum(n for n, j in zip(values, of, strict=True) if j == i)) for values in (counts, rows))
            for i in whole
        ]
        value, low, high = intervals.share_of_all([(n, m, whole[i]) for (n, m), i in zip(parts, whole, strict=True)])
        return Figure(value=value, low=low, high=high, origin="measured")

    def stage(sums: _Sums, per: Unit, units: Sequence[float]) -> StageRates:
        extra = {name: figure(values, units) for name, values in sums.more.items()}
        return StageRates(
            per=per,
            share=figure(sums.seen, units) if sums.seen else None,
            cpu=figure(sums.cpu, units),
            gpu=figure(sums.gpu, units),
            device=sums.device,
            bytes=figure(sums.bytes, units),
            files=Figure(value=sums.files, origin="measured"),
            **extra,
        )

    fetch, pixels, read, of_models = _collect(data, shards, records)
    stages = {"fetch": stage(fetch, "fetched", asked), "images": stage(pixels, "images", images)}
    if sum(read.cpu):
        stages["decode"] = stage(read, "images", images)
    stages |= {name: stage(sums, "images", images) for name, sums in of_models.items()}

    rules = sum(records[s]["spent"].get("rules", 0.0) for s in shards)
    shares = {"fetched": share(asked), "images": share(images)}
    if kept is not None:
        value, low, high = intervals.share_of_all([(kept[i], lists[i]["rows"], whole[i]) for i in whole])
        shares["kept"] = Figure(value=value, low=low, high=high, origin="measured")
    for name, per, units in (("select", "listed", plan.total_rows), ("pack", "kept", sum(kept or ()))):
        took = (spent or {}).get(name)
        if took and units:
            # of a short list it is start-up, and the sheet
            cpu = Figure(value=took["cpu"] / units, origin="measured") if units >= STARTS_UP else None
            left = Figure(value=took.get("bytes", 0.0) / units, origin="measured")
            stages[name] = StageRates(per=per, cpu=cpu, bytes=left)  # type: ignore[arg-type]
    return Rates(
        listed=plan.listed_rows,
        taken=plan.total_rows,
        of=plan.list if len(lists) == 1 else f"{len(lists)} lists",
        shares=shares,
        stages=stages,
        domains=_domains(
            data, {s: w for s, w, i in zip(shards, weights, of, strict=True) if not lists[i]["base"]}, rules
        ),
        settings={**(settings or {})},
        **more,
    )


def _collect(
    data: Data, shards: Sequence[int], records: Mapping[int, Mapping[str, Any]]
) -> tuple[_Sums, _Sums, _Sums, dict[str, _Sums]]:
    """Amounts by shard of fetching, of the images stage, of reading images for models, and of each of these."""
    fetch, pixels, read, models = _Sums(), _Sums(), _Sums(), dict[str, _Sums]()
    for i, shard in enumerate(shards):
        spent = records[shard]["spent"]
        fetch.cpu.append(max(0.0, spent["cpu"] - spent.get("decode", 0.0)))
        for name in ("requests", "received", "in_flight"):
            other = spent.get("rules", 0.0) if name == "requests" else 0.0
            fetch.more.setdefault(name, []).append(spent.get(name, 0.0) - other)
        pixels.cpu.append(spent.get("decode", 0.0))
        pixels.bytes.append(_bytes(records[shard]))
        pixels.files = _files(records[shard])
        read.cpu.append(0.0)
        made = {"encode": data.embedded_record(shard)}
        made |= {name: data.annotations_record(name, shard) for name in data.annotated()}
        for name, path in made.items():
            record = data.record(path)
            if "outputs" not in record:
                continue
            sums, spent = models.setdefault(name, _Sums()), record.get("spent", {})
            for values in (sums.cpu, sums.gpu, sums.bytes, sums.seen):
                values += [0.0] * (i - len(values))
            on_gpu = spent.get("gpu", 0.0)
            sums.cpu.append(0.0 if on_gpu else spent.get("cpu", 0.0))
            sums.gpu.append(on_gpu)
            sums.bytes.append(_bytes(record))
            sums.seen.append(spent.get("images", 0.0))
            sums.device, sums.files = spent.get("device", sums.device), _files(record)
            read.cpu[i] += spent.get("decode", 0.0)
    for sums in models.values():
        for values in (sums.cpu, sums.gpu, sums.bytes, sums.seen):
            values += [0.0] * (len(shards) - len(values))
    return fetch, pixels, read, models


def _bytes(record: Mapping[str, Any]) -> float:
    return float(sum(fact["bytes"] for fact in record.get("outputs", {}).values())) + 1000  # and the record itself


def _files(record: Mapping[str, Any]) -> int:
    return len(record.get("outputs", {})) + 1


def _asked(data: Data, shard: int, record: Mapping[str, Any]) -> float:
    """Rows of a shard that were not rejected before anything was asked for."""
    if not record.get("rejected_early"):
        return float(record["count"])
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(data.local(data.table(shard)), columns=["status", "http_status"])
    never = pc.and_(pc.equal(table["status"], "rejected_early"), pc.is_null(table["http_status"]))
    return float(len(table) - (pc.sum(never).as_py() or 0))


def _domains(data: Data, shards: Mapping[int, float], rules: float) -> DomainShares | None:
    """The domains of lists of URLs: of shards, each with how many rows one of its rows stands for."""
    import numpy as np
    import pyarrow.parquet as pq

    seen, urls = list[str](), list[str]()
    for shard, weight in shards.items():
        column = pq.read_table(data.local(data.table(shard)), columns=["url"])["url"].drop_null()
        column = column.slice(0, max(1, HOSTS // len(shards)))
        chosen = np.linspace(0, len(column), round(len(column) * weight / max(shards.values())), endpoint=False)
        seen += column.to_pylist()
        urls += column.take(chosen.astype(np.int64)).to_pylist()
    asked = domains_of(seen, None, rules)
    found = domains_of(urls, data.plan.listed_rows)
    return replace(found, rules=asked.rules) if found and asked else None


def domains_of(urls: Sequence[str], whole: int | None = None, rules: float | None = None) -> DomainShares | None:
    """The domains of URLs that were sampled from a list of `whole` rows, of whose hosts `rules` requests asked for
    robots.txt and its like; None of no URLs."""
    from urllib.parse import urlsplit

    from curate.fetch.budget import registered_domain

    counts, hosts = Counter[str](), Counter[str]()
    for url in urls:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            continue
        if host:
            counts[registered_domain(host)] += 1
            hosts[host] += 1
    rows = counts.total()
    if not rows:
        return None
    each = Figure(value=1.0 if rules is None else rules / len(hosts), origin="assumed" if rules is None else "measured")
    often = Counter(hosts.values())
    (name, count), *_ = counts.most_common(1)
    low, high = intervals.share(count, rows, max(whole or rows, rows))
    largest = Figure(value=count / rows, low=low, high=high, origin="measured")
    return DomainShares(
        rows=rows, hosts=len(hosts), once=often[1], twice=often[2], largest=largest, name=name, rules=each
    )
