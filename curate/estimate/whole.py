"""What a whole list would take, by what a part of it took here: time, disk, requests, CPU or GPU time, kept rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curate.estimate import intervals
from curate.estimate.rates import Figure, Rates


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Of a list of `rows`; figures with 95% intervals, but `seconds`: from stages that overlap wholly to not at all."""

    rows: int
    taken: int
    images: Figure
    kept: Figure | None
    seconds: Figure | None
    disk: Figure  # bytes
    requests: Figure
    received: Figure  # bytes
    cpu: Figure  # seconds of a core
    gpu: Figure  # seconds of a GPU


def counts(rates: Rates, rows: float) -> dict[str, Figure]:
    """How many there are of each unit that stages count by, in a list of so many rows."""
    one = Figure(value=1.0, low=1.0, high=1.0)
    listed = one.times(rows)
    return {"listed": listed} | {
        name: rates.shares.get(name, one).times(rows) for name in ("fetched", "images", "kept")
    }


def total(rates: Rates, what: str, units: Mapping[str, Figure]) -> Figure:
    """A stage's amounts (cpu, gpu, requests, received, bytes) summed over all stages.

    The interval adds the ends of the stages' intervals, as if all were wrong to the same side: it is too wide rather
    than too narrow. Of a figure without an interval its value counts at both ends.
    """
    value = low = high = 0.0
    measured = False
    for stage in rates.stages.values():
        each: Figure | None = getattr(stage, what)
        if each is not None:
            n = units[stage.per].value
            value += each.value * n
            low += (each.value if each.low is None else each.low) * n
            high += (each.value if each.high is None else each.high) * n
            measured |= each.low is not None
    return Figure(value=value, low=low if measured else None, high=high if measured else None, origin="measured")


def requests_of(rates: Rates, units: Mapping[str, Figure]) -> Figure:
    """Requests for images, and for the robots.txt of the hosts that there will be."""
    found = total(rates, "requests", units)
    d = rates.domains
    if d is None:
        return found
    hosts = intervals.distinct(d.rows, d.hosts, d.once, d.twice, max(0.0, units["listed"].value - d.rows))
    value, low, high = found.value + d.rules.value * hosts, None, None
    if found.low is not None and found.high is not None:
        low, high = found.low + d.rules.value * d.hosts, found.high + d.rules.value * (2 * hosts - d.hosts)
    return Figure(value=value, low=low, high=high, origin="measured")


def whole_list(rates: Rates, cores: int) -> Projection:
    """The projection of the trial that these rates are of to its list, on a machine with so many cores."""
    units = counts(rates, rates.listed)
    return Projection(
        rows=rates.listed,
        taken=rates.taken,
        images=units["images"],
        kept=units["kept"] if "kept" in rates.shares else None,
        seconds=_seconds(rates, units, cores),
        disk=total(rates, "bytes", units),
        requests=requests_of(rates, units),
        received=total(rates, "received", units),
        cpu=total(rates, "cpu", units),
        gpu=total(rates, "gpu", units),
    )


def _seconds(rates: Rates, units: Mapping[str, Figure], cores: int) -> Figure | None:
    """Seconds here: start-up and the slow last rows once, the rest by the clock's rates of the trial.

    Fetching and embedding run at once as far as there are cores. At best each takes what it took alone; at worst they
    wait for each other all the time. Between these, the cores' time that both took decides. Columns that are computed
    after them take in proportion to the rows.
    """
    fetch, embed = rates.wall.get("fetch"), rates.wall.get("embed")
    if not fetch:
        return None
    seconds = [fetch["each"] * units["listed"].value]
    starts, tail = fetch["begin"], fetch["tail"]
    if embed:
        seconds.append(embed["each"] * units["images"].value)
        tail = max(tail, embed["tail"])
    used = [min(1.0, _cores(rates, name) / cores) for name in ("fetch", "embed")]
    busy = sum(took * share for took, share in zip(seconds, used, strict=False))
    more = rates.listed / max(rates.taken, 1)
    later = rates.wall.get("annotate", {}).get("seconds", 0.0) * more
    for name in ("select", "pack"):  # start-up as it was, and what the other rows add
        stage = rates.stages.get(name)
        slope = stage.cpu.value * units[stage.per].value * (1 - 1 / more) if stage and stage.cpu else 0.0
        later += rates.wall.get(name, {}).get("seconds", 0.0) + slope
    floor = _largest_site(rates, units)
    once = starts + tail + later
    low, high = max(*seconds, floor, 0.0), max(sum(seconds), floor)
    return Figure(value=once + max(low, busy), low=once + low, high=once + high, origin="measured")


def _cores(rates: Rates, name: str) -> float:
    """Cores that fetching or embedding kept busy in the trial."""
    each = rates.wall.get(name, {}).get("each")
    fetching = ("fetch", "images")
    own = [s for n, s in rates.stages.items() if (n in fetching) == (name == "fetch") and n not in ("select", "pack")]
    took = sum(s.cpu.value * rates.shares[s.per].value for s in own if s.cpu)  # for each row of the list
    rows = 1.0 if name == "fetch" else rates.shares["images"].value
    return took / (each * rows) if each and rows else 0.0


def _largest_site(rates: Rates, units: Mapping[str, Figure]) -> float:
    """Seconds that the largest site takes: it is asked so many times a second, whoever asks (fetch.rate)."""
    fetch, limit = rates.stages.get("fetch"), rates.settings.get("rate")
    if rates.domains is None or not limit or fetch is None or fetch.requests is None:
        return 0.0
    return rates.domains.largest.value * units["fetched"].value * fetch.requests.value / limit


def projection_facts(found: Projection) -> dict[str, Any]:
    """For --json: each figure as value, low and high."""
    figures = ("images", "kept", "seconds", "disk", "requests", "received", "cpu", "gpu")
    told = {name: getattr(found, name) for name in figures}
    return {"rows": found.rows, "taken": found.taken} | {
        name: {"value": f.value, "low": f.low, "high": f.high} for name, f in told.items() if f is not None
    }
