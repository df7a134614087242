"""Which addresses can be steered, and which should not be."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import pytest
from support import (
    V4,
    V4_B,
    V6,
    ask,
    choosing,
    eventually,
    ip,
    loopback,
    namespace,
    readable,
    result,
    server,
    sysctl,
    tcp_client,
    tcp_listener,
    udp_client,
    udp_socket,
)

PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])
DESTINATION = {"v4": V4, "v6": V6}


@contextlib.contextmanager
def neighbours():
    """Two namespaces and a wire: here (198.18.0.1, 2001:2::1) and there (198.18.0.2, 2001:2::2)."""
    with namespace() as here, namespace() as there:
        ip(
            here,
            f"link add wire type veth peer name wire netns /proc/{os.getpid()}/fd/{there.fileno()}",
            *_end(1),
        )
        for family in ("ipv4", "ipv6"):  # who does not answer is given up sooner than by default, and not too soon
            sysctl(there, f"{family}/neigh/wire/retrans_time_ms", 200)
        ip(there, *_end(2), *(f"route del local {prefix} dev lo" for prefix in _DOCUMENTATION))
        yield here, there


_DOCUMENTATION = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")


def _end(number):
    return (
        f"address add 198.18.0.{number}/24 dev wire",
        f"address add 2001:2::{number}/64 dev wire nodad",
        "link set wire up",
    )


def reached(server, client):
    """Whether a datagram of a connected client reaches a server."""
    client.send(b"?")
    return bool(readable(server)) and server.recv(16) == b"?"


def unreachable(client):
    """Whether the client is told that its datagram found nobody: EHOSTUNREACH."""
    level, option = {
        socket.AF_INET: (socket.IPPROTO_IP, 11),  # IP_RECVERR
        socket.AF_INET6: (socket.IPPROTO_IPV6, 25),  # IPV6_RECVERR
    }[client.family]
    client.setsockopt(level, option, 1)
    client.send(b"?")
    with pytest.raises(OSError) as error:
        client.recv(16)
    client.setsockopt(level, option, 0)
    return error.value.errno == errno.EHOSTUNREACH


@FAMILIES
@PROTOCOLS
def test_the_address_must_be_local(netns, family, protocol):
    """`ip route add local PREFIX dev lo`, and for v6 `ip -6 route add local …`."""
    prefix, host = {"v4": ("198.18.7.0/24", "198.18.7.9"), "v6": ("2001:2:7::/64", "2001:2:7::9")}[family]
    with server(netns, protocol, loopback(family)) as ours:
        with choosing(netns, {0: ours}, slot=0, port_min=80, port_max=80) as program:
            with pytest.raises(OSError) as error:
                ask(protocol, netns, host, 80, ours)
            assert error.value.errno == errno.ENETUNREACH
            assert result(program).runs == 0
            ip(netns, f"route add local {prefix} dev lo")
            assert ask(protocol, netns, host, 80, ours) is ours


@FAMILIES
@PROTOCOLS
def test_traffic_from_outside_to_an_address_that_is_local_by_its_route(family, protocol):
    with neighbours() as (here, there), server(here, protocol, loopback(family)) as ours:
        via = {"v4": "198.18.0.1", "v6": "2001:2::1"}[family]
        prefix = {"v4": "192.0.2.0/24", "v6": "2001:db8::/32"}[family]
        ip(there, f"route add {prefix} via {via}")
        with choosing(here, {0: ours}, slot=0, port_min=80, port_max=80):
            with server(there, protocol, {"v4": "0.0.0.0", "v6": "::"}[family]):
                pass
            with {"tcp": tcp_client, "udp": udp_client}[protocol](there, DESTINATION[family], 80) as client:
                if protocol == "tcp":
                    connection, address = ours.accept()
                    connection.close()
                else:
                    client.send(b"?")
                    _, address = ours.recvfrom(16)
                assert address == client.getsockname()


def test_a_v6_prefix_on_link_does_not_answer_neighbour_discovery(netns):
    """An address local by its route alone: proxy_ndp for it, or a route by way of this host.

    IPv4 is another matter: ARP answers for it.
    """
    with neighbours() as (here, there), udp_socket(here, "::", v6only=False) as ours:
        ip(there, "route add 2001:db8::/64 dev wire", "route add 192.0.2.0/24 dev wire")
        with choosing(here, {0: ours}, slot=0, port_min=80, port_max=80) as program:
            with udp_client(there, V4, 80) as client:
                assert reached(ours, client)
            with udp_client(there, V6, 80) as client:
                assert unreachable(client)
                assert result(program).runs == 1
                sysctl(here, "ipv6/conf/wire/forwarding", 1)  # without it proxy_ndp does nothing
                sysctl(here, "ipv6/conf/wire/proxy_ndp", 1)
                sysctl(here, "ipv6/neigh/wire/proxy_delay", 0)
                ip(here, f"neigh add proxy {V6} dev wire")
                assert reached(ours, client)
            ip(there, "route add 2001:db8:1::/64 via 2001:2::1")
            with udp_client(there, "2001:db8:1::1", 80) as client:
                assert reached(ours, client)


def _dropped_by_rp_filter(ns):
    with ns.entered(), open("/proc/thread-self/net/netstat") as file:
        names, values = (line.split() for line in file if line.startswith("TcpExt:"))
    return int(values[names.index("IPReversePathFilter")])


def test_rp_filter_drops_some_of_it_silently():
    """What comes from an address whose route is another way: dropped, and only a counter knows."""
    with neighbours() as (here, there), udp_socket(here) as ours:
        ip(here, "link add elsewhere type veth peer name nobody", "link set elsewhere up")
        ip(here, "link set nobody up", "route add 198.19.0.0/24 dev elsewhere")
        ip(there, "route add 192.0.2.0/24 via 198.18.0.1", "address add 198.19.0.2/32 dev wire")
        sysctl(here, "ipv4/conf/all/rp_filter", 0)
        sysctl(here, "ipv4/conf/wire/rp_filter", 1)
        with (
            choosing(here, {0: ours}, slot=0) as program,
            udp_client(there, V4, 80) as direct,
            udp_client(there, V4, 80, source=("198.19.0.2", 0)) as roundabout,
        ):
            assert reached(ours, direct)
            roundabout.send(b"?")
            assert eventually(lambda: _dropped_by_rp_filter(here) == 1)
            assert readable(ours, roundabout, timeout=0) == []
            assert result(program).runs == 1
            sysctl(here, "ipv4/conf/wire/rp_filter", 0)
            assert reached(ours, roundabout)


def test_a_prefix_that_covers_the_clients_own_address_loses_it():
    """Its packets have a source that is local here, so they are no longer taken from outside."""
    with neighbours() as (here, there), udp_socket(here) as ours:
        ip(there, "route add 192.0.2.0/24 via 198.18.0.1")
        ip(there, "address add 192.0.2.77/32 dev wire", "address add 198.18.0.77/24 dev wire")
        with (
            choosing(here, {0: ours}, slot=0) as program,
            udp_client(there, V4, 80, source=("192.0.2.77", 0)) as covered,
            udp_client(there, V4, 80, source=("198.18.0.77", 0)) as outside,
        ):
            assert reached(ours, outside)
            before = _martians(here)
            covered.send(b"?")
            assert eventually(lambda: _martians(here) == before + 1)
            assert readable(ours, covered, timeout=0) == []
            assert result(program).runs == 1


def test_a_prefix_that_covers_the_gateways_own_address_loses_the_gateway():
    """… and with it every client behind it."""
    with neighbours() as (here, there), udp_socket(here) as ours:
        ip(there, "route add 192.0.2.0/24 via 198.18.0.1", "address add 198.19.0.2/32 dev wire")
        ip(here, "route add 198.19.0.0/24 via 198.18.0.2")
        sysctl(there, "ipv4/conf/wire/arp_announce", 2)  # asks as itself, as a gateway does
        with (
            choosing(here, {0: ours}, slot=0, port_min=80, port_max=80),
            udp_client(there, V4, 80, source=("198.19.0.2", 0)) as client,
        ):
            assert reached(ours, client)
            ip(here, "route add local 198.18.0.0/24 dev lo")
            ip(there, "neigh flush dev wire")
            assert unreachable(client)  # this host answers no ARP request of the gateway
            ip(here, "route del local 198.18.0.0/24 dev lo")
            assert reached(ours, client)


def _martians(ns):
    with ns.entered(), open("/proc/thread-self/net/stat/rt_cache") as file:
        names, *per_cpu = (line.split() for line in file)
    return sum(int(row[names.index("in_martian_src")], 16) for row in per_cpu)


def test_a_rule_for_this_hosts_own_address_over_ephemeral_ports_catches_its_own_replies(netns):
    """The replies to its unconnected UDP clients; a connected one gets its own."""
    how = {"slot": 0, "port_min": 32768, "port_max": 60999, "ip4": socket.inet_aton(V4)}
    with (
        udp_socket(netns, V4_B, 53) as resolver,
        udp_socket(netns, "127.0.0.1") as ours,
        udp_socket(netns, V4, 40000) as unconnected,
        udp_client(netns, V4_B, 53, source=(V4, 40001)) as connected,
        choosing(netns, {0: ours}, **how),
    ):
        for client, receives in ((unconnected, ours), (connected, connected)):
            client.sendto(b"?", (V4_B, 53)) if client is unconnected else client.send(b"?")
            assert resolver.recvfrom(16) == (b"?", client.getsockname())
            resolver.sendto(b"!", client.getsockname())
            assert readable(ours, unconnected, connected) == [receives]
            assert receives.recv(16) == b"!"


@pytest.mark.parametrize(
    ("destination", "bound", "expected"),
    [
        (V4, "127.0.0.1", (V4, 80)),
        (V6, "::1", (V6, 80, 0, 0)),
        (V4, "::", (f"::ffff:{V4}", 80, 0, 0)),
        (V6, "::", (V6, 80, 0, 0)),
    ],
    ids=["v4", "v6", "v4 over dual-stack", "v6 over dual-stack"],
)
def test_an_accepted_connections_getsockname_is_the_original_destination(netns, destination, bound, expected):
    """TCP needs neither IP_TRANSPARENT nor IP_FREEBIND."""
    with (
        tcp_listener(netns, bound, v6only=False) as ours,
        choosing(netns, {0: ours}, slot=0, port_min=80, port_max=80),
    ):
        for option in (socket.IP_TRANSPARENT, 15):  # 15: IP_FREEBIND
            assert ours.getsockopt(socket.IPPROTO_IP, option) == 0
        with tcp_client(netns, destination, 80) as client:
            connection, address = ours.accept()
            with connection:
                assert connection.getsockname() == expected
                assert client.getpeername()[:2] == (destination, 80)
                assert address[1] == client.getsockname()[1]
