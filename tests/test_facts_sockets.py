"""Which sockets a SOCKMAP or SOCKHASH takes, and what becomes of them there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import termios
import threading

import pytest
from support import (
    IPPROTO_MPTCP,
    IPPROTO_UDPLITE,
    SO_NETNS_COOKIE,
    V4,
    V6,
    ask,
    ask_tcp,
    bpf_object,
    choosing,
    cookie,
    kernel_has,
    namespace,
    new_socket,
    readable,
    result,
    server,
    sys_bpf,
    tcp_client,
    tcp_listener,
    udp_client,
    udp_socket,
    unanswered,
    unavailable,
)

import pyskl

PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])


@pytest.fixture(params=["SOCKMAP", "SOCKHASH"])
def sockets(request):
    """A map of either kind, empty, whose keys may be ints."""
    kind = {"SOCKMAP": pyskl.SockMap, "SOCKHASH": pyskl.SockHash}[request.param]
    with kind.create(8) as it:
        yield it


# -- The table of sockets --------------------------------------------------------------------------


def optional(ns, name, family, kind, protocol=0):
    """A socket of a family or protocol that not every kernel has; skips by its name."""
    try:
        return new_socket(ns, family, kind, protocol)
    except OSError as error:
        unavailable(name, error.strerror)


@contextlib.contextmanager
def established(ns, host):
    with tcp_listener(ns, host) as listener, tcp_client(ns, *listener.getsockname()[:2]) as client:
        with listener.accept()[0]:
            yield client


@contextlib.contextmanager
def bound(sock, address, *, listening=False):
    with sock:
        sock.bind(address)
        if listening:
            sock.listen()
        yield sock


@contextlib.contextmanager
def one_of_a_pair(kind):
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    with a, b:
        yield a


@contextlib.contextmanager
def connected_udp(ns, host):
    with udp_client(ns, host, 80) as client:
        yield client


STREAM, DATAGRAM, RAW = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
SEQPACKET = socket.SOCK_SEQPACKET
INET, INET6, UNIX, VSOCK = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK
ANY_VSOCK = (socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY)
LOCAL = ("127.0.0.1", 0)

TAKEN = {
    "TCP listening, v4": lambda ns: tcp_listener(ns, "127.0.0.1"),
    "TCP listening, v6": lambda ns: tcp_listener(ns, "::1"),
    "TCP listening, dual-stack": lambda ns: tcp_listener(ns, "::", v6only=False),
    "TCP established, v4": lambda ns: established(ns, "127.0.0.1"),
    "TCP established, v6": lambda ns: established(ns, "::1"),
    "UDP bound, v4": lambda ns: udp_socket(ns, "127.0.0.1"),
    "UDP bound, v6": lambda ns: udp_socket(ns, "::1"),
    "UDP bound, dual-stack": lambda ns: udp_socket(ns, "::", v6only=False),
    "UDP connected, v4": lambda ns: connected_udp(ns, "127.0.0.1"),
    "UDP connected, v6": lambda ns: connected_udp(ns, "::1"),
    "unix datagram": lambda _: socket.socket(UNIX, DATAGRAM),
    "unix datagram, connected": lambda _: one_of_a_pair(DATAGRAM),
    "unix stream, connected": lambda _: one_of_a_pair(STREAM),
}

REFUSED = {
    "TCP unbound, v4": lambda ns: new_socket(ns, INET, STREAM),
    "TCP unbound, v6": lambda ns: new_socket(ns, INET6, STREAM),
    "TCP bound and not listening": lambda ns: bound(new_socket(ns, INET, STREAM), LOCAL),
    "UDP unbound, v4": lambda ns: new_socket(ns, INET, DATAGRAM),
    "UDP unbound, v6": lambda ns: new_socket(ns, INET6, DATAGRAM),
    "MPTCP listening": lambda ns: bound(optional(ns, "mptcp", INET, STREAM, IPPROTO_MPTCP), LOCAL, listening=True),
    "UDP-Lite bound": lambda ns: bound(optional(ns, "udplite", INET, DATAGRAM, IPPROTO_UDPLITE), LOCAL),
    "raw": lambda ns: new_socket(ns, INET, RAW, socket.IPPROTO_ICMP),
    "vsock unbound": lambda ns: optional(ns, "vsock", VSOCK, STREAM),
    "vsock listening": lambda ns: bound(optional(ns, "vsock", VSOCK, STREAM), ANY_VSOCK, listening=True),
    "unix stream, unconnected": lambda _: socket.socket(UNIX, STREAM),
    "unix seqpacket, unconnected": lambda _: socket.socket(UNIX, SEQPACKET),
    "unix seqpacket, connected": lambda _: one_of_a_pair(SEQPACKET),
}


def unix_sockets_are_taken(sock):
    """Skip where this kernel takes none, asked without the library."""
    with pyskl.SockMap.create(1) as probe:
        try:
            update_elem(probe, 0, sock.fileno())
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            unavailable("unix_sockmap", "a SOCKMAP takes no unix socket")


@pytest.mark.parametrize("what", TAKEN)
def test_a_socket_that_is_taken(netns, sockets, what):
    with TAKEN[what](netns) as sock:
        if what.startswith("unix"):
            unix_sockets_are_taken(sock)
        sockets[1] = sock
        assert sockets[1] == cookie(sock) == pyskl.socket_cookie(sock)


@pytest.mark.parametrize("what", REFUSED)
def test_a_socket_that_is_refused(netns, sockets, what):
    with REFUSED[what](netns) as sock, pytest.raises(pyskl.SocketRefused) as error:
        sockets[1] = sock
    assert error.value.errno == errno.EOPNOTSUPP
    assert error.value.call == "BPF_MAP_UPDATE_ELEM"
    assert error.value.reason
    assert len(sockets) == 0


@pytest.mark.parametrize("expected", [errno.ENOTSOCK, errno.EBADF, errno.EINVAL], ids=errno.errorcode.get)
def test_what_is_no_socket(sockets, tmp_path, expected):
    """Not a socket: ENOTSOCK; a closed fd: EBADF; fd -1: EINVAL."""
    with open(tmp_path / "file", "w") as file:
        closed = os.dup(file.fileno())
        os.close(closed)
        fd = {errno.ENOTSOCK: file.fileno(), errno.EBADF: closed, errno.EINVAL: -1}[expected]
        with pytest.raises(pyskl.SocketRefused) as error:
            sockets[1] = fd
    assert error.value.errno == expected


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_a_dual_stack_listener_takes_v4_and_v6_traffic(netns, family):
    with (
        tcp_listener(netns, "::", v6only=False) as ours,
        choosing(netns, {0: ours}, slot=0, port_min=80, port_max=80),
    ):
        assert ask_tcp(netns, {"v4": V4, "v6": V6}[family], 80, ours) is ours


@pytest.mark.parametrize(
    "what",
    [
        "TCP established, v4",
        "UDP connected, v4",
        "unix datagram",
        "unix datagram, connected",
        "unix stream, connected",
    ],
)
def test_a_socket_that_is_taken_and_never_selectable(netns, what):
    """Established TCP, connected UDP, unix: bpf_sk_assign() gives ESOCKTNOSUPPORT."""
    protocol = "tcp" if "TCP" in what else "udp"
    with server(netns, protocol, "0.0.0.0", 80) as ordinary, TAKEN[what](netns) as sock:
        if what.startswith("unix"):
            unix_sockets_are_taken(sock)
        with choosing(netns, {0: sock}, slot=0, port_min=80, port_max=80) as program:
            assert ask(protocol, netns, V4, 80, ordinary) is ordinary
            assert result(program) == (1, True, errno.ESOCKTNOSUPPORT)


# -- Keys ------------------------------------------------------------------------------------------


def update_elem(map_: pyskl.Map, key: int, fd: int, flags: int = 0) -> None:
    """BPF_MAP_UPDATE_ELEM itself."""
    with buffers(struct.pack("=I", key), struct.pack("=q", fd)) as (at_key, at_value):
        sys_bpf(2, struct.pack("=IxxxxQQQ", map_.fileno(), at_key, at_value, flags))


@contextlib.contextmanager
def buffers(*contents: bytes):
    held = [ctypes.create_string_buffer(it, len(it)) for it in contents]
    yield [ctypes.addressof(it) for it in held]


def test_an_index_beyond_max_entries_is_e2big_and_an_index_error(netns):
    with pyskl.SockMap.create(4) as sockmap, tcp_listener(netns) as ours:
        with pytest.raises(OSError) as error:
            update_elem(sockmap, 4, ours.fileno())
        assert error.value.errno == errno.E2BIG
        with pytest.raises(IndexError):
            sockmap[4] = ours
        sockmap[3] = ours
        assert list(sockmap) == [3]


def test_a_full_hash_is_e2big(netns):
    """A SOCKHASH has no index to be beyond: it is full."""
    with pyskl.SockHash.create(2) as sockhash, tcp_listener(netns) as ours:
        sockhash[1] = sockhash[1 << 31] = ours
        with pytest.raises(pyskl.BpfError) as error:
            sockhash[3] = ours
        assert error.value.errno == errno.E2BIG


def test_noexist_on_a_full_slot_is_eexist_and_exist_on_an_empty_one_enoent(netns, sockets):
    with tcp_listener(netns) as a, tcp_listener(netns) as b:
        with pytest.raises(pyskl.NoSuchKey) as error:
            sockets.put(1, a, mode="exist")
        assert error.value.errno == errno.ENOENT
        sockets.put(1, a, mode="noexist")
        with pytest.raises(pyskl.BpfError) as error:
            sockets.put(1, b, mode="noexist")
        assert error.value.errno == errno.EEXIST
        assert sockets[1] == cookie(a)
        sockets.put(1, b, mode="exist")
        assert sockets[1] == cookie(b)


def test_deleting_an_empty_slot(netns, sockets):
    """EINVAL of a SOCKMAP, ENOENT of a SOCKHASH, says the kernel; KeyError, says the library."""
    with pytest.raises(OSError) as raw, buffers(bytes(4)) as (key,):
        sys_bpf(3, struct.pack("=IxxxxQQQ", sockets.fileno(), key, 0, 0))
    sockmap = sockets.info.type is pyskl.MapType.SOCKMAP
    assert raw.value.errno == (errno.EINVAL if sockmap else errno.ENOENT)
    with pytest.raises(pyskl.NoSuchKey):
        del sockets[0]
    with tcp_listener(netns) as ours:
        sockets[0] = ours
        del sockets[0]
        assert 0 not in sockets
    with pytest.raises(pyskl.NoSuchKey):
        del sockets[0]


def test_one_socket_under_many_keys_and_in_many_maps(netns):
    with (
        tcp_listener(netns) as ours,
        pyskl.SockMap.create(4) as a,
        pyskl.SockMap.create(4) as b,
        pyskl.SockHash.create(4) as c,
    ):
        for sockmap in (a, b, c):
            for key in range(4):
                sockmap[key] = ours
            assert [sockmap[key] for key in range(4)] == [cookie(ours)] * 4
        del b[0]
        assert (0 in a, 0 in b, 0 in c) == (True, False, True)


@pytest.mark.parametrize("kind", ["SOCKMAP", "SOCKHASH"])
def test_a_look_up_gives_the_cookie_and_needs_a_value_of_8_bytes(netns, kind):
    """With a value_size of 4 the map takes sockets, and a look-up is ENOSPC."""
    with (
        tcp_listener(netns) as ours,
        pyskl.Map.create(pyskl.MapType[kind], 4, 8, 1) as wide,
        pyskl.Map.create(pyskl.MapType[kind], 4, 4, 1) as narrow,
    ):
        wide[0] = narrow[0] = ours
        assert wide[0] == cookie(ours)
        with pytest.raises(pyskl.BpfError) as error:
            narrow[0]
        assert error.value.errno == errno.ENOSPC
        assert not isinstance(error.value, KeyError)


@pytest.mark.parametrize(
    ("command", "name"),
    [(24, "LOOKUP"), (25, "LOOKUP_AND_DELETE"), (26, "UPDATE"), (27, "DELETE")],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_batch_operations_do_not_exist(netns, sockets, command, name):
    """Errno 524, ENOTSUPP, which `errno` does not name: update() and items() loop."""
    assert 524 not in errno.errorcode
    with tcp_listener(netns) as a, tcp_listener(netns) as b:
        with pytest.raises(OSError) as error:
            with buffers(bytes(4), bytes(16), bytes(8)) as (position, keys, values):
                batch = (0, position, keys, values, 1, sockets.fileno(), 0, 0)
                sys_bpf(command, struct.pack("=QQQQIIQQ", *batch))
        assert error.value.errno == 524
        sockets.update({0: a, 1: b})
        assert {cookie(a), cookie(b)} == {value for _, value in sockets.items()}


def test_a_socket_in_a_reuseport_sockarray_and_a_sockmap_is_ebusy(netns, sockets):
    with (
        pyskl.ReuseportSockArray.create(4) as array,
        tcp_listener(netns, reuseport=True) as a,
        tcp_listener(netns, reuseport=True) as b,
    ):
        array[0] = a
        with pytest.raises(pyskl.SocketRefused) as error:
            sockets[0] = a
        assert error.value.errno == errno.EBUSY
        sockets[0] = b
        with pytest.raises(pyskl.SocketRefused) as error:
            array[1] = b
        assert error.value.errno == errno.EBUSY
        del array[0]
        sockets[1] = a
        assert sockets[1] == cookie(a)


def test_threads_that_put_and_delete_the_same_socket_see_at_most_a_transient_ebusy(netns, sockets):
    """… and at the end the map is as whole as before."""
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def hammer(key: int) -> None:
        start.wait()
        for _ in range(2000):
            for operation in (lambda: sockets.put(key, ours), lambda: sockets.__delitem__(key)):
                try:
                    operation()
                except (pyskl.SocketRefused, pyskl.NoSuchKey) as error:
                    if error.errno not in (errno.EBUSY, errno.ENOENT, errno.EINVAL):
                        errors.append(error)
                except BaseException as error:
                    errors.append(error)

    with tcp_listener(netns) as ours:
        threads = [threading.Thread(target=hammer, args=(n % 2,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        sockets[0] = sockets[1] = ours
        assert [sockets[0], sockets[1]] == [cookie(ours)] * 2


# -- Closed, shut down, of another namespace, frozen -----------------------------------------------


@PROTOCOLS
def test_the_last_close_empties_every_slot(netns, sockets, protocol):
    with pyskl.SockMap.create(2) as another:
        with server(netns, protocol, "127.0.0.1") as ours:
            sockets[0] = sockets[1] = another[0] = ours
            copy = ours.dup()
        with copy:
            assert sockets[0] == another[0] == cookie(copy)
        assert len(sockets) == len(another) == 0
        with pytest.raises(pyskl.NoSuchKey):
            sockets[0]


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_a_listener_that_was_shut_down_is_a_zombie(netns, how):
    """It stays in its slot. Now it can't be selected; in 5.10 it is, and its clients wait in vain."""
    with (
        tcp_listener(netns) as ours,
        tcp_listener(netns, "0.0.0.0", 80) as ordinary,
        choosing(netns, {0: ours}, slot=0) as program,
    ):
        assert ask_tcp(netns, V4, 80, ours, ordinary) is ours
        ours.shutdown(how)
        assert program.maps["sockets"][0] == cookie(ours)
        if program.test_run("tcp", (V4, 80), (V4, 1234)).cookie == 0:
            assert ask_tcp(netns, V4, 80, ordinary) is ordinary
            assert result(program) == (3, True, errno.ESOCKTNOSUPPORT)
        else:
            with unanswered(netns, V4, 80):
                assert result(program) == (3, True, 0)
                program.maps["sockets"][0] = ordinary


def test_so_netns_cookie_tells_the_sockets_of_namespaces_apart(netns):
    def netns_cookie(sock):
        try:
            return sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        except OSError as error:
            unavailable("SO_NETNS_COOKIE", error.strerror)

    assert SO_NETNS_COOKIE == 71
    with namespace() as elsewhere, tcp_listener(elsewhere) as foreign, tcp_listener(netns) as a, udp_socket(netns) as b:
        assert netns_cookie(a) == netns_cookie(b) != netns_cookie(foreign)


def test_a_socket_of_another_namespace_is_accepted_and_its_clients_time_out(netns):
    with (
        namespace() as elsewhere,
        tcp_listener(elsewhere) as foreign,
        tcp_listener(netns) as ours,
        choosing(netns, {0: foreign}, slot=0, port_min=80, port_max=80) as program,
    ):
        with unanswered(netns, V4, 80):
            assert result(program) == (1, True, 0)  # selected; and yet the client waits
            assert readable(foreign, timeout=0) == []
            program.maps["sockets"][0] = ours  # for the SYN that it sends again
        ours.accept()[0].close()


def test_a_datagram_for_a_socket_of_another_namespace_cannot_be_answered(netns):
    with (
        namespace() as elsewhere,
        udp_socket(elsewhere) as foreign,
        choosing(netns, {0: foreign}, slot=0, port_min=80, port_max=80),
        udp_client(netns, V4, 80) as client,
        udp_socket(netns, "127.0.0.1") as ours,
    ):
        client.send(b"?")
        data, address = foreign.recvfrom(16)
        assert (data, address) == (b"?", client.getsockname())
        foreign.sendto(b"lost", address)
        with choosing(netns, {0: ours}, slot=0, port_min=80, port_max=80, flags=1):
            client.send(b"?")
            assert ours.recv(16) == b"?"
        assert readable(client, timeout=0) == []


def test_a_frozen_map_takes_no_socket(netns, sockets):
    """EPERM, and no capability is missing: so no PermissionDenied."""
    with tcp_listener(netns) as a, tcp_listener(netns) as b:
        sockets[0] = a
        sockets.freeze()
        for operation in (lambda: sockets.put(0, b), lambda: sockets.put(1, b)):
            with pytest.raises(pyskl.BpfError) as error:
                operation()
            assert error.value.errno == errno.EPERM
            assert not isinstance(error.value, pyskl.PermissionDenied)
        assert sockets[0] == cookie(a)


@PROTOCOLS
def test_map_in_map_of_sockmaps(netns, protocol):
    """The outer slot is changed in one step for all that the inner map holds."""
    with (
        server(netns, protocol, "127.0.0.1") as a,
        server(netns, protocol, "127.0.0.1") as b,
        pyskl.SockMap.create(1) as first,
        pyskl.SockMap.create(1) as second,
        pyskl.Program.load(bpf_object("nested"), name="nested") as program,
        program.attach(netns),
    ):
        first[0], second[0] = a, b
        with pytest.raises(ConnectionRefusedError):
            ask(protocol, netns, V4, 80, a, b)
        for inner, expected in ((first, a), (second, b)):
            program.maps["outer"][0] = inner
            assert ask(protocol, netns, V4, 80, a, b) is expected


def test_fionread_of_a_udp_socket_in_a_sockmap_is_0(netns, sockets):
    """… although the datagram is there to be read; 6.1 and earlier still count it."""

    def pending() -> int:
        return struct.unpack("=i", fcntl.ioctl(ours, termios.FIONREAD, bytes(4)))[0]

    with udp_socket(netns) as ours, udp_client(netns, *ours.getsockname()) as client:
        client.send(b"12345")
        readable(ours)
        assert pending() == 5
        sockets[0] = ours
        assert pending() == (0 if kernel_has("udp_bpf_ioctl") else 5)
        assert ours.recv(16) == b"12345"
        del sockets[0]
        client.send(b"1234567")
        readable(ours)
        assert pending() == 7
        assert ours.recv(16) == b"1234567"
