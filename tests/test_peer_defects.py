"""What went wrong in another dispatcher (tubular), each in a test that fails on its way of doing it.

Here are those that a dispatcher of one process can have. The others:

- it goes by programs' tags: test_pinned.py, test_a_program_of_another_build_is_opened_and_upgraded
- a namespace that was made again: test_pinned.py, test_a_namespace_that_is_gone_and_another_at_the_same_path
- a missing pin that a reader makes anew: test_pinned.py, test_each_missing_pin_is_told_and_mended
- kill -9: all of test_killed.py
- replies from the wrong port: test_udp.py
- files that say something else than they seem to: test_bindings_file.py
- a lock without limit, whose holder is not named: test_pinned.py, test_the_lock_has_a_holder_and_a_limit
- what is missing is not named: test_cli_rights.py
"""

import contextlib
import logging
import os
import socket

import privileges
import pytest
import support
from support import TIMEOUT

import pyskl
from pyskl import Binding, Dispatcher

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]


@pytest.fixture
def keep():
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


def connect(host, port=80):
    return socket.create_connection((host, port), TIMEOUT)


def _reuseport(kind, address):
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def test_the_number_of_a_label_whose_socket_died_is_no_other_labels_while_it_is_bound(netns, keep):
    with netns.entered(), Dispatcher.create(max_labels=2, max_sockets=2) as d:
        other = keep(socket.create_server(("", 0)))
        with socket.create_server(("", 0)) as gone:
            d.bind("old", "tcp", "192.0.2.1", 80)
            d.register("old", gone)
        for number in range(20):  # more than there are numbers
            label = f"new {number}"
            d.bind(label, "tcp", "192.0.2.2", 80)
            d.register(label, other)
            assert d.explain("tcp", ("192.0.2.1", 80))[2:] == ("old", None, 0, "reset")
            with pytest.raises(ConnectionRefusedError):
                connect("192.0.2.1")
            with connect("192.0.2.2"), other.accept()[0]:
                pass
            d.unregister(label)
            d.unbind(label, "tcp", "192.0.2.2", 80)
        assert (d.counters()["old"].selected, d.counters()["old"].missed) == (0, 20)
        d.unbind("old", "tcp", "192.0.2.1", 80)
        d.bind("newest", "tcp", "192.0.2.1", 80)
        with pytest.raises(ConnectionRefusedError):
            connect("192.0.2.1")


@pytest.mark.parametrize("mapped", [False, True])
def test_everything_of_ipv6_is_nothing_of_ipv4(netns, keep, mapped):
    with netns.entered(), Dispatcher.create() as d:
        d.bind("a", "tcp", "::/0")
        d.bind("a", "udp", "::/0")
        server = keep(socket.create_server(("", 80)))
        client = keep(socket.socket(socket.AF_INET6 if mapped else socket.AF_INET))
        client.settimeout(TIMEOUT)
        client.connect(("::ffff:192.0.2.1" if mapped else "192.0.2.1", 80))
        server.accept()[0].close()
        with pytest.raises(ConnectionRefusedError):
            connect("2001:db8::1")
        for protocol in ("tcp", "udp"):
            assert d.explain(protocol, ("192.0.2.1", 80)).reason == "unbound"
            assert d.explain(protocol, ("2001:db8::1", 80)).reason == "reset"
        assert d.counters()["a"].by[pyskl.Protocol.TCP, socket.AF_INET] == (0, 0)


@pytest.mark.parametrize("how", ["unregistered", "closed"])
def test_labels_come_and_go_ten_times_as_many_as_there_can_be(netns, how):
    with netns.entered(), Dispatcher.create(max_labels=3, max_sockets=3) as d:
        for number in range(30):
            label = f"label {number}"
            with socket.create_server(("", 0)) as sock:
                d.bind(label, "tcp", "192.0.2.1", 80)
                d.register(label, sock)
                assert d.explain("tcp", ("192.0.2.1", 80)).cookie == pyskl.socket_cookie(sock)
                if how == "unregistered":
                    d.unregister(label)
            d.unbind(label, "tcp", "192.0.2.1", 80)
        assert d.status().bindings == d.status().sockets == 0


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_the_death_of_the_member_that_is_registered_refuses_nobody(netns, keep, kind):
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with netns.entered(), Dispatcher.create() as d:
        first = keep(_reuseport(kind, ("::1", 0)))
        sibling = keep(_reuseport(kind, first.getsockname()))
        d.bind("a", protocol, "2001:db8::/64")
        d.register("a", first)
        first.close()
        for number in range(20):
            assert support.ask(protocol, netns, f"2001:db8::{number}", 80, sibling) is sibling
        decision = d.explain(protocol, ("2001:db8::1", 80))
        assert (decision.cookie, decision.reason) == (pyskl.socket_cookie(sibling), "sibling")


def test_a_group_that_lives_in_its_siblings_makes_no_room_for_others(netns, keep):
    with netns.entered(), Dispatcher.create(max_labels=2, max_sockets=1) as d:
        first = keep(_reuseport(socket.SOCK_STREAM, ("::1", 0)))
        sibling = keep(_reuseport(socket.SOCK_STREAM, first.getsockname()))
        d.bind("a", "tcp", "2001:db8::/64")
        d.register("a", first)
        first.close()
        other = keep(socket.create_server(("", 0)))
        with pytest.raises(pyskl.LimitReached, match="max_sockets"):
            d.register("b", other)
        assert support.ask_tcp(netns, "2001:db8::1", 80, sibling) is sibling
        sibling.close()
        d.register("b", other)


def test_a_process_whose_fds_have_a_gap(netns):
    code = """if True:
        import os, socket
        with socket.create_server(("127.0.0.1", 0)) as low:
            os.dup2(low.fileno(), 300)
            port = low.getsockname()[1]
        print(port, flush=True)
        input()"""
    with netns.entered(), Dispatcher.create() as d:
        process = support.child(code, ns=netns)
        try:
            port = int(process.stdout.readline())
            assert max(map(int, os.listdir(f"/proc/{process.pid}/fd"))) == 300
            d.bind("a", "tcp", "192.0.2.0/24")
            assert d.register_pid("a", process.pid, "tcp", "127.0.0.1", port).alive
            connect("192.0.2.1").close()
        finally:
            support.kill(process)


def test_a_namespace_in_the_place_of_another_has_a_dispatcher_of_its_own():
    """The kernel gives a new namespace the inode of one that is gone."""
    inodes = []
    for _ in range(3):
        with support.namespace() as ns, ns.entered(), socket.create_server(("", 0)) as server:
            inodes.append(ns.inode)
            with pyskl.steer(server, "192.0.2.0/24"), connect("192.0.2.1"), server.accept()[0]:
                assert len(pyskl.query()) == 1
            with Dispatcher.create() as d:
                d.bind("a", "tcp", "192.0.2.0/24")
                assert d.register("a", server).alive
                assert d.status().attached
                with connect("192.0.2.1"), server.accept()[0]:
                    pass


@pytest.mark.parametrize("prefix", ["192.0.2.0/33", "192.0.2.0/", "2001:db8::/129", "192.0.2.256", "example.org", ""])
def test_a_bad_prefix_is_quoted(netns, prefix):
    with netns.entered(), Dispatcher.create() as d:
        for call in (d.bind, d.unbind):
            with pytest.raises(ValueError) as caught:
                call("a", "tcp", prefix)
            assert repr(prefix) in str(caught.value)
        assert d.bindings() == ()


def test_who_may_not_is_told_which_capability_is_missing(netns):
    with netns.entered(), pytest.raises(pyskl.PermissionDenied, match="CAP_") as caught:
        privileges.run(lambda: Dispatcher.create().close())
    assert caught.value.missing
    with netns.entered():
        privileges.run(lambda: Dispatcher.create().close(), keep=("CAP_BPF", "CAP_NET_ADMIN"))
        assert support.eventually(lambda: pyskl.query() == ())


def test_a_label_without_a_socket_is_named(netns, keep, caplog):
    with netns.entered(), Dispatcher.create() as d, caplog.at_level(logging.WARNING):
        d.register("served", keep(socket.create_server(("", 0))))
        d.replace([Binding(label, "tcp", "192.0.2.1", port) for port, label in enumerate(("served", "bare"), 80)])
        assert [(each.levelname, "'bare'" in each.message, "'served'" in each.message) for each in caplog.records] == [
            ("WARNING", True, False)
        ]
        assert d.status().unserved == ("bare",)


@pytest.mark.parametrize("label", ["a\tb", "a\nb", "\x1b[2J", "a\0b", "a\x7f", "\x85", "", "é" * 128, "\udc80"])
def test_a_label_that_would_break_a_table_is_taken_nowhere(netns, keep, label):
    with netns.entered(), Dispatcher.create(max_labels=1) as d:
        sock = keep(socket.create_server(("", 0)))
        for call in (
            lambda: d.bind(label, "tcp", "192.0.2.1"),
            lambda: d.register(label, sock),
            lambda: d.set_policy(label, on_missing="hold"),
            lambda: d.replace([], {label: pyskl.Policy("hold")}),
        ):
            with pytest.raises(ValueError, match="label"):
                call()
        assert (d.bindings(), d.sockets(), d.policies(), d.counters()) == ((), (), {}, {})
