# SPDX-License-Identifier: BSD-2-Clause
"""Parking sockets, which drop whatever they get: what the policy "hold" sends clients to, so that they try again.

A classic filter that returns 0 makes the kernel drop each packet in silence (socket(7), SO_ATTACH_FILTER).
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Any

from pyskl import _sys
from pyskl.errors import BpfError
from pyskl.registry import GROUPS, SLOTS, of_kind

if TYPE_CHECKING:
    from typing_extensions import Self

    from pyskl.maps import SockMap
    from pyskl.netns import NetNS


class Parking:
    """The parking sockets that one process keeps for a dispatcher; `close()` lets them go."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}

    @classmethod
    def keep(cls, parking: SockMap, netns: NetNS) -> Self:
        """Open parking sockets in a namespace and put them into a dispatcher's map.

        Where the process can't (it may not enter the namespace, or as many as there is room for keep some), it keeps
        none: whether "hold" is in force is told by `Dispatcher.status`.
        """
        made = cls()
        with contextlib.suppress(OSError), netns.visited():
            for kind in range(GROUPS):
                with contextlib.suppress(OSError):  # a family that the kernel does not have
                    made._open(kind, *of_kind(kind))
        made._enter(parking)
        return made

    def _open(self, kind: int, protocol: int, family: socket.AddressFamily) -> None:
        udp = protocol == socket.IPPROTO_UDP
        with contextlib.ExitStack() as unless_done:
            sock = socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM, protocol)
            unless_done.callback(sock.close)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _sys.mute(sock.fileno())
            sock.bind(("", 0))
            if not udp:
                sock.listen(1)
            unless_done.pop_all()
        self._sockets[kind] = sock

    def _enter(self, parking: Any) -> None:
        for keeper in range(SLOTS if self._sockets else 0):
            try:
                for kind, sock in self._sockets.items():
                    parking.put(keeper * GROUPS + kind, sock, mode="noexist")
            except BpfError as error:
                if error.errno == errno.EEXIST:  # another's
                    continue
                break
            return
        self.close()

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The sockets that are kept; none where the process can't."""
        return tuple(self._sockets.values())

    def close(self) -> None:
        """Close the sockets, which leave the map with it."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def keepers(parking: SockMap) -> int:
    """Count those who keep parking sockets for a dispatcher."""
    return len({index // GROUPS for index in parking})
