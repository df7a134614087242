# SPDX-License-Identifier: BSD-2-Clause
"""Events of a dispatcher: who was sent where, and why not, from a ring buffer that its program writes to."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyskl import _sys
from pyskl._fd import Closable
from pyskl.enums import MapType, Protocol
from pyskl.errors import LimitReached
from pyskl.maps import Map
from pyskl.registry import of_kind
from pyskl.store import TRACING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyskl.address import Address
    from pyskl.store import Store

_TRACES: Final = 8
_EVENT: Final = struct.Struct("=Q16s16sIIIIIi")  # struct pyskl_event
_FILTER: Final = struct.Struct("=IIQ")  # struct pyskl_filter
_AT_ONCE: Final = 256
_STARTED: Final = 19  # the place of starttime in /proc/PID/stat, after the name (proc_pid_stat(5))


class Event(NamedTuple):
    """One look-up that a binding matched.

    Attributes:
        time_ns: when, in nanoseconds of CLOCK_MONOTONIC.
        protocol: TCP (a SYN) or UDP (a datagram).
        source: the client's (host, port).
        destination: the (host, port) that it asked for.
        label: whose binding matched.
        slot: of the socket that was selected, or None.
        reason: as in `Decision`.
    """

    time_ns: int
    protocol: Protocol
    source: Address
    destination: Address
    label: str
    slot: int | None
    reason: str


class Trace(Closable):
    """An iterator over events as they come; `close()` ends it.

    Where the reader is too slow, events are lost. ``fileno()`` can be polled for reading.
    """

    _closed = True  # until there is something to close

    def __init__(self, store: Store, names: Callable[[], dict[int, str]], label: int, reasons: tuple[str, ...]) -> None:
        self._store = store
        self._names = names
        self._reasons = reasons
        self._pending: list[Event] = []
        self._ring: Map[Any, Any] = Map.create(MapType.RINGBUF, 0, 0, 1 << 18, name="events")
        try:
            self._memory = _sys.RingBuffer(self._ring.fileno(), self._ring.info.max_entries)
            with store.writing():
                self._place = self._free_place()
                filters: Any = store.maps["filters"]
                filters[self._place] = _FILTER.pack(label, os.getpid(), _started(os.getpid()))
                traces: Any = store.maps["traces"]
                traces[self._place] = self._ring
                store.state[TRACING] |= 1 << self._place
        except BaseException:
            self._ring.close()
            raise
        self._closed = False

    def _free_place(self) -> int:
        """Find a place of no living reader's."""
        filters: Any = self._store.maps["filters"]
        for place in range(_TRACES):
            if not self._store.state[TRACING] >> place & 1:
                return place
            _, pid, started = _FILTER.unpack(filters[place])
            if _started(pid) != started:
                return place
        raise LimitReached(f"{_TRACES} processes read events already")

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def close(self) -> None:
        """End it; once more does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ValueError, OSError), self._store.writing():  # the dispatcher may be closed
            self._store.state[TRACING] &= ~(1 << self._place)
            traces: Any = self._store.maps["traces"]
            del traces[self._place]
        self._ring.close()

    def fileno(self) -> int:
        """Give the fd of the ring buffer."""
        return self._ring.fileno()

    def read(self, timeout: float | None = None) -> list[Event]:
        """Give the events that came, at least one; or none after a time.

        Args:
            timeout: how long to wait, in seconds; None: until there is one, 0: not at all.
        """
        if self._closed:
            raise ValueError("operation on a closed Trace")
        events = self._decode(self._memory.read(_EVENT.size, _AT_ONCE))
        if not events and timeout != 0:
            with select.epoll() as poll:
                poll.register(self._ring, select.EPOLLIN)
                poll.poll(timeout)
            events = self._decode(self._memory.read(_EVENT.size, _AT_ONCE))
        return events

    def __iter__(self) -> Trace:
        return self

    def __next__(self) -> Event:
        while not self._pending:
            if self._closed:
                raise StopIteration
            self._pending = self.read()
        return self._pending.pop(0)

    def _decode(self, records: bytes) -> list[Event]:
        names = self._names()
        return [self._event(names, *fields) for fields in _EVENT.iter_unpack(records)]

    def _event(
        self,
        names: dict[int, str],
        time: int,
        remote: bytes,
        local: bytes,
        remote_port: int,
        local_port: int,
        kind: int,
        label: int,
        reason: int,
        slot: int,
    ) -> Event:
        protocol, family = of_kind(kind)
        size = 4 if family == socket.AF_INET else 16
        source = socket.inet_ntop(family, remote[:size]), socket.ntohs(remote_port)
        destination = socket.inet_ntop(family, local[:size]), local_port
        why = self._reasons[reason]
        selected = slot if why == "selected" else None
        return Event(time, protocol, source, destination, names.get(label, "?"), selected, why)


def _started(pid: int) -> int:
    """Tell when a process began, by which it is told from a later one of the same number; 0 where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as status:
            return int(status.read().rpartition(b")")[2].split()[_STARTED])
    except (OSError, IndexError):
        return 0
