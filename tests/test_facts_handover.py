"""Hand-over of a service from one socket, or process, to its successor: what is lost, and what not."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import subprocess
from pathlib import Path

import pytest
from support import (
    LOAD,
    V4,
    Load,
    answering,
    ask,
    ask_tcp,
    child,
    chooser,
    choosing,
    grace_period,
    kernel_has,
    kill,
    readable,
    result,
    server,
    sysctl,
    tcp_client,
    tcp_listener,
    unavailable,
)

import pyskl

PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
EIGHTY = {"slot": 0, "port_min": 80, "port_max": 80}
TCP_DEFER_ACCEPT = socket.TCP_DEFER_ACCEPT


# -- Under load: nothing is lost -------------------------------------------------------------------


def overwrite(sockets, sock):
    """Put a socket that was in the map before: a receiver of it, in any process, can make it EBUSY for a moment."""
    while True:
        try:
            sockets[0] = sock
        except pyskl.SocketRefused as error:
            if error.errno != errno.EBUSY:
                raise
        else:
            return


@PROTOCOLS
def test_overwriting_the_slot_while_both_are_alive_loses_nothing(netns, protocol):
    with (
        server(netns, protocol, "127.0.0.1") as a,
        server(netns, protocol, "127.0.0.1") as b,
        choosing(netns, {0: a}, **EIGHTY) as program,
        answering(a, "A"),
        answering(b, "B"),
        Load(netns, LOAD, protocol=protocol) as load,
    ):
        overwritten = 0
        while load.running:
            overwrite(program.maps["sockets"], (b, a)[overwritten % 2])
            overwritten += 1
        outcomes = load.outcomes()
    assert outcomes.keys() <= {"A", "B"}
    assert len(outcomes) == 2 or LOAD < 40_000  # few may all come while the same one is there
    assert outcomes.total() == LOAD
    assert overwritten > LOAD / 40


def serve(listener):
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):
        connection.sendall(b"served")


def test_the_old_one_accepts_until_its_queues_are_empty_and_then_closes_loses_nothing(netns):
    """Over and over: each listener takes some clients, is overwritten, drained and closed.

    Until EAGAIN is not quite enough: a SYN that was looked up before the overwrite may be in no
    queue yet. So first a grace period, after which it is in one of the two.
    """
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(choosing(netns, **EIGHTY))
        old, generations = tcp_listener(netns), 1
        program.maps["sockets"][0] = old
        load = stack.enter_context(Load(netns, LOAD))
        while load.running:
            for _ in range(200):
                if readable(old, timeout=0.01):
                    serve(old)
            new = tcp_listener(netns)
            program.maps["sockets"][0] = new
            grace_period()
            while syn_queue(netns) or accept_queue(old):
                if readable(old, timeout=0):
                    serve(old)
            old.close()
            old, generations = new, generations + 1
        outcomes = load.outcomes()
        old.close()
    assert outcomes == {"served": LOAD}
    assert generations > LOAD / 2000


_SUCCESSOR = """
import socket, sys
import pyskl
listener = socket.socket(fileno=int(sys.argv[1]))
with pyskl.SockMap.from_pin(sys.argv[2]) as sockets:
    sockets[0] = listener
print(flush=True)
while True:
    connection, _ = listener.accept()
    try:
        connection.sendall(sys.argv[3].encode())
    except OSError:
        pass
    connection.close()
"""


def test_two_processes_over_a_pinned_map_and_kill_9_of_the_old_one_loses_nothing(netns, bpffs):
    """… 150 ms after the overwrite; over and over, while the load lasts."""

    @contextlib.contextmanager
    def process(answer):
        """A process that has a listener of its own, puts it into the map, and serves."""
        with tcp_listener(netns) as listener:
            listener.setblocking(True)
            fd = listener.fileno()
            started = child(_SUCCESSOR, fd, bpffs / "sockets", answer, pass_fds=[fd])
        try:
            assert started.stdout.readline()  # it is in the map
            yield started
        finally:
            kill(started)

    with choosing(netns, **EIGHTY) as program, contextlib.ExitStack() as stack:
        program.maps["sockets"].pin(bpffs / "sockets")
        old = stack.enter_context(process("0"))
        load = stack.enter_context(Load(netns, LOAD))
        answers = ["0"]
        while load.running:
            answers.append(str(len(answers)))
            new = stack.enter_context(process(answers[-1]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                old.wait(0.15)
            old.kill()
            old.wait()
            old = new
        outcomes = load.outcomes()
        program.maps["sockets"].unpin()
    assert outcomes.total() == LOAD
    assert outcomes.keys() <= set(answers)
    assert len(outcomes) > (2 if LOAD > 10_000 else 1)


@PROTOCOLS
def test_bpf_link_update_thousands_of_times_loses_nothing(netns, protocol):
    with (
        server(netns, protocol, "127.0.0.1") as a,
        server(netns, protocol, "127.0.0.1") as b,
        chooser({0: a}, **EIGHTY) as first,
        chooser({0: b}, **EIGHTY) as second,
        first.attach(netns) as link,
        answering(a, "A"),
        answering(b, "B"),
        Load(netns, LOAD, protocol=protocol) as load,
    ):
        updated = 0
        while load.running:
            link.update((second, first)[updated % 2])
            updated += 1
        outcomes = load.outcomes()
    assert outcomes.keys() == {"A", "B"}
    assert outcomes.total() == LOAD
    assert updated > LOAD / 40


# -- What loses ------------------------------------------------------------------------------------


def test_overwriting_and_closing_at_once_resets_what_was_queued(netns):
    with (
        tcp_listener(netns) as old,
        tcp_listener(netns) as new,
        choosing(netns, {0: old}, **EIGHTY) as program,
        tcp_client(netns, V4, 80) as client,
    ):
        program.maps["sockets"][0] = new
        old.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert ask_tcp(netns, V4, 80, new) is new


@pytest.mark.parametrize("migrates", [True, False], ids=["tcp_migrate_req=1", "tcp_migrate_req=0"])
def test_within_one_reuseport_group_what_was_queued_migrates(netns, migrates):
    """Connections in the accept queue and in the SYN queue go over, with tcp_migrate_req=1 alone."""
    if not kernel_has("reuseport_migrate_sock"):
        unavailable("tcp_migrate_req", "this kernel migrates no connections")
    sysctl(netns, "ipv4/tcp_migrate_req", int(migrates))
    with (
        tcp_listener(netns, reuseport=True) as old,
        choosing(netns, {0: old}, **EIGHTY) as program,
    ):
        old.setsockopt(socket.IPPROTO_TCP, TCP_DEFER_ACCEPT, 5)
        with tcp_client(netns, V4, 80) as half_open:
            old.setsockopt(socket.IPPROTO_TCP, TCP_DEFER_ACCEPT, 0)
            with (
                tcp_client(netns, V4, 80) as queued,
                tcp_listener(netns, *old.getsockname(), reuseport=True) as new,
            ):
                assert accept_queue(old) == 1
                program.maps["sockets"][0] = new
                old.close()
                for client in (queued, half_open):
                    if migrates:
                        client.send(b"?")
                        with new.accept()[0] as connection:
                            assert connection.getpeername() == client.getsockname()
                            assert connection.recv(16) == b"?"
                    else:
                        with pytest.raises((ConnectionResetError, BrokenPipeError)):
                            client.send(b"?")
                            client.recv(16)


@PROTOCOLS
def test_delete_then_add_refuses_while_it_is_empty(netns, protocol):
    with (
        server(netns, protocol, "127.0.0.1") as old,
        server(netns, protocol, "127.0.0.1") as new,
        choosing(netns, {0: old}, **EIGHTY) as program,
    ):
        assert ask(protocol, netns, V4, 80, old, new) is old
        del program.maps["sockets"][0]
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, V4, 80, old, new)
        program.maps["sockets"][0] = new
        assert ask(protocol, netns, V4, 80, old, new) is new


@PROTOCOLS
def test_detach_then_attach_refuses_in_between(netns, protocol):
    with server(netns, protocol, "127.0.0.1") as ours, chooser({0: ours}, **EIGHTY) as program:
        with program.attach(netns) as link:
            assert ask(protocol, netns, V4, 80, ours) is ours
            link.detach()
            with pytest.raises(ConnectionRefusedError):
                ask(protocol, netns, V4, 80, ours)
        with program.attach(netns):
            assert ask(protocol, netns, V4, 80, ours) is ours


@PROTOCOLS
def test_close_then_overwrite_refuses_in_between(netns, protocol):
    with (
        server(netns, protocol, "127.0.0.1") as old,
        server(netns, protocol, "127.0.0.1") as new,
        choosing(netns, {0: old}, **EIGHTY) as program,
    ):
        old.close()
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, V4, 80, new)
        program.maps["sockets"][0] = new
        assert ask(protocol, netns, V4, 80, new) is new


# -- The recipe ------------------------------------------------------------------------------------


def accept_queue(listener):
    """tcpi_unacked of a listener: the connections that wait to be accepted."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return struct.unpack_from("=I", info, 24)[0]


def syn_queue(ns):
    """The connections of a namespace that wait for the last step of their handshake."""
    with ns.entered(), open("/proc/thread-self/net/tcp") as file:
        return [line.split()[3] for line in file].count("03")  # TCP_SYN_RECV


def test_the_accept_queue_of_a_listener_is_its_tcpi_unacked(netns):
    with tcp_listener(netns) as ours, choosing(netns, {0: ours}, **EIGHTY):
        with contextlib.ExitStack() as clients:
            for number in range(5):
                assert accept_queue(ours) == number
                clients.enter_context(tcp_client(netns, V4, 80))
            for number in range(5, 0, -1):
                assert accept_queue(ours) == number
                ours.accept()[0].close()
            assert accept_queue(ours) == 0


def test_what_is_in_the_syn_queue_goes_on_to_the_old_listener_after_the_overwrite(netns):
    """So accept until both queues are empty; a listener closed before resets it."""
    with (
        tcp_listener(netns) as old,
        tcp_listener(netns) as new,
        choosing(netns, {0: old}, **EIGHTY) as program,
    ):
        old.setsockopt(socket.IPPROTO_TCP, TCP_DEFER_ACCEPT, 5)  # waits for data to be established
        with tcp_client(netns, V4, 80) as first, tcp_client(netns, V4, 80) as second:
            assert (accept_queue(old), syn_queue(netns)) == (0, 2)
            program.maps["sockets"][0] = new
            first.send(b"?")
            assert readable(old, new) == [old]
            assert (accept_queue(old), syn_queue(netns)) == (1, 1)
            with old.accept()[0] as connection:
                assert connection.recv(16) == b"?"
            old.close()
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                second.send(b"?")
                second.recv(16)
        assert ask_tcp(netns, V4, 80, new) is new


def never_looks_recent():
    """Whether a listener that never sent a cookie takes one.

    It does for two minutes after the last. Where there was none, that is 0 in the kernel's ticks, which begin five
    minutes before 0: to a machine that has been up for five to seven minutes it is as if it were just now.
    """
    return 298 < float(Path("/proc/uptime").read_text().split()[0]) < 422


@pytest.mark.parametrize("later", ["the old one", "the new one"])
def test_under_syn_cookies_the_final_ack_can_reach_the_new_listener_and_be_reset(netns, later):
    """A cookie is of no listener: its ACK is looked up again, by the hook too; here, the swap is in between."""
    sysctl(netns, "ipv4/tcp_syncookies", 2)  # always, as if the backlog were too small
    with tcp_listener(netns) as old, tcp_listener(netns) as new:
        sockets = {0: old, 1: {"the old one": old, "the new one": new}[later]}
        with choosing(netns, sockets, name="first_then_other") as program:
            if later == "the old one":
                assert ask_tcp(netns, V4, 80, old, new) is old
            elif never_looks_recent():
                assert ask_tcp(netns, V4, 80, old, new) is new
            else:
                with pytest.raises(ConnectionResetError):
                    ask_tcp(netns, V4, 80, old, new)
            assert result(program).runs == 2
