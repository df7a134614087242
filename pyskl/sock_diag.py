# SPDX-License-Identifier: BSD-2-Clause
"""The sockets of a network namespace, whoever holds them: sock_diag(7)."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from pyskl import netlink
from pyskl.enums import Protocol
from pyskl.errors import BpfError
from pyskl.sockets import socket_beside

if TYPE_CHECKING:
    from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_TCP_SYN_RECV, _TCP_CLOSE, _TCP_LISTEN = 3, 7, 10
_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2
_ANSWER = struct.Struct("=BBBB2s2s16s16sIQIIIII")  # struct inet_diag_msg


class SocketEntry(NamedTuple):
    """A socket as the kernel lists it: ``struct inet_diag_msg``.

    Attributes:
        cookie: by which the kernel knows it (`pyskl.socket_cookie`).
        inode: of the file, which /proc/PID/fd names.
        address: that it is bound to, 4 or 16 bytes.
        port: that it is bound to.
        receive_queue: of a listening socket, the connections that wait for accept(2); else bytes.
    """

    cookie: int
    inode: int
    address: bytes
    port: int
    receive_queue: int


def bound_sockets(protocol: Protocol, family: int) -> Iterator[SocketEntry]:
    """List what can be steered to in the calling thread's namespace: TCP that listens, UDP that is not connected.

    Args:
        protocol: TCP or UDP.
        family: AF_INET or AF_INET6.

    Raises:
        BpfError: the kernel refuses (ENOENT: it was built without CONFIG_INET_DIAG, or CONFIG_INET_UDP_DIAG).
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        yield from _dump(sock, protocol, family, _TCP_LISTEN if protocol == Protocol.TCP else _TCP_CLOSE)


def handshakes(listener: socket.socket) -> set[int]:
    """List the connections of a listener's namespace and family that wait for the last step of their handshake.

    The kernel does not tell which of them are this listener's: where a look-up selected it, their addresses and ports
    are not its own.

    Returns:
        Their cookies: no later connection has one of these.

    Raises:
        BpfError: as `bound_sockets`.
        PermissionDenied: the listener is in another namespace, which the process may not enter.
    """
    with socket_beside(listener, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        return {entry.cookie for entry in _dump(sock, Protocol.TCP, listener.family, _TCP_SYN_RECV)}


def _dump(sock: socket.socket, protocol: Protocol, family: int, state: int) -> Iterator[SocketEntry]:
    try:
        request = _REQUEST.pack(family, protocol, 0, 0, 1 << state)
        yield from map(_entry, netlink.dump(sock, "SOCK_DIAG_BY_FAMILY", _SOCK_DIAG_BY_FAMILY, request))
    except BpfError as error:
        if error.errno == errno.ENOENT:
            error.hint = "this kernel was built without CONFIG_INET_DIAG"
        raise


def _entry(body: bytes) -> SocketEntry:
    family, _, _, _, port, _, address, _, _, cookie, _, queue, _, _, inode = _ANSWER.unpack_from(body)
    size = 4 if family == socket.AF_INET else 16
    return SocketEntry(cookie, inode, address[:size], int.from_bytes(port, "big"), queue)
