# SPDX-License-Identifier: BSD-2-Clause
"""Measure pyskl.udp against Python's own sockets and against C: CPU time for each datagram, python tests/bench/udp.py.

The rounds of all take turns, in a network namespace of their own, and are compared round by round. A round's datagrams
wait in the receive buffer before the clock starts, so that only the server is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from run import Figure, Side, table

import pyskl
from pyskl.udp import Endpoint

HERE = Path(__file__).parent
DATAGRAMS, SIZE, TOGETHER = 2000, 64, 64  # as in udp.c
SO_RCVBUFFORCE = 33
PREFIX = "192.0.2."
OWN_PORT = 5353
PLAIN = {"receive": "recvfrom()", "echo": "recvfrom(), sendto()"}
IN_C = {"receive": "recvmmsg(), C", "echo": "recvmmsg(), sendmmsg(), C"}

Serve = Callable[[], None]


def bound(address: tuple[str, int] = ("127.0.0.1", 0)) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
    sock.bind(address)
    return sock


def receive_plain(sock: socket.socket) -> Serve:
    def serve() -> None:
        for _ in range(DATAGRAMS):
            sock.recvfrom(65535)

    return serve


def receive_one(endpoint: Endpoint) -> Serve:
    def serve() -> None:
        for _ in range(DATAGRAMS):
            endpoint.recv()

    return serve


def receive_many(endpoint: Endpoint) -> Serve:
    def serve() -> None:
        done = 0
        while done < DATAGRAMS:
            done += len(endpoint.recv_many(TOGETHER))

    return serve


def echo_plain(sock: socket.socket) -> Serve:
    def serve() -> None:
        for _ in range(DATAGRAMS):
            sock.sendto(*sock.recvfrom(65535))

    return serve


def echo_one(endpoint: Endpoint) -> Serve:
    def serve() -> None:
        for _ in range(DATAGRAMS):
            datagram = endpoint.recv()
            endpoint.reply(datagram, datagram.data)

    return serve


def echo_many(endpoint: Endpoint) -> Serve:
    def serve() -> None:
        done = 0
        while done < DATAGRAMS:
            done += endpoint.send_many([each.reply(each.data) for each in endpoint.recv_many(TOGETHER)])

    return serve


class Asker:
    """Fills a server's receive buffer, and times how it is emptied."""

    def __init__(self, serve: Serve, destinations: list[tuple[str, int]]) -> None:
        self._serve = serve
        self._destinations = destinations
        self._client = bound(("198.51.100.1", 0))
        self._client.setblocking(False)

    def round(self) -> list[float]:
        for number in range(DATAGRAMS):
            self._client.sendto(bytes(SIZE), self._destinations[number % len(self._destinations)])
        began = time.thread_time_ns()
        self._serve()
        spent = time.thread_time_ns() - began
        with contextlib.suppress(BlockingIOError):
            while True:
                self._client.recv(SIZE)
        return [spent / DATAGRAMS]


def sides(stack: contextlib.ExitStack, binary: Path) -> Iterator[tuple[str, Asker | Side]]:
    """Name each that takes part: what it does, and how."""
    constants = {"prefix4": socket.inet_aton(f"{PREFIX}0"), "prefix4_len": 24}
    program = stack.enter_context(pyskl.Program.load(pyskl.REDIRECT, constants=constants))
    stack.enter_context(program.attach())
    steered = stack.enter_context(Endpoint(bound(("127.0.0.1", OWN_PORT))))
    program.maps["sockets"][1] = steered
    addresses = [(f"{PREFIX}{host}", OWN_PORT) for host in range(1, 101)]
    ports = [(f"{PREFIX}1", 10_000 + port) for port in range(100)]

    plain = stack.enter_context(bound())
    own = stack.enter_context(Endpoint(bound()))
    for what, in_python in (
        ("receive", [(receive_plain, ""), (receive_one, "recv()"), (receive_many, "recv_many()")]),
        ("echo", [(echo_plain, ""), (echo_one, "recv(), reply()"), (echo_many, "recv_many(), send_many()")]),
    ):
        yield f"{what}: {IN_C[what]}", stack.enter_context(Side(str(binary), what))
        for make, name in in_python:
            sock = plain if "plain" in make.__name__ else own
            yield f"{what}: {name or PLAIN[what]}", Asker(make(sock), [sock.getsockname()])
    for where, destinations in (("100 hosts", addresses), ("100 ports", ports)):
        yield f"echo, {where}: recv(), reply()", Asker(echo_one(steered), destinations)
        yield f"echo, {where}: recv_many(), send_many()", Asker(echo_many(steered), destinations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        binary = Path(stack.enter_context(tempfile.TemporaryDirectory()), "udp")
        subprocess.run(["cc", "-O2", "-o", binary, HERE / "udp.c"], check=True)
        ns = stack.enter_context(pyskl.NetNS.create())
        stack.enter_context(ns.entered())
        for command in (
            "link set lo up",
            f"route add local {PREFIX}0/24 dev lo",
            "route add local 198.51.100.0/24 dev lo",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        taking_part = dict(sides(stack, binary))
        rounds: dict[str, list[float]] = {name: [] for name in taking_part}
        for number in range(options.rounds + 1):
            for name, side in taking_part.items():
                spent = side.round()
                if number:  # the first is to warm up
                    rounds[name] += spent
    print(*table(list(figures(rounds))), sep="\n")


def figures(rounds: dict[str, list[float]]) -> Iterator[Figure]:
    for whose, other in (("times the plain socket", PLAIN), ("times C", IN_C)):
        for name, spent in rounds.items():
            what, _, how = name.partition(": ")
            theirs = other[what.partition(",")[0]]
            if how == theirs or how in IN_C.values():
                continue
            ratios = [one / two for one, two in zip(spent, rounds[f"{what.partition(',')[0]}: {theirs}"], strict=True)]
            yield Figure(name, whose, ratios, note=f"{statistics.median(spent):.0f} ns")
    for name in (f"{what}: {how[what]}" for what in PLAIN for how in (PLAIN, IN_C)):
        yield Figure(name, "ns", rounds[name])


if __name__ == "__main__":
    main()
