# SPDX-License-Identifier: BSD-2-Clause
"""Measure what it costs to let UDP flows stay (udp_sticky): python tests/bench/sticky.py, as root, with clang.

Datagrams over loopback, of one flow that goes on and of ever new flows, to a label of dispatchers that differ:
    without: bpf/dispatcher.bpf.c compiled with no flows that stay
    unused: no label lets flows stay
    another: another label does
    sticky: this one does, and remembers as many flows as it can when it is measured
Each has a network namespace of its own, and all take turns. The time of look-ups is the kernel's own count
(kernel.bpf_stats_enabled, which adds the same to each). That of datagrams is the sender's CPU time, which on loopback
is the whole way; the receiver drops them at once. Figures are ratios to "unused", round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from run import Figure, table

import pyskl
from pyskl import _sys, store

ROOT = Path(__file__).resolve().parent.parent.parent
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
DATAGRAMS = 10_000  # of a round
REMEMBERED = 1 << 17
HOSTS, PORTS = range(1, 251), range(1024, 65536)
PREFIX, CLIENT = "192.0.2.", "198.51.100.1"
DISPATCHERS = ("without", "unused", "another", "sticky")
FLOWS = ("one flow", "new flows")


def compile_without(folder: Path) -> Path:
    """Build the dispatcher as if no label ever let flows stay."""
    sys.path.insert(0, str(ROOT))
    from build_ffi import CLANG

    text = (ROOT / "bpf/dispatcher.bpf.c").read_text()
    assert "shared->sticky" in text
    source = folder / "dispatcher.bpf.c"
    source.write_text(text.replace("shared->sticky", "0"))
    how = [f"-I{ROOT / 'bpf'}", "-Wno-unused-function", "-target", "bpf"]
    subprocess.run(["clang", *CLANG, *how, "-c", source, "-o", folder / "dispatcher.bpf.o"], check=True, cwd=ROOT)
    return folder / "dispatcher.bpf.o"


class Subject:
    """A dispatcher, a socket of its label that drops what it gets, and clients."""

    def __init__(self, kind: str, opened: contextlib.ExitStack, without: Path) -> None:
        ns = opened.enter_context(pyskl.NetNS.create())
        with ns.entered():
            for command in (
                "link set lo up",
                f"route add local {PREFIX}0/24 dev lo",
                "route add local 198.51.100.0/24 dev lo",
            ):
                subprocess.run(["ip", *command.split()], check=True)
            server, self._client = (opened.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(2))
            with mock.patch.object(store, "_OBJECT", str(without) if kind == "without" else store._OBJECT):
                self._dispatcher = opened.enter_context(pyskl.Dispatcher.create())
        server.bind(("127.0.0.1", 0))
        _sys.mute(server.fileno())
        self._client.bind((CLIENT, 0))
        self._dispatcher.bind("this", "udp", f"{PREFIX}0/24")
        self._dispatcher.register("this", server)
        self._dispatcher.bind("other", "udp", "203.0.113.0/24")
        if kind in ("another", "sticky"):
            self._dispatcher.set_policy("this" if kind == "sticky" else "other", udp_sticky=3600)
        self._program = self._dispatcher.program
        self._new = itertools.cycle((f"{PREFIX}{host}", port) for host in HOSTS for port in PORTS)
        if kind == "sticky":
            for _ in range(REMEMBERED // DATAGRAMS + 1):
                self.round("new flows")

    def round(self, flows: str) -> tuple[float, float]:
        """Tell the nanoseconds of a look-up, and of a datagram in all."""
        destinations = [(f"{PREFIX}1", 80)] * DATAGRAMS
        if flows == "new flows":
            destinations = list(itertools.islice(self._new, DATAGRAMS))
        send = self._client.sendto
        before = self._program.info
        began = time.thread_time_ns()
        for destination in destinations:
            send(b"x", destination)
        spent = time.thread_time_ns() - began
        after = self._program.info
        runs = after.run_count - before.run_count
        assert runs == DATAGRAMS, f"{runs} look-ups for {DATAGRAMS} datagrams"
        return (after.run_time_ns - before.run_time_ns) / runs, spent / DATAGRAMS


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Let the kernel count the time of programs."""
    before = STATS.read_text()
    STATS.write_text("1")
    try:
        yield
    finally:
        STATS.write_text(before)


def figures(rounds: dict[tuple[str, str], list[tuple[float, float]]]) -> Iterator[Figure]:
    for place, what in enumerate(("look-up", "datagram")):
        for flows in FLOWS:
            unused = [each[place] for each in rounds["unused", flows]]
            for kind in DISPATCHERS:
                spent = [each[place] for each in rounds[kind, flows]]
                ratios = [one / other for one, other in zip(spent, unused, strict=True)]
                note = f"{statistics.median(spent):.0f} ns"
                yield Figure(f"{what}, {flows}: {kind}", "times unused", ratios, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="with the same dispatchers")
    parser.add_argument("--places", type=int, default=8, help="how often these are made anew, elsewhere in memory")
    options = parser.parse_args()
    rounds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, counted():
        without = compile_without(Path(folder))
        for _ in range(options.places):
            with contextlib.ExitStack() as opened:
                order = random.sample(DISPATCHERS, len(DISPATCHERS))
                subjects = {kind: Subject(kind, opened, without) for kind in order}
                for number, flows in itertools.product(range(options.rounds + 1), FLOWS):
                    for kind, subject in subjects.items():
                        spent = subject.round(flows)
                        if number:  # the first is to warm up
                            rounds.setdefault((kind, flows), []).append(spent)
    print(*table(list(figures(rounds))), sep="\n")


if __name__ == "__main__":
    main()
