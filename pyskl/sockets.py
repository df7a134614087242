# SPDX-License-Identifier: BSD-2-Clause
"""Sockets as a BPF map takes them, and what is wrong with one that it does not take."""

from __future__ import annotations

import errno
import socket
from typing import Any, TypeAlias

from pyskl import _sys
from pyskl._fd import HasFileno, fd_of
from pyskl.errors import BpfError, SocketRefused

Socket: TypeAlias = HasFileno | int
"""Anything with ``fileno()``, or an fd."""

_REFUSALS = frozenset({errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EBADF, errno.EINVAL, errno.EBUSY, errno.EPROTONOSUPPORT})
_IPPROTO_MPTCP = 262
_FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6})
_PROTOCOLS = {
    _IPPROTO_MPTCP: "an MPTCP socket; make it with IPPROTO_TCP",
    socket.IPPROTO_SCTP: "an SCTP socket",
    socket.IPPROTO_UDPLITE: "a UDP-Lite socket",
}


def socket_cookie(sock: Socket) -> int:
    """Give the number by which the kernel knows a socket, as long as it boots: SO_COOKIE of getsockopt(2).

    It is what reading a `SockMap` gives.

    Raises:
        BpfError: it is not a socket (ENOTSOCK, EBADF).
    """
    return _sys.socket_cookie(fd_of(sock))


def refusal(error: BpfError, fd: int) -> BpfError:
    """Say what is wrong with a socket, where that is why a map did not take it."""
    if error.errno not in _REFUSALS:
        return error
    reason = _what_is_wrong(fd, error.errno)
    refused = SocketRefused(error.errno, error.strerror or "", call=error.call, hint=reason)
    refused.reason = reason
    return refused


def _what_is_wrong(fd: int, refusal: int) -> str:
    """Say why a map does not take this socket."""
    if fd < 0:
        return "the socket is closed"
    if refusal == errno.EBADF:
        return f"fd {fd} is not open"
    if refusal == errno.ENOTSOCK:
        return f"fd {fd} is not a socket"
    if refusal == errno.EBUSY:
        return (
            "it is in a map of the other kind (a sockmap, or a REUSEPORT_SOCKARRAY); "
            "or it is being moved, or received from, at this moment: try again"
        )
    return _what_keeps_it_out(_sys.socket_state(fd))


def _what_keeps_it_out(state: Any) -> str:
    """Say what kind or state of a socket that is."""
    if state.domain not in _FAMILIES:
        return f"it is of address family {state.domain}, and no look-up selects any but IPv4 and IPv6"
    if state.protocol in _PROTOCOLS:
        return f"it is {_PROTOCOLS[state.protocol]}"
    if state.type == socket.SOCK_RAW:
        return "it is a raw socket, which no look-up selects"
    if not state.port:
        return "it is not bound: call bind() first"
    if state.type == socket.SOCK_STREAM and not state.listens:
        return "it is a TCP socket that does not listen: call listen() first"
    if not state.reuseport:
        return "it has no SO_REUSEPORT, which this map needs: set it before bind()"
    return "it is in a state that this map does not take"
