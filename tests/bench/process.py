# SPDX-License-Identifier: BSD-2-Clause
"""Measure what a dispatcher of a million bindings takes inside a process: python tests/bench/process.py, as root.

Each round is a new process: it loads a bindings file into an ephemeral dispatcher, loads another with one entry in a
hundred changed, replaces all by Binding objects, binds and unbinds one prefix after another, registers sockets, and
asks for the status and for the metrics. Times are of the wall's clock, to which the goals are, with the median of the
CPU's beside them: on a machine that has other work the two differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import workload
from run import Figure, report, table

ENTRIES = 500_000
CHANGES = 500  # of one binding, in a round
SCRAPES = 5

# The unit of each figure, and the goal at a million bindings.
GOALS: dict[str, tuple[str, float | None]] = {
    "load a file": ("s", 1.8),
    "load it again, 1% changed": ("s", 1.5),
    "replace(), from Binding objects": ("s", 1.5),
    "bind() one": ("ms", 1),
    "unbind() one": ("ms", 1),
    "register() one": ("ms", None),
    "status()": ("s", 1.5),
    "scrape of the metrics": ("ms", 50),
    "process, while it loads": ("bytes/binding", 250),
    "kernel": ("bytes/binding", 64),
}


def seconds(function: Callable[[], object]) -> list[float]:
    """Measure a call: by the wall's clock, and by the CPU's."""
    before = time.perf_counter(), time.process_time()
    function()
    return [time.perf_counter() - before[0], time.process_time() - before[1]]


def each_ms(functions: Sequence[Callable[[], object]]) -> list[float]:
    """Give the median of many short calls, in milliseconds."""
    return [1e3 * statistics.median(column) for column in zip(*map(seconds, functions), strict=True)]


def memory(name: str) -> int:
    """Read a member of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{name}:"))


def round_of(first: Path, changed: Path) -> dict[str, list[float]]:
    from subject import memory_of

    import pyskl
    from pyskl import bindings_file, metrics

    def load(path: Path) -> None:
        loaded = bindings_file.load(path.read_bytes(), name=path.name)
        dispatcher.replace(loaded.bindings, loaded.policies)

    with contextlib.ExitStack() as opened:
        ns = opened.enter_context(pyskl.NetNS.create())
        opened.enter_context(ns.entered())
        dispatcher = opened.enter_context(pyskl.Dispatcher.create())
        bindings_file.load('{"bindings": []}')  # imports what it needs
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
        before = memory("VmRSS")
        figures = {"load a file": seconds(partial(load, first))}
        peak = memory("VmHWM") - before
        figures["load it again, 1% changed"] = seconds(partial(load, changed))
        objects = list(dispatcher.bindings())
        figures["replace(), from Binding objects"] = seconds(partial(dispatcher.replace, objects))
        count = len(objects)
        for name, change in (("bind() one", dispatcher.bind), ("unbind() one", dispatcher.unbind)):
            figures[name] = each_ms(
                [partial(change, "service-0", "tcp", f"198.51.{i >> 8}.{i & 255}", 8081) for i in range(CHANGES)]
            )
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        figures["register() one"] = each_ms(
            [partial(dispatcher.register, workload.label(i), listener) for i in range(workload.LABELS)]
        )
        figures["status()"] = seconds(dispatcher.status)
        figures["scrape of the metrics"] = each_ms([partial(metrics.text, dispatcher)] * SCRAPES)
        figures["process, while it loads"] = [peak / count]
        figures["kernel"] = [memory_of(dispatcher._store.table().map) / count]
        assert dispatcher.explain("tcp", ("198.51.0.0", 8081)).label is None
    return figures


def measure(entries: int, rounds: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        files = workload.write(entries, Path(folder))
        command = [sys.executable, __file__, "--round", *map(str, files)]
        measured = [
            json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(rounds)
        ]
    for name, (unit, goal) in GOALS.items():
        walls, *cpus = zip(*(each[name] for each in measured), strict=True)
        note = "".join(f"CPU {statistics.median(cpu):.2f} {unit}" for cpu in cpus)
        yield Figure(f"{2 * entries:,}: {name}", unit, walls, goal if entries == ENTRIES else None, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer bindings and rounds")
    parser.add_argument("--json", type=Path, default=Path(".build/process.json"), metavar="FILE")
    parser.add_argument("--round", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.round:
        print(json.dumps(round_of(*options.round)))
        return
    figures = [*(measure(20_000, 2) if options.quick else measure(ENTRIES, 5))]
    print(*table(figures), sep="\n")
    report(figures, options.json)


if __name__ == "__main__":
    main()
