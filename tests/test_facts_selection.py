"""When the hook runs, what bpf_sk_assign() says, and what clients see of it all."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct

import pytest
from support import (
    NO_REUSEPORT,
    REPLACE,
    SO_ATTACH_REUSEPORT_EBPF,
    V4,
    V6,
    ask,
    ask_tcp,
    ask_udp,
    bpf_object,
    chooser,
    choosing,
    loopback,
    readable,
    result,
    server,
    silence,
    tcp_client,
    tcp_listener,
    udp_client,
    udp_socket,
    unanswered,
)

import pyskl

PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])
DESTINATION = {"v4": V4, "v6": V6}


# -- How often the hook runs -----------------------------------------------------------------------


@FAMILIES
def test_once_per_syn(netns, family):
    """Not for the ACK, the data, the FIN; and once where it is refused."""
    with tcp_listener(netns, loopback(family)) as ours:
        with choosing(netns, {0: ours}, slot=0, port_min=80, port_max=80) as program:
            for number in range(1, 11):
                with tcp_client(netns, DESTINATION[family], 80) as client:
                    with ours.accept()[0] as connection:
                        client.sendall(b"?")
                        assert connection.recv(16) == b"?"
                    assert client.recv(16) == b""
                assert result(program).runs == number
            del program.maps["sockets"][0]
            with pytest.raises(ConnectionRefusedError):
                ask_tcp(netns, DESTINATION[family], 80)
            assert result(program).runs == 11


def test_a_retransmitted_syn_runs_it_again(netns):
    with silence(tcp_listener(netns)) as parked, tcp_listener(netns) as ours:
        with choosing(netns, {0: parked}, slot=0, port_min=80, port_max=80) as program:
            with unanswered(netns, V4, 80):
                assert result(program) == (1, True, 0)
                program.maps["sockets"][0] = ours
            assert result(program) == (2, True, 0)
            ours.accept()[0].close()


@FAMILIES
def test_once_per_datagram_that_no_connected_socket_takes(netns, family):
    host = DESTINATION[family]
    with udp_socket(netns, loopback(family)) as ours:
        with choosing(netns, {0: ours}, slot=0, port_min=80, port_max=80) as program:
            with udp_client(netns, host, 80) as client:
                for number in range(1, 11):
                    client.send(b"?")
                    assert ours.recv(16) == b"?"
                    assert result(program).runs == number
                with udp_client(netns, *client.getsockname()[:2], source=(host, 80)) as connected:
                    client.send(b"?")
                    assert connected.recv(16) == b"?"
                assert result(program).runs == 10


# -- The errors of bpf_sk_assign() -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "destination", "selected", "expected"),
    [
        ("tcp", V4, ("udp", "127.0.0.1", True), errno.EPROTOTYPE),
        ("udp", V4, ("tcp", "127.0.0.1", True), errno.EPROTOTYPE),
        ("tcp", V6, ("udp", "::", False), errno.EPROTOTYPE),
        ("tcp", V4, ("tcp", "::1", True), errno.EAFNOSUPPORT),
        ("udp", V4, ("udp", "::1", True), errno.EAFNOSUPPORT),
        ("tcp", V6, ("tcp", "127.0.0.1", True), errno.EAFNOSUPPORT),
        ("udp", V6, ("udp", "127.0.0.1", True), errno.EAFNOSUPPORT),
        ("tcp", V4, ("tcp", "::", False), 0),
        ("udp", V4, ("udp", "::", False), 0),
        ("tcp", V6, ("tcp", "::", False), 0),
    ],
)
def test_the_protocol_and_the_family_must_fit(netns, packet, destination, selected, expected):
    """EPROTOTYPE and EAFNOSUPPORT; then nothing is selected, and the look-up continues."""
    protocol, host, v6only = selected
    with (
        server(netns, protocol, host, v6only=v6only) as ours,
        server(netns, packet, "0.0.0.0" if destination == V4 else "::", 80) as ordinary,
        choosing(netns, {0: ours}, slot=0, port_min=80, port_max=80) as program,
    ):
        reached = ask(packet, netns, destination, 80, ours, ordinary)
        assert reached is (ordinary if expected else ours)
        assert result(program) == (1, True, expected)


@PROTOCOLS
def test_a_selection_of_an_earlier_program_is_eexist_without_replace(netns, protocol):
    with (
        server(netns, protocol, "127.0.0.1") as a,
        server(netns, protocol, "127.0.0.1") as b,
        choosing(netns, {0: a}, slot=0),
        choosing(netns, {0: b}, slot=0) as second,
    ):
        assert ask(protocol, netns, V4, 80, a, b) is a
        assert result(second) == (1, True, errno.EEXIST)
        with choosing(netns, {0: b}, slot=0, flags=REPLACE) as third:
            assert ask(protocol, netns, V4, 80, a, b) is b
            assert result(third) == (1, True, 0)


# -- SO_REUSEPORT ----------------------------------------------------------------------------------


@contextlib.contextmanager
def group(ns, protocol, host="127.0.0.1", size=2):
    """So many sockets of one SO_REUSEPORT group."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server(ns, protocol, host, reuseport=True))
        port = first.getsockname()[1]
        yield (
            first,
            *(stack.enter_context(server(ns, protocol, host, port, reuseport=True)) for _ in range(size - 1)),
        )


@PROTOCOLS
@FAMILIES
def test_selecting_a_member_of_a_group_spreads_over_the_whole_group(netns, protocol, family):
    with group(netns, protocol, loopback(family)) as members:
        with choosing(netns, {0: members[0]}, slot=0, port_min=80, port_max=80):
            reached = {ask(protocol, netns, DESTINATION[family], 80, *members) for _ in range(100)}
    assert reached == set(members)  # by chance a member is missed once in 2**99 runs


@PROTOCOLS
@FAMILIES
def test_no_reuseport_pins_that_member(netns, protocol, family):
    with group(netns, protocol, loopback(family)) as members:
        how = {"slot": 0, "flags": NO_REUSEPORT, "port_min": 80, "port_max": 80}
        with choosing(netns, {0: members[1]}, **how):
            reached = {ask(protocol, netns, DESTINATION[family], 80, *members) for _ in range(100)}
    assert reached == {members[1]}


@PROTOCOLS
@pytest.mark.parametrize("flags", [0, NO_REUSEPORT])
def test_where_the_member_in_the_map_closes_clients_are_refused(netns, protocol, flags):
    """… although its siblings live."""
    with group(netns, protocol) as (mapped, sibling):
        how = {"slot": 0, "flags": flags, "port_min": 80, "port_max": 80}
        with choosing(netns, {0: mapped}, **how) as program:
            assert ask(protocol, netns, V4, 80, mapped, sibling) in (mapped, sibling)
            mapped.close()
            with pytest.raises(ConnectionRefusedError):
                ask(protocol, netns, V4, 80, sibling)
            assert not result(program).found
            assert ask(protocol, netns, *sibling.getsockname(), sibling) is sibling


@contextlib.contextmanager
def reuseport_program(members, **constants):
    """reuseport.bpf.c with these constants, in charge of a group; yields how often it ran."""
    with pyskl.Program.load(bpf_object("reuseport"), name="pick", constants=constants) as program:
        for number, sock in enumerate(members):
            program.maps["members"][number] = sock
        fd = struct.pack("=i", program.fileno())
        members[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, fd)
        yield lambda: struct.unpack("=Q", program.maps["runs"][0])[0]


@PROTOCOLS
@FAMILIES
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_sk_reuseport_program_chooses_within_the_group(netns, protocol, family, number):
    """The sk_lookup program selects a socket that is not in its array: of another group."""
    host = DESTINATION[family]
    with (
        group(netns, protocol, loopback(family), size=3) as members,
        server(netns, protocol, loopback(family), reuseport=True) as pinned,
        reuseport_program(members, member=number) as runs,
        chooser(slot=0, port_min=80, port_max=80) as program,
    ):
        assert ask(protocol, netns, *members[0].getsockname()[:2], *members) is members[number]
        assert runs() == 1
        # A socket is in a REUSEPORT_SOCKARRAY or in a SOCKMAP: the group is entered by a member
        # that the array has not.
        address = members[0].getsockname()[:2]
        with server(netns, protocol, *address, reuseport=True) as door, program.attach(netns):
            program.maps["sockets"][0] = door
            for _ in range(10):
                assert ask(protocol, netns, host, 80, door, *members) is members[number]
            assert runs() == 11
            with choosing(netns, {0: door}, slot=0, port_min=80, flags=NO_REUSEPORT | REPLACE):
                assert ask(protocol, netns, host, 80, door, *members) is door
            assert runs() == 11
            program.maps["sockets"][0] = pinned
            assert ask(protocol, netns, host, 80, pinned, *members) is pinned


@PROTOCOLS
def test_an_sk_reuseport_program_drops(netns, protocol):
    with (
        group(netns, protocol) as members,
        server(netns, protocol, *members[0].getsockname(), reuseport=True) as door,
        reuseport_program(members, verdict=pyskl.Verdict.DROP) as runs,
        choosing(netns, {0: door}, slot=0, port_min=80, port_max=80),
    ):
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, V4, 80, door, *members)
        assert runs() == 1


@FAMILIES
def test_a_udp_group_with_connected_members(netns, family):
    """A connected member takes its own client's datagrams and no other's."""
    with group(netns, "udp", loopback(family), size=3) as members:
        connected, *others = members
        with choosing(netns, {0: others[0]}, slot=0, port_min=80, port_max=80):
            connected.connect((loopback(family), 9))
            reached = {ask_udp(netns, DESTINATION[family], 80, *members) for _ in range(100)}
    assert reached == set(others)


# -- Several programs ------------------------------------------------------------------------------


@PROTOCOLS
@pytest.mark.parametrize("drops", [(0,), (1,), (0, 1)], ids=["before", "after", "before and after"])
def test_any_selection_beats_any_drop(netns, protocol, drops):
    with server(netns, protocol, "127.0.0.1") as ours, contextlib.ExitStack() as stack:
        drop = stack.enter_context(chooser(verdict=pyskl.Verdict.DROP))
        select = stack.enter_context(chooser({0: ours}, slot=0))
        if 0 in drops:
            stack.enter_context(drop.attach(netns))
        link = stack.enter_context(select.attach(netns))
        if 1 in drops:
            stack.enter_context(drop.attach(netns))
        assert ask(protocol, netns, V4, 80, ours) is ours
        link.detach()
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, V4, 80, ours)


@PROTOCOLS
def test_the_last_selection_wins(netns, protocol):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server(netns, protocol, "127.0.0.1")) for _ in range(4)]
        links = [
            stack.enter_context(stack.enter_context(chooser({0: sock}, slot=0, flags=REPLACE)).attach(netns))
            for sock in servers
        ]
        while links:
            assert ask(protocol, netns, V4, 80, *servers) is servers[len(links) - 1]
            links.pop().detach()


def test_64_links_per_namespace_then_e2big(netns):
    with chooser() as program, contextlib.ExitStack() as stack:
        links = [stack.enter_context(program.attach(netns)) for _ in range(64)]
        with pytest.raises(pyskl.BpfError) as error:
            program.attach(netns)
        assert error.value.errno == errno.E2BIG
        assert error.value.call == "BPF_LINK_CREATE"
        assert len(pyskl.query(netns)) == 64
        with pytest.raises(ConnectionRefusedError):
            ask_tcp(netns, V4, 80)
        assert result(program).runs == 64
        links[13].close()
        stack.enter_context(program.attach(netns))
        assert len(pyskl.query(netns)) == 64


# -- What the client sees --------------------------------------------------------------------------


@PROTOCOLS
@FAMILIES
@pytest.mark.parametrize(
    "how",
    [{"verdict": 0}, {"slot": 0}, {"slot": 0, "verdict": 0}],
    ids=["drop", "empty slot", "both"],
)
def test_a_drop_and_an_empty_slot_answer_at_once(netns, protocol, family, how):
    """By a RST or an ICMP port unreachable: to the first packet, the only one."""
    with choosing(netns, **how) as program:
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, DESTINATION[family], 80)
        assert result(program) == (1, False, 0)


@PROTOCOLS
@FAMILIES
def test_a_pass_falls_through_to_an_ordinary_wildcard_socket(netns, protocol, family):
    wildcard = {"v4": "0.0.0.0", "v6": "::"}[family]
    with server(netns, protocol, wildcard, 80) as ordinary:
        for how in ({}, {"slot": 0}):
            with choosing(netns, **how) as program:
                assert ask(protocol, netns, DESTINATION[family], 80, ordinary) is ordinary
                assert result(program).runs == 1


def test_a_parking_socket_is_silence_and_a_restart_is_not_seen(netns):
    """TCP: 0 refused over a restart, during which the parking socket stands in the slot."""
    with silence(tcp_listener(netns)) as parked, contextlib.ExitStack() as clients:
        with choosing(netns, {0: parked}, slot=0, port_min=80, port_max=80) as program:
            for _ in range(20):
                clients.enter_context(unanswered(netns, V4, 80))
            assert readable(parked, timeout=0) == []
            with tcp_listener(netns) as ours:
                program.maps["sockets"][0] = ours
                clients.close()  # each is connected now
                for _ in range(20):
                    ours.accept()[0].close()


@FAMILIES
def test_a_parking_socket_is_silence_to_datagrams(netns, family):
    """Neither does the parking socket receive, nor is the client told of anything."""
    with silence(udp_socket(netns, loopback(family))) as parked:
        with choosing(netns, {0: parked}, slot=0, port_min=80, port_max=80) as program:
            with (
                udp_client(netns, DESTINATION[family], 80) as client,
                udp_socket(netns, loopback(family)) as ours,
            ):
                client.send(b"unheard")
                assert result(program) == (1, True, 0)
                assert readable(parked, client, timeout=0) == []
                program.maps["sockets"][0] = ours
                client.send(b"heard")
                assert ours.recv(16) == b"heard"
                assert readable(parked, client, timeout=0) == []
                del program.maps["sockets"][0]
                with pytest.raises(ConnectionRefusedError):  # and it would have been told
                    client.send(b"refused")
                    client.recv(16)
