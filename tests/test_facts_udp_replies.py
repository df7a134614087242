"""What the kernel tells of where a datagram was sent to, and from where a reply can leave."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct

import pytest
from support import (
    IP_RECVORIGDSTADDR,
    IPV6_FREEBIND,
    IPV6_RECVORIGDSTADDR,
    TIMEOUT,
    V4,
    V6,
    ask_udp,
    chooser,
    choosing,
    family_of,
    loopback,
    new_socket,
    python,
    readable,
    result,
    silence,
    tcp_client,
    tcp_listener,
    udp_client,
    udp_socket,
)

FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])
DESTINATION = {"v4": V4, "v6": V6}
IP_PKTINFO = 8
CASES = pytest.mark.parametrize(
    ("destination", "bound"),
    [(V4, "127.0.0.1"), (V6, "::1"), (V4, "::"), (V6, "::")],
    ids=["v4", "v6", "v4 over dual-stack", "v6 over dual-stack"],
)
EIGHTY = {"slot": 0, "port_min": 80, "port_max": 80}


def ancillary(sock, destination, v4_option, v6_option):
    """Switch an option of the destination's family on, and return that family's level."""
    if sock.family == socket.AF_INET6 and v6_option is not None:
        sock.setsockopt(socket.IPPROTO_IPV6, v6_option, 1)
    if family_of(destination) == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, v4_option, 1)


def received(sock):
    """One datagram's ancillary data, by (level, type)."""
    _, ancdata, _, address = sock.recvmsg(64, 256)
    return {(level, kind): data for level, kind, data in ancdata}, address


@CASES
def test_the_original_destination_arrives_address_and_port(netns, destination, bound):
    """By IP_RECVORIGDSTADDR (20) and IPV6_RECVORIGDSTADDR (74)."""
    assert (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR) == (20, 74)
    with udp_socket(netns, bound, v6only=False) as ours, choosing(netns, {0: ours}, **EIGHTY):
        ancillary(ours, destination, IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR)
        with udp_client(netns, destination, 80) as client:
            client.send(b"?")
            data, _ = received(ours)
        if family_of(destination) == socket.AF_INET:
            raw = data[socket.IPPROTO_IP, IP_RECVORIGDSTADDR]
            family, port, address = struct.unpack_from("=H2s4s", raw)
        else:
            raw = data[socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR]
            family, port, address = struct.unpack_from("=H2s4x16s", raw)
    assert family == family_of(destination)
    assert (socket.inet_ntop(family, address), int.from_bytes(port, "big")) == (destination, 80)


@CASES
def test_pktinfo_carries_the_address_alone(netns, destination, bound):
    with udp_socket(netns, bound, v6only=False) as ours, choosing(netns, {0: ours}, **EIGHTY):
        ancillary(ours, destination, IP_PKTINFO, socket.IPV6_RECVPKTINFO)
        with udp_client(netns, destination, 80) as client:
            client.send(b"?")
            data, _ = received(ours)
        if (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO) in data:
            address, _index = struct.unpack("=16sI", data[socket.IPPROTO_IPV6, socket.IPV6_PKTINFO])
        else:
            _index, _local, address = struct.unpack("=I4s4s", data[socket.IPPROTO_IP, IP_PKTINFO])
    expected = socket.inet_pton(family_of(destination), destination)
    assert address in (expected, socket.inet_pton(socket.AF_INET6, f"::ffff:{V4}"))


@CASES
def test_a_reply_through_pktinfo_sets_its_source_address_and_not_its_source_port(netns, destination, bound):
    """It leaves from the server's own port; and a v6 address needs IPV6_FREEBIND here too."""
    with udp_socket(netns, bound, v6only=False) as ours, choosing(netns, {0: ours}, **EIGHTY):
        with new_socket(netns, family_of(destination), socket.SOCK_DGRAM) as client:
            client.sendto(b"?", (destination, 80))
            address = ours.recvfrom(64)[1]
            if ours.family == socket.AF_INET:
                info = struct.pack("=I4s4s", 0, socket.inet_aton(destination), bytes(4))
                ours.sendmsg([b"!"], [(socket.IPPROTO_IP, IP_PKTINFO, info)], 0, address)
            else:
                mapped = destination if destination == V6 else f"::ffff:{destination}"
                info = struct.pack("=16sI", socket.inet_pton(socket.AF_INET6, mapped), 0)
                control = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)]
                if destination == V6:  # local by its route alone
                    with pytest.raises(OSError) as error:
                        ours.sendmsg([b"!"], control, 0, address)
                    assert error.value.errno == errno.EINVAL
                    ours.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                ours.sendmsg([b"!"], control, 0, address)
            data, source = client.recvfrom(64)
            assert data == b"!"
            assert source[:2] == (destination, ours.getsockname()[1])
            assert source[1] != 80


@FAMILIES
def test_a_reply_from_the_original_address_and_port_needs_its_own_bound_socket(netns, family):
    """… with a classic filter that returns 0, so that it never receives."""
    host = DESTINATION[family]
    with (
        udp_socket(netns, loopback(family)) as ours,
        choosing(netns, {0: ours}, **EIGHTY) as program,
        silence(new_socket(netns, family_of(host), socket.SOCK_DGRAM)) as replies,
        udp_client(netns, host, 80) as client,
    ):
        if family == "v6":
            replies.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        replies.bind((host, 80))
        client.send(b"?")
        _, address = ours.recvfrom(64)
        replies.sendto(b"!", address)
        assert client.recv(64) == b"!"
        del program.maps["sockets"][0]  # nothing is steered: so the socket that is bound there…
        client.send(b"?")
        assert readable(replies, client, timeout=0) == []  # … takes it, and lets nothing through
        with udp_socket(netns, host if family == "v4" else "::", 81) as other:
            assert ask_udp(netns, host, 81, other) is other


@FAMILIES
def test_without_the_filter_the_socket_of_replies_would_receive(netns, family):
    host = DESTINATION[family]
    with new_socket(netns, family_of(host), socket.SOCK_DGRAM) as replies:
        if family == "v6":
            replies.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        replies.bind((host, 80))
        assert ask_udp(netns, host, 80, replies) is replies


def test_binding_to_a_v6_address_that_is_local_by_its_route_needs_freebind(netns):
    """IPV6_FREEBIND, 78; IPv4 needs nothing."""
    with udp_socket(netns, V4, 80):
        pass
    with new_socket(netns, socket.AF_INET6, socket.SOCK_DGRAM) as replies:
        with pytest.raises(OSError) as error:
            replies.bind((V6, 80))
        assert error.value.errno == errno.EADDRNOTAVAIL
        assert IPV6_FREEBIND == 78
        replies.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        replies.bind((V6, 80))


def test_binding_to_a_port_below_1024_needs_cap_net_bind_service(netns):
    code = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for port in (1024, 1023):
    try:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind((sys.argv[1], port))
        print("bound")
    except PermissionError as error:
        print("EACCES", error.errno)
"""
    with netns.entered():
        assert python(code, V4).stdout.split() == ["bound", "EACCES", str(errno.EACCES)]


@FAMILIES
def test_a_connected_udp_socket_always_wins_over_sk_lookup(netns, family):
    host = DESTINATION[family]
    with (
        udp_socket(netns, loopback(family)) as ours,
        choosing(netns, {0: ours}, slot=0) as program,
        udp_client(netns, loopback(family), 9, source=(loopback(family), 0)) as client,
        udp_client(netns, *client.getsockname()[:2], source=(host, 80)) as connected,
    ):
        client.connect((host, 80))
        client.send(b"?")
        assert readable(ours, connected) == [connected]
        assert result(program).runs == 0
        connected.close()
        client.send(b"!")
        assert ours.recv(64) == b"!"


def test_asyncio_start_server_works_as_it_is(netns):
    _start_server(netns, asyncio.run)


@pytest.fixture(scope="module")
def uvloop():
    """uvloop, where it is installed; what its first loop opens, it keeps for good."""
    module = pytest.importorskip("uvloop", exc_type=ImportError)
    module.run(asyncio.sleep(0))
    return module


def test_uvloop_start_server_works_as_it_is(netns, uvloop):
    _start_server(netns, uvloop.run)


def _start_server(netns, run):
    async def echo(reader, writer):
        writer.write(await reader.read(64) + repr(writer.get_extra_info("sockname")).encode())
        writer.close()
        await writer.wait_closed()

    async def main():
        async with await asyncio.start_server(echo, sock=ours):
            with tcp_client(netns, V4, 80) as client:
                client.setblocking(False)
                reader, writer = await asyncio.open_connection(sock=client)
                writer.write(b"?")
                assert await asyncio.wait_for(reader.read(), TIMEOUT) == f"?{(V4, 80)}".encode()
                writer.close()
                await writer.wait_closed()

    with tcp_listener(netns) as ours, chooser({0: ours}, **EIGHTY) as program:
        with program.attach(netns):
            run(main())
