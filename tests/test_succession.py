# SPDX-License-Identifier: BSD-2-Clause
"""pyskl.TakeOver: generations of a daemon, each a process, of which no client notices that they change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess

import pytest
from support import LOAD, V4, Load, ask_tcp, ask_udp, child, kill, new_socket, readable, tcp_listener, udp_socket

import pyskl

pytestmark = [pytest.mark.needs("sk_lookup", "sockmap", "netns_link"), pytest.mark.slow]
GENERATIONS = int(os.environ.get("PYSKL_TEST_GENERATIONS", "8"))

_SERVER = """
import contextlib, os, select, signal, socket, sys
import pyskl

path, pid_file, answer = sys.argv[1:]
reads, writes = os.pipe2(os.O_NONBLOCK)
signal.signal(signal.SIGTERM, lambda *_: os.write(writes, b"!"))  # an exception could hit a connection half-way

def serve(connection):
    with connection, contextlib.suppress(OSError):
        connection.sendall(answer.encode())

listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
with pyskl.Dispatcher.open(path) as dispatcher:
    with pyskl.TakeOver(dispatcher, "web", listener, predecessor=pid_file) as place:
        print(place.pid, flush=True)  # meanwhile clients wait in the backlog
poller = select.poll()
poller.register(listener, select.POLLIN)
poller.register(reads, select.POLLIN)
while reads not in (ready := [fd for fd, _ in poller.poll()]):
    serve(listener.accept()[0])
for connection, _ in pyskl.drain(listener):
    serve(connection)
listener.close()
"""

_ASYNC_SERVER = """
import asyncio, contextlib, signal, socket, sys
import pyskl

path, pid_file, answer = sys.argv[1:]

async def serve(_, writer):
    with contextlib.suppress(OSError):
        writer.write(answer.encode())
        await writer.drain()
    writer.close()

async def main():
    go = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, go.set)
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    with pyskl.Dispatcher.open(path) as dispatcher:
        async with pyskl.TakeOver(dispatcher, "web", listener, predecessor=pid_file) as place:
            server = await asyncio.start_server(serve, sock=listener)
            print(place.pid, flush=True)
    await go.wait()
    async for connection, _ in pyskl.drain(listener):
        with connection:
            await asyncio.get_running_loop().sock_sendall(connection, answer.encode())
    server.close()
    await asyncio.sleep(0)
    while (tasks := asyncio.all_tasks() - {asyncio.current_task()}):
        await asyncio.wait(tasks)

asyncio.run(main())
"""


@contextlib.contextmanager
def pinned(ns, bpffs, protocol="tcp"):
    with pyskl.Dispatcher.create(ns, path=bpffs / "dispatcher") as dispatcher:
        dispatcher.bind("web", protocol, "192.0.2.0/24", ports=80)
        yield dispatcher
        dispatcher.unload()


@pytest.mark.slow
@pytest.mark.parametrize("code", [_SERVER, _ASYNC_SERVER], ids=["blocking", "asyncio"])
def test_generations_of_a_daemon_lose_nobody(netns, bpffs, tmp_path, code):
    """Each a process, which takes over while clients ask."""
    with pinned(netns, bpffs) as dispatcher, contextlib.ExitStack() as stack:

        def start():
            arguments = dispatcher.path, tmp_path / "pid", len(processes)
            processes.append(child(code, *arguments, ns=netns))
            stack.callback(kill, processes[-1])
            return processes[-1].stdout.readline()

        processes: list[subprocess.Popen[str]] = []
        under_load: set[str] = set()
        assert start() == "None\n"
        load = stack.enter_context(Load(netns, LOAD))
        while load.running or len(processes) < GENERATIONS:
            assert start() == f"{processes[-2].pid}\n"
            if load.running:
                under_load.add(str(len(processes) - 2))
            assert processes[-2].wait(30) == 0
        outcomes = load.outcomes()
        processes[-1].send_signal(signal.SIGTERM)
        assert processes[-1].wait(30) == 0
    assert outcomes.total() == LOAD
    assert outcomes.keys() <= {str(number) for number in range(len(processes))}
    assert under_load
    assert outcomes.keys() >= under_load  # each generation really served


@pytest.mark.slow
def test_under_hold_a_crash_refuses_nobody(netns, bpffs, tmp_path):
    """SIGKILL of the newest, again and again: who comes before the next is there waits for it."""
    with pinned(netns, bpffs) as dispatcher, contextlib.ExitStack() as stack:
        dispatcher.set_policy("web", on_missing="hold")

        def start():
            processes.append(child(_SERVER, dispatcher.path, tmp_path / "pid", len(processes), ns=netns))
            stack.callback(kill, processes[-1])
            assert processes[-1].stdout.readline() == "None\n"

        processes: list[subprocess.Popen[str]] = []
        start()
        load = stack.enter_context(Load(netns, LOAD))
        for _ in range(3):
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[-1].wait(1.5)  # time for those who wait to send their SYN again
            processes[-1].kill()
            processes[-1].wait()
            start()
        outcomes = load.outcomes()
    assert outcomes.total() == LOAD
    assert outcomes.keys() & {"ECONNREFUSED", "TimeoutError"} == set()
    # Who was in the queues of one that was killed is reset: there is nobody who could have served them.
    assert sum(count for how, count in outcomes.items() if not how.isdecimal()) < 4 * len(processes)


def test_generations_of_a_udp_server_get_only_datagrams_of_flows_that_they_know(netns):
    """20 of them, and 1,000 flows that go on, each with the one that it began with."""
    generations, each = 20, 50
    with pyskl.Dispatcher.create(netns) as dispatcher, contextlib.ExitStack() as stack:
        dispatcher.bind("udp", "udp", "192.0.2.0/24", ports="1-65535")
        dispatcher.set_policy("udp", udp_sticky=60)
        endpoints, flows = [], []
        for number in range(generations):
            endpoints.append(stack.enter_context(pyskl.udp.Endpoint(udp_socket(netns))))
            dispatcher.register("udp", endpoints[-1])
            for client in range(each):
                sock = stack.enter_context(new_socket(netns, socket.AF_INET, socket.SOCK_DGRAM))
                sock.bind(("198.51.100.1", 0))
                flows.append((sock, (f"192.0.2.{client + 1}", 1000 + len(flows)), number))
            for sock, destination, _ in flows:
                sock.sendto(b"?", destination)
            for _ in flows:
                (readable_one,) = readable(*(endpoint.sock for endpoint in endpoints))[:1]
                served = next(endpoint for endpoint in endpoints if endpoint.sock is readable_one)
                datagram = served.recv()
                served.reply(datagram, str(endpoints.index(served)).encode())
            for sock, destination, knows in flows:
                assert sock.recvfrom(10) == (str(knows).encode(), destination)
    assert len(flows) == 1000


# -- what it does --------------------------------------------------------------------------------------------------


_OBEDIENT = """
import signal
print(flush=True)
signal.sigwait({signal.SIGTERM, signal.SIGUSR1})
"""
_STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
signal.pause()
"""


@contextlib.contextmanager
def process(code):
    started = child("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15, 10})\n" + code)
    try:
        assert started.stdout.readline()
        yield started
    finally:
        kill(started)


def test_new_clients_are_the_successors_from_the_first_line_on(netns, bpffs, tmp_path):
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as old, tcp_listener(netns) as new:
        dispatcher.register("web", old)
        with process(_OBEDIENT) as predecessor:
            (tmp_path / "pid").write_text(f"{predecessor.pid}\n")  # as other programs write it
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=tmp_path / "pid") as place:
                assert place.pid == predecessor.pid
                assert [each.label for each in place.registrations] == ["web"]
                assert ask_tcp(netns, V4, 80, old, new) is new
                assert (tmp_path / "pid").read_text().split()[0] == str(os.getpid())
            assert predecessor.poll() == 0
        with pytest.raises(ValueError, match="this very process"):
            pyskl.TakeOver(dispatcher, "web", new, predecessor=tmp_path / "pid").__enter__()


def test_by_pid_by_another_signal_and_several_sockets(netns, bpffs):
    with (
        pinned(netns, bpffs) as dispatcher,
        tcp_listener(netns) as tcp,
        udp_socket(netns) as udp,
        process(_OBEDIENT) as predecessor,
    ):
        dispatcher.bind("web", "udp", "192.0.2.0/24", ports=80)
        how = {"predecessor": predecessor.pid, "signal": signal.SIGUSR1, "slot": 3}
        with pyskl.TakeOver(dispatcher, "web", tcp, udp, **how) as place:
            assert [each.slot for each in place.registrations] == [3, 3]
            assert ask_tcp(netns, V4, 80, tcp) is tcp
            assert ask_udp(netns, V4, 80, udp) is udp
        assert predecessor.poll() == 0


@pytest.mark.parametrize("content", [None, "", "gone", "reused"])
def test_where_there_is_no_predecessor(netns, bpffs, tmp_path, content):
    path = tmp_path / "pid"
    with process(_OBEDIENT) as other:
        pid = other.pid
        if content == "reused":  # the number is another process's by now
            path.write_text(f"{pid}\n1\n")
        elif content == "gone":
            other.kill()
            other.wait()
            path.write_text(f"{pid}\n")
        elif content is not None:
            path.write_text(content)
        with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new:
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=path) as place:
                assert place.pid is None
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=None) as place:
                assert place.pid is None
        assert path.read_text().split()[0] == str(os.getpid())
        assert content != "reused" or other.poll() is None


def test_one_that_does_not_go_in_time(netns, bpffs):
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new, process(_STUBBORN) as predecessor:
        with pytest.raises(TimeoutError, match=str(predecessor.pid)):
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=predecessor.pid, timeout=0.05):
                pass

        async def main():
            async with pyskl.TakeOver(dispatcher, "web", new, predecessor=predecessor.pid, timeout=0.05):
                pass

        with pytest.raises(TimeoutError, match=str(predecessor.pid)):
            asyncio.run(main())
        assert ask_tcp(netns, V4, 80, new) is new


def test_what_fails_is_not_held_up_by_the_predecessor_and_leaves_it_alone(netns, bpffs, tmp_path):
    path = tmp_path / "pid"
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new, process(_STUBBORN) as predecessor:
        with pytest.raises(LookupError):
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=predecessor.pid, timeout=None):
                raise LookupError
        path.write_text("not a pid")
        with pytest.raises(ValueError, match="no pid"):
            pyskl.TakeOver(dispatcher, "web", new, predecessor=path).__enter__()
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new, process(_OBEDIENT) as predecessor:
        path.write_text(f"{predecessor.pid}")
        new.close()
        with pytest.raises(ValueError):
            pyskl.TakeOver(dispatcher, "web", new, predecessor=path).__enter__()
        assert path.read_text() == f"{predecessor.pid}"
        assert predecessor.poll() is None
        with pytest.raises(ValueError, match="no socket"):
            pyskl.TakeOver(dispatcher, "web", predecessor=path)
        with pytest.raises(ValueError, match="negative"):
            pyskl.TakeOver(dispatcher, "web", 3, predecessor=path, timeout=-1)


def test_two_that_want_the_same_place_at_once(netns, bpffs, tmp_path):
    path = tmp_path / "pid"
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as one, tcp_listener(netns) as other:
        with pyskl.TakeOver(dispatcher, "web", one, predecessor=path):
            with pytest.raises(pyskl.Busy) as error:
                pyskl.TakeOver(dispatcher, "web", other, predecessor=path, timeout=0.05).__enter__()
            assert error.value.pid == os.getpid()
            assert ask_tcp(netns, V4, 80, one, other) is one
