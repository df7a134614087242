# SPDX-License-Identifier: BSD-2-Clause
"""The sockets that are registered under labels.

They are in the maps ``labels``, ``groups``, ``alone``, ``sockets``, ``siblings`` and ``registered`` of a dispatcher.
A group has the 64 slots of a label for one protocol and family. A socket is put into its slot before the slot is told
to be filled, and a group that was given to a label stays with it until no more are left: whoever looks up meanwhile
finds a socket of that label, or none.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from pyskl.enums import Protocol
from pyskl.errors import BpfError, LimitReached, NoSuchKey
from pyskl.sockets import socket_cookie

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pyskl.address import Address
    from pyskl.maps import Map
    from pyskl.sockets import Socket, Steerable

SLOTS = 64
GROUPS = 4
_RECORD = struct.Struct("=Q16sIHBB")  # struct pyskl_registered
_NOBODYS = 0  # the first place of the sockmap: groups begin with 1
_BUSY_TRIES = 100
_BUSY_PAUSE = 0.001


class Slot(NamedTuple):
    """A slot that is filled: ``kind`` is 2 for IPv6, and 1 more for UDP; ``place`` where it is in the sockmap."""

    label: int
    kind: int
    slot: int
    place: int


class Wanted(NamedTuple):
    """A socket that is to be put into a slot.

    Attributes:
        slot: 0 to 63.
        sock: the socket.
        facts: about it.
        siblings: other members of its SO_REUSEPORT group, to be selected when it has died.
    """

    slot: int
    sock: Socket
    facts: Steerable
    siblings: Sequence[Socket] = ()

    @property
    def kind(self) -> int:
        """The number of its kind of group."""
        return kind_of(self.facts.protocol, self.facts.family)


def kind_of(protocol: Protocol, family: int) -> int:
    """Give the number of a kind of group: there are four."""
    return 2 * (family == socket.AF_INET6) + (protocol == Protocol.UDP)


def of_kind(kind: int) -> tuple[Protocol, socket.AddressFamily]:
    """Tell the protocol and family of a kind of group."""
    return (Protocol.UDP if kind & 1 else Protocol.TCP), (socket.AF_INET6 if kind & 2 else socket.AF_INET)


class Registry:
    """The registered sockets of a dispatcher; the caller holds its lock while it changes them."""

    def __init__(
        self, maps: Mapping[str, Map[Any, Any]], labels: memoryview, groups: memoryview, alone: memoryview
    ) -> None:
        self._sockets: Any = maps["sockets"]
        self._siblings: Any = maps["siblings"]
        self._stayers: Any = maps["stayers"]
        self._records: Any = maps["registered"]
        self._labels = labels.cast("I")  # four groups to each label
        self._groups = groups.cast("Q")  # filled and dual of each group
        self._alone = alone.cast("I")  # for each group of a label, where its one socket is

    @property
    def limit(self) -> int:
        """How many sockets can be registered."""
        return len(self._groups) // 2 - 1

    def filled(self, label: int) -> list[Slot]:
        """List the slots of a label."""
        found = []
        for kind in range(GROUPS):
            group = self._labels[label * GROUPS + kind]
            bits = self._groups[group * 2] if group else 0
            while bits:
                slot = (bits & -bits).bit_length() - 1
                bits &= bits - 1
                found.append(Slot(label, kind, slot, group * SLOTS + slot))
        return found

    def cookie(self, index: int) -> int:
        """Give the cookie of the socket that is at a place of the sockmap now, or 0."""
        try:
            return int(self._sockets[index])
        except KeyError:
            return 0

    def record(self, index: int) -> tuple[int, Address]:
        """Give the cookie and address of the socket that was registered at a place of the sockmap."""
        cookie, raw, scope, port, family, _ = _RECORD.unpack(self._records[index])
        if family:
            return cookie, (socket.inet_ntop(socket.AF_INET6, raw), port, 0, scope)
        return cookie, (socket.inet_ntop(socket.AF_INET, raw[:4]), port)

    def put(self, label: int, wanted: Sequence[Wanted], unused: Callable[[], set[int]]) -> None:
        """Put sockets into slots of a label, each in the place of what is there: all of them, or none.

        What can fail is tried first, where no look-up sees it. Each of them is one step.

        Args:
            label: number of the label.
            wanted: the sockets, no two of a kind for the same slot.
            unused: takes back and tells the groups that nothing uses; asked only when there are none left.

        Raises:
            LimitReached: there is no room for so many more; nothing has changed.
            BpfError: the kernel refuses a socket; nothing has changed.
        """
        new = self._new_of(label, wanted)
        if new and self._registered() + len(new) > self.limit:
            unused()
            new = self._new_of(label, wanted)  # the dead are gone from their slots
        if new and self._registered() + len(new) > self.limit:
            raise LimitReached(f"{self.limit} sockets can be registered; create the dispatcher with more max_sockets")
        for each in wanted:
            if each.facts.protocol == Protocol.UDP:
                self._store(self._stayers, each.facts.cookie.to_bytes(8, sys.byteorder), each.sock)
        if len(wanted) > 1:
            self._try([each.sock for each in wanted])
        for each in wanted:
            self._put(label, each, unused)

    def _registered(self) -> int:
        return sum(map(int.bit_count, self._groups[::2]))

    def _new_of(self, label: int, wanted: Iterable[Wanted]) -> list[Wanted]:
        """List those whose slot is not filled."""
        taken = {(each.kind, each.slot) for each in self.filled(label)}
        return [each for each in wanted if (each.kind, each.slot) not in taken]

    def _try(self, socks: Iterable[Socket]) -> None:
        """Let the kernel say whether it takes these, in a place that belongs to no group."""
        try:
            for sock in socks:
                self._store(self._sockets, _NOBODYS, sock)
        finally:
            with contextlib.suppress(NoSuchKey):
                del self._sockets[_NOBODYS]

    def _put(self, label: int, wanted: Wanted, unused: Callable[[], set[int]]) -> None:
        slot, sock, facts, siblings = wanted
        kind = wanted.kind
        group = self._labels[label * GROUPS + kind] or self._new_group(unused)
        bit = 1 << slot
        index = group * SLOTS + slot
        self._part(label)
        before = self._records.get(index)
        self._records[index] = _pack(facts)
        try:
            self._store(self._sockets, index, sock)
        except BaseException:
            if before is None:
                del self._records[index]
            else:
                self._records[index] = before
            self._join(label)
            raise
        self._replace_siblings(group, siblings, alone=not self._groups[group * 2] & ~bit)
        dual = self._groups[group * 2 + 1]
        self._groups[group * 2 + 1] = dual | bit if facts.dual else dual & ~bit
        self._groups[group * 2] |= bit
        self._labels[label * GROUPS + kind] = group
        self._join(label)

    def _part(self, label: int) -> None:
        """Let look-ups go by label and group before these change: one who is killed then leaves no wrong short cut."""
        for kind in range(GROUPS):
            self._alone[label * GROUPS + kind] = 0

    def _join(self, label: int) -> None:
        """Let look-ups take the short cut where one socket gets all."""
        for kind in range(GROUPS):
            group = self._labels[label * GROUPS + kind]
            filled = self._groups[group * 2] if group else 0
            if not filled and kind < 2:  # a socket of both families is registered as one of IPv6
                group = self._labels[label * GROUPS + kind + 2]
                filled = self._groups[group * 2] & self._groups[group * 2 + 1] if group else 0
            alone = filled.bit_count() == 1
            self._alone[label * GROUPS + kind] = group * SLOTS + filled.bit_length() - 1 if alone else 0

    def _new_group(self, unused: Callable[[], set[int]]) -> int:
        """Find a group that no label has."""
        taken = set(self._labels)
        free = next((group for group in range(1, self.limit + 1) if group not in taken), 0)
        return free or min(unused())

    @staticmethod
    def _store(holder: Any, index: int | bytes, sock: Socket) -> None:
        """Put a socket into a map; one that another process receives from is busy for a moment."""
        for left in reversed(range(_BUSY_TRIES)):
            try:
                holder[index] = sock
            except BpfError as error:
                if error.errno != errno.EBUSY or not left:
                    raise
                time.sleep(_BUSY_PAUSE)
            else:
                return

    def _replace_siblings(self, group: int, siblings: Sequence[Socket], *, alone: bool) -> None:
        """Keep these siblings for a group, beside those that its other slots have; `alone`: there are none."""
        if not siblings and next(iter(self._siblings), None) is None:
            return  # as it nearly always is: there is none of any group
        have = {}
        for number in range(SLOTS):
            with contextlib.suppress(KeyError):
                have[int(self._siblings[group * SLOTS + number])] = number
        wanted = {socket_cookie(sibling): sibling for sibling in siblings}
        free = iter(sorted(set(range(SLOTS)) - set(have.values())))
        for cookie in wanted.keys() - have.keys():
            if (vacant := next(free, None)) is None:
                break
            with contextlib.suppress(BpfError):  # one that died meanwhile, or a map that is full: they are a reserve
                self._store(self._siblings, group * SLOTS + vacant, wanted[cookie])
        for cookie in have.keys() - wanted.keys() if alone else ():
            with contextlib.suppress(NoSuchKey):
                del self._siblings[group * SLOTS + have[cookie]]

    def empty(self, slot: Slot) -> None:
        """Take a socket out of its slot."""
        group = slot.place // SLOTS
        self._part(slot.label)
        self._groups[group * 2] &= ~(1 << slot.slot)
        if not self._groups[group * 2]:
            for number in range(SLOTS):
                with contextlib.suppress(NoSuchKey):
                    del self._siblings[group * SLOTS + number]
        for holder in (self._sockets, self._records):
            with contextlib.suppress(NoSuchKey):
                del holder[slot.place]
        self._join(slot.label)

    def forget(self, labels: Iterable[int]) -> set[int]:
        """Take the groups from labels that have no socket in them, and those that no label has: which are free now.

        The caller waits for the look-ups that are under way before it gives them to others.
        """
        for label in labels:
            for place in range(label * GROUPS, (label + 1) * GROUPS):
                group = self._labels[place]
                if group and not self._groups[group * 2]:
                    self._labels[place] = 0
        return set(range(1, self.limit + 1)) - set(self._labels)

    def has_groups(self, label: int) -> bool:
        """Whether a label has a group."""
        return any(self._labels[label * GROUPS : (label + 1) * GROUPS])

    def dead(self, label: int) -> Iterator[Slot]:
        """List the slots of a label whose socket is closed, and where no sibling lives that clients reach instead."""
        return (
            slot
            for slot in self.filled(label)
            if not self.cookie(slot.place) and not self._has_siblings(slot.place // SLOTS)
        )

    def _has_siblings(self, group: int) -> bool:
        for number in range(SLOTS):
            with contextlib.suppress(KeyError):
                return bool(self._siblings[group * SLOTS + number])
        return False


def _pack(facts: Steerable) -> bytes:
    host, port, *rest = facts.address
    v6 = facts.family == socket.AF_INET6
    raw = socket.inet_pton(facts.family, str(host).partition("%")[0])
    return _RECORD.pack(facts.cookie, raw, int(rest[1]) if rest else 0, port, v6, 0)
