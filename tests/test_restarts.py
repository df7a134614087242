# SPDX-License-Identifier: BSD-2-Clause
"""Each way in which a daemon restarts, under load: nobody is lost, reset or answered twice, and each generation serves.

Each generation is a process. A sample in each run; 100 generations and 200,000 connections, in each way:
``PYSKL_TEST_WHOLE=1 ./ci/test tests/test_restarts.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections import Counter, defaultdict

import pytest
from support import LOAD, Load, certificate, child, handed_over, kill

import pyskl

pytestmark = [pytest.mark.needs("sk_lookup", "sockmap", "netns_link"), pytest.mark.slow]
WHOLE = "PYSKL_TEST_WHOLE" in os.environ
GENERATIONS = 100 if WHOLE else 8
CONNECTIONS = 200_000 if WHOLE else LOAD // 2
SHARE = CONNECTIONS // GENERATIONS  # of each generation, before the next one starts
PATIENCE = 60.0  # a bound for what is waited for


# -- what all daemons do -------------------------------------------------------------------------------------------

_DAEMON = """
import contextlib, os, select, signal, socket, sys
import pyskl

number, share = map(int, sys.argv[1:3])
answered = 0
reads, writes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
for each in (signal.SIGTERM, signal.SIGHUP):
    # No exception: it could hit a connection half-way.
    signal.signal(each, lambda which, _: os.write(writes, bytes([which])))

def tell(*words):
    print(number, *words, flush=True)

def count():
    global answered
    answered += 1
    if answered == share:
        tell("share")

def serve(connection):
    with connection:
        connection.sendall(b"%d" % number)
    count()

def ready(*fds):
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll()]

def serve_until_told(listener):
    while reads not in ready(listener.fileno(), reads):
        serve(listener.accept()[0])
"""


class Generations:
    """Processes, one after the other, each of which tells in lines what it does: its number, a word, and a figure."""

    def __init__(self, ns, stack):
        self._ns = ns
        reader, self._writer = os.pipe()
        self._lines = stack.enter_context(open(reader))
        stack.callback(os.close, self._writer)
        self._stack = stack
        self._said = defaultdict(dict)
        self._buffer = b""

    def start(self, code, number, *arguments, **how):
        """One more, of the code that follows what all have in common."""
        process = child(_DAEMON + code, number, SHARE, *arguments, ns=self._ns, stdout=self._writer, **how)
        self._stack.callback(kill, process)
        return process

    def told(self, number, word):
        """Wait until a generation has told something, and give its figure."""
        deadline = time.monotonic() + PATIENCE
        while word not in self._said[number]:
            left = deadline - time.monotonic()
            assert left > 0, f"generation {number} has not told {word!r}, but {dict(self._said)}"
            if select.select([self._lines], [], [], left)[0]:
                self._buffer += os.read(self._lines.fileno(), 4096)
                *lines, self._buffer = self._buffer.split(b"\n")
                for line in lines:
                    who, what, *figure = line.decode().split()
                    self._said[int(who)][what] = int(*figure)
        return self._said[number][word]

    def under_load(self, restart, *protocols):
        """Let one follow the other, by ``restart(number)``, when it has had its share; ``restart(None)`` is the end."""
        with contextlib.ExitStack() as loads:
            restart(0)
            options = {"until_told": True, "clients": 2 // len(protocols)}
            running = [loads.enter_context(Load(self._ns, 0, protocol=each, **options)) for each in protocols]
            for number in range(GENERATIONS):
                if number:
                    restart(number)
                self.told(number, "share")
            outcomes = Counter()
            for load in running:
                outcomes.update(load.outcomes())
        restart(None)
        answered = {str(number): self.told(number, "answered") for number in range(GENERATIONS)}
        assert outcomes == answered  # nobody lost, reset, or answered twice
        assert outcomes.total() >= CONNECTIONS
        assert min(outcomes.values()) >= SHARE  # each generation really served


@pytest.fixture
def generations(netns):
    with contextlib.ExitStack() as stack:
        yield Generations(netns, stack)


@contextlib.contextmanager
def pinned(ns, bpffs, *protocols, ports=80):
    with pyskl.Dispatcher.create(ns, path=bpffs / "dispatcher") as dispatcher:
        for protocol in protocols or ["tcp"]:
            dispatcher.bind("web", protocol, "192.0.2.0/24", ports)
        yield dispatcher
        dispatcher.unload()


# -- two processes over a pinned dispatcher ------------------------------------------------------------------------

_TAKES_OVER = """
path, pid_file = sys.argv[3:]
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
with pyskl.Dispatcher.open(path) as dispatcher:
    with pyskl.TakeOver(dispatcher, "web", listener, predecessor=pid_file):
        pass  # meanwhile clients wait in the backlog
tell("ready")
serve_until_told(listener)
for connection, _ in pyskl.drain(listener):
    serve(connection)
listener.close()
tell("answered", answered)
"""

_TAKES_OVER_IN_ASYNCIO = """
import asyncio

async def answer(_, writer):
    with contextlib.suppress(ConnectionResetError):  # the client has read the answer, and is gone
        writer.write(b"%d" % number)
        await writer.drain()
        writer.close()
    count()

async def main(path, pid_file):
    go = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, go.set)
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    with pyskl.Dispatcher.open(path) as dispatcher:
        async with pyskl.TakeOver(dispatcher, "web", listener, predecessor=pid_file):
            server = await asyncio.start_server(answer, sock=listener)
    tell("ready")
    await go.wait()
    async for connection, _ in pyskl.drain(listener):
        with connection:
            await asyncio.get_running_loop().sock_sendall(connection, b"%d" % number)
        count()
    server.close()
    await asyncio.sleep(0)
    while (tasks := asyncio.all_tasks() - {asyncio.current_task()}):
        await asyncio.wait(tasks)
    tell("answered", answered)

asyncio.run(main(*sys.argv[3:]))
"""


@pytest.mark.parametrize("code", [_TAKES_OVER, _TAKES_OVER_IN_ASYNCIO], ids=["blocking", "asyncio"])
def test_two_processes_over_a_pinned_dispatcher(netns, bpffs, tmp_path, generations, code):
    with pinned(netns, bpffs) as dispatcher:
        take_over(generations, dispatcher, tmp_path, code, "tcp")


def take_over(generations, dispatcher, folder, code, *protocols):
    processes = []

    def restart(number):
        if number is None:
            processes[-1].terminate()
            return
        processes.append(generations.start(code, number, dispatcher.path, folder / "pid"))
        generations.told(number, "ready")
        if number:
            assert processes[-2].wait(PATIENCE) == 0

    generations.under_load(restart, *protocols)
    assert processes[-1].wait(PATIENCE) == 0


_TAKES_OVER_TCP_AND_UDP = """
path, pid_file = sys.argv[3:]
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 0))
endpoint = pyskl.udp.Endpoint(sock)

def answer():
    question = endpoint.recv()
    endpoint.reply(question, b"%d" % number)
    count()

with pyskl.Dispatcher.open(path) as dispatcher:
    with pyskl.TakeOver(dispatcher, "web", listener, endpoint, predecessor=pid_file):
        pass
tell("ready")
while reads not in (those := ready(listener.fileno(), endpoint.fileno(), reads)):
    if listener.fileno() in those:
        serve(listener.accept()[0])
    if endpoint.fileno() in those:
        answer()
for connection, _ in pyskl.drain(listener):
    serve(connection)
endpoint.settimeout(0)  # drain() has let a grace period pass: what was looked up before is here by now
with contextlib.suppress(BlockingIOError):
    while True:
        answer()
tell("answered", answered)
"""


def test_tcp_and_udp_are_taken_over_in_one_call(netns, bpffs, tmp_path, generations):
    with pinned(netns, bpffs, "tcp", "udp") as dispatcher:
        take_over(generations, dispatcher, tmp_path, _TAKES_OVER_TCP_AND_UDP, "tcp", "udp")


# -- fork and exec -------------------------------------------------------------------------------------------------

_EXECUTES_ITS_SUCCESSOR = """
inherited = list(map(int, sys.argv[3:]))
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
if inherited:
    link, sockets = pyskl.Link.from_fd(inherited[0]), pyskl.SockMap.from_fd(inherited[1])
    sockets[0] = listener  # from here on new clients are ours
    os.write(inherited[2], b"!")
    for fd in inherited:
        os.close(fd)
else:
    constants = {"prefix4": socket.inet_aton("192.0.2.0"), "prefix4_len": 24}
    with pyskl.Program.load(pyskl.REDIRECT, constants=constants) as program:
        sockets = program.maps["sockets"]
        sockets[0] = listener
        link = program.attach()
tell("ready", os.getpid())

def execute_successor():
    serves, told = os.pipe()
    if not os.fork():
        fds = [link.fileno(), sockets.fileno(), told]
        for fd in fds:
            os.set_inheritable(fd, True)
        same = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
        os.execv(sys.executable, [sys.executable, *same, *map(str, [number + 1, share, *fds])])
    os.close(told)
    return serves

successor = []
while True:
    those = ready(listener.fileno(), reads, *successor)
    if listener.fileno() in those:
        serve(listener.accept()[0])
    if reads in those:
        if os.read(reads, 1)[0] == signal.SIGTERM:
            break
        successor = [execute_successor()]
    if set(those) & set(successor):
        if os.read(*successor, 1):
            break
        successor = []  # it came to nothing
for connection, _ in pyskl.drain(listener):
    serve(connection)
link.close()
sockets.close()
tell("answered", answered)
"""


def test_fork_and_exec_with_inherited_fds(generations):
    """Nothing is pinned: the link and the sockets' map are handed down, and live as long as a generation does."""
    running = {}

    def restart(number):
        if not number and number is not None:
            generations.start(_EXECUTES_ITS_SUCCESSOR, 0)
        before = list(running)  # one
        for each in before:
            os.kill(running[each], signal.SIGTERM if number is None else signal.SIGHUP)
        if number is not None:
            running[number] = generations.told(number, "ready")
        for each in before:
            generations.told(each, "answered")
            assert os.waitpid(running.pop(each), 0)[1] == 0  # an orphan, once its parent is gone

    try:
        generations.under_load(restart, "tcp")
    finally:
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)


# -- stop and start, by a service manager that keeps the listener --------------------------------------------------

_KEEPS_ITS_LISTENER_THERE = """
from pyskl import systemd

if kept := systemd.inherited():
    assert [each.name for each in kept] == ["web"]
    listener = socket.socket(fileno=kept[0].fd)
else:
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    with pyskl.Dispatcher.open(sys.argv[3]) as dispatcher:
        dispatcher.register("web", listener)  # and stays so, as long as anybody has it
    systemd.notify("FDSTORE=1", "FDNAME=web", fds=[listener])
systemd.notify("READY=1")
tell("ready")
serve_until_told(listener)
systemd.notify("STOPPING=1")
tell("answered", answered)
"""


class ServiceManager:
    """What systemd does for a service of Type=notify: sd_notify(3), sd_listen_fds(3), and its file descriptor store."""

    def __init__(self, stack, folder):
        self._sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._sock.bind(str(folder / "notify"))
        self._sock.settimeout(PATIENCE)
        self.environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}
        self.store = {}
        stack.callback(lambda: [os.close(fd) for fd in self.store.values()])

    def heard(self, state):
        """Take in what the service says, until it says this."""
        while True:
            message, fds, _, _ = socket.recv_fds(self._sock, 4096, 16)
            said = message.decode().split("\n")
            if "FDSTORE=1" in said:
                (name,) = (each.removeprefix("FDNAME=") for each in said if each.startswith("FDNAME="))
                self.store |= dict.fromkeys([name], *fds)
            if state in said:
                return


def test_stop_and_start_with_a_listener_that_the_service_manager_keeps(netns, bpffs, tmp_path, generations):
    """Nobody serves between the one and the next: the clients wait in the listener's own queue."""
    with pinned(netns, bpffs) as dispatcher, contextlib.ExitStack() as stack:
        manager, processes = ServiceManager(stack, tmp_path), []

        def restart(number):
            if processes:
                processes[-1].terminate()
                manager.heard("STOPPING=1")
                assert processes[-1].wait(PATIENCE) == 0
            if number is not None:
                with handed_over(manager.store.values(), ":".join(manager.store)) as (words, how):
                    how |= {"started_by": words, "env": manager.environment}
                    processes.append(generations.start(_KEEPS_ITS_LISTENER_THERE, number, dispatcher.path, **how))
                manager.heard("READY=1")

        generations.under_load(restart, "tcp")


# -- a crash -------------------------------------------------------------------------------------------------------


def test_under_hold_a_crash_refuses_nobody(netns, bpffs, tmp_path, generations):
    """SIGKILL of the newest, again and again: who comes before the next is there waits for it."""
    with pinned(netns, bpffs) as dispatcher, contextlib.ExitStack() as stack:
        dispatcher.set_policy("web", on_missing="hold")

        def start(number):
            process = generations.start(_TAKES_OVER, number, dispatcher.path, tmp_path / "pid")
            generations.told(number, "ready")
            return process

        process = start(0)
        load = stack.enter_context(Load(netns, 0, until_told=True))
        for number in range(1, 4):
            generations.told(number - 1, "share")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.5)  # time for those who wait to send their SYN again
            process.kill()
            process.wait()
            process = start(number)
        generations.told(3, "share")
        outcomes = load.outcomes()
    assert outcomes.keys() & {"ECONNREFUSED", "TimeoutError"} == set()
    assert all(outcomes[str(number)] >= SHARE for number in range(4))
    # Who was in the queues of one that was killed is reset: there is nobody who could have served them.
    assert sum(count for how, count in outcomes.items() if not how.isdecimal()) < 4 * 4


# -- UDP: a flow stays with the process that knows it --------------------------------------------------------------

_KNOWS_ITS_FLOWS = """
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 0))
endpoint = pyskl.udp.Endpoint(sock)
flows, served, strangers, going = set(), 0, 0, False
with pyskl.Dispatcher.open(sys.argv[3]) as dispatcher, contextlib.suppress(TimeoutError):  # it has flows, and stays
    with pyskl.TakeOver(dispatcher, "web", endpoint, predecessor=sys.argv[4], timeout=0):
        tell("ready")
while flows or not going:
    those = ready(endpoint.fileno(), *[reads][going:])
    going = going or reads in those
    if endpoint.fileno() in those:
        answers = []
        for each in endpoint.recv_many(64):
            flow = each.source, each.destination
            if each.data == b"hello":
                flows.add(flow)
                served += 1
            elif flow not in flows:
                strangers += 1
            if each.data == b"bye":
                flows.discard(flow)
            answers.append(each.reply(b"%d" % number))
            answered += 1
        endpoint.send_many(answers)
tell("strangers", strangers)
tell("served", served)
tell("answered", answered)
"""

_FLOWS = """
import collections, json, select, socket, sys

outcomes, long, short, made = collections.Counter(), [], [[], []], 0

class Flow:
    def __init__(self):
        global made
        made += 1
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.settimeout(10)
        self.sock.bind(("198.51.100.1", 0))
        self.sock.connect((f"192.0.2.{made % 250 + 1}", 1000 + made % 60000))
        self.served_by = None

def say(word, flows):
    for start in range(0, len(flows), 50):  # as many as any receive buffer holds
        together = flows[start : start + 50]
        for flow in together:
            flow.sock.send(word)
        for flow in together:
            try:
                who = flow.sock.recv(100)
            except OSError as error:
                outcomes[type(error).__name__] += 1
                continue
            outcomes["answered" if who == (flow.served_by or who) else "moved"] += 1
            flow.served_by = who
    return flows

def go_on():
    say(b"more", long)
    short.append(say(b"hello", [Flow() for _ in range(5)]))  # some begin and end at any time
    say(b"more", short[-2])
    for flow in say(b"bye", short.pop(0)):
        flow.sock.close()

while True:
    while not select.select([0], (), (), 0)[0]:
        go_on()
    if not (line := sys.stdin.readline()):
        break
    begun = say(b"hello", [Flow() for _ in range(int(line))])
    long += begun
    go_on()
    print(*{flow.served_by.decode() for flow in begun}, flush=True)
for flow in say(b"bye", long + sum(short, [])):
    flow.sock.close()
print(json.dumps({"made": made, **outcomes}))
"""


def test_udp_flows_stay_with_the_process_that_knows_them(netns, bpffs, tmp_path, generations):
    """20 generations and 1,000 long flows, which go on all the time, beside short ones that begin and end meanwhile."""
    count, each = 20, 50
    with pinned(netns, bpffs, "udp", ports="1-65535") as dispatcher, contextlib.ExitStack() as stack:
        dispatcher.set_policy("web", udp_sticky=60)
        processes, client = [], None
        for number in range(count):
            processes.append(generations.start(_KNOWS_ITS_FLOWS, number, dispatcher.path, tmp_path / "pid"))
            generations.told(number, "ready")
            if not number:
                client = child(_FLOWS, ns=netns)
                stack.callback(kill, client)
            client.stdin.write(f"{each}\n")
            client.stdin.flush()
            assert client.stdout.readline() == f"{number}\n"  # new ones at once with the new generation
        assert [process.poll() for process in processes] == [None] * count  # each ends with the last of its flows
        processes[-1].terminate()
        outcomes = json.loads(client.communicate(timeout=PATIENCE)[0])
        assert outcomes.keys() == {"made", "answered"}  # nobody without an answer, and none by another than before
        assert [generations.told(number, "strangers") for number in range(count)] == [0] * count
        assert all(generations.told(number, "served") > each for number in range(count))
        assert outcomes == {
            "made": sum(generations.told(number, "served") for number in range(count)),
            "answered": sum(generations.told(number, "answered") for number in range(count)),
        }
        assert [process.wait(PATIENCE) for process in processes] == [0] * count


_QUIC = """
import asyncio
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated

connections = set()

class Connection(QuicConnectionProtocol):
    def __init__(self, *arguments, **how):
        super().__init__(*arguments, **how)
        connections.add(self)

    def quic_event_received(self, event):
        super().quic_event_received(event)
        if isinstance(event, ConnectionTerminated):
            connections.discard(self)
            ended.set()

def echo(reader, writer):
    async def copy():
        writer.write(b"%d:" % number)
        while data := await reader.read(4096):
            writer.write(data)
        writer.write_eof()
        count()
    tasks.add(asyncio.ensure_future(copy()))

async def main(path, cert, key):
    go = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, go.set)
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["echo"])
    configuration.load_cert_chain(cert, key)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    transport, server = await pyskl.udp.create_datagram_endpoint(
        lambda: QuicServer(configuration=configuration, create_protocol=Connection, stream_handler=echo), sock
    )
    with pyskl.Dispatcher.open(path) as dispatcher:
        dispatcher.register("web", sock)
    tell("ready")
    await go.wait()
    while connections:
        ended.clear()
        await ended.wait()
    server.close()
    tell("answered", answered)

tasks, ended = set(), asyncio.Event()
asyncio.run(main(*sys.argv[3:]))
"""


def test_transfers_of_aioquics_client_go_on_across_restarts(netns, bpffs, tmp_path, generations):
    """Client and server are aioquic's own. Each server ends when its connections do."""
    pytest.importorskip("aioquic")
    from aioquic.asyncio.client import connect
    from aioquic.quic.configuration import QuicConfiguration

    cert, key = certificate(tmp_path)
    asks = QuicConfiguration(is_client=True, alpn_protocols=["echo"], server_name="localhost")
    asks.load_verify_locations(cert)
    payload, count, processes = random.Random(6).randbytes(300_000), 4, []

    def restart(number):
        processes.append(generations.start(_QUIC, number, dispatcher.path, cert, key))
        generations.told(number, "ready")
        if number:
            processes[-2].terminate()

    async def transfer(number, begun, restarted):
        async with connect("192.0.2.7", 4000 + number, configuration=asks) as client:
            reader, writer = await client.create_stream()
            writer.write(payload[:1000])
            assert await reader.readexactly(1002) == b"%d:" % number + payload[:1000]
            begun.set()
            for place in range(1000, len(payload), 1000):
                if place == len(payload) // 2:
                    await restarted.wait()
                writer.write(payload[place : place + 1000])
                assert await reader.readexactly(1000) == payload[place : place + 1000]
            writer.write_eof()
            assert await reader.read() == b""

    async def main():
        transfers = []
        for number in range(count):
            await asyncio.to_thread(restart, number)
            for _, _, restarted in transfers[-1:]:
                restarted.set()
            begun, restarted = asyncio.Event(), asyncio.Event()
            transfers.append((asyncio.ensure_future(transfer(number, begun, restarted)), begun, restarted))
            await asyncio.wait_for(begun.wait(), PATIENCE)
        await asyncio.to_thread(restart, count)
        restarted.set()
        await asyncio.wait_for(asyncio.gather(*(each for each, _, _ in transfers)), PATIENCE)

    with pinned(netns, bpffs, "udp", ports="4000-5000") as dispatcher:
        dispatcher.set_policy("web", udp_sticky=60)
        with netns.entered():
            asyncio.run(main())
        assert [generations.told(number, "answered") for number in range(count)] == [1] * count
        processes[-1].terminate()
        assert [process.wait(PATIENCE) for process in processes] == [0] * (count + 1)
