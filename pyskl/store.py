# SPDX-License-Identifier: BSD-2-Clause
"""Where the objects of a dispatcher live: programs, maps, the link and the table.

A `Store` is of one process, and gone with it; pyskl/pinned.py has one on bpffs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Any

from pyskl import _sys, capabilities, loader
from pyskl.errors import BpfError, VerifierError
from pyskl.maps import LruHashMap
from pyskl.netns import NetNS, netns_fd
from pyskl.object import BpfObject
from pyskl.program import adopt
from pyskl.sockets import cookie_of_netns
from pyskl.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pyskl.link import Link
    from pyskl.maps import Map
    from pyskl.netns import NetNSLike
    from pyskl.program import Program

_OBJECT = os.path.join(os.path.dirname(__file__), "bpf", "dispatcher.bpf.o")
PROGRAM, EXPLAIN = "dispatch", "explain"
SLOTS = 64
# What programs of all versions share, if they have the same ABI.
MAPS = frozenset(
    {
        "alone",
        "counters",
        "explained",
        "filters",
        "flows",
        "groups",
        "labels",
        "names",
        "parking",
        "registered",
        "siblings",
        "sockets",
        "state",
        "stayers",
        "tables",
        "traces",
    }
)

_FLOW_MAPS = 2  # those that were seen once, and those that were seen again
_FLOW_SIZES = (40, 24)  # struct pyskl_flow and struct pyskl_stay
_FLOWS = 1 << 17  # in each: an LRU map lets go of some before it is full

# The words of struct pyskl_state.
ABI, SEED, NETNS_COOKIE, _NAMES, STICKY, TRACING, FULL_SPEED, NETNS_INODE = range(8)


def load_object(**options: Any) -> BpfObject:
    """Load the dispatcher's object as `BpfObject.load` does, in the way that this kernel takes.

    Raises:
        VerifierError: it takes it in none.
    """
    try:
        return BpfObject.load(_OBJECT, **options)
    except VerifierError as error:
        with contextlib.suppress(VerifierError), loader.open_object(_OBJECT) as opened:
            opened.follow_calls()
            return BpfObject(*adopt(*loader.load(opened, **options)))
        raise error from None


def load(netns: NetNS, max_labels: int, max_sockets: int) -> BpfObject:
    """Load the programs, and make their maps for a namespace; there is no table yet.

    Raises:
        PermissionDenied: the process lacks CAP_BPF or CAP_NET_ADMIN.
        NotSupported: the kernel has no sk_lookup.
    """
    room = max_sockets + 1  # group 0 is none, as label 0 is
    loaded = load_object(
        max_entries={
            "alone": max_labels + 1,
            "labels": max_labels + 1,
            "names": max_labels + 1,
            "counters": max_labels + 1,
            "groups": room,
            "sockets": room * SLOTS,
            "siblings": room,
            "stayers": 2 * room,
            "registered": room,
        },
    )
    try:
        state: Any = loaded.maps["state"]
        state = state.mmap().cast("Q")
        state[ABI] = _sys.ABI
        state[SEED] = int.from_bytes(os.urandom(8), "little")
        state[FULL_SPEED] = _is_fast()
        state[NETNS_INODE] = netns.inode
        state[NETNS_COOKIE] = cookie_of_netns(netns)
    except BaseException:
        loaded.close()
        raise
    return loaded


def _is_fast() -> bool:
    """Whether what is loaded now is loaded without the verifier's barriers against speculation."""
    return not capabilities.missing(("CAP_PERFMON",))


class Store:
    """The objects of a dispatcher, and the lock of those who change it."""

    path: str | None = None
    read_only = False

    def __init__(
        self,
        netns: NetNS | None,
        programs: Mapping[str, Program],
        maps: Mapping[str, Map[Any, Any]],
        link: Link | None,
        table: Table,
    ) -> None:
        self.netns = netns
        self.programs: dict[str, Program] = dict(programs)
        self.maps: dict[str, Map[Any, Any]] = dict(maps)
        self.link = link
        self._table = table
        self._lock = threading.RLock()
        self._copies: dict[str, memoryview] = {}
        self.state: memoryview = self.memory("state").cast("Q")

    def memory(self, name: str) -> memoryview:
        """Give the memory of a map; that of one which this user may only read is a copy, until `refresh` is called."""
        holder: Any = self.maps[name]
        if not holder.read_only:
            return holder.mmap(readonly=self.read_only)  # type: ignore[no-any-return]
        if name not in self._copies:
            self._copies[name] = memoryview(holder.snapshot())
        return self._copies[name].toreadonly()

    def refresh(self) -> None:
        """Read again what is a copy."""
        for name, copy in self._copies.items():
            holder: Any = self.maps[name]
            copy[:] = holder.snapshot()

    def attached(self) -> Link:
        """Give the link.

        Raises:
            BpfError: this user may not open it (EACCES).
        """
        if self.link is None:
            raise self._denied("link")
        return self.link

    def program(self, name: str) -> Program:
        """Give a program by its name.

        Raises:
            BpfError: this user may not open it (EACCES).
        """
        if name not in self.programs:
            raise self._denied("program")
        return self.programs[name]

    def require(self, name: str) -> None:
        """See that this user may change a map.

        Raises:
            BpfError: it was opened for reading alone, since its mode allows no more (EACCES).
        """
        holder: Any = self.maps[name]
        if holder.read_only:
            raise self._denied(f"map {name!r}")

    def _denied(self, what: str) -> BpfError:
        hint = f"its mode keeps this user from the {what}"
        return BpfError(errno.EACCES, os.strerror(errno.EACCES), call="BPF_OBJ_GET", hint=hint, filename=self.path)

    @classmethod
    def create(cls, netns: NetNSLike, max_labels: int, max_sockets: int) -> Store:
        """Load and attach what lives as long as this process."""
        with contextlib.ExitStack() as unless_done:
            with netns_fd(netns) as fd:
                space = unless_done.enter_context(NetNS.from_fd(fd))
            loaded = load(space, max_labels, max_sockets)
            unless_done.callback(loaded.close)
            table = Table.build(b"", max_labels + 1, {})
            unless_done.callback(table.close)
            loaded.maps["tables"][0] = table.map
            link = unless_done.enter_context(loaded.programs[PROGRAM].attach(space))
            made = cls(space, loaded.programs, loaded.maps, link, table)
            loaded.close()  # what was taken out of it stays
            unless_done.pop_all()
        return made

    def unload(self) -> None:
        """Detach the program."""
        self.attached().detach()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Table]:
        """Hold the lock of those who change something, and have the table that is in force."""
        with self._lock:
            yield self._table

    @contextlib.contextmanager
    def explaining(self) -> Iterator[Table]:
        """Hold the lock of those who ask the program, and have the table that is in force."""
        with self._lock:
            yield self._table

    def table(self) -> Table:
        """Give the table that is in force, to read from."""
        return self._table

    def swap(self, table: Table) -> None:
        """Put another table in force, in one step; on return no look-up sees the old one any more.

        The caller holds the lock.
        """
        self.maps["tables"][0] = table.map
        before, self._table = self._table, table
        before.close()

    def synchronize(self) -> None:
        """Wait for the look-ups that are under way: an update of a map of maps does."""
        self.maps["tables"][0] = self._table.map

    def new_programs(self) -> dict[str, Program]:
        """Load the programs of this version, over the same maps."""
        with load_object(reuse={name: self.maps[name] for name in MAPS}) as loaded:
            return dict(loaded.programs)

    def upgrade(self) -> None:
        """Put the programs of this version in the place of those that run, under traffic."""
        with self.writing():
            self._take(self.new_programs())

    def _take(self, programs: dict[str, Program]) -> None:
        """Run other programs from now on."""
        try:
            self.attached().update(programs[PROGRAM])
        except BaseException:
            for program in programs.values():
                program.close()
            raise
        before, self.programs = self.programs, programs
        self.state[FULL_SPEED] = _is_fast()
        for program in before.values():
            program.close()

    def remember_flows(self) -> None:
        """Begin an epoch of remembered UDP flows; their maps are made for the first.

        Raises:
            PermissionDenied: the process lacks CAP_BPF, and they are not there yet.
            BpfError: the kernel has no memory for them (ENOMEM).
        """
        flows: Any = self.maps["flows"]
        for place in range(_FLOW_MAPS):
            if place not in flows:
                with LruHashMap.create(*_FLOW_SIZES, _FLOWS, name="flows") as remembered:
                    flows[place] = remembered
        self.state[STICKY] += 1

    def close(self) -> None:
        """Close everything; what nobody else holds goes."""
        self.state = memoryview(b"")
        for owner in (self.link, *self.programs.values(), *self.maps.values(), self._table.map, self.netns):
            if owner is not None:
                owner.close()
        del self._table  # with its memory
