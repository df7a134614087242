# SPDX-License-Identifier: BSD-2-Clause
"""Measure the command `pyskl` as an operator has it: python tests/bench/command.py, as root, with bpffs mounted.

Each figure is of whole processes: what the wall's clock says, with the median of the CPU's time, and what was resident
at most. Beside it is tubular's, as far as it is known: two cores, Linux 6.18, a machine of its own. It is no run of
today, and its process starts in 3.4 ms; what Python's own start takes is in the first line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import workload
from run import ENVIRONMENT, Figure, report, table

import pyskl

PYSKL = str(Path(sys.executable).with_name("pyskl"))
FOLDER = f"/sys/fs/bpf/pyskl-bench-{os.getpid()}"
SIZES = (10_000, 100_000, 1_000_000)
ONES = 9  # runs, in a round, of what is done in milliseconds
START, LOAD, AGAIN, DRY, DIFF, STATUS = (
    "python -I -c pass", "load-bindings", "load-bindings, 1% changed", "load-bindings --dry-run, 1% changed",
    "load-bindings --json, all new", "status",
)  # fmt: skip
BIND, REGISTER, METRICS, SCRAPE = "bind one", "register one", "metrics", "scrape of metrics --listen"
ONE = 0.0044

# Seconds, of tubular.
TUBULAR = {
    (LOAD, 10_000): 0.18, (LOAD, 100_000): 1.77, (LOAD, 1_000_000): 18.4,
    (AGAIN, 10_000): 0.07, (AGAIN, 100_000): 0.66, (AGAIN, 1_000_000): 7.0,
    (STATUS, 10_000): 0.19, (STATUS, 100_000): 1.99, (STATUS, 1_000_000): 19.0,
    **{(what, size): ONE for what in (BIND, REGISTER) for size in SIZES},
}  # fmt: skip
RESIDENT = {10_000: 16, 100_000: 42, 1_000_000: 408}  # megabytes
GOALS = {
    (LOAD, 1_000_000): 1.8, (AGAIN, 1_000_000): 1.5, (STATUS, 1_000_000): 1.5, (SCRAPE, 1_000_000): 0.05,
}  # fmt: skip


class Run(NamedTuple):
    """One process: seconds, seconds, megabytes."""

    wall: float
    cpu: float
    resident: float


def run(*command: object, listener: socket.socket | None = None) -> Run:
    """Run a command in silence; with a listener as systemd gives one."""
    words = list(map(str, command))
    began = time.perf_counter()
    child = os.fork()
    if not child:
        environment = dict(ENVIRONMENT)
        silence = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(silence, fd)
        if listener is not None:
            os.dup2(listener.fileno(), 3)
            os.set_inheritable(3, True)
            environment |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
        os.execve(words[0], words, environment)
    _, status, used = os.wait4(child, 0)
    wall = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(words)}: {os.waitstatus_to_exitcode(status)}")
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1.024e-3)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Run `pyskl metrics --listen`, and give the URL that it tells."""
    with subprocess.Popen(
        [PYSKL, "--path", FOLDER, "metrics", "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    ) as server:  # fmt: skip
        try:
            yield server.stderr.readline().split()[-1]
        finally:
            server.send_signal(signal.SIGTERM)


def scrape(url: str) -> Run:
    began = time.perf_counter()
    with urllib.request.urlopen(url) as answer:
        answer.read()
    return Run(time.perf_counter() - began, 0, 0)


def verb(*words: object, listener: socket.socket | None = None) -> Run:
    return run(PYSKL, "--path", FOLDER, *words, listener=listener)


def round_of(files: tuple[Path, Path]) -> Iterator[tuple[str, Run]]:
    """Do all once, with a new dispatcher; what is short, some times."""
    first, changed = files
    yield from [(START, run(sys.executable, "-I", "-c", "pass")) for _ in range(ONES)]
    verb("load")
    try:
        yield LOAD, verb("load-bindings", first)
        yield AGAIN, verb("load-bindings", changed)
        yield DRY, verb("load-bindings", "--dry-run", first)
        yield STATUS, verb("status")
        yield from [(BIND, verb("bind", "service-0", "tcp", f"198.51.100.{i}", 8081)) for i in range(ONES)]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield from [(REGISTER, verb("register", workload.label(i), listener=listener)) for i in range(ONES)]
            yield METRICS, verb("metrics")
            with served() as url:
                scrape(url)
                yield from [(SCRAPE, scrape(url)) for _ in range(ONES)]
    finally:
        verb("unload")
    verb("load")
    try:
        yield DIFF, verb("load-bindings", "--json", first)
    finally:
        verb("unload")


def measure(sizes: Sequence[int], rounds: int) -> Iterator[Figure]:
    measured: dict[tuple[str, int], list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for size in sizes:
            Path(folder, str(size)).mkdir()
            files[size] = workload.write(size // 2, Path(folder, str(size)))
        with pyskl.NetNS.create() as ns, ns.entered():
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            for _ in range(rounds):
                for size in sizes:
                    for name, figures in round_of(files[size]):
                        measured.setdefault((name, size), []).append(figures)
    for size in sizes:
        yield from (figure(name, size, runs) for (name, of), runs in measured.items() if of == size)


def figure(name: str, size: int, runs: Sequence[Run]) -> Figure:
    walls, cpus, residents = zip(*runs, strict=True)
    theirs = TUBULAR.get((name, size))
    scale, unit = (1e3, "ms") if statistics.median(walls) < 0.2 else (1, "s")
    notes = [f"CPU {statistics.median(cpus) * scale:.2f} {unit}, {max(residents):.0f} MB"] if max(residents) else []
    if theirs is not None:
        slower = ", which is faster" if theirs < statistics.median(walls) else ""
        memory = f", {RESIDENT[size]} MB" if name == LOAD else ""
        notes.append(f"tubular {theirs * scale:g} {unit}{memory}{slower}")
    goal = GOALS.get((name, size))
    return Figure(
        f"{size:,}: {name}", unit, [wall * scale for wall in walls], None if goal is None else goal * scale,
        "; ".join(notes),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer bindings and rounds")
    parser.add_argument("--json", type=Path, default=Path(".build/command.json"), metavar="FILE")
    options = parser.parse_args()
    figures = [*(measure(SIZES[:1], 2) if options.quick else measure(SIZES, 3))]
    print(*table(figures), sep="\n")
    print("CPU and MB are of the same processes; tubular's figures were measured elsewhere")
    report(figures, options.json)


if __name__ == "__main__":
    main()
