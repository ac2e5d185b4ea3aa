"""Machines on one machine: namespaces of network, mounts, host name and processes, a bridge between them.

    with machines(tmp_path) as net:
        store, head, other = net.add("store"), net.add("head"), net.add("other")
        head.run(["ip", "addr"]);  other.die();  other.cut()

Each has its own home, cache, /tmp/ray and /dev/shm; of the disk all see the rest, which tests leave alone. All ends
with the process that made it, however that ends: a machine is a process whose parent's death kills it, and what runs
in it dies with it. Needs root.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.stores import KEYS, weed_command

ROOT = Path(__file__).parents[1]
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount")


def why_not() -> str:
    """Why there can be no machines here; "" where there can."""
    if os.geteuid() != 0:
        return "needs root: it makes namespaces of the network and of mounts"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    made = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return f"namespaces can't be made here: {made.stderr.decode().strip()}" if made.returncode else ""


needs_machines = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@dataclass
class Machine:
    """One of them. `folder` is its own place on the disk, which it sees as `net.here`."""

    name: str
    ip: str
    folder: Path
    here: Path  # its folder, as it sees it
    holder: subprocess.Popen[bytes]
    pid: int  # of its first process, as the machine of the tests numbers it
    bridge: int = 0  # pid of the machine that holds the bridge
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def environment(self, more: Mapping[str, str] = {}) -> dict[str, str]:
        """What its processes have: its own home and cache, and nothing of who runs the tests."""
        keep = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV")}
        return {
            **keep,
            "HOME": str(self.here / "home"),
            "TASTEMAKER_CACHE": str(self.here / "cache"),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",  # names of machines mean nothing here
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            **more,
        }

    def _enter(self, command: Sequence[str]) -> list[str]:
        inside = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid"]
        return [*inside, "setpriv", "--pdeathsig", "KILL", "sh", "-c", 'cd "$0" && exec "$@"', str(self.here), *command]

    def run(
        self, command: Sequence[str], *, timeout: float = 120, env: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self._enter(command), env=self.environment(env), capture_output=True, text=True, timeout=timeout
        )

    def start(self, command: Sequence[str], log: str, *, env: Mapping[str, str] = {}) -> subprocess.Popen[bytes]:
        """Start a command, whose output goes to a file of that name in its folder."""
        with open(self.folder / log, "wb") as out:
            process = subprocess.Popen(self._enter(command), env=self.environment(env), stdout=out, stderr=out)
        self.started.append(process)
        return process

    def ray(self, *options: str, env: Mapping[str, str] = {}, timeout: float = 120) -> None:
        """Start a Ray node here and wait until it says that it has joined."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={self.ip}", "--object-store-memory=80000000", *options]
        node = self.start(command, "ray.txt", env=env)
        deadline = time.monotonic() + timeout
        while "Ray runtime started" not in (said := (self.folder / "ray.txt").read_text()):
            assert node.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.3)

    def processes(self, words: str) -> list[psutil.Process]:
        """Its processes whose command line has these words."""
        found = []
        for pid in (self.pid, *(process.pid for process in self.started)):
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        if words in " ".join(process.cmdline()):
                            found.append(process)
        return found

    def die(self) -> None:
        """Pull the plug: every process of the machine gets SIGKILL from the kernel, and its network is gone."""
        os.kill(self.pid, signal.SIGKILL)
        for process in self.started:
            process.wait()
        self.holder.wait()

    def cut(self) -> None:
        """Cut its cable: packets vanish, nobody is told."""
        _run("nsenter", "--target", str(self.bridge), "--net", "ip", "link", "set", f"v-{self.name}", "down")

    def mend(self) -> None:
        """Put the cable back."""
        _run("nsenter", "--target", str(self.bridge), "--net", "ip", "link", "set", f"v-{self.name}", "up")


def serve_s3(machine: Machine) -> dict[str, str]:
    """Start a real S3 server on a machine, with a bucket `bucket`; what others need in their environment to use it."""
    port = random.randrange(11_000, 30_000)  # its parts find each other by sockets in /tmp, named after ports
    machine.start(weed_command(machine.folder, machine.ip, port, port + 1, port + 2, port + 3), "weed.txt")
    ask = (
        "import time, urllib.request as u, urllib.error as e\n"
        "for method, url in (('POST', 'http://{0}:{1}/buckets/bucket/'), ('GET', 'http://{0}:{2}/')):\n"
        "    for _ in range(300):\n"
        "        try: u.urlopen(u.Request(url, method=method), timeout=5); break\n"
        "        except e.HTTPError as x:\n"
        "            if x.code < 500: break\n"
        "        except OSError: pass\n"
        "        time.sleep(0.2)\n"
        "    else: raise SystemExit(1)\n"
    )
    assert machine.run([sys.executable, "-c", ask.format(machine.ip, port + 2, port + 3)]).returncode == 0
    use = {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{machine.ip}:{port + 3}"}
    first = "from curate.store.objects import ObjectStore\nObjectStore('s3://bucket').put(b'bytes', 'first')"
    done = machine.run([sys.executable, "-c", first], env=use, timeout=300)  # its first write takes 5 s
    assert done.returncode == 0, done.stderr
    return use


TOKEN = "5" * 64
"""Of the Ray clusters here, which nobody else's packets reach."""


@dataclass
class Net:
    """The machines, and the wire between them; the first one holds the bridge."""

    folder: Path
    machines: list[Machine] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def here(self) -> Path:
        """What every machine calls its own folder."""
        return self.folder / "here"

    def add(self, name: str) -> Machine:
        """Make a machine of this name (letters, nine at most), and connect it."""
        ip, folder = f"10.77.0.{next(self._numbers)}", self.folder / name
        for each in (self.here, Path("/tmp/ray"), *(folder / n for n in ("home", "cache", "ray"))):
            each.mkdir(parents=True, exist_ok=True)
        inside = (
            f"hostname {name} && mount --make-rprivate / && mount --bind {folder} {self.here} "
            f"&& mount --bind {folder}/ray /tmp/ray && mount -t tmpfs tmpfs /dev/shm && ip link set lo up "
            f"&& touch {folder}/up && exec sleep infinity"
        )
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(folder / "machine.txt", "wb") as log:
            command = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "sh", "-c", inside]
            holder = subprocess.Popen(command, stderr=log)
        deadline = time.monotonic() + 20
        while not (folder / "up").exists():
            assert holder.poll() is None and time.monotonic() < deadline, f"machine {name} did not start"
            time.sleep(0.05)
        pid = psutil.Process(holder.pid).children()[0].pid
        bridge = self.machines[0].pid if self.machines else pid
        machine = Machine(name, ip, folder, self.here, holder, pid, bridge)
        in_bridge, in_machine = (["nsenter", "--target", str(p), "--net", "ip"] for p in (bridge, pid))
        if not self.machines:
            _run(*in_bridge, "link", "add", "br0", "type", "bridge")
            _run(*in_bridge, "link", "set", "br0", "up")
            _run(*in_bridge, "addr", "add", f"{ip}/24", "dev", "br0")
        else:
            _run(*in_bridge, "link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            _run(*in_bridge, "link", "set", f"v-{name}", "master", "br0", "up")
            _run(*in_machine, "addr", "add", f"{ip}/24", "dev", "eth0")
            _run(*in_machine, "link", "set", "eth0", "up")
        self.machines.append(machine)
        return machine


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Net]:
    """A net without machines; those that are added end with the block."""
    net = Net(folder)
    try:
        yield net
    finally:
        for machine in reversed(net.machines):
            with contextlib.suppress(ProcessLookupError):
                os.kill(machine.pid, signal.SIGKILL)
            for process in (*machine.started, machine.holder):
                process.kill()
                process.wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
