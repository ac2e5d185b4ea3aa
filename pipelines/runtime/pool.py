"""Items through stages of workers, on a cluster whose nodes come and go.

A worker is an actor. Ray says within a second that one of them has died, and takes a minute to find that packets no
longer reach a node; what was asked of one there may never come back. So workers give signs of life, and one that is
silent for `SILENT` seconds has lost its items to others. What it still writes later must do no harm: that is the
store's part.

Only item numbers, and what is small, go through here; the driver holds no list but that of the items that wait.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aesthetic.errors import UserError
from pipelines.runtime.nodes import alive_nodes, node_name

SILENT = 60.0
"""Seconds without a sign of life after which a worker is given up. Ray gives a node up after about as many."""
BEAT = 2.0  # seconds between signs of life
TRIES = 8
"""Workers that an item may lose, or that may end in a row before one works; more would be no accident."""


@dataclass(frozen=True)
class Size:
    """What the cluster's nodes have together."""

    cpus: int
    gpus: int
    nodes: int


@dataclass(frozen=True)
class Staff:
    """How many workers a stage wants in a cluster of some size, and what Ray sets aside for each.

    most: how many it may have, where nodes join; 0: as many as there are items.
    """

    count: int
    cpus: float
    gpus: float = 0.0
    threads: int = 1
    most: int = 0


@dataclass(frozen=True)
class Stage:
    """One kind of workers.

    make: called in a worker's process once its node is found fit, with the threads that it has; gives a function of
    (item, how many workers this item has lost). It may be `async`; then `together` items are under way at one time.
    """

    name: str
    make: Callable[[int], Callable[[Any, int], Any]]
    staff: Callable[[Size], Staff]
    together: int = 1
    is_async: bool = False


class _Worker:
    """In a process of its own: gives signs of life, and runs items."""

    def __init__(self, progress: Any) -> None:
        import ray

        self._run: Callable[[Any, int], Any] | None = None
        context = ray.get_runtime_context()
        self._node, name = context.get_node_id(), context.get_actor_name()

        def beat() -> None:
            while True:
                progress.alive.remote(name)
                time.sleep(BEAT)

        threading.Thread(target=beat, daemon=True, name="alive").start()

    def open(
        self, make: Callable[[int], Any], threads: int, check: Callable[[], list[str]] | None, fit: Sequence[str]
    ) -> tuple[str, list[str]]:
        """The id of its node, and what that lacks (then nothing is opened); a node that is `fit` is not asked again."""
        problems = check() if check is not None and self._node not in fit else []
        if not problems:
            self._run = make(threads)
        return self._node, problems

    def run(self, item: Any, lost: int) -> Any:
        assert self._run is not None
        return self._run(item, lost)


class _AsyncWorker(_Worker):
    """`async` is the form in which Ray lets several calls overlap."""

    async def run(self, item: Any, lost: int) -> Any:  # type: ignore[override]
        assert self._run is not None
        return await self._run(item, lost)


@dataclass
class _Hired:
    """What the driver knows of a worker. node: None until it has opened."""

    name: str
    stage: int
    staff: Staff
    handle: Any
    node: str | None = None
    items: dict[Any, int] = field(
        default_factory=dict
    )  # what it is at: a reference to the answer -> number of the item


class Pool:
    """Runs items through stages. `say` hears of nodes and workers that were lost or left out.

    check: what a node lacks, asked there before the first worker on it opens; a node that lacks something is left out.
    grow: whether nodes may join: then workers wait for them, which is what an autoscaler goes by.
    ahead: how many items may be taken before the oldest is through.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        items: Iterable[Any],
        progress: Any,
        *,
        check: Callable[[], list[str]] | None = None,
        fit: Sequence[str] = (),
        grow: bool = False,
        ahead: int = 10_000,
        say: Callable[[str], None] = print,
    ) -> None:
        self._stages, self._progress, self._check, self._grow = stages, progress, check, grow
        self._ahead, self._say = ahead, say
        self._source = enumerate(items)
        self._next, self._more = 0, True  # the number of the item to take next, and whether there may be one
        self._item: dict[int, Any] = {}  # taken, and not through
        self._lost = Counter[int]()  # workers that each of these has lost
        self._waiting: list[deque[tuple[int, str | None]]] = [deque() for _ in stages]  # and the node where it was last
        self._hired: list[_Hired] = []
        self._opening: dict[Any, _Hired] = {}
        self._fit, self._unfit = set(fit), dict[str, str]()  # ids of nodes
        self._names = dict[str, str]()
        self._heard = set[str]()  # names of workers that Ray has placed
        self._size = Size(0, 0, 0)
        self._staff: list[Staff] = []
        self._looked, self._ended_in_a_row = 0.0, 0
        self._numbers = itertools.count()
        self._id = secrets.token_hex(3)

    def results(self) -> Iterator[tuple[int, Any]]:
        """(place among the items, what the last stage gave), in the order in which they end. Raises what a worker
        raised (a RayTaskError), and UserError where workers end again and again."""
        import ray

        try:
            while True:
                self._take()
                self._look()
                self._hire()
                self._assign()
                asked = {ref: w for w in self._hired for ref in w.items} | self._opening
                if not self._item and not self._more:
                    return
                if not asked:
                    time.sleep(0.2)
                    continue
                for ref in ray.wait([*asked], num_returns=1, timeout=1.0)[0]:
                    worker = asked[ref]
                    if ref in self._opening:
                        self._opened(ref)
                    elif ref in worker.items and (answer := self._answered(worker, ref)) is not None:
                        yield answer
        finally:
            for worker in self._hired:
                _end(worker)

    # ------------------------------------------------------------------------------------------------ items, workers

    def _take(self) -> None:
        """Take items, to wait for the first stage."""
        while self._more and (not self._item or self._next - min(self._item) < self._ahead):
            number, item = next(self._source, (-1, None))
            if number < 0:
                self._more = False
                return
            self._item[number], self._next = item, number + 1
            self._waiting[0].append((number, None))

    def _assign(self) -> None:
        """Give waiting items to workers that have room, rather where the item was before: its files are there."""
        for number, stage in enumerate(self._stages):
            waiting = self._waiting[number]
            open_ = [w for w in self._hired if w.stage == number and w.node is not None]
            while waiting:
                free = [w for w in open_ if len(w.items) < stage.together]
                if not free:
                    break
                worker = min(free, key=lambda w: len(w.items))
                place = next((i for i, (_, node) in enumerate(itertools.islice(waiting, 64)) if node == worker.node), 0)
                item, _ = waiting[place]
                del waiting[place]
                ref = worker.handle.run.remote(self._item[item], self._lost[item])
                worker.items[ref] = item

    def _answered(self, worker: _Hired, ref: Any) -> tuple[int, Any] | None:
        """An item is through a stage: on to the next one; what the last one gave."""
        import ray

        try:
            value = ray.get(ref)
        except _lost_errors() as e:
            self._lose(worker, e)
            return None
        item = worker.items.pop(ref)
        self._ended_in_a_row = 0
        if worker.stage + 1 < len(self._stages):
            self._waiting[worker.stage + 1].append((item, worker.node))
            return None
        del self._item[item]
        self._lost.pop(item, None)
        return item, value

    def _opened(self, ref: Any) -> None:
        import ray

        worker = self._opening.pop(ref)
        try:
            node, problems = ray.get(ref)
        except _lost_errors() as e:
            self._lose(worker, e)
            return
        if not problems:
            worker.node = node
            self._fit.add(node)
            return
        self._fire(worker)
        if node not in self._unfit:
            self._unfit[node] = problems[0]
            self._look(now=True)
            lines = "\n".join(f"    {problem}" for problem in problems)
            self._say(f"node {self._names.get(node, node)} is left out, the run goes on without it:\n{lines}")

    def _lose(self, worker: _Hired, error: Any = None) -> None:
        """A worker is gone, or nothing is heard of it: its items go to others."""
        if worker not in self._hired:
            return
        self._fire(worker)
        items = [*worker.items.values()]
        self._waiting[worker.stage].extendleft((item, None) for item in sorted(items, reverse=True))
        self._lost.update(items)
        self._ended_in_a_row += 1
        where = f" on {self._names.get(worker.node, worker.node)}" if worker.node else ""
        what = f"was not heard of for {SILENT:.0f} s" if error is None else "has died"
        given = f"; what it was at goes to others ({len(items)})" if items else ""
        self._say(f"a worker ({self._stages[worker.stage].name}){where} {what}{given}")
        most, times = max(((item, self._lost[item]) for item in items), key=lambda x: x[1], default=(-1, 0))
        if times >= TRIES:
            raise UserError(
                f"{self._stages[worker.stage].name}: item {self._item[most]} has ended {times} workers, which is no "
                f"accident. Mostly memory is short; the last one said: {_first_line(error)}"
            )
        if self._ended_in_a_row > TRIES * max(1, self._size.nodes):
            raise UserError(f"{self._ended_in_a_row} workers ended in a row, at last with: {_first_line(error)}")

    def _fire(self, worker: _Hired) -> None:
        self._progress.dismiss.remote(worker.name)  # what it says from now on is of no interest
        _end(worker)
        self._hired.remove(worker)
        self._opening = {ref: w for ref, w in self._opening.items() if w is not worker}

    # -------------------------------------------------------------------------------------------------------- staffing

    def _look(self, now: bool = False) -> None:
        """Every two seconds: which nodes there are, and whether all workers are heard of. Raises RayError where what
        runs beside the driver is gone."""
        import ray
        from ray.exceptions import GetTimeoutError, RaySystemError

        if not now and time.monotonic() - self._looked < BEAT:
            return
        self._looked = time.monotonic()
        nodes = alive_nodes()
        if ray.get_runtime_context().get_node_id() not in {node["NodeID"] for node in nodes}:
            raise RaySystemError("Ray's processes on this machine have ended")
        nodes = [node for node in nodes if node["NodeID"] not in self._unfit]
        self._names.update({node["NodeID"]: node_name(node) for node in nodes})
        have = Counter[str]()
        for node in nodes:
            have.update({kind: int(n) for kind, n in node["Resources"].items() if kind in ("CPU", "GPU")})
        size = Size(have["CPU"], have["GPU"], sum(node["Resources"].get("CPU", 0) >= 1 for node in nodes) or 1)
        silence: dict[str, float] = {}
        with contextlib.suppress(GetTimeoutError):  # the actor's own silence says nothing of workers
            silence = ray.get(self._progress.silence.remote(), timeout=5)
            self._heard = {*silence}
        if size != self._size:
            self._size, self._staff = size, [stage.staff(size) for stage in self._stages]
            # those that Ray has not placed yet were asked for when the cluster was another
            for worker in [w for w in self._hired if w.node is None and w.name not in self._heard]:
                wanted = self._staff[worker.stage]
                if (worker.staff.cpus, worker.staff.gpus) != (wanted.cpus, wanted.gpus):
                    self._fire(worker)
        for worker in [w for w in self._hired if silence.get(w.name, 0.0) > SILENT]:
            self._lose(worker)

    def _hire(self) -> None:
        """Start the workers that are wanted, and end those that nothing will be asked of."""
        for number, stage in enumerate(self._stages):
            staff, waiting = self._staff[number], len(self._waiting[number])
            ours = [w for w in self._hired if w.stage == number]
            before = number > 0 and (self._more or any(self._at(n) for n in range(number)))
            if not waiting and not before and not (number == 0 and self._more):
                for worker in [w for w in ours if not w.items]:  # the room is for others
                    self._fire(worker)
                continue
            at = sum(len(w.items) for w in ours)
            useful = waiting + at if not before else len(self._item)  # items that there may be for them
            wanted = staff.count
            if self._grow and not staff.most:  # and some who wait for nodes to join, as many as there are
                wanted += max(1, sum(w.node is not None for w in ours))
            elif self._grow:
                wanted = max(wanted, staff.most)
            opening = sum(w.node is None for w in ours)
            for _ in range(min(wanted, max(1, useful)) - len(ours)):
                if opening >= max(4, 2 * staff.count):
                    break
                self._start(number, stage, staff)
                opening += 1

    def _at(self, number: int) -> bool:
        return bool(self._waiting[number]) or any(w.items for w in self._hired if w.stage == number)

    def _start(self, number: int, stage: Stage, staff: Staff) -> None:
        import ray

        name = f"tastemaker-{stage.name}-{self._id}-{next(self._numbers)}"
        base = _AsyncWorker if stage.is_async else _Worker
        kind: Any = ray.remote(type(f"{stage.name.title()}Worker", (base,), {}))  # as `ps` and `ray list` show it
        labels = {"label_selector": {"ray.io/node-id": f"!in({','.join(self._unfit)})"}} if self._unfit else {}
        handle = kind.options(
            name=name,
            num_cpus=staff.cpus,
            num_gpus=staff.gpus or None,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            **({"max_concurrency": max(2, stage.together)} if stage.is_async else {}),
            **labels,
        ).remote(self._progress)
        worker = _Hired(name, number, staff, handle)
        self._hired.append(worker)
        self._opening[handle.open.remote(stage.make, staff.threads, self._check, sorted(self._fit))] = worker


def _end(worker: _Hired) -> None:
    import ray

    with contextlib.suppress(Exception):  # it is gone, or Ray is
        ray.kill(worker.handle, no_restart=True)


def _lost_errors() -> tuple[type[Exception], ...]:
    """What Ray raises where a worker or its node is gone, or can't be reached."""
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError


def _first_line(error: object) -> str:
    return next(iter(str(error or "").strip().splitlines()), "nothing")
