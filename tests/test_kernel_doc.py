"""The kernel's document of sk_lookup, sentence by sentence, and the ground of its self-test."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import sys
from typing import NamedTuple

import pytest
from support import (
    REPLACE,
    V4,
    V4_B,
    V6,
    V6_B,
    ask,
    ask_tcp,
    bpf_object,
    chooser,
    choosing,
    family_of,
    loopback,
    needs,
    result,
    server,
    tcp_client,
    tcp_listener,
    udp_client,
    udp_socket,
)

import pyskl

PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])
DESTINATION = {"v4": V4, "v6": V6}
WILDCARD = {"v4": "0.0.0.0", "v6": "::"}


# -- Introduction, Motivation ----------------------------------------------------------------------


@PROTOCOLS
@pytest.mark.parametrize(
    ("destination", "bound"),
    [
        pytest.param(V4, "127.0.0.1", id="v4"),
        pytest.param(V6, "::1", id="v6"),
        pytest.param(V4, "::", id="v4 to dual-stack"),
        pytest.param(V6, "::", id="v6 to dual-stack"),
        pytest.param(f"::ffff:{V4}", "127.0.0.1", id="v4-mapped to v4"),
        pytest.param(f"::ffff:{V4}", "::", id="v4-mapped to dual-stack"),
        pytest.param(V4, "::ffff:127.0.0.1", id="v4 to v4-mapped"),
    ],
)
def test_a_program_selects_the_socket_that_will_receive_the_packet(netns, protocol, destination, bound):
    """Invoked in the transport layer's look-up, by bpf_sk_assign(), with hooks for TCP and UDP."""
    with server(netns, protocol, bound, v6only=False) as ours:
        with choosing(netns, {0: ours}, slot=0) as program:
            assert ask(protocol, netns, destination, 80, ours) is ours
            assert result(program) == (1, True, 0)
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, destination, 80, ours)


@PROTOCOLS
@pytest.mark.parametrize(
    ("constants", "destination", "wildcard"),
    [
        ({"prefix4": b"\xc0\0\2\0", "prefix4_len": 24}, "192.0.2.{}", "0.0.0.0"),
        (
            {"prefix6": socket.inet_pton(socket.AF_INET6, "2001:db8::"), "prefix6_len": 64},
            "2001:db8::{:x}",
            "::",
        ),
    ],
    ids=["v4", "v6"],
)
def test_a_range_of_addresses_whose_wildcard_has_a_port_conflict(netns, protocol, constants, destination, wildcard):
    """Motivation 1: all of 192.0.2.0/24, where another has the port, so not the wildcard."""
    slot = {("tcp", "v4"): 0, ("udp", "v4"): 1, ("tcp", "v6"): 2, ("udp", "v6"): 3}
    family = "v6" if ":" in wildcard else "v4"
    with server(netns, protocol, loopback(family), 80) as other:
        with pytest.raises(OSError) as error:
            server(netns, protocol, wildcard, 80)
        assert error.value.errno == errno.EADDRINUSE
        with (
            server(netns, protocol, loopback(family)) as ours,
            pyskl.Program.load(pyskl.REDIRECT, constants=constants) as program,
            program.attach(netns),
        ):
            program.maps["sockets"][slot[protocol, family]] = ours
            for number in range(256):
                assert ask(protocol, netns, destination.format(number), 80, ours, other) is ours
            assert ask(protocol, netns, loopback(family), 80, ours, other) is other


@PROTOCOLS
def test_all_ports(netns, protocol):
    """Motivation 2: connections on all or a wide range of ports, with one socket."""
    with (
        server(netns, protocol, "127.0.0.1") as ours,
        choosing(netns, {0: ours}, slot=0, ip4=_ip4()),
    ):
        for port in {1, 22, 80, 1023, 1024, 65535, *range(100, 65536, 501)}:
            assert ask(protocol, netns, V4, port, ours) is ours


# -- Attachment ------------------------------------------------------------------------------------


def test_attached_to_a_network_namespace_by_its_fd(netns):
    """BPF_LINK_CREATE with the attach type BPF_SK_LOOKUP and a netns fd: there and nowhere else."""
    with chooser() as program, program.attach(netns.fileno()) as link:
        assert link.info.attach_type is pyskl.AttachType.SK_LOOKUP
        assert link.info.prog_id == program.info.id
        assert link.info.netns_inode == netns.inode == os.fstat(netns.fileno()).st_ino
        assert [info.id for info in pyskl.query(netns)] == [program.info.id]
        assert program.info.id not in [info.id for info in pyskl.query()]


def test_what_is_not_a_namespace_takes_no_program(netns, tmp_path):
    with chooser() as program, open(tmp_path / "file", "w") as file:
        with pytest.raises(ValueError):
            program.attach(file.fileno())
    assert pyskl.query(netns) == ()


def _order_of_runs(order):
    length, *who = struct.unpack("=64I", order[0])
    order[0] = bytes(256)
    return who[:length]


@PROTOCOLS
def test_several_programs_run_in_the_order_in_which_they_were_attached(netns, protocol):
    """… and that order is what BPF_PROG_QUERY says, also when one in the middle goes and comes."""
    with contextlib.ExitStack() as stack:
        order = stack.enter_context(pyskl.Map.create(pyskl.MapType.ARRAY, 4, 256, 1))
        programs = [stack.enter_context(chooser(who=who, reuse={"order": order})) for who in range(5)]
        links = {who: stack.enter_context(programs[who].attach(netns)) for who in (3, 1, 4, 0)}

        def check(*expected):
            with pytest.raises(ConnectionRefusedError):
                ask(protocol, netns, V4, 80)
            assert _order_of_runs(order) == list(expected)
            assert [info.id for info in pyskl.query(netns)] == [programs[who].info.id for who in expected]

        check(3, 1, 4, 0)
        links[1].detach()
        check(3, 4, 0)
        stack.enter_context(programs[1].attach(netns))
        check(3, 4, 0, 1)
        links[4].update(programs[2])  # BPF_LINK_UPDATE keeps the place
        check(3, 2, 0, 1)


# -- Hooks -----------------------------------------------------------------------------------------


@FAMILIES
def test_established_tcp_traffic_does_not_trigger_the_hook(netns, family):
    with tcp_listener(netns, loopback(family)) as ours:
        with choosing(netns, {0: ours}, slot=0) as program:
            with tcp_client(netns, DESTINATION[family], 80) as client:
                connection, _ = ours.accept()
                with connection:
                    for number in range(10):
                        client.sendall(b"%d" % number)
                        assert connection.recv(16) == b"%d" % number
                        connection.sendall(b"%d" % number)
                        assert client.recv(16) == b"%d" % number
                    assert result(program).runs == 1  # the SYN


@FAMILIES
def test_traffic_to_a_connected_udp_socket_does_not_trigger_the_hook(netns, family):
    host = DESTINATION[family]
    with udp_socket(netns, loopback(family)) as ours, choosing(netns, {0: ours}, slot=0) as program:
        with udp_client(netns, host, 80) as client:
            client.send(b"to the program's choice")
            assert ours.recv(64) == b"to the program's choice"
            assert result(program).runs == 1
            with udp_client(netns, *client.getsockname()[:2], source=(host, 80)) as connected:
                client.send(b"to the connected one")
                assert connected.recv(64) == b"to the connected one"
                connected.send(b"and back")
                assert client.recv(64) == b"and back"
            assert result(program).runs == 1


@pytest.mark.parametrize(("name", "word"), [("neither", "R0"), ("beyond", "invalid"), ("writes", "invalid")])
def test_a_program_must_return_sk_pass_or_sk_drop_and_only_read_its_context(name, word):
    """The verifier refuses any other verdict; and reads beyond a field, and writes."""
    with pytest.raises(pyskl.VerifierError) as error:
        pyskl.Program.load(bpf_object("refused"), name=name)
    assert error.value.call == "BPF_PROG_LOAD"
    assert error.value.errno in (errno.EINVAL, errno.EACCES)
    assert word in error.value.log


@PROTOCOLS
@FAMILIES
@pytest.mark.parametrize(
    ("verdict", "continues"),
    [(pyskl.Verdict.PASS, True), (pyskl.Verdict.DROP, False)],
    ids=["SK_PASS", "SK_DROP"],
)
def test_sk_pass_continues_to_the_regular_look_up_and_sk_drop_drops(netns, protocol, family, verdict, continues):
    with (
        server(netns, protocol, WILDCARD[family], 80) as ordinary,
        choosing(netns, verdict=verdict) as program,
    ):
        if continues:
            assert ask(protocol, netns, DESTINATION[family], 80, ordinary) is ordinary
        else:
            with pytest.raises(ConnectionRefusedError):
                ask(protocol, netns, DESTINATION[family], 80, ordinary)
        assert result(program).runs == 1


@PROTOCOLS
def test_a_socket_is_looked_up_in_a_sockmap_or_a_sockhash(netns, protocol):
    with (
        server(netns, protocol, "127.0.0.1") as by_slot,
        server(netns, protocol, "127.0.0.1") as by_port,
        chooser({0: by_slot}, slot=0, port_min=80, port_max=80) as sockmap,
        chooser(name="by_hash") as sockhash,
        sockmap.attach(netns),
        sockhash.attach(netns),
    ):
        assert sockmap.maps["sockets"].info.type is pyskl.MapType.SOCKMAP
        assert sockhash.maps["by_port"].info.type is pyskl.MapType.SOCKHASH
        sockhash.maps["by_port"][443] = by_port
        assert ask(protocol, netns, V4, 80, by_slot, by_port) is by_slot
        assert ask(protocol, netns, V4, 443, by_slot, by_port) is by_port


@PROTOCOLS
def test_a_selection_takes_effect_only_with_sk_pass(netns, protocol):
    with server(netns, protocol, "127.0.0.1") as ours:
        with choosing(netns, {0: ours}, slot=0, verdict=pyskl.Verdict.DROP) as program:
            with pytest.raises(ConnectionRefusedError):
                ask(protocol, netns, V4, 80, ours)
            assert result(program) == (1, True, 0)


class Behaviour(NamedTuple):
    """What a program does."""

    verdict: pyskl.Verdict
    selects: str | None = None


BEHAVIOURS = {
    "pass": Behaviour(pyskl.Verdict.PASS),
    "drop": Behaviour(pyskl.Verdict.DROP),
    "A": Behaviour(pyskl.Verdict.PASS, "A"),
    "B": Behaviour(pyskl.Verdict.PASS, "B"),
    "A and drop": Behaviour(pyskl.Verdict.DROP, "A"),
}


def the_four_rules(behaviours: tuple[Behaviour, ...]) -> str:
    """The end result of several programs, as the document says it."""
    passed = [it for it in behaviours if it.verdict is pyskl.Verdict.PASS]
    selections = [it.selects for it in passed if it.selects]
    if selections:  # 1: the socket is used; 2: of more than one, the last takes effect
        return selections[-1]
    if len(passed) < len(behaviours):  # 3: any SK_DROP, and no selection: the look-up fails
        return "refused"
    return "ordinary"  # 4: all SK_PASS, and no selection: the look-up continues on


@PROTOCOLS
@FAMILIES
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_end_result_of_several_programs_is_by_the_four_rules(netns, protocol, family, number):
    """Every combination of so many programs, against the rules and in the order of the query."""
    with contextlib.ExitStack() as stack:
        servers = {
            "ordinary": stack.enter_context(server(netns, protocol, WILDCARD[family], 80)),
            "A": stack.enter_context(server(netns, protocol, loopback(family))),
            "B": stack.enter_context(server(netns, protocol, loopback(family))),
        }
        named = {sock: name for name, sock in servers.items()}
        programs = {}
        for name, (verdict, selects) in BEHAVIOURS.items():
            sockets = {0: servers[selects]} if selects else {}
            how = {"slot": 0, "flags": REPLACE} if selects else {}
            programs[name] = stack.enter_context(chooser(sockets, verdict=verdict, **how))

        wrong = {}
        for names in itertools.product(BEHAVIOURS, repeat=number):
            with contextlib.ExitStack() as links:
                for name in names:
                    links.enter_context(programs[name].attach(netns))
                assert [info.id for info in pyskl.query(netns)] == [programs[name].info.id for name in names]
                try:
                    seen = named[ask(protocol, netns, DESTINATION[family], 80, *servers.values())]
                except ConnectionRefusedError:
                    seen = "refused"
            if seen != the_four_rules(tuple(BEHAVIOURS[name] for name in names)):
                wrong[names] = seen
        assert wrong == {}


# -- API: the context ------------------------------------------------------------------------------


def _ip4(host: str = V4) -> bytes:
    return socket.inet_aton(host)


def context_image(protocol: str, destination: tuple[str, int], source: tuple[str, int], width: str = "words") -> bytes:
    """struct bpf_sk_lookup from `family` to `local_port`, as linux/bpf.h declares it.

    A read of a whole word at `remote_port` gives its two bytes as a number of 32 bits.
    """
    low_half_last = sys.byteorder == "big" and width == "words"
    family = family_of(destination[0])
    local, remote = (socket.inet_pton(family, host) for host, _ in (destination, source))
    none4, none6 = bytes(4), bytes(16)
    v6 = family == socket.AF_INET6
    return b"".join(
        (
            struct.pack("=II", family, {"tcp": 6, "udp": 17}[protocol]),
            none4 if v6 else remote,
            remote if v6 else none6,
            struct.pack("!xxH" if low_half_last else "!Hxx", source[1]),  # network byte order
            none4 if v6 else local,
            local if v6 else none6,
            struct.pack("=I", destination[1]),  # host byte order
        )
    )


@PROTOCOLS
@FAMILIES
@pytest.mark.parametrize("width", ["words", "halves", "bytes"])
def test_the_context_has_the_packet_in_reads_of_every_width(netns, protocol, family, width):
    """IP version, L4 protocol, both addresses and ports; and the same in a test run."""
    destination = (DESTINATION[family], 0x1234)
    source = ({"v4": "203.0.113.77", "v6": "2001:db8:77::7654"}[family], 0xABCD)
    expected = context_image(protocol, destination, source, width)

    def known(image: bytes) -> bytes:
        """Without what is beyond the two bytes that the kernel has of family, protocol and either port.

        There a half reads 0, or as the lower half: of no use, and of no harm.
        """
        beyond = (1, 3, 15, 27) if sys.byteorder == "little" else (0, 2, 15, 26)
        halves = [image[at : at + 2] for at in range(0, len(image), 2)]
        return b"".join(it for n, it in enumerate(halves) if width != "halves" or n not in beyond)

    with pyskl.Program.load(bpf_object("context"), name=width) as program:
        with program.attach(netns), pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, *destination, source=source)
        assert known(program.maps["image"][0]) == known(expected)
        program.maps["image"][0] = bytes(len(expected))
        assert program.test_run(protocol, destination, source).verdict is pyskl.Verdict.PASS
        assert known(program.maps["image"][0]) == known(expected)


def test_a_v4_packet_to_a_v4_mapped_address_has_the_context_of_ipv4(netns):
    with pyskl.Program.load(bpf_object("context"), name="words") as program:
        with program.attach(netns), pytest.raises(ConnectionRefusedError):
            ask_tcp(netns, f"::ffff:{V4}", 80, source=(f"::ffff:{V4_B}", 4321))
        assert program.maps["image"][0] == context_image("tcp", (V4, 80), (V4_B, 4321))


@needs("sk_lookup_ingress_ifindex")
@FAMILIES
def test_the_context_has_the_ingress_interface(netns, family):
    """Since 5.17; 0 in a test run."""
    with pyskl.Program.load(bpf_object("context"), name="ingress") as program:
        with program.attach(netns), pytest.raises(ConnectionRefusedError):
            ask_tcp(netns, DESTINATION[family], 80)
        with netns.entered():
            lo = socket.if_nametoindex("lo")
        assert program.maps["ifindex"][0] == struct.pack("=Q", lo)
        program.test_run("tcp", (V4, 80), (V4_B, 4321))
        assert program.maps["ifindex"][0] == bytes(8)


class Step(NamedTuple):
    """What tests/bpf/assign.bpf.c saw of one bpf_sk_assign()."""

    error: int
    selected: int
    same: int
    family: int = 0
    type: int = 0
    protocol: int = 0
    src_port: int = 0
    src_ip4: int = 0
    state: int = 0


def steps(program: pyskl.Program) -> list[Step]:
    return [Step(*struct.unpack("=i8I", program.maps["steps"][n])) for n in range(4)]


def through_sk(sock: socket.socket) -> tuple[int, ...]:
    """What ctx->sk says of a socket."""
    host, port = sock.getsockname()
    tcp = sock.type == socket.SOCK_STREAM
    address = struct.unpack("=I", socket.inet_aton(host))[0]
    state = 10 if tcp else 7  # TCP_LISTEN, TCP_CLOSE
    return (sock.family, sock.type, 6 if tcp else 17, port, address, state)


@contextlib.contextmanager
def assigning(netns, a, b, name, **constants):
    """A program of tests/bpf/assign.bpf.c, attached, with two sockets."""
    with pyskl.Program.load(bpf_object("assign"), name=name, constants=constants) as program:
        if "sockets" in program.maps:
            program.maps["sockets"].update({0: a, 1: b})
        with program.attach(netns):
            yield program


@pytest.fixture(params=["tcp", "udp"])
def three(request, netns):
    """Two servers to select, and an ordinary one at port 80, of one protocol."""
    protocol = request.param
    with (
        server(netns, protocol, "127.0.0.1") as a,
        server(netns, protocol, "127.0.0.1") as b,
        server(netns, protocol, "0.0.0.0", 80) as ordinary,
    ):
        yield protocol, a, b, ordinary


def test_a_second_selection_is_eexist_and_ctx_sk_says_what_is_selected(netns, three):
    protocol, a, b, ordinary = three
    with assigning(netns, a, b, "twice") as program:
        assert ask(protocol, netns, V4, 80, a, b, ordinary) is a
        assert steps(program)[:2] == [
            Step(0, 1, 1, *through_sk(a)),
            Step(-errno.EEXIST, 1, 0, *through_sk(a)),
        ]


def test_a_second_selection_with_replace_takes_the_place_of_the_first(netns, three):
    protocol, a, b, ordinary = three
    with assigning(netns, a, b, "replace") as program:
        assert ask(protocol, netns, V4, 80, a, b, ordinary) is b
        assert steps(program)[:2] == [
            Step(0, 1, 1, *through_sk(a)),
            Step(0, 1, 1, *through_sk(b)),
        ]


def test_assigning_null_deselects_within_a_program(netns, three):
    """It too needs BPF_SK_LOOKUP_F_REPLACE where something is selected; then nothing is."""
    protocol, a, b, ordinary = three
    with assigning(netns, a, b, "null") as program:
        assert ask(protocol, netns, V4, 80, a, b, ordinary) is ordinary
        assert steps(program)[:3] == [
            Step(0, 1, 1, *through_sk(a)),
            Step(-errno.EEXIST, 1, 0, *through_sk(a)),
            Step(0, 0, 1),
        ]
    with assigning(netns, a, b, "null_then_other") as program:
        assert ask(protocol, netns, V4, 80, a, b, ordinary) is b
        assert steps(program)[:2] == [Step(0, 0, 1), Step(0, 1, 1, *through_sk(b))]


def test_ctx_sk_is_what_earlier_programs_selected_and_null_where_none_did(netns, three):
    protocol, a, b, ordinary = three
    with assigning(netns, a, b, "peek") as first:
        assert ask(protocol, netns, V4, 80, a, b, ordinary) is ordinary
        assert steps(first)[3] == Step(0, 0, 0)
        with choosing(netns, {0: a}, slot=0), assigning(netns, a, b, "peek") as last:
            assert ask(protocol, netns, V4, 80, a, b, ordinary) is a
            assert steps(first)[3] == Step(0, 0, 0)
            assert steps(last)[3] == Step(0, 1, 0, *through_sk(a))


def test_a_selection_that_ended_in_sk_drop_is_not_seen_by_later_programs(netns, three):
    protocol, a, b, ordinary = three
    with (
        choosing(netns, {0: a}, slot=0, verdict=pyskl.Verdict.DROP),
        assigning(netns, a, b, "peek") as last,
    ):
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, V4, 80, a, b, ordinary)
        assert steps(last)[3] == Step(0, 0, 0)


def test_no_later_program_undoes_a_selection_by_assigning_null(netns, three):
    """Rule 1 again: some program passed and selected, so its socket is the result."""
    protocol, a, b, ordinary = three
    with choosing(netns, {0: a}, slot=0), assigning(netns, a, b, "deselect") as last:
        assert ask(protocol, netns, V4, 80, a, b, ordinary) is a
        assert steps(last)[3] == Step(0, 0, 1)


def test_assigning_with_unknown_flags_is_einval(netns, three):
    protocol, a, _, ordinary = three
    with choosing(netns, {0: a}, slot=0, flags=1 << 2) as program:
        assert ask(protocol, netns, V4, 80, a, ordinary) is ordinary
        assert result(program) == (1, True, errno.EINVAL)


# -- The ground of the kernel's own self-test that is not above -----------------------------------


@PROTOCOLS
@pytest.mark.parametrize(
    ("constants", "family", "misses"),
    [
        ({"port_min": 7007, "port_max": 7007}, "v4", [(V4, 7008)]),
        ({"port_min": 7007, "port_max": 7007}, "v6", [(V6, 7008)]),
        ({"ip4": socket.inet_aton(V4)}, "v4", [(V4_B, 7007)]),
        ({"ip6": socket.inet_pton(socket.AF_INET6, V6)}, "v6", [(V6_B, 7007)]),
        ({"protocol": 6}, "v4", []),
        ({"protocol": 17}, "v6", []),
    ],
    ids=["port v4", "port v6", "address v4", "address v6", "protocol TCP", "protocol UDP"],
)
def test_redirect_by_port_by_address_and_by_protocol(netns, protocol, constants, family, misses):
    host = loopback(family)
    with server(netns, protocol, host) as ours, choosing(netns, {0: ours}, slot=0, **constants):
        misses = [*misses]
        if constants.get("protocol") in (None, {"tcp": 6, "udp": 17}[protocol]):
            assert ask(protocol, netns, DESTINATION[family], 7007, ours) is ours
        else:
            misses.append((DESTINATION[family], 7007))
        for address in misses:
            with pytest.raises(ConnectionRefusedError):
                ask(protocol, netns, *address, ours)
