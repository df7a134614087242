# SPDX-License-Identifier: BSD-2-Clause
"""Sockets that UDP replies leave from: one for each address and port, in a cache that is bounded.

A datagram's source port is that of the socket that sends it, so each port that a reply must come from needs a socket
that is bound to it. None of them ever receives: a classic filter lets nothing through, and each is connected to itself,
so that no look-up finds it (udp(7), socket(7)).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from typing import Final

from pyskl import _sys
from pyskl.address import from_sockaddr
from pyskl.errors import BpfError, PermissionDenied
from pyskl.sockets import socket_beside

IPV6_FREEBIND: Final = 78
_SO_BINDTOIFINDEX: Final = 62
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23

# What the server's socket is set to, its replies are too.
_ALIKE: Final = (
    (socket.SOL_SOCKET, socket.SO_PRIORITY),
    (socket.SOL_SOCKET, socket.SO_MARK),
    (socket.SOL_SOCKET, _SO_BINDTOIFINDEX),
    (socket.IPPROTO_IP, socket.IP_TOS),
    (socket.IPPROTO_IP, socket.IP_TTL),
    (socket.IPPROTO_IP, _IP_MTU_DISCOVER),
)
_ALIKE_V6: Final = (
    *_ALIKE,
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
    (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER),
)

_HINTS: Final = {
    errno.EADDRINUSE: "another socket is bound to it, without SO_REUSEADDR",
    errno.EADDRNOTAVAIL: "no reply can leave from there: it is no local address, or port 0",
    errno.EMFILE: "each address and port that replies leave from takes an fd: raise RLIMIT_NOFILE",
    errno.ENFILE: "each address and port that replies leave from takes an fd: raise fs.file-max",
}


class _Reply(socket.socket):
    """Closed when nobody holds it any more: one that has left the cache may be sending in another thread."""

    def __del__(self) -> None:
        self.close()


class ReplySockets:
    """The sockets that were used last, up to `room` of them. Threads may share it."""

    def __init__(self, sock: socket.socket, room: int) -> None:
        self._like = sock
        self._room = room
        self._sockets: dict[bytes, socket.socket] = {}  # in order of use
        self._lock = threading.Lock()

    def get(self, source: bytes) -> socket.socket:
        """Give the socket that is bound to an address and port, as `pyskl.address.to_sockaddr` packs them.

        Raises:
            PermissionDenied: the port is privileged, and the process lacks CAP_NET_BIND_SERVICE.
            BpfError: it can't be bound, or there is no fd left.
        """
        with self._lock:
            if found := self._sockets.pop(source, None):
                self._sockets[source] = found
                return found
        made = self._make(source)
        with self._lock:
            self._sockets[source] = made
            while len(self._sockets) > self._room:
                self._let_go()
        return made

    def clear(self) -> None:
        """Let them all go."""
        with self._lock:
            self._sockets.clear()

    def __len__(self) -> int:
        return len(self._sockets)

    def _let_go(self) -> None:
        del self._sockets[next(iter(self._sockets))]

    def _make(self, source: bytes) -> socket.socket:
        while True:
            try:
                return self._bound(source)
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:
                    with self._lock:
                        if self._sockets:
                            self._let_go()
                            continue
                raise _refusal(error, source) from None

    def _bound(self, source: bytes) -> socket.socket:
        address = from_sockaddr(source)
        if not address[1]:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        like = self._like
        with contextlib.ExitStack() as failing:
            plain = socket_beside(like, like.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            made = _Reply(fileno=plain.detach())
            failing.callback(made.close)
            _sys.mute(made.fileno())
            for level, option in _ALIKE if like.family == socket.AF_INET else _ALIKE_V6:
                if (value := like.getsockopt(level, option)) != made.getsockopt(level, option):
                    made.setsockopt(level, option, value)
            room = like.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room // 2)  # the kernel doubles it: socket(7)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if like.family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                made.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            try:
                made.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # another socket may have set that alone
                made.bind(address)
            made.connect(address)
            failing.pop_all()
        return made


def _refusal(error: OSError, source: bytes) -> BpfError:
    """Say what is wrong with an address and port that no socket could be bound to."""
    if isinstance(error, BpfError):
        return error
    number, words = error.errno or 0, error.strerror or ""
    host, port, *_ = from_sockaddr(source)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if number == errno.EACCES:
        hint = f"{where}: the port is privileged, and the process lacks CAP_NET_BIND_SERVICE"
        denied = PermissionDenied(number, words, call="bind", hint=hint)
        denied.missing = ("CAP_NET_BIND_SERVICE",)
        return denied
    call = "socket" if number in {errno.EMFILE, errno.ENFILE} else "bind"
    hint = f": {_HINTS[number]}" if number in _HINTS else ""
    return BpfError(number, words, call=call, hint=f"{where}{hint}")
