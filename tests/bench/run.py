# SPDX-License-Identifier: BSD-2-Clause
"""Measure pyskl: python -P tests/bench/run.py [--json FILE] [--quick], as root, with a python that has pyskl.

Machines are noisy, so each figure is the median of many rounds, shown between their quartiles; and where something has
an equal in C over libbpf (baseline.c), or without pyskl, the two take turns, and the figure is the ratio of neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import resource
import shlex
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PORTS = 65535
LOOPBACK = "127.0.0.1"
CLONE_NEWNET = 0x40000000

# Byte code is part of an installation.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

# What an interpreter says that has a daemon's usual modules: milliseconds for a statement more, and kilobytes in all:
# private ones (of the libraries' files, those that no other process has in memory now) and resident ones.
IMPORT = """
import dataclasses, ipaddress, logging, socket, typing
from time import perf_counter
before = perf_counter()
{statement}
spent = perf_counter() - before
with open("/proc/self/smaps_rollup") as rollup:
    kilobytes = dict(line.split()[:2] for line in rollup.readlines()[1:])
print(spent * 1e3, int(kilobytes["Private_Clean:"]) + int(kilobytes["Private_Dirty:"]), kilobytes["Rss:"])
"""

SERVICE = "from pyskl import REDIRECT, BpfObject, NetNS, Program, SockMap"


class Figure(NamedTuple):
    """One line of the table; the rounds' figures in its unit, and the greatest median that is good enough."""

    name: str
    unit: str
    rounds: Sequence[float]
    goal: float | None = None
    note: str = ""

    @property
    def quartiles(self) -> list[float]:
        return statistics.quantiles(self.rounds, n=4, method="inclusive")


class Side:
    """A process that does a round when it is told to, and gives its figures."""

    def __init__(self, *command: str, pass_fds: Sequence[int] = ()) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._process = subprocess.Popen(command, pass_fds=pass_fds, env=ENVIRONMENT, **pipes)

    def round(self) -> list[float]:
        self._process.stdin.write("\n")
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{shlex.join(self._process.args)} failed: {self._process.wait()}")
        return [float(each) for each in line.split()]

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.stdin.close()


def subject(*arguments: object) -> Side:
    return Side(sys.executable, str(HERE / "subject.py"), *map(str, arguments))


def against_c(name: str, ours: Sequence[float], theirs: Sequence[float], goal: float | None = None) -> Figure:
    """Compare two columns of nanoseconds, round by round."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    scale, unit = (1e3, "us") if mine > 1e4 else (1, "ns")
    note = f"{mine / scale:.0f} {unit}; C {other / scale:.0f} {unit}"
    return Figure(name, "times C", [one / two for one, two in zip(ours, theirs, strict=True)], goal, note)


def take_turns(baseline: Path, arguments: Sequence[object], rounds: int) -> list[list[tuple]]:
    """Give the columns of both sides, ours first; a round to warm up is not counted."""
    with subject(*arguments) as ours, Side(str(baseline), *map(str, arguments)) as theirs:
        pairs = [(ours.round(), theirs.round()) for _ in range(rounds + 1)][1:]
    return [list(zip(*side, strict=True)) for side in zip(*pairs, strict=True)]


def measure_import(rounds: int) -> Iterator[Figure]:
    def fresh(statement: str) -> list[float]:
        code = IMPORT.format(statement=statement)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=HERE, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
        return [float(each) for each in done.stdout.split()]

    # The second is what a service pays in any case, whether the import loads it or the first use.
    for name, statement in (("import pyskl", "import pyskl"), ("import of what a service uses", SERVICE)):
        fresh(statement)
        pairs = [(fresh(statement), fresh("pass")) for _ in range(rounds)]
        yield Figure(f"{name}: time", "ms", [ours[0] for ours, _ in pairs], 3)
        yield Figure(f"{name}: private", "MB", [(ours[1] - control[1]) * 1.024e-3 for ours, control in pairs], 1)
        yield Figure(f"{name}: resident", "MB", [(ours[2] - control[2]) * 1.024e-3 for ours, control in pairs])


def measure_sockmap(baseline: Path, rounds: int) -> Iterator[Figure]:
    # A few sockets stay in the CPU's caches, and the kernel's part is as small as it gets; many do not.
    for count, kind in ((16, "tcp"), (16, "udp"), (4000, "tcp"), (4000, "udp")):
        (singly, at_once), (in_c,) = take_turns(baseline, (kind, count), rounds)
        yield against_c(f"SockMap m[i] = sock, {count:,} {kind}", singly, in_c, 2)
        yield against_c(f"SockMap m.update(), {count:,} {kind}", at_once, in_c, 2)


def measure_hash(baseline: Path, rounds: int) -> Iterator[Figure]:
    ours, theirs = take_turns(baseline, ("hash", 100_000), rounds)
    for what, one, other in zip(("m[key] = value", "m[key]", "m.update()", "m.items()"), ours, theirs, strict=True):
        yield against_c(f"HashMap of 100,000, {what}", one, other)


def measure_load(baseline: Path, rounds: int) -> Iterator[Figure]:
    import pyskl  # only now: of what a process has in memory already, no other has a private copy

    with pyskl.Program.load(pyskl.REDIRECT) as program, program.attach():  # the first one patches the kernel's code
        ours, theirs = take_turns(baseline, ("load", pyskl.REDIRECT), rounds)
    for what, one, other in zip(("load", "attach", "test run", "close"), ours, theirs, strict=True):
        yield against_c(f"redirect.bpf.o: {what}", one, other)


def slab() -> float:
    """Count the kernel's memory for objects, in bytes."""
    with open("/proc/meminfo") as meminfo:
        return next(1024 * int(line.split()[1]) for line in meminfo if line.startswith("Slab:"))


def raise_fd_limit() -> None:
    """Allow as many fds as it may be, for the processes to come too."""
    wanted = PORTS + 100
    with contextlib.suppress(ValueError, PermissionError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def must_answer(ports: Sequence[int]) -> None:
    """Connect to the service; leave no TIME_WAIT, which would keep a port from the next round."""
    for port in ports:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.bind(("127.0.0.2", 0))
            client.connect((LOOPBACK, port))


def serve(parts: Sequence[tuple[object, ...]]) -> list[float]:
    """Start a service in so many processes, one after the other.

    Gives milliseconds, and megabytes: of the processes, of the kernel's slabs (where all others on the machine leave
    their noise), and of BPF objects.
    """
    with contextlib.ExitStack() as running:
        sides = [running.enter_context(subject(*part)) for part in parts]
        before = slab()
        figures = [side.round() for side in sides]
        slabs = slab() - before
        must_answer((1, PORTS, *random.sample(range(2, PORTS), 20)))
    spent, private, objects = (sum(column) / 1e6 for column in zip(*figures, strict=True))
    return [spent, private, slabs / 1e6, objects]


def measure_service(rounds: int) -> Iterator[Figure]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    share = hard - 100
    parts = [("each", first, min(first + share - 1, PORTS)) for first in range(1, PORTS + 1, share)]
    processes = f"{len(parts)} process{'es' * (len(parts) > 1)}, {hard} fds each"
    pairs = [(serve([("all",)]), serve(parts)) for _ in range(rounds)]
    ours, theirs = (list(zip(*side, strict=True)) for side in zip(*pairs, strict=True))
    yield Figure("65,535 ports by bind(): start", "ms", theirs[0], None, processes)
    yield Figure("65,535 ports by bind(): kernel memory", "MB", theirs[2], None, "slabs")
    yield Figure("65,535 ports by bind(): process memory", "MB", theirs[1])
    yield Figure("65,535 ports by pyskl: start", "ms", ours[0], None, "one socket, import included")
    yield Figure("65,535 ports by pyskl: kernel memory", "MB", ours[3], None, "the program and its maps")
    yield Figure("65,535 ports by pyskl: process memory", "MB", ours[1])
    ratios = [other / mine for mine, other in zip(ours[0], theirs[0], strict=True)]
    yield Figure("65,535 ports: start by bind()", "times pyskl", ratios)


def table(figures: Sequence[Figure]) -> Iterator[str]:
    yield f"{'':42}{'goal':>6}{'quartile':>10}{'median':>10}{'quartile':>10}"
    for each in figures:
        goal = "" if each.goal is None else f"{each.goal:g}"
        missed = " *" if each.goal is not None and each.quartiles[1] > each.goal else ""
        numbers = "".join(f"{number:10.2f}" for number in each.quartiles)
        yield f"{each.name:42}{goal:>6}{numbers} {each.unit}{f' ({each.note})' if each.note else ''}{missed}"
    yield "* the median misses the goal"


def report(figures: Sequence[Figure], target: Path) -> None:
    """Write figures as JSON, with what they were measured on."""
    document = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "figures": [{**each._asdict(), "quartiles": each.quartiles} for each in figures],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path(".build/bench.json"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    few, many = (3, 8) if options.quick else (5, 40)

    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        sys.exit(f"a network namespace of its own: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    raise_fd_limit()
    with tempfile.TemporaryDirectory() as folder:
        baseline = Path(folder, "baseline")
        subprocess.run(["cc", "-O2", "-o", baseline, HERE / "baseline.c", "-lbpf"], check=True)
        figures = [
            *measure_import(many),
            *measure_sockmap(baseline, many),
            *measure_hash(baseline, few),
            *measure_load(baseline, many),
            *measure_service(few),
        ]
    print(*table(figures), sep="\n")
    report(figures, options.json)


if __name__ == "__main__":
    main()
