# SPDX-License-Identifier: BSD-2-Clause
"""The one-liner: traffic for some prefixes to one socket, as long as a ``with`` lasts."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Final

from pyskl import sockets
from pyskl.dispatcher import Dispatcher
from pyskl.netns import NetNS, netns_fd

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyskl.binding import PortsLike, PrefixLike
    from pyskl.netns import NetNSLike
    from pyskl.report import Registration
    from pyskl.sockets import Socket

_lock: Final = threading.Lock()
_numbers: Final = itertools.count(1)


class _Shared:
    """The dispatcher of a namespace, and how many use it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.users = 0


_dispatchers: Final[dict[int, _Shared]] = {}  # by the inode of their namespace, which they keep


@contextlib.contextmanager
def steer(
    sock: Socket,
    *prefixes: PrefixLike,
    ports: PortsLike | Iterable[PortsLike] = None,
    netns: NetNSLike = None,
) -> Iterator[Registration]:
    """Steer what arrives for prefixes and ports to a socket, for the length of a ``with``.

    One dispatcher for each namespace is shared by all of a process; it goes with the last who uses it.

    Args:
        sock: TCP that listens, or UDP that is bound and not connected.
        prefixes: of destination addresses.
        ports: None (all), ``80``, ``"1024-65535"``, a range, or an iterable of these.
        netns: the namespace; the calling thread's own where None.

    Raises:
        BadSocket: the socket can't be steered to; `reason` says why.
        ValueError: a value that can't be, or no prefix.
        BindingConflict: another socket has the same protocol, prefix and ports.
        PermissionDenied: the process lacks CAP_BPF or CAP_NET_ADMIN.
    """
    if not prefixes:
        raise ValueError("at least one prefix is needed")
    with contextlib.ExitStack() as undo:
        with netns_fd(netns) as fd:
            space = undo.enter_context(NetNS.from_fd(fd))
        dispatcher = undo.enter_context(_shared(space))
        label = f"steer-{next(_numbers)}"
        protocol = sockets.examine(sock, space.inode, sockets.cookie_of_netns(space)).protocol
        registration = dispatcher.register(label, sock)
        undo.callback(dispatcher.unregister, label)
        for prefix in dict.fromkeys(prefixes):
            dispatcher.bind(label, protocol, prefix, ports)
            undo.callback(dispatcher.unbind, label, protocol, prefix, ports)
        yield registration


@contextlib.contextmanager
def _shared(space: NetNS) -> Iterator[Dispatcher]:
    """Give the dispatcher of a namespace."""
    inode = space.inode
    with _lock:
        if inode not in _dispatchers:
            _dispatchers[inode] = _Shared(Dispatcher.create(space))
        shared = _dispatchers[inode]
        shared.users += 1
    try:
        yield shared.dispatcher
    finally:
        with _lock:
            shared.users -= 1
            if not shared.users:
                del _dispatchers[inode]
                shared.dispatcher.close()
