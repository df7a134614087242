# SPDX-License-Identifier: BSD-2-Clause
"""Measure traffic end to end: python tests/bench/traffic.py, as root, with clang.

Datagrams to random destinations, and connections, each taken from the server's socket by the thread that sent it: to
the port of the socket itself, with nothing attached; through the reference of lookup.py, two look-ups in an LPM
trie; and through a `Dispatcher`; the latter two with one binding and with a million. Each has a network namespace of
its own, and all take turns. The goal of the dispatcher is the reference's median.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import lookup
from lookup import BITS, LABELS, SLOTS, Entry
from run import Figure, Side, report, table

import pyskl
from pyskl.binding import Bindings

HERE = Path(__file__).resolve().parent
PREFIX, LENGTH = 0x20010DB8, 32  # 2001:db8::/32, of documentation: all traffic is to it
DESTINATIONS = 1 << 17
SOCKADDR = struct.Struct("=HHI16sI")  # struct sockaddr_in6
KINDS = {"tcp": (0, "connection"), "udp": (1, "datagram")}
PLAIN, REFERENCE, DISPATCHER = "bound socket", "reference", "dispatcher"


class OfPrefix(lookup.Bindings):
    """Bindings within the prefix: one for each protocol, or so many addresses with a port and /64 with all."""

    def __init__(self, size: int) -> None:
        rnd = random.Random(size)
        self.list = [Entry(1, LENGTH, PREFIX, udp, None) for udp in (0, 1)] if size == 1 else []
        seen: set[Entry] = set()
        while size > 1 and len(seen) < size:
            whole = rnd.getrandbits(1)
            length = 64 if whole else 128
            prefix = PREFIX << (length - LENGTH) | rnd.getrandbits(length - LENGTH)
            seen.add(Entry(1, length, prefix, rnd.getrandbits(1), None if whole else rnd.choice((53, 80, 443, 8080))))
        self.list += seen

    def destinations(self, udp: int, port: int | None = None) -> bytes:
        """Draw addresses that are bound, with ports that are, or with one port."""
        rnd = random.Random(udp)
        chosen = rnd.choices([each for each in self.list if each.udp == udp], k=DESTINATIONS)
        packed = bytearray()
        for each in chosen:
            spare = BITS[1] - each.length
            address = each.prefix << spare | rnd.getrandbits(spare)
            bound = each.port or rnd.randrange(1, 65536)
            packed += SOCKADDR.pack(socket.AF_INET6, socket.htons(port or bound), 0, address.to_bytes(16, "big"), 0)
        return bytes(packed)


def servers(host: str) -> dict[str, socket.socket]:
    """Open a server for each kind."""
    made = {"udp": socket.socket(socket.AF_INET6, socket.SOCK_DGRAM), "tcp": socket.socket(socket.AF_INET6)}
    for each in made.values():
        each.bind((host, 0))
    made["tcp"].listen(1024)
    return made


def refer(
    opened: contextlib.ExitStack, kernel: lookup.Kernel, bindings: OfPrefix, of: dict[str, socket.socket]
) -> None:
    """Attach the reference, with a socket under each label."""
    sizes = {**kernel.sizes, "trie": len(bindings.list), "questions": 1}
    names = ("reference_attached",)
    loaded = opened.enter_context(pyskl.BpfObject.load(kernel.source, programs=names, max_entries=sizes))
    loaded.maps["trie"].update(bindings.trie())
    for label in range(1, LABELS + 1):
        for kind, (udp, _) in KINDS.items():
            loaded.maps["sockets"][(label * 4 + 2 + udp) * SLOTS] = of[kind]
    opened.enter_context(loaded.programs["reference_attached"].attach())


def dispatch(opened: contextlib.ExitStack, bindings: OfPrefix, of: dict[str, socket.socket]) -> None:
    labels = {number: f"service-{number}" for number in range(1, LABELS + 1)}
    dispatcher = opened.enter_context(pyskl.Dispatcher.create())
    for label in labels.values():
        for each in of.values():
            dispatcher.register(label, each)
    dispatcher.replace(Bindings(bindings.records(), labels))


def sides(opened: contextlib.ExitStack, size: int) -> Iterator[tuple[tuple[str, str], Side]]:
    """Set up all who take part, named by the kind of traffic and by who selects the socket."""
    folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
    binary = folder / "traffic"
    subprocess.run(["cc", "-O2", "-Wall", "-o", binary, HERE / "traffic.c"], check=True)
    kernel = lookup.Kernel(opened, {})
    small, large = OfPrefix(1), OfPrefix(size)
    for kind, (udp, _) in KINDS.items():
        (folder / kind).write_bytes(large.destinations(udp))
    for name, bindings in (
        (PLAIN, None),
        *((f"{who}, {count:,}", of) for count, of in ((1, small), (size, large)) for who in (REFERENCE, DISPATCHER)),
    ):
        ns = opened.enter_context(pyskl.NetNS.create())
        with ns.entered():
            for words in ("link set lo up", "-6 route add local 2001:db8::/32 dev lo"):
                subprocess.run(["ip", *words.split()], check=True)
            of = servers("::" if bindings is None else "::1")
            for kind, server in of.items():
                opened.enter_context(server)
                file = folder / kind
                if bindings is None:
                    file = folder / f"{kind} itself"
                    file.write_bytes(large.destinations(KINDS[kind][0], server.getsockname()[1]))
                command = (str(binary), kind, str(server.fileno()), str(file))
                yield (kind, name), opened.enter_context(Side(*command, pass_fds=(server.fileno(),)))
            if bindings is not None:
                refer(opened, kernel, bindings, of) if name.startswith(REFERENCE) else dispatch(opened, bindings, of)


def measure(size: int, rounds: int) -> Iterator[Figure]:
    with contextlib.ExitStack() as opened:
        taking_part = dict(sides(opened, size))
        measured: dict[tuple[str, str], list[float]] = {key: [] for key in taking_part}
        for number in range(rounds + 1):
            for key, side in taking_part.items():
                spent = side.round()
                if number:  # the first is to warm up
                    measured[key] += spent
    for (kind, name), spent in sorted(measured.items()):
        yield figure(kind, name, spent, measured)


def figure(kind: str, name: str, spent: Sequence[float], measured: dict[tuple[str, str], list[float]]) -> Figure:
    unit = KINDS[kind][1]
    note, goal = f"{1e9 / statistics.median(spent):,.0f} {unit}s/s", None
    if name.startswith(DISPATCHER):
        other = measured[kind, name.replace(DISPATCHER, REFERENCE)]
        goal = statistics.median(other)
        times = statistics.median(theirs / mine for theirs, mine in zip(other, spent, strict=True))
        note += f", {times:.2f} times the reference"
    return Figure(f"{kind}: {name}", f"ns/{unit}", spent, goal and round(goal), note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer bindings and rounds")
    parser.add_argument("--json", type=Path, default=Path(".build/traffic.json"), metavar="FILE")
    options = parser.parse_args()
    figures = [*(measure(10_000, 5) if options.quick else measure(1_000_000, 40))]
    print(*table(figures), sep="\n")
    report(figures, options.json)


if __name__ == "__main__":
    main()
