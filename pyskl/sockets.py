# SPDX-License-Identifier: BSD-2-Clause
"""Sockets as a BPF map takes them, and what is wrong with one that it does not take."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from pyskl import _sys
from pyskl._fd import HasFileno, fd_of
from pyskl.enums import Protocol
from pyskl.errors import BadSocket, BpfError, PermissionDenied, SocketRefused
from pyskl.netns import NetNS

if TYPE_CHECKING:
    from pyskl.address import Address

Socket: TypeAlias = HasFileno | int
"""Anything with ``fileno()``, or an fd."""

_REFUSALS = frozenset({errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EBADF, errno.EINVAL, errno.EBUSY, errno.EPROTONOSUPPORT})
_IPPROTO_MPTCP = 262
_SO_NETNS_COOKIE = 71  # since Linux 5.14
_POLLRDHUP = 0x2000
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
        return "it is a TCP socket that does not listen, or that was shut down: call listen() first"
    if not state.reuseport:
        return "it has no SO_REUSEPORT, which this map needs: set it before bind()"
    return "it is in a state that this map does not take"


# --- what can be steered to -------------------------------------------------------------------------------------------


class Steerable(NamedTuple):
    """A socket that a look-up can select.

    Attributes:
        protocol: TCP or UDP.
        family: AF_INET or AF_INET6.
        dual: whether one of AF_INET6 takes IPv4 too.
        reuseport: whether SO_REUSEPORT is set.
        cookie: by which the kernel knows it.
        address: that it is bound to.
    """

    protocol: Protocol
    family: socket.AddressFamily
    dual: bool
    reuseport: bool
    cookie: int
    address: Address


def refuse(reason: str, what: str = "be steered to") -> NoReturn:
    """Raise BadSocket, which says what can't be done with a socket and why."""
    error = BadSocket(f"this socket can't {what}: {reason}")
    error.reason = reason
    raise error


def examine(sock: Socket, netns: int, netns_cookie: int) -> Steerable:
    """Look whether a socket can be steered to in a namespace.

    Args:
        sock: the socket.
        netns: inode of the namespace.
        netns_cookie: its cookie (SO_NETNS_COOKIE of socket(7)), or 0 where the kernel does not tell it.

    Raises:
        BadSocket: it can't; `reason` says why.
    """
    fd = fd_of(sock)
    if fd < 0:
        refuse("the socket is closed")
    try:
        copied = _sys.dup(fd)
    except OSError as error:
        refuse(_what_is_wrong(fd, errno.EBADF) if error.errno == errno.EBADF else str(error))
    try:
        copy = socket.socket(fileno=copied)
    except OSError:
        os.close(copied)
        refuse(_what_is_wrong(fd, errno.ENOTSOCK))
    with copy:
        return _examine(copy, netns, netns_cookie)


def _examine(copy: socket.socket, netns: int, netns_cookie: int) -> Steerable:
    state = _sys.socket_state(copy.fileno())
    listens = state.type == socket.SOCK_STREAM
    if state.domain not in _FAMILIES or state.protocol not in {Protocol.TCP, Protocol.UDP}:
        refuse(_what_keeps_it_out(state))
    if not state.port or (listens and not state.listens):
        refuse(_what_keeps_it_out(state))
    try:
        peer = copy.getpeername()
    except OSError:
        pass
    else:
        refuse(f"it is connected to {peer}, and gets nothing but from there")
    if _is_shut_down(copy):
        refuse("it was shut down")
    if not _is_in(copy, netns, netns_cookie):
        refuse("it is in another network namespace than the dispatcher")
    v6 = copy.family == socket.AF_INET6
    return Steerable(
        Protocol(state.protocol),
        socket.AF_INET6 if v6 else socket.AF_INET,
        v6 and not copy.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
        bool(state.reuseport),
        _sys.socket_cookie(copy.fileno()),
        copy.getsockname(),
    )


def _is_shut_down(copy: socket.socket) -> bool:
    """Whether shutdown(2) was called: poll(2) tells, of a UDP socket too."""
    poll = select.poll()
    poll.register(copy, _POLLRDHUP)
    return any(events & (_POLLRDHUP | select.POLLHUP) for _, events in poll.poll(0))


def cookie_of_netns(netns: NetNS) -> int:
    """Give the cookie of a namespace, or 0 before Linux 5.14.

    Raises:
        PermissionDenied: the thread is elsewhere, and the process lacks CAP_SYS_ADMIN.
    """
    with netns.visited(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inside:
        return netns_cookie_of(inside)


def netns_cookie_of(sock: socket.socket) -> int:
    """SO_NETNS_COOKIE of getsockopt(2): the number of the socket's namespace, or 0 before Linux 5.14."""
    try:
        return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])
    except OSError:
        return 0


def socket_beside(sock: socket.socket, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Make a socket in the network namespace of another one, whatever namespace the calling thread is in.

    Before Linux 5.14 a process without CAP_NET_ADMIN can't see where a socket is: its own namespace is assumed.

    Raises:
        PermissionDenied: that is another namespace, and the process lacks CAP_NET_ADMIN or CAP_SYS_ADMIN.
    """
    made = socket.socket(family, kind, protocol)
    try:
        cookie = netns_cookie_of(made)
        if _is_in(sock, 0 if cookie else os.stat("/proc/thread-self/ns/net").st_ino, cookie):
            return made
        made.close()
        with NetNS.own(_sys.socket_netns(sock.fileno())) as theirs, theirs.entered():
            return socket.socket(family, kind, protocol)
    except BaseException:
        made.close()
        raise


def _is_in(copy: socket.socket, netns: int, netns_cookie: int) -> bool:
    if netns_cookie:
        return netns_cookie_of(copy) == netns_cookie
    try:
        with NetNS.own(_sys.socket_netns(copy.fileno())) as its:
            return its.inode == netns
    except PermissionDenied:  # then it can't be told
        return True
