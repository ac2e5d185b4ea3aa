"""What a list of some size takes on some machines: hours, money, requests, and what limits it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aesthetic.errors import UserError, nearest
from curate.estimate.rates import Figure, NodeType, Rates, StageRates
from curate.estimate.whole import counts, requests_of, total

_PART = 5_000_000
"""Bytes of a part of an upload: an object of more takes a request for each, and two more."""

_GPU_STAGES = ("encode",)

_ORDER = {"fetch": 0, "images": 1, "decode": 2, "encode": 3, "select": 5, "pack": 6}  # columns between


class NoRate(UserError):
    """A stage whose rate on the machines in question nobody measured or published."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Machines, as `--nodes` names them."""

    name: str
    nodes: tuple[tuple[int, NodeType], ...]

    @property
    def cpus(self) -> int:
        return sum(n * node.cpus for n, node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(n * node.gpus for n, node in self.nodes)

    @property
    def dollars(self) -> float:
        """An hour of all."""
        return sum(n * node.dollars.value for n, node in self.nodes)

    @property
    def machines(self) -> int:
        return sum(n for n, _ in self.nodes)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """A stage for the whole list: how many rows or images it looks at, and seconds of cores or GPUs."""

    name: str
    per: str
    count: float
    cpu: Figure | None
    gpu: Figure | None


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """A list on a fleet. Hours by limit, the longest of which is the `bottleneck`; what follows when all is fetched and
    embedded is in `after`, and `hours` are both."""

    fleet: Fleet
    stages: list[StageCost]
    limits: dict[str, float]
    bottleneck: str
    after: float
    hours: float
    dollars: float
    core_hours: float
    gpu_hours: float
    gbit: float  # a second, while it fetches
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class ListPlan:
    """What does not depend on the machines: bytes, requests to the web and to an object store, and its prices."""

    rows: float
    images: Figure
    kept: Figure
    disk: Figure
    requests: Figure
    received: Figure
    puts: float
    gets: float
    store_requests: float  # dollars
    store_month: float


def parse_fleet(text: str, nodes: Mapping[str, NodeType]) -> Fleet:
    """`4x16cpu,2xh100`: counts and kinds of machines, with commas between. UserError names what is wrong with it."""
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(?:(\d+)\s*[x*×]\s*)?(\S+)", part)
        kind = match[2].lower() if match else part
        count = int(match[1] or 1) if match else 0
        if count < 1:
            raise UserError(f"--nodes {part}: a count and a kind of machine are expected, such as 4x16cpu or 2xh100")
        cores = re.fullmatch(r"(\d+)cpus?", kind)
        if cores and int(cores[1]) and "cpu" in nodes:
            each, cpu = int(cores[1]), nodes["cpu"]
            node = replace(cpu, cpus=each, dollars=cpu.dollars.times(each))
        elif kind in nodes and kind != "cpu":
            node = nodes[kind]
        else:
            known = [name for name in nodes if name != "cpu"]
            near = nearest(kind, known)
            hint = f" Did you mean {near}?" if near else ""
            raise UserError(
                f"--nodes {part}: there is no kind of machine {kind!r}.{hint} There are: NNcpu (any number of cores), "
                f"{', '.join(known)}; a file of --rates can name others"
            )
        found.append((count, node))
    if not found:
        raise UserError("--nodes names no machine: 4x16cpu,2xh100 is four of 16 cores and two with an H100")
    return Fleet(name=text, nodes=tuple(found))


def plan_list(rates: Rates, rows: float) -> ListPlan:
    """What a list of so many rows leaves and asks for. UserError where there are no rows, or no rates."""
    if rows <= 0:
        raise UserError(f"--rows {rows:g}: it must be more than 0")
    if not rates.stages:
        raise UserError("there are no rates to make a plan from: name a data folder, or a file with --rates")
    units = counts(rates, rows)
    puts = gets = 0.0
    shards = rows / rates.settings.get("shard_size", 10_000)
    for name, stage in rates.stages.items():
        files = stage.files.value if stage.files else 0.0
        size = (stage.bytes.value if stage.bytes else 0.0) * units[stage.per].value
        many = shards * files if name != "pack" else 2 * units["kept"].value / 10_000
        parts = size / _PART if many and size / many > _PART else 0.0
        puts += many + parts
        gets += many  # each is read once, by the stage after it
    disk = total(rates, "bytes", units)
    store = rates.store
    return ListPlan(
        rows=rows,
        images=units["images"],
        kept=units["kept"],
        disk=disk,
        requests=requests_of(rates, units),
        received=total(rates, "received", units),
        puts=puts,
        gets=gets,
        store_requests=(puts * store.put.value + gets * store.get.value) / 1e6 if store else 0.0,
        store_month=disk.value / 1e9 * store.month.value if store else 0.0,
    )


def plan_fleet(rates: Rates, rows: float, fleet: Fleet) -> FleetPlan:
    """Hours and money of a list of so many rows on these machines.

    Fetching, decoding, embedding and annotating run at once, on all cores and GPUs, of whose time `busy` is used; the
    slowest of cores, GPUs, open requests, the largest site and the network decides. Selecting and packing follow, on
    one machine.
    """
    notes: list[str] = []
    gpu_rates = _on_gpus(rates, fleet, notes) if fleet.gpus else {}
    units = counts(rates, rows)
    stages, cpu, gpu = [], 0.0, 0.0
    for name, stage in sorted(rates.stages.items(), key=lambda item: _ORDER.get(item[0], 4)):
        n = units[stage.per].value
        on_gpu, on_cpu = gpu_rates.get(name), stage.cpu
        if on_gpu is None and on_cpu is None and stage.gpu is None and name != "encode":
            continue
        if on_gpu is None and on_cpu is None:
            raise NoRate(
                f"--nodes {fleet.name}: no rate of {rates.encoder or 'the encoder'} ({name}) on them is known; "
                "a trial on one measures it, and a file of --rates can name it"
            )
        stages.append(
            StageCost(
                name=name,
                per=stage.per,
                count=n * (stage.share.value if stage.share else 1.0),
                cpu=on_cpu.times(n) if on_gpu is None and on_cpu else None,
                gpu=on_gpu.times(n) if on_gpu else None,
            )
        )
        if name not in ("select", "pack"):
            cpu += on_cpu.value * n if on_gpu is None and on_cpu else 0.0
            gpu += on_gpu.value * n if on_gpu else 0.0

    busy = rates.busy.value if rates.busy else 1.0
    limits = {"cores": cpu / (fleet.cpus * busy)}
    if gpu:
        limits["GPUs"] = gpu / (fleet.gpus * busy)
    limits |= _web_limits(rates, rows, fleet)
    slowest = max(limits, key=lambda name: limits[name])
    after = _after(rates, units, max(node.cpus for _, node in fleet.nodes))
    received = total(rates, "received", units).value
    hours = (limits[slowest] + after) / 3600
    return FleetPlan(
        fleet=fleet,
        stages=stages,
        limits={name: seconds / 3600 for name, seconds in limits.items()},
        bottleneck=slowest,
        after=after / 3600,
        hours=hours,
        dollars=hours * fleet.dollars,
        core_hours=cpu / 3600,
        gpu_hours=gpu / 3600,
        gbit=received * 8 / max(limits[slowest], 1e-9) / 1e9,
        notes=notes,
    )


def _web_limits(rates: Rates, rows: float, fleet: Fleet) -> dict[str, float]:
    """Seconds below which the web holds the fetching, whatever the cores: requests that are open at once, the largest
    site by what it may be asked a second and at a time, and the network where it is known."""
    units, fetch, settings = counts(rates, rows), rates.stages.get("fetch"), rates.settings
    if fetch is None or fetch.requests is None or not fetch.requests.value:
        return {}
    requests = fetch.requests.value * units["fetched"].value
    each = fetch.in_flight.value / fetch.requests.value if fetch.in_flight else 0.0  # seconds of one
    workers = max(1, fleet.cpus // (2 if fleet.gpus else 4))  # as pipelines sizes its pools
    found = {"open requests": requests * each / (settings.get("concurrency", 384) * workers)}
    if rates.domains is not None:
        largest = rates.domains.largest.value * requests
        rate = settings.get("rate", 0.0)
        by_rate = largest / rate if rate else 0.0
        found[f"the site {rates.domains.name}"] = max(by_rate, largest * each / settings.get("per_domain", 6))
    gbit = [node.gbit for _, node in fleet.nodes]
    if all(gbit) and fetch.received:
        speed = sum(n * (node.gbit or 0.0) for n, node in fleet.nodes) * 1e9 / 8
        found["network"] = fetch.received.value * units["fetched"].value / speed
    return found


def _on_gpus(rates: Rates, fleet: Fleet, notes: list[str]) -> dict[str, Figure]:
    """Seconds of one of the fleet's GPUs for each stage that runs on GPUs; the mean kind, where there are several.

    What was measured on a GPU counts before what others publish of the encoder; on another kind it is scaled by the
    speeds of `gpus`, which is assumed.
    """
    found = {}
    speed = sum(n * node.gpus * _speed(rates, node.gpu) for n, node in fleet.nodes if node.gpus) / fleet.gpus
    kinds = {node.gpu for _, node in fleet.nodes if node.gpus}
    for name, stage in rates.stages.items():
        at: tuple[Figure, str] | None = (stage.gpu, _kind(rates, stage)) if stage.gpu else None
        if at is None and name in _GPU_STAGES:
            at = _published(rates, stage)
            if at is None:
                notes.append(f"no rate of {rates.encoder or 'the encoder'} on a GPU is known: cores are counted")
        if at is None:
            continue
        figure, kind = at
        factor = _speed(rates, kind) / speed
        origin = figure.origin if kinds == {kind} else "assumed"
        found[name] = replace(figure.times(factor), origin=origin)
    return found


def _speed(rates: Rates, gpu: str) -> float:
    return rates.gpus[gpu].value if gpu in rates.gpus else 1.0


def _kind(rates: Rates, stage: StageRates) -> str:
    known = sorted(rates.gpus, key=len, reverse=True)
    return next((name for name in known if name in stage.device.lower()), stage.device)


def _published(rates: Rates, stage: StageRates) -> tuple[Figure, str] | None:
    """What others report of the encoder, and on which GPU."""
    for name, by_gpu in rates.encoders.items():
        if by_gpu and re.search(rf"(^|[:/]){re.escape(name)}(-quickgelu)?(/|$)", rates.encoder, re.I):
            kind, figure = next(iter(by_gpu.items()))
            share = stage.share.value if stage.share else 1.0
            return figure.times(share), kind
    return None


def _after(rates: Rates, units: Mapping[str, Figure], cpus: int) -> float:
    """Seconds of what follows on one machine: select on its cores, and pack on one."""
    seconds = 0.0
    for name, cores in (("select", cpus), ("pack", 1)):
        stage = rates.stages.get(name)
        if stage is not None and stage.cpu is not None:
            seconds += stage.cpu.value * units[stage.per].value / cores
    return seconds


def default_fleets(nodes: Mapping[str, NodeType]) -> Sequence[str]:
    """What is compared where no machines are named: one of each kind."""
    return ["16cpu", *(name for name in nodes if name != "cpu")]
