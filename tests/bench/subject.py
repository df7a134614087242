# SPDX-License-Identifier: BSD-2-Clause
"""The Python side of the benchmarks: what baseline.c does, through pyskl; and the start of a service.

Each line on standard input asks for one round; the answer is a line of figures. Where pyskl is imported says whether
that is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses  # noqa: F401 - of the usual modules of a daemon, those that nothing else here needs
import ipaddress  # noqa: F401
import logging  # noqa: F401
import socket
import sys
import time
import typing
from collections.abc import Callable, Iterator

if typing.TYPE_CHECKING:
    import pyskl

LOOPBACK = "127.0.0.1"
UPDATES = 4000  # of a sockmap in a round, as in baseline.c


def lap() -> Callable[[], float]:
    """Make a stopwatch: nanoseconds since it was asked before."""
    before = time.perf_counter_ns()

    def passed() -> float:
        nonlocal before
        now = time.perf_counter_ns()
        before, spent = now, now - before
        return spent

    return passed


def listen(port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((LOOPBACK, port))
    sock.listen()
    return sock


def bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((LOOPBACK, 0))
    return sock


def sockmap(make: Callable[[], socket.socket], count: int) -> Iterator[tuple[float, ...]]:
    """`m[i] = sock` and `m.update()`, an item."""
    import pyskl

    with contextlib.ExitStack() as kept, pyskl.SockMap.create(count) as m:
        sockets = [kept.enter_context(make()) for _ in range(count)]
        while True:
            passed = lap()
            for _ in range(UPDATES // count):
                for i in range(count):
                    m[i] = sockets[i]
            singly = passed()
            for _ in range(UPDATES // count):
                m.update(enumerate(sockets))
            yield singly / UPDATES, passed() / UPDATES


def hashmap(count: int) -> Iterator[tuple[float, ...]]:
    """`m[key] = value`, `m[key]`, `m.update()` and `m.items()`, an item."""
    import pyskl

    entries = {i: i.to_bytes(8, sys.byteorder) for i in range(count)}
    with pyskl.HashMap.create(value_size=8, max_entries=count) as m:
        while True:
            passed = lap()
            for key, value in entries.items():
                m[key] = value
            update = passed()
            for key in entries:
                m[key]
            lookup = passed()
            m.update(entries)
            update_batch = passed()
            for _ in m.items():
                pass
            yield tuple(each / count for each in (update, lookup, update_batch, passed()))


def redirect() -> pyskl.BpfObject:
    """Load the program that sends every port of the loopback address to a slot."""
    import pyskl

    constants = {"prefix4": socket.inet_aton(LOOPBACK), "prefix4_len": 32}
    return pyskl.BpfObject.load(pyskl.REDIRECT, constants=constants)


def load() -> Iterator[tuple[float, ...]]:
    """Load, attach, test run, close."""
    while True:
        passed = lap()
        with redirect() as loaded:
            times = [passed()]
            program = loaded.programs["redirect"]
            with program.attach():
                times.append(passed())
                program.test_run("tcp", (LOOPBACK, 80), (LOOPBACK, 40000))
                times.append(passed())
            del program
        yield *times, passed()


def private() -> int:
    """Count the bytes that are this process's alone."""
    with open("/proc/self/smaps_rollup") as rollup:
        return 1024 * sum(int(line.split()[1]) for line in rollup if line.startswith("Private"))


def memory_of(thing: pyskl.Program | pyskl.Map) -> int:
    """Ask the kernel how many bytes a program or a map takes (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{thing.fileno()}") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("memlock:"))


def serve_each(first: int, last: int) -> Iterator[tuple[float, ...]]:
    """Open a service on a range of ports with a socket for each, and keep it open: nanoseconds, bytes, no BPF."""
    before, passed = private(), lap()
    sockets = [listen(port) for port in range(first, last + 1)]
    yield passed(), private() - before, 0
    for sock in sockets:
        sock.close()


def serve_all() -> Iterator[tuple[float, ...]]:
    """Open a service on every port with one socket, and keep it open: nanoseconds, bytes, and those of BPF.

    What a daemon would not have imported without pyskl is counted.
    """
    before, passed = private(), lap()
    with listen() as sock, redirect() as loaded:
        loaded.maps["sockets"][0] = sock
        with loaded.programs["redirect"].attach():
            spent = passed()
            held = (*loaded.programs.values(), *loaded.maps.values())
            yield spent, private() - before, sum(memory_of(each) for each in held)


ROUNDS = {
    "tcp": lambda count: sockmap(listen, int(count)),
    "udp": lambda count: sockmap(bound, int(count)),
    "hash": lambda count: hashmap(int(count)),
    "load": lambda _: load(),
    "each": lambda first, last: serve_each(int(first), int(last)),
    "all": serve_all,
}

if __name__ == "__main__":
    rounds = ROUNDS[sys.argv[1]](*sys.argv[2:])
    for _ in sys.stdin:
        print(*next(rounds), flush=True)
    next(rounds, None)
