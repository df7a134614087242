# SPDX-License-Identifier: BSD-2-Clause
"""Show on real traffic what pyskl is for, and compare each figure with what it must be.

All of it happens in a network namespace that only this process and its children hold: however the demo ends, it goes
with them. Nothing sleeps: each step waits for what it needs, and no longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import itertools
import mmap
import multiprocessing
import os
import platform
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import pyskl

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T", pyskl.Program, pyskl.Link, pyskl.SockMap)
Prefix: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

V4, V6 = ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/48")
ASKER = {V4: "198.51.100.1", V6: "2001:db8:ffff::1"}  # who asks does so from outside the prefixes
FAMILY = {V4: socket.AF_INET, V6: socket.AF_INET6}
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
SLOTS = {TCP: (0, 2), UDP: (1, 3)}  # of redirect.bpf.o, for IPv4 and IPv6
CLIENTS, STEP, SUCCESSORS = 4, 4, 10
EACH = int(os.environ.get("PYSKL_TEST_LOAD", "40000")) // CLIENTS  # connections of each, with a tick after every STEP
PATIENCE, DEADLINE = 60, 600  # seconds: for what takes microseconds, and for everything, on an emulated machine, too
CHOOSE = os.path.join(os.path.dirname(__file__), "..", "tests", "bpf", "choose.bpf.c")
CLANG = ("clang", "-O2", "-g", "-target", "bpf", f"-I/usr/include/{platform.machine()}-linux-gnu", "-c", "-o", "-")
COLOURS = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
GREEN, RED, BOLD, DIM = 32, 31, 1, 2

libc = ctypes.CDLL(None)
kept: set[tuple[type, int]] = set()  # the kind and id of every BPF object that came into being
results: list[bool] = []


def paint(code: int, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if COLOURS else text


def say(*lines: str) -> None:
    print(*(paint(DIM, f"   {line}") if line else "" for line in lines), sep="\n", flush=True)


def heading(title: str, *lines: str) -> None:
    print(f"\n{paint(BOLD, title)}")
    say(*lines, "")


def check(what: str, figure: object, must_be: object) -> None:
    results.append(figure == must_be)
    shown, wanted = (f"{each:,}" if isinstance(each, int) else str(each) for each in (figure, must_be))
    mark, equals = (paint(GREEN, "✓"), "=") if results[-1] else (paint(RED, "✗"), paint(RED, "≠"))
    print(f" {mark} {what} {paint(DIM, '.' * (48 - len(what)))} {shown:>11} {equals} {wanted}", flush=True)


# -- The stage --------------------------------------------------------------------------------------------------------


def make_local() -> None:
    """Make every address of the prefixes local, and one outside of each, from which they are asked."""
    lines = ["link set lo up"]
    for prefix, asker in ASKER.items():
        lines.append(f"address add {asker} dev lo {'nodad' if prefix is V6 else ''}")
        lines.append(f"route add local {prefix} dev lo src {asker}")
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)


def keep(stack: contextlib.ExitStack, thing: T) -> T:
    """Have a BPF object until the stack ends, and remember its id."""
    kept.update((type(each), each.info.id) for each in (thing, *getattr(thing, "maps", {}).values()))
    return stack.enter_context(thing)


def load_redirect(stack: contextlib.ExitStack) -> pyskl.Program:
    prefixes = {"prefix4": V4.network_address.packed, "prefix6": V6.network_address.packed}
    lengths = {"prefix4_len": V4.prefixlen, "prefix6_len": V6.prefixlen}
    return keep(stack, pyskl.Program.load(pyskl.REDIRECT, constants=prefixes | lengths))


def server_socket(stack: contextlib.ExitStack, kind: socket.SocketKind, port: int = 0) -> socket.socket:
    """Give a socket that takes both IPv4 and IPv6, bound to the wildcard address."""
    sock = stack.enter_context(socket.socket(socket.AF_INET6, kind))
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    if kind == TCP:
        sock.listen(4096)
    else:
        sock.setsockopt(socket.IPPROTO_IP, 20, 1)  # IP_RECVORIGDSTADDR
        sock.setsockopt(socket.IPPROTO_IPV6, 74, 1)  # IPV6_RECVORIGDSTADDR
    return sock


def address(prefix: Prefix, number: int) -> str:
    """Scatter numbers over the addresses of a prefix; 256 in a row reach each of a /24."""
    return str(prefix[number * 0x9E3779B97F4A7C15 % prefix.num_addresses])


def name(endpoint: tuple) -> bytes:
    """Write an address and port, an IPv4 one of a dual-stack socket as its client does."""
    return f"{endpoint[0].removeprefix('::ffff:')} {endpoint[1]}".encode()


# -- 1 and 2: every address and port ----------------------------------------------------------------------------------


def ask_tcp(listener: socket.socket, destination: tuple[str, int]) -> bytes:
    """Connect, and be told getsockname() of the server's end of the connection."""
    try:
        with socket.create_connection(destination) as client, listener.accept()[0] as connection:
            connection.sendall(name(connection.getsockname()))
            return client.recv(100)
    except ConnectionRefusedError:
        return b"refused"


def ask_udp(server: socket.socket, client: socket.socket, destination: tuple[str, int]) -> bytes:
    """Send a datagram, and be told where the server says that it was sent to."""
    client.sendto(b"?", destination)
    try:
        _, [(_, _, sockaddr)], _, source = server.recvmsg(1, 64)
    except TimeoutError:
        return b"silence"
    host = sockaddr[8:24] if client.family == socket.AF_INET6 else sockaddr[4:8]
    server.sendto(name((socket.inet_ntop(client.family, host), int.from_bytes(sockaddr[2:4], "big"))), source)
    return client.recv(100)


def every_address_and_port(stack: contextlib.ExitStack) -> None:
    heading(
        "1  One TCP and one UDP socket answer for whole prefixes",
        f"{V4} and {V6} are local, and nothing is bound to them. TCP",
        "asks at every 31st port and UDP at every port, all over the addresses; the",
        "server answers with the address and port that it was asked at.",
    )
    tcp, udp = (server_socket(stack, kind, port=7) for kind in (TCP, UDP))
    program = load_redirect(stack)
    program.maps["sockets"].update({slot: sock for sock in (tcp, udp) for slot in SLOTS[sock.type]})
    some = {prefix: [(address(prefix, port), port) for port in range(1, 65536, 31)] for prefix in (V4, V6)}
    refused = sum(ask_tcp(tcp, each) == b"refused" for each in some[V4] + some[V6])
    check("connections refused while nothing is attached", refused, 2 * 2115)
    keep(stack, program.attach())
    for prefix in (V4, V6):
        right = {each for each in some[prefix] if ask_tcp(tcp, each) == name(each)}
        check(f"IPv{prefix.version}: TCP ports 1, 32, … 65535, getsockname()", len({port for _, port in right}), 2115)
        check("      addresses among them", len({host for host, _ in right}), {V4: 256, V6: 2115}[prefix])
        with socket.socket(FAMILY[prefix], UDP) as client:
            asked = ((address(prefix, port), port) for port in range(1, 65536))
            answered = itertools.takewhile(lambda each: ask_udp(udp, client, each) == name(each), asked)
            check("      UDP ports 1, 2, … 65535, ORIGDSTADDR", sum(1 for _ in answered), 65535)
    check("TCP to an address beside the prefix", ask_tcp(tcp, (ASKER[V4], 80)).decode(), "refused")
    sockets = subprocess.run(["ss", "-Hnltu"], capture_output=True, text=True, check=True).stdout.splitlines()
    for protocol in ("tcp", "udp"):
        check(f"{protocol.upper()} sockets that ss finds", sum(line.startswith(protocol) for line in sockets), 1)
    say(*(" ".join(line.split()) for line in sockets))

    heading("2  Asked without a packet", "test_run() gives the cookie of the socket that the program selects, or 0.")
    for protocol, prefix, host, port, whose in (
        ("tcp", V4, "192.0.2.200", 443, tcp),
        ("udp", V6, "2001:db8::53", 53, udp),
        ("tcp", V6, "2001:db8:0:cafe::", 65535, tcp),
        ("udp", V4, ASKER[V4], 53, None),
    ):
        ran = program.test_run(protocol, (host, port), (ASKER[prefix], 40000))
        check(f"{protocol} {host} port {port}", ran.cookie, pyskl.socket_cookie(whose) if whose else 0)


# -- 3: the kernel's rules --------------------------------------------------------------------------------------------

RULES = {  # of Documentation/bpf/prog_sk_lookup.rst: what the first program does, what the second does, who answers
    "Rule 1: a socket selected by a program that passes is the result": (
        ("PASS A", "PASS", "A"),
        ("PASS A", "DROP", "A"),
        ("DROP", "PASS B", "B"),
    ),
    "Rule 2: of several selections, the last takes effect": (("PASS A", "PASS B", "B"), ("PASS B", "PASS A", "A")),
    "Rule 3: a drop, and no program that selects and passes: the look-up fails": (
        ("DROP", "PASS", "refused"),
        ("PASS", "DROP", "refused"),
        ("DROP A", "PASS", "refused"),
    ),
    "Rule 4: all pass and none selects: the ordinary look-up goes on": (("PASS", "PASS", "ordinary"),),
}


def who_answers(kind: socket.SocketKind, prefix: Prefix, servers: dict[str, socket.socket]) -> str:
    with socket.socket(FAMILY[prefix], kind) as client:
        try:
            client.connect((str(prefix[80]), 80))
            if kind == UDP:
                client.send(b"?")
            (found, *_), _, _ = select.select([client, *servers.values()], (), (), PATIENCE)
            if found is client:
                client.recv(1)  # raises what ICMP reported
        except ConnectionRefusedError:
            return "refused"
    if kind == TCP:
        found.accept()[0].close()
    else:
        found.recv(1)
    return next(who for who, sock in servers.items() if sock is found)


def two_programs(stack: contextlib.ExitStack) -> None:
    heading(
        "3  Two programs in order, and the four rules of the kernel's document",
        "Each may select socket A or B; an ordinary socket is bound to the port. Each",
        "pair is asked four times: by TCP and UDP, over IPv4 and IPv6.",
    )
    if ready := os.environ.get("PYSKL_TEST_OBJECTS"):  # where there is no compiler
        choose: str | bytes = os.path.join(ready, "choose.bpf.o")
    else:
        choose = subprocess.run([*CLANG, CHOOSE], stdout=subprocess.PIPE, check=True).stdout
    ports = {"A": 0, "B": 0, "ordinary": 80}
    servers = {kind: {who: server_socket(stack, kind, ports[who]) for who in ports} for kind in (TCP, UDP)}
    slots = {(kind, who): slot for slot, (kind, who) in enumerate(itertools.product(servers, "AB"))}
    sockets = keep(stack, pyskl.SockMap.create(len(slots)))
    sockets.update({slot: servers[kind][who] for (kind, who), slot in slots.items()})

    def attach(attached: contextlib.ExitStack, kind: socket.SocketKind, what: str) -> int:
        verdict, *selected = what.split()
        constants = {"verdict": pyskl.Verdict[verdict], "flags": 1}  # BPF_SK_LOOKUP_F_REPLACE
        if selected:
            constants["slot"] = slots[kind, selected[0]]
        program = pyskl.Program.load(choose, "choose", constants=constants, reuse={"sockets": sockets})
        keep(attached, keep(attached, program).attach())
        return program.info.id

    in_order = 0
    for rule, cases in RULES.items():
        say(rule)
        for first, second, must_be in cases:
            answers: Counter[str] = Counter()
            for kind, by_name in servers.items():
                with contextlib.ExitStack() as attached:
                    ids = [attach(attached, kind, what) for what in (first, second)]
                    in_order += [each.id for each in pyskl.query()] == ids
                    answers.update(who_answers(kind, prefix, by_name) for prefix in (V4, V6))
            said = ", ".join(f"{n}x {who}" for who, n in answers.items())
            check(f"   {first}, then {second}", said, f"4x {must_be}")
    check("pairs that query() lists in order of attachment", in_order, 18)


# -- 4 and 5: under load ----------------------------------------------------------------------------------------------


def child(stack: contextlib.ExitStack, work: Callable[..., None], *args: object) -> multiprocessing.Process:
    """Start a process, which is killed when the stack ends, or with this one."""

    def run() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the parent answers
        work(*args)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    for last in (process.close, process.join, process.kill):
        stack.callback(last)
    return process


def server(stack: contextlib.ExitStack, number: int, sockets: pyskl.SockMap) -> multiprocessing.Process:
    """Start a process that puts its listener into the map, and answers with its number and where the client went."""
    ready = os.eventfd(0)
    stack.callback(os.close, ready)

    def serve() -> None:
        listener = server_socket(stack, TCP)
        listener.settimeout(None)
        sockets.update(dict.fromkeys(SLOTS[TCP], listener))
        os.eventfd_write(ready, 1)
        while True:
            with listener.accept()[0] as connection:
                connection.sendall(b"%d %s" % (number, name(connection.getsockname())))

    process = child(stack, serve)
    os.eventfd_read(ready)
    return process


class Load:
    """Clients that go on connecting to anywhere in the prefixes, and what came of it, in memory that they share."""

    def __init__(self, stack: contextlib.ExitStack, servers: int) -> None:
        self.tried, *self.answered = (
            memoryview(mmap.mmap(-1, 8 * n)).cast("Q") for n in [CLIENTS] + [servers] * CLIENTS
        )
        self.ticks, self.steps = os.eventfd(0, os.EFD_SEMAPHORE), os.eventfd(0)
        for fd in (self.ticks, self.steps):
            stack.callback(os.close, fd)
        self.started = time.monotonic()
        self.clients = [child(stack, self.connect, number) for number in range(CLIENTS)]

    def connect(self, number: int) -> None:
        pick = random.Random(number)
        for n in range(1, EACH + 1):
            destination = address(pick.choice((V4, V6)), pick.getrandbits(80)), pick.randint(1, 65535)
            with contextlib.suppress(OSError, ValueError), socket.create_connection(destination) as sock:
                who, _, where = sock.recv(100).partition(b" ")
                self.answered[number][int(who)] += where == name(destination)
            self.tried[number] = n
            os.eventfd_write(self.steps, 1)
            if n % STEP == 0:
                os.eventfd_write(self.ticks, 1)

    def tick(self, ticks: int = 1) -> None:
        """Wait until the clients went on."""
        for _ in range(ticks):
            os.eventfd_read(self.ticks)

    def settle(self) -> None:
        """Wait until what is under way now is done; of the ticks, all are left for those who count on them."""
        before = list(self.tried)
        while any(now <= then < EACH for now, then in zip(self.tried, before, strict=True)):
            os.eventfd_read(self.steps)

    def check(self) -> None:
        for client in self.clients:
            client.join()
        seconds, made = time.monotonic() - self.started, CLIENTS * EACH
        by_server = [sum(column) for column in zip(*self.answered, strict=True)]
        check("connections answered by where they went to", sum(by_server), made)
        check("connections lost", sum(self.tried) - sum(by_server), 0)
        with open("/proc/net/netstat", encoding="ascii") as file:
            counters = dict(zip(*(line.split() for line in itertools.islice(file, 2)), strict=True))
        check("SYNs that had to be sent again", int(counters["TCPSynRetrans"]), 0)
        check("servers that answered", sum(n > 0 for n in by_server), len(by_server))
        say(f"{seconds:.1f} s, {made / seconds:,.0f} connections a second; {min(by_server):,} or more by each server")


def swap_under_load(stack: contextlib.ExitStack) -> None:
    swaps = CLIENTS * EACH // STEP
    heading(
        f"4  A program is swapped for another {swaps:,} times under load",
        f"{CLIENTS} clients connect to anywhere in the prefixes. At every {STEP} connections,",
        "Link.update() puts the other of two programs in place; each has its server.",
    )
    there, other = (load_redirect(stack) for _ in range(2))
    for number, program in enumerate((there, other)):
        server(stack, number, program.maps["sockets"])
    link = keep(stack, there.attach())
    ids = {program: program.info.id for program in (there, other)}
    load, confirmed = Load(stack, servers=2), 0
    for _ in range(swaps):
        load.tick()
        link.update(other, expected=there)
        there, other = other, there
        confirmed += link.info.prog_id == ids[there]
    check("swaps that the kernel confirms", confirmed, swaps)
    load.check()


def hand_over(stack: contextlib.ExitStack) -> None:
    heading(
        f"5  A service is handed over {SUCCESSORS} times under load",
        "A successor puts its listener into the slots, over its predecessor's. When",
        "what was under way then is done, the predecessor gets a SIGKILL.",
    )
    program = load_redirect(stack)
    keep(stack, program.attach())
    there = server(stack, 0, program.maps["sockets"])
    load, killed = Load(stack, servers=SUCCESSORS + 1), 0
    for number in range(1, SUCCESSORS + 1):
        load.tick(CLIENTS * EACH // STEP // (SUCCESSORS + 2))
        predecessor, there = there, server(stack, number, program.maps["sockets"])
        load.settle()
        predecessor.kill()
        predecessor.join()
        killed += predecessor.exitcode == -signal.SIGKILL
    check("predecessors killed", killed, SUCCESSORS)
    load.check()


# -- The dispatcher ---------------------------------------------------------------------------------------------------


def answers(listeners: dict[str, socket.socket], destination: tuple[str, int]) -> str:
    """Tell whose listener gets a connection."""
    try:
        with socket.create_connection(destination, PATIENCE):
            ready, _, _ = select.select(list(listeners.values()), [], [], PATIENCE)
            for label, listener in listeners.items():
                if listener in ready:
                    listener.accept()[0].close()
                    return label
    except ConnectionRefusedError:
        return "refused"
    return "nobody"


def dispatch(stack: contextlib.ExitStack) -> None:
    heading(
        "6  The dispatcher: bindings lead to labels, and sockets are registered under labels",
        "The longest prefix goes first, then the narrowest range of ports; all bindings are replaced in one step.",
    )
    labels = ("web", "admin", "rest")
    listeners = {label: stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096)) for label in labels}
    dispatcher = stack.enter_context(pyskl.Dispatcher.create())
    kept.update((type(each), each.info.id) for each in (dispatcher.program, dispatcher.link, *dispatcher.maps.values()))
    dispatcher.bind("web", "tcp", V4, [80, 443, "8000-8999"])
    dispatcher.bind("rest", "tcp", V4)
    dispatcher.bind("admin", "tcp", address(V4, 7), 443)
    for label, listener in listeners.items():
        dispatcher.register(label, listener)
    asked = [
        ((host, port), dispatcher.explain("tcp", (host, port)).label)
        for host in (address(V4, number) for number in range(256))
        for port in (443, 8500, 9000)
    ]
    check("connections that go where explain() says", sum(answers(listeners, to) == says for to, says in asked), 768)
    check("   to the longer prefix", answers(listeners, (address(V4, 7), 443)), "admin")
    for _ in range(50):
        for first, second in (("web", "rest"), ("rest", "web")):
            table = [
                pyskl.Binding(first, "tcp", f"{address(V4, n)}", port) for n in range(256) for port in range(80, 100)
            ]
            dispatcher.replace([*table, pyskl.Binding(second, "tcp", V4)])
            results_of = {answers(listeners, (address(V4, n), 80)) for n in (0, 255)}
            if results_of != {first}:
                check("after replace()", str(results_of), first)
    check("bindings, all replaced 100 times, in force at once", dispatcher.status().bindings, 5121)
    dispatcher.unregister("web")
    dispatcher.set_policy("web", on_missing="hold")
    with socket.socket() as waiting:
        waiting.setblocking(False)
        waiting.connect_ex((address(V4, 1), 5000))
        check(
            "a client while its label has no socket", dispatcher.explain("tcp", (address(V4, 1), 5000)).reason, "hold"
        )
        dispatcher.register("web", listeners["web"])
        _, connected, _ = select.select([], [waiting], [], PATIENCE)
        check("   and when it has one", waiting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if connected else "…", 0)


# -- The end ----------------------------------------------------------------------------------------------------------


def exists(kind: type, number: int) -> bool:
    try:
        kind.from_id(number).close()
    except pyskl.BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def until(ask: Callable[[], int | None], must_be: int) -> int | None:
    """Wait for what the kernel does after a grace period, and tells nobody."""
    deadline = time.monotonic() + PATIENCE
    while (found := ask()) != must_be and time.monotonic() < deadline:
        os.sched_yield()
    return found


def stop(number: int, _: object) -> None:
    raise SystemExit(f"stopped by {signal.Signals(number).name}")


def main() -> int:
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, stop)
    signal.alarm(DEADLINE)
    socket.setdefaulttimeout(PATIENCE)
    sys.stdout.reconfigure(encoding="utf-8")
    fds = os.listdir("/proc/self/fd")
    print(paint(BOLD, f"pyskl {version('pyskl')} on Linux {platform.release()}"))
    with contextlib.ExitStack() as outside:
        with pyskl.NetNS.create() as ns, ns.entered():  # without a name: our fd alone holds it
            say(f"in a network namespace of its own, net:[{ns.inode}]")
            make_local()
            for show in (every_address_and_port, two_programs, swap_under_load, hand_over, dispatch):
                with contextlib.ExitStack() as stack:
                    show(stack)
            link = keep(outside, load_redirect(outside).attach())
        heading("7  Nothing is left behind")
        check("the namespace's inode, asked of a link into it", until(lambda: link.info.netns_inode, 0), 0)
    check(f"BPF objects left, of {len(kept)}", until(lambda: sum(exists(*each) for each in kept), 0), 0)
    check("file descriptors left", len(os.listdir("/proc/self/fd")) - len(fds), 0)
    with open("/proc/thread-self/children", encoding="ascii") as file:
        check("processes left", len(file.read().split()), 0)
    failed = results.count(False)
    verdict = paint(RED, f"{failed} FAILED") if failed else paint(GREEN, "each figure what it must be")
    print(f"\n{paint(BOLD, f'{len(results)} checks')}: {verdict}, in {time.monotonic() - started:.1f} seconds")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pyskl.PermissionDenied as denied:
        sys.exit(str(denied))
