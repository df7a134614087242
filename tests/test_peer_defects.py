"""What goes wrong in another dispatcher (tubular), each done its way here.

Others are held where their subject is: a namespace made again, missing pins, the lock and its holder in test_pinned,
kill -9 in test_killed, labels that come and go and the death of a reuseport member in test_dispatcher.
"""

import socket

import pytest
import support
from support import TIMEOUT

from pyskl import Dispatcher

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]


@pytest.fixture
def d(netns):
    with netns.entered(), Dispatcher.create() as dispatcher:
        yield dispatcher


def test_a_label_whose_socket_died_gets_nothing_of_the_label_made_after_it(d):
    d.bind("old", "tcp", "192.0.2.1", 80)
    with socket.create_server(("", 0)) as dying:
        d.register("old", dying)
    d.bind("new", "tcp", "192.0.2.2", 80)
    with socket.create_server(("", 0)) as server:
        d.register("new", server)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("192.0.2.1", 80), TIMEOUT)
        with socket.create_connection(("192.0.2.2", 80), TIMEOUT) as client, server.accept()[0] as accepted:
            assert accepted.getpeername() == client.getsockname()
        d.unbind("old", "tcp", "192.0.2.1", 80)
        d.bind("newest", "tcp", "192.0.2.1", 80)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("192.0.2.1", 80), TIMEOUT)
        assert not support.readable(server, timeout=0)


def test_all_of_ipv6_is_nothing_of_ipv4(d):
    d.bind("six", "tcp", "::/0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert d.explain("tcp", server.getsockname()).label is None
        with socket.create_connection(server.getsockname(), TIMEOUT), server.accept()[0]:
            pass
        with pytest.raises(ConnectionRefusedError):  # it does hold for IPv6
            socket.create_connection(("::1", server.getsockname()[1]), TIMEOUT)


def test_a_socket_is_found_behind_a_gap_in_the_fds(d, netns):
    code = (
        "import fcntl, socket; s = socket.create_server(('127.0.0.1', 0));"
        "s = socket.socket(fileno=fcntl.fcntl(s, fcntl.F_DUPFD, 500)); print(s.getsockname()[1], flush=True); input()"
    )
    d.bind("a", "tcp", "192.0.2.0/24", 80)
    process = support.child(code, ns=netns)
    try:
        told = d.register_pid("a", process.pid, "tcp", "127.0.0.1", int(process.stdout.readline()))
        assert told.alive
        with socket.create_connection(("192.0.2.1", 80), TIMEOUT):
            pass
    finally:
        support.kill(process)


@pytest.mark.parametrize("label", ["a\tb", "a\nb", "\x1b[2J", "a\0b", "", "x" * 1000])
def test_a_label_that_would_spoil_a_table(d, label):
    with pytest.raises(ValueError):
        d.bind(label, "tcp", "192.0.2.0/24", 80)
    assert list(d.bindings()) == []
