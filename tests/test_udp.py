# SPDX-License-Identifier: BSD-2-Clause
"""pyskl.udp.Endpoint: where each datagram was sent to, and replies that leave from there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import random
import resource
import signal
import socket
import struct
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    IPV6_FREEBIND,
    LOAD,
    TIMEOUT,
    UDP_GRO,
    V4,
    V6,
    ask_udp,
    family_of,
    fds,
    ip,
    needs_coalescing,
    new_socket,
    python,
    readable,
    send_together,
    steered,
    udp_client,
    udp_socket,
)

import pyskl
from pyskl.address import from_sockaddr, to_sockaddr
from pyskl.udp import Datagram, Endpoint

pytestmark = pytest.mark.needs("sk_lookup", "sockmap", "netns_link")

PAIRS = LOAD // 4  # ten thousand, but where emulated
PREFIX = {"v4": ipaddress.ip_network("192.0.2.0/24"), "v6": ipaddress.ip_network("2001:db8::/48")}
CLIENT = {"v4": "198.51.100.1", "v6": "2001:db8:ffff::1"}  # outside of what is steered
DESTINATION = {"v4": V4, "v6": V6}
CASES = pytest.mark.parametrize(
    ("family", "bound"),
    [("v4", "127.0.0.1"), ("v4", "0.0.0.0"), ("v6", "::1"), ("v4", "::"), ("v6", "::")],
    ids=["v4", "v4 wildcard", "v6", "v4 over dual-stack", "v6 over dual-stack"],
)
FAMILIES = pytest.mark.parametrize(("family", "bound"), [("v4", "127.0.0.1"), ("v6", "::1")], ids=["v4", "v6"])


@contextlib.contextmanager
def serving(ns, bound="127.0.0.1", port=0, **how):
    """An endpoint that all of both prefixes is steered to."""
    with Endpoint(udp_socket(ns, bound, port, v6only=False), **how) as endpoint, steered(ns, endpoint):
        yield endpoint


def asker(ns, family="v4"):
    """A client that takes an answer from anywhere, and says from where."""
    sock = new_socket(ns, family_of(CLIENT[family]), socket.SOCK_DGRAM)
    if family == "v6":
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    sock.bind((CLIENT[family], 0))
    return sock


def open_sockets():
    return len([1 for _, what in fds() if what.startswith("socket:")])


# -- where it was sent to, and from there back ---------------------------------------------------------------------


@CASES
def test_the_reply_to_ten_thousand_addresses_and_ports_leaves_from_each(netns, family, bound):
    prefix, chosen = PREFIX[family], random.Random(8)
    own = chosen.randrange(1024, 65536)
    with serving(netns, bound, own, max_reply_sockets=100) as endpoint, asker(netns, family) as client:
        for number in range(PAIRS):
            port = own if number % 5 == 0 else chosen.randrange(1, 65536)
            asked = str(prefix[chosen.randrange(prefix.num_addresses)]), port
            client.sendto(b"?%d" % number, asked)
            datagram = endpoint.recv()
            assert datagram.destination == asked
            assert endpoint.reply(datagram, b"!" + datagram.data) == len(datagram.data) + 1
            data, source = client.recvfrom(100)
            assert (data, source[:2]) == (b"!?%d" % number, asked)


@CASES
def test_many_at_once_come_with_their_destinations_and_are_answered_from_there(netns, family, bound):
    prefix, chosen = PREFIX[family], random.Random(9)
    with serving(netns, bound, 5353) as endpoint, asker(netns, family) as client:
        for _ in range(LOAD // 2000 or 1):
            asked = {
                (str(prefix[chosen.randrange(prefix.num_addresses)]), chosen.choice([5353, chosen.randrange(1, 65536)]))
                for _ in range(100)
            }
            for host, port in asked:
                client.sendto(repr((host, port)).encode(), (host, port))
            came = []
            while len(came) < len(asked):
                came += endpoint.recv_many(64)
            assert {datagram.destination for datagram in came} == asked
            assert all(datagram.data.decode() == repr(datagram.destination) for datagram in came)
            assert endpoint.send_many(datagram.reply(datagram.data) for datagram in came) == len(asked)
            answered = set()
            for _ in asked:
                data, source = client.recvfrom(100)
                assert data.decode() == repr(source[:2])
                answered.add(source[:2])
            assert answered == asked


@CASES
def test_the_source_is_as_the_socket_itself_gives_it(netns, family, bound):
    with serving(netns, bound) as endpoint, asker(netns, family) as client:
        for _ in range(2):
            client.sendto(b"?", (DESTINATION[family], 80))
        datagram = endpoint.recv()
        assert isinstance(datagram, Datagram)
        assert endpoint.sock.recvfrom(10) == (datagram.data, datagram.source)
        data, source, destination = datagram
        assert (data, source, destination) == (b"?", datagram.source, (DESTINATION[family], 80))


@CASES
def test_from_the_own_port_no_other_socket_is_needed(netns, family, bound):
    """Not for the own address, and for another one PKTINFO suffices."""
    with serving(netns, bound, 5353) as endpoint, asker(netns, family) as client:
        before = open_sockets()
        for address in PREFIX[family][1], PREFIX[family][2]:
            client.sendto(b"?", (str(address), 5353))
            endpoint.reply(endpoint.recv(), b"!")
            assert client.recvfrom(10)[1][:2] == (str(address), 5353)
        assert open_sockets() == before


@FAMILIES
def test_to_the_own_address_and_port_it_is_an_ordinary_socket(netns, family, bound):
    with (
        Endpoint(udp_socket(netns, bound)) as endpoint,
        udp_client(netns, *endpoint.getsockname()[:2]) as client,
    ):
        client.send(b"?")
        datagram = endpoint.recv()
        assert datagram == (b"?", client.getsockname(), endpoint.getsockname()[:2])
        endpoint.reply(datagram, b"!")
        assert client.recv(10) == b"!"
        endpoint.send(b"unasked", client.getsockname())
        assert client.recv(10) == b"unasked"


@FAMILIES
def test_from_the_own_address_and_another_port(netns, family, bound):
    with Endpoint(udp_socket(netns, bound)) as endpoint, udp_socket(netns, bound) as client:
        endpoint.send(b"!", client.getsockname(), source=(bound, 999))
        assert client.recvfrom(10)[1][:2] == (bound, 999)


def test_what_came_before_the_endpoint_was_made_has_its_destination_too(netns):
    with udp_socket(netns) as ours, steered(netns, ours), asker(netns) as client:
        client.sendto(b"?", (V4, 80))
        assert readable(ours)
        with Endpoint(ours) as endpoint:
            assert endpoint.recv().destination == (V4, 80)


def test_a_link_local_destination_names_its_interface(netns):
    ip(netns, "link add one type veth peer name two", "link set one up", "link set two up")
    with netns.entered():
        index = socket.if_nametoindex("one")
    ip(netns, "address add fe80::1/64 dev one nodad", "address add fe80::2/64 dev two nodad")
    with (
        Endpoint(udp_socket(netns, "::", 5353)) as endpoint,
        new_socket(netns, socket.AF_INET6, socket.SOCK_DGRAM) as client,
    ):
        client.bind(("fe80::1", 0, 0, index))
        client.sendto(b"?", ("fe80::1", 5353, 0, index))
        datagram = endpoint.recv()
        assert datagram.destination == (f"fe80::1%{index}", 5353)
        endpoint.reply(datagram, b"!")
        assert client.recvfrom(10) == (b"!", ("fe80::1", 5353, 0, index))
        with netns.entered():
            endpoint.send(b"!", datagram.source, source=("fe80::1%one", 9999))
        assert client.recvfrom(10) == (b"!", ("fe80::1", 9999, 0, index))


def test_a_multicast_datagram_is_answered_from_the_socket_itself(netns):
    group = "224.0.0.251"
    ip(netns, "route add 224.0.0.0/4 dev lo")
    with Endpoint(udp_socket(netns, "0.0.0.0", 5353)) as endpoint, asker(netns) as client:
        membership = socket.inet_aton(group) + socket.inet_aton("127.0.0.1")
        endpoint.sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        client.sendto(b"?", (group, 5353))
        datagram = endpoint.recv()
        assert datagram.destination == (group, 5353)
        endpoint.reply(datagram, b"!")
        assert client.recvfrom(10)[1][1] == 5353


# -- datagrams -----------------------------------------------------------------------------------------------------


def test_empty_datagrams_go_both_ways(netns):
    with serving(netns) as endpoint, asker(netns) as client:
        client.sendto(b"", (V4, 80))
        datagram = endpoint.recv()
        assert datagram == (b"", client.getsockname(), (V4, 80))
        assert endpoint.reply(datagram, b"") == 0
        assert client.recvfrom(10) == (b"", (V4, 80))
        client.sendto(b"", (V4, 80))
        assert [each.data for each in endpoint.recv_many(8)] == [b""]
        assert endpoint.send_many([datagram.reply(b"")]) == 1
        assert client.recvfrom(10) == (b"", (V4, 80))


def test_what_is_longer_than_there_is_room_for_is_cut_and_says_so(netns):
    with serving(netns) as endpoint, asker(netns) as client:
        for text in (b"short", b"much too long", b"exact", b"much too long"):
            client.sendto(text, (V4, 80))
        first, *others = endpoint.recv_many(3, 5)
        assert [each.data for each in (first, *others)] == [b"short", b"much ", b"exact"]
        assert [each.truncated for each in (first, *others)] == [False, True, False]
        datagram = endpoint.recv(0)
        assert (datagram.data, datagram.truncated) == (b"", True)


@pytest.mark.parametrize("coalesced", [True, False])
@CASES
def test_coalesced_datagrams_are_given_as_what_they_were(netns, family, bound, coalesced):
    """UDP_GRO, which the socket's owner has set."""
    payload = random.Random(7).randbytes(1037)
    parts = [payload[start : start + 100] for start in range(0, len(payload), 100)]
    host, port = DESTINATION[family], 4242
    if coalesced:
        needs_coalescing(netns)
    with serving(netns, bound) as endpoint, asker(netns, family) as client:
        endpoint.sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, coalesced)
        send_together(client, (host, port), payload, 100)
        assert endpoint.sock.recv(2000) == (payload if coalesced else parts[0])  # what a plain socket gets
        while not coalesced and readable(endpoint.sock, timeout=0):
            endpoint.sock.recv(2000)

        client.sendto(b"alone", (host, port))
        client.sendto(b"", (host, port))
        send_together(client, (host, port), payload, 100)
        send_together(client, (host, port + 1), payload[:300], 100)
        client.sendto(b"last", (host, port))
        expected = [(data, (host, port)) for data in (b"alone", b"", *parts)]
        expected += [*((data, (host, port + 1)) for data in parts[:3]), (b"last", (host, port))]
        came = endpoint.recv_many(5 if coalesced else 100)
        assert [(each.data, each.destination) for each in came] == expected
        assert {each.source[1] for each in came} == {client.getsockname()[1]}
        assert not any(each.truncated for each in came)
        assert endpoint.send_many([each.reply(each.data) for each in came]) == len(expected)
        assert [(data, source[:2]) for data, source in (client.recvfrom(2000) for _ in came)] == expected


def test_coalesced_datagrams_one_by_one(netns):
    needs_coalescing(netns)
    with serving(netns) as endpoint, asker(netns) as client:
        endpoint.sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        send_together(client, (V4, 80), b"abcdefg", 2)
        client.sendto(b"next", (V4, 80))
        assert endpoint.recv().data == b"ab"
        assert [each.data for each in endpoint.recv_many(2)] == [b"cd", b"ef"]
        assert [each.data for each in endpoint.recv_many(9)] == [b"g"]  # what is here already, without asking for more
        assert endpoint.recv().data == b"next"
        send_together(client, (V4, 80), b"abcdefg", 2)
        assert [(each.data, each.truncated) for each in endpoint.recv_many(1, 5)] == [
            (b"ab", False),
            (b"cd", False),
            (b"e", True),
        ]
        send_together(client, (V4, 80), b"abcdefg", 2)
        assert endpoint.recv().data == b"ab"
        endpoint.close()
        with pytest.raises(ValueError):
            endpoint.recv()


@FAMILIES
def test_the_largest_datagrams_go_both_ways(netns, family, bound):
    largest = 65507 if family == "v4" else 65527
    with serving(netns, bound) as endpoint, asker(netns, family) as client:
        client.sendto(bytes(largest), (DESTINATION[family], 80))
        datagram = endpoint.recv()
        assert (len(datagram.data), datagram.truncated) == (largest, False)
        endpoint.reply(datagram, memoryview(datagram.data))
        assert client.recv(70000) == bytes(largest)
        with pytest.raises(OSError) as error:
            endpoint.reply(datagram, bytes(largest + 1))
        assert error.value.errno == errno.EMSGSIZE


def test_data_is_bytes_or_a_buffer(netns):
    with serving(netns) as endpoint, asker(netns) as client:
        to = client.getsockname()
        for data in (b"ab", bytearray(b"ab"), memoryview(b"ab"), memoryview(struct.pack("=H", 0x6261)).cast("H")):
            assert endpoint.send(data, to, source=(V4, 80)) == 2
            assert client.recv(10) in (b"ab", b"ba")
        for data in ("text", 5, None):
            with pytest.raises(TypeError):
                endpoint.send(data, to, source=(V4, 80))


def test_recv_many_waits_for_the_first_alone_and_takes_no_more_than_asked(netns):
    with serving(netns) as endpoint, asker(netns) as client:
        for number in range(5):
            client.sendto(b"%d" % number, (V4, 80))
        assert [each.data for each in endpoint.recv_many(3)] == [b"0", b"1", b"2"]
        assert [each.data for each in endpoint.recv_many(10**9)] == [b"3", b"4"]
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=str(wrong)):
                endpoint.recv_many(wrong)
        with pytest.raises(ValueError, match="-1"):
            endpoint.recv(-1)


def test_send_many_gives_how_many_went_before_the_one_that_could_not(netns):
    with serving(netns, port=5353) as endpoint, asker(netns) as client:
        to, good = client.getsockname(), (V4, 5353)
        too_long, no_port = (bytes(70000), good, to), (b"x", (V4, 0), to)
        for bad in (too_long, no_port, (b"x", ("203.0.113.250", 99), ("127.0.0.1", 0))):
            assert endpoint.send_many([*[(b"a", (V4, n), to) for n in (5353, 80, 5353)], bad, (b"b", good, to)]) == 3
            assert [client.recvfrom(10)[1] for _ in range(3)] == [good, (V4, 80), good]
            with pytest.raises(OSError):
                endpoint.send_many([bad, (b"b", good, to)])
        with pytest.raises(ValueError, match="nowhere"):  # before anything goes out
            endpoint.send_many([(b"a", good, to), (b"b", good, ("nowhere", 1))])
        assert endpoint.send_many([]) == 0
        assert endpoint.send_many([(b"last", None, to)] * 200) == 200
        assert {client.recvfrom(10)[0] for _ in range(200)} == {b"last"}


# -- as a socket has it --------------------------------------------------------------------------------------------


def test_time_outs_and_blocking(netns):
    with Endpoint(udp_socket(netns)) as endpoint:
        assert endpoint.gettimeout() == TIMEOUT  # the socket's
        endpoint.settimeout(0.01)
        for receive in (endpoint.recv, lambda: endpoint.recv_many(4)):
            with pytest.raises(TimeoutError):
                receive()
        endpoint.setblocking(False)
        assert (endpoint.gettimeout(), endpoint.sock.gettimeout()) == (0, 0)
        for receive in (endpoint.recv, lambda: endpoint.recv_many(4)):
            with pytest.raises(BlockingIOError):
                receive()
        with pytest.raises(ValueError, match="range"):
            endpoint.settimeout(-1)


@pytest.mark.parametrize("timeout", [None, TIMEOUT])
def test_waiting_for_a_datagram(netns, timeout):
    with Endpoint(udp_socket(netns)) as endpoint, udp_client(netns, *endpoint.getsockname()) as client:
        endpoint.settimeout(timeout)
        came = []
        thread = threading.Thread(target=lambda: came.append(endpoint.recv()))
        thread.start()
        client.send(b"?")
        thread.join(TIMEOUT)
        assert came[0].data == b"?"


def test_a_signal_that_is_handled_does_not_end_the_wait(netns):
    with Endpoint(udp_socket(netns)) as endpoint, udp_client(netns, *endpoint.getsockname()) as client:
        for timeout in (None, TIMEOUT):
            endpoint.settimeout(timeout)
            before = signal.signal(signal.SIGALRM, lambda *_: client.send(b"!"))
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                assert endpoint.recv().data == b"!"
            finally:
                signal.signal(signal.SIGALRM, before)


def test_an_error_that_is_pending_on_the_socket_is_raised(netns):
    """An ICMP error, with IP_RECVERR (11)."""
    with Endpoint(udp_socket(netns)) as endpoint:
        endpoint.sock.setsockopt(socket.IPPROTO_IP, 11, 1)
        with udp_socket(netns) as gone:
            to = gone.getsockname()
        for use in (endpoint.recv, lambda: endpoint.send(b"?", to), endpoint.recv, lambda: endpoint.recv_many(9)):
            endpoint.send(b"?", to)
            with pytest.raises(ConnectionRefusedError):
                use()
        with pytest.raises(OSError):  # one that is of this very datagram
            endpoint.send(bytes(70000), to)
        assert readable(endpoint.sock, timeout=0) == []  # nothing that would wake a loop for ever
        endpoint.setblocking(False)
        with pytest.raises(BlockingIOError):
            endpoint.recv()


def test_closing(netns):
    sock = udp_socket(netns)
    endpoint = Endpoint(sock)
    assert endpoint.fileno() == sock.fileno()
    assert not endpoint.closed
    endpoint.send(b"", ("127.0.0.1", 9), source=("127.0.0.1", 1234))
    endpoint.close()
    endpoint.close()
    assert (endpoint.closed, sock.fileno(), repr(endpoint)) == (True, -1, "<Endpoint closed>")
    for use in (
        endpoint.fileno,
        endpoint.recv,
        lambda: endpoint.recv_many(2),
        lambda: endpoint.send(b"", ("127.0.0.1", 9)),
        lambda: endpoint.send_many([(b"", None, ("127.0.0.1", 9))]),
        lambda: endpoint.settimeout(1),
        lambda: endpoint.setblocking(True),
        endpoint.__enter__,
    ):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_one_that_is_forgotten_warns_and_is_closed(netns):
    sock = udp_socket(netns)
    endpoint = Endpoint(sock)
    with pytest.warns(ResourceWarning, match="Endpoint"):
        del endpoint
    assert sock.fileno() == -1


def test_an_fd_is_taken_over_and_an_object_with_one_duplicated(netns):
    with udp_socket(netns) as sock, udp_client(netns, *sock.getsockname()) as client:
        client.send(b"?")
        copy = os.dup(sock.fileno())
        with Endpoint(copy) as endpoint:
            assert endpoint.fileno() == copy
            assert endpoint.recv().data == b"?"
        with pytest.raises(OSError):
            os.fstat(copy)
        with open(os.dup(sock.fileno()), "rb", buffering=0) as holder:
            os.set_blocking(holder.fileno(), False)
            with Endpoint(holder) as endpoint, pytest.raises(BlockingIOError):
                endpoint.recv()
            os.fstat(holder.fileno())


def test_a_socket_that_can_be_no_endpoint_is_refused_and_left_alone(netns):
    with contextlib.ExitStack() as stack:
        new = lambda *kind: stack.enter_context(new_socket(netns, *kind))  # noqa: E731
        bound = stack.enter_context(udp_socket(netns))
        tcp = new(socket.AF_INET, socket.SOCK_STREAM)
        tcp.bind(("127.0.0.1", 0))
        for sock, reason in (
            (new(socket.AF_INET, socket.SOCK_DGRAM), "not bound"),
            (new(socket.AF_INET6, socket.SOCK_DGRAM), "not bound"),
            (stack.enter_context(udp_client(netns, *bound.getsockname())), "connected"),
            (tcp, "no UDP socket"),
            (new(socket.AF_UNIX, socket.SOCK_DGRAM), "no UDP socket"),
        ):
            with pytest.raises(pyskl.BadSocket, match=reason) as error:
                Endpoint(sock)
            assert error.value.reason in str(error.value)
            assert sock.fileno() >= 0
        for wrong, kind in ((0.5, TypeError), ("x", TypeError), (-1, OSError), (10**6, OSError)):
            with pytest.raises(kind):
                Endpoint(wrong)
        with pytest.raises(ValueError, match="max_reply_sockets"):
            Endpoint(bound, max_reply_sockets=0)
        assert bound.fileno() >= 0


def test_addresses_that_are_none(netns):
    with serving(netns) as v4, Endpoint(udp_socket(netns, "::1")) as v6:
        for address, kind in (
            (("nowhere.example", 80), ValueError),
            (("192.0.2.256", 80), ValueError),
            (("2001:db8::1", 80), ValueError),
            ((V4, -1), ValueError),
            ((V4, 65536), ValueError),
            ((V4, "80"), TypeError),
            ((V4,), TypeError),
            (80, TypeError),
            ([V4, 80], TypeError),
        ):
            with pytest.raises(kind):
                v4.send(b"?", address)
            with pytest.raises(kind):
                v4.send(b"?", (V4, 80), source=address)
        with pytest.raises(ValueError, match="IPv6"):
            v6.send(b"?", ("nowhere", 80))
        assert v4.send(b"?", (ipaddress.ip_address(V4), 80)) == 1


# -- the sockets that replies leave from ---------------------------------------------------------------------------


def test_no_more_than_so_many_are_kept_and_the_last_used_stay(netns):
    with serving(netns, max_reply_sockets=5) as endpoint, asker(netns) as client:
        before, to = open_sockets(), client.getsockname()
        for number in range(50):
            endpoint.send(b"favourite", to, source=(V4, 53))
            endpoint.send(b"other", to, source=(V4, 1000 + number))
            assert open_sockets() <= before + 5
        kept = set(endpoint._replies._sockets)
        assert kept == {to_sockaddr(socket.AF_INET, (V4, port)) for port in (53, 1046, 1047, 1048, 1049)}
        for number in range(50):
            assert client.recvfrom(10)[1] == (V4, 53)
            assert client.recvfrom(10)[1] == (V4, 1000 + number)


@FAMILIES
def test_they_never_receive_and_keep_nobody_from_receiving(netns, family, bound):
    """Without steering, what is sent to where a reply left from goes where it would go without that socket."""
    host = DESTINATION[family]
    wildcard = "0.0.0.0" if family == "v4" else "::"
    with asker(netns, family) as client, serving(netns, bound) as endpoint:
        endpoint.send(b"!", client.getsockname(), source=(host, 80))
        assert client.recvfrom(10)[1][:2] == (host, 80)
        (reply,) = endpoint._replies._sockets.values()
        with steered(netns, endpoint):
            assert ask_udp(netns, host, 80, endpoint.sock, reply) is endpoint.sock
    with (
        asker(netns, family) as client,
        Endpoint(udp_socket(netns, bound)) as endpoint,
    ):
        endpoint.send(b"!", client.getsockname(), source=(host, 80))
        (reply,) = endpoint._replies._sockets.values()
        with pytest.raises(ConnectionRefusedError):
            ask_udp(netns, host, 80, endpoint.sock, reply)
        other = new_socket(netns, family_of(host), socket.SOCK_DGRAM)
        with other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((wildcard, 80))
            assert ask_udp(netns, host, 80, endpoint.sock, reply, other) is other
        assert readable(reply, timeout=0) == []
        reply.setblocking(False)
        with reply.dup() as itself:  # not even from itself
            itself.send(b"?")
            assert readable(reply, timeout=0) == []


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_two_servers_reply_from_the_same_address_and_port(netns, option):
    """As during a hand-over; and beside a socket that shares its port by either option."""
    with serving(netns) as old, Endpoint(udp_socket(netns)) as new, asker(netns) as client:
        beside = new_socket(netns, socket.AF_INET, socket.SOCK_DGRAM)
        with beside:
            beside.setsockopt(socket.SOL_SOCKET, option, 1)
            beside.bind((V4, 80))
            for endpoint in (old, new, old):
                endpoint.send(b"!", client.getsockname(), source=(V4, 80))
                assert client.recvfrom(10) == (b"!", (V4, 80))
            old.close()
            assert ask_udp(netns, V4, 80, beside) is beside


def test_an_address_and_port_that_is_taken_says_so(netns):
    with serving(netns) as endpoint, udp_socket(netns, V4, 80):
        with pytest.raises(pyskl.BpfError, match=r"192\.0\.2\.1:80.*another socket") as error:
            endpoint.send(b"!", (V4, 9), source=(V4, 80))
        assert (error.value.errno, error.value.call) == (errno.EADDRINUSE, "bind")


def test_an_address_that_is_not_local_says_so(netns):
    with serving(netns) as endpoint, pytest.raises(pyskl.BpfError, match=r"192\.0\.3\.1:80.*no local") as error:
        endpoint.send(b"!", (V4, 9), source=("192.0.3.1", 80))
    assert error.value.errno == errno.EADDRNOTAVAIL


def test_a_privileged_port_without_the_capability_says_so(netns):
    code = """
import fcntl, os, socket  # the first before nobody, who may not read it, needs it
import pyskl, pyskl.udp
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(type=socket.SOCK_DGRAM) as sock:
    sock.bind(("127.0.0.1", 5353))
    with pyskl.udp.Endpoint(sock) as endpoint:
        endpoint.send(b"!", ("127.0.0.1", 9), source=("192.0.2.1", 1024))
        try:
            endpoint.send(b"!", ("127.0.0.1", 9), source=("192.0.2.1", 1023))
        except pyskl.PermissionDenied as error:
            print(error.errno, *error.missing, error)
"""
    with netns.entered():
        number, missing, *words = python(code).stdout.split()
    assert (int(number), missing) == (errno.EACCES, "CAP_NET_BIND_SERVICE")
    assert "192.0.2.1:1023:" in words
    assert words[-1] == "CAP_NET_BIND_SERVICE"


def test_where_fds_run_out_those_that_are_kept_make_room(netns):
    with serving(netns, max_reply_sockets=1000) as endpoint, asker(netns) as client:
        to, limits = client.getsockname(), resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fd for fd, _ in fds()) + 4, limits[1]))
        try:
            for port in range(1000, 1200):
                assert endpoint.send(b"!", to, source=(V4, port)) == 1
                assert client.recvfrom(10)[1] == (V4, port)
            endpoint._replies.clear()
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(OSError):
                    while True:
                        stack.callback(os.close, os.dup(0))
                with pytest.raises(pyskl.BpfError, match="RLIMIT_NOFILE") as error:
                    endpoint.send(b"!", to, source=(V4, 80))
                assert error.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_replies_are_set_as_the_servers_socket_is(netns):
    with serving(netns) as endpoint, asker(netns) as client:
        endpoint.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x28)
        endpoint.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 7)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        client.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
        for port in (endpoint.getsockname()[1], 80):
            endpoint.send(b"!", client.getsockname(), source=(V4, port))
            _, ancdata, _, _ = client.recvmsg(10, 100)
            set_as = {kind: int.from_bytes(data, sys.byteorder) for _, kind, data in ancdata}
            assert set_as == {socket.IP_TOS: 0x28, socket.IP_TTL: 7}


def test_threads_share_an_endpoint_and_few_reply_sockets(netns):
    """Sockets leave the cache while others send from them."""
    each, workers = 500, 4
    with serving(netns, max_reply_sockets=2) as endpoint, contextlib.ExitStack() as stack:
        stop = threading.Event()

        def serve():
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    endpoint.send_many(datagram.reply(datagram.data) for datagram in endpoint.recv_many(4))

        def asks(number):
            with asker(netns) as client:
                for turn in range(each):
                    asked = f"192.0.2.{number + 1}", 1000 + turn % 7
                    client.sendto(b"%d" % turn, asked)
                    assert client.recvfrom(10) == (b"%d" % turn, asked)
                done.append(number)

        done: list[int] = []
        endpoint.settimeout(0.05)
        servers = [threading.Thread(target=serve) for _ in range(workers)]
        askers = [threading.Thread(target=asks, args=[number]) for number in range(workers)]
        stack.callback(lambda: [thread.join() for thread in servers])
        stack.callback(stop.set)
        for thread in (*servers, *askers):
            thread.start()
        for thread in askers:
            thread.join()
        assert sorted(done) == list(range(workers))


@pytest.fixture
def narrow(netns):
    """A way out on which nothing leaves: a neighbour that does not say where it is."""
    ip(
        netns,
        "link add wide type veth peer name far",
        "link set wide up",
        "link set far up",
        "address add 203.0.113.1/24 dev wide",
        "route del local 203.0.113.0/24 dev lo",
    )
    return lambda: ip(netns, "neighbour replace 203.0.113.9 lladdr 02:00:00:00:00:01 nud permanent dev wide")


@pytest.mark.parametrize("port", [5353, 80], ids=["own port", "another port"])
def test_sending_that_would_block(netns, narrow, port):
    """Not waiting: BlockingIOError; to a time-out: TimeoutError; else until there is room."""
    with Endpoint(udp_socket(netns, port=5353)) as endpoint:
        endpoint.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        one = (bytes(1000), ("203.0.113.1", port), ("203.0.113.9", 9))
        endpoint.setblocking(False)
        sent = endpoint.send_many([one] * 100)
        assert 0 < sent < 100
        with pytest.raises(BlockingIOError):
            endpoint.send_many([one])
        endpoint.settimeout(0.01)
        with pytest.raises(TimeoutError):
            endpoint.send(one[0], one[2], source=one[1])
        endpoint.settimeout(TIMEOUT)
        threading.Timer(0.01, narrow).start()
        assert endpoint.send_many([one] * 100) == 100


# -- addresses as the kernel has them: pure ------------------------------------------------------------------------

_ports = st.integers(0, 65535)
_words = st.integers(0, 2**32 - 1)


@pytest.mark.portable
@settings(deadline=None)
@given(st.ip_addresses(v=4).map(str), _ports)
def test_v4_addresses_are_packed_and_unpacked(host, port):
    packed = to_sockaddr(socket.AF_INET, (host, port))
    assert packed == struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(host) + bytes(20)
    assert from_sockaddr(packed) == (host, port)
    mapped = to_sockaddr(socket.AF_INET6, (host, port))
    assert from_sockaddr(mapped) == (f"::ffff:{host}", port, 0, 0)


@pytest.mark.portable
@settings(deadline=None)
@given(st.ip_addresses(v=6), _ports, _words, _words)
def test_v6_addresses_are_packed_and_unpacked(address, port, flow, scope):
    packed = to_sockaddr(socket.AF_INET6, (str(address), port, flow, scope))
    wire = struct.pack("!HI16s", port, flow, address.packed)
    assert packed == struct.pack("=H", socket.AF_INET6) + wire + struct.pack("=I", scope)
    host, *others = from_sockaddr(packed)
    assert (ipaddress.ip_address(host), others) == (address, [port, flow, scope])
