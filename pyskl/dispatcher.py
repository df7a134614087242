# SPDX-License-Identifier: BSD-2-Clause
"""The dispatcher: bindings lead from addresses and ports to labels, and labels to sockets."""

from __future__ import annotations

import contextlib
import grp
import ipaddress
import logging
import operator
import socket
import struct
import sys
from array import array
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from pyskl import _sys, mending, parking, sock_diag, sockets
from pyskl._fd import Closable
from pyskl.address import parse_endpoint, parse_protocol
from pyskl.binding import (
    ON_MISSING,
    RECORD_SIZE,
    Binding,
    Bindings,
    Policy,
    PortsLike,
    PrefixLike,
    check_label,
    check_policy,
    conflict,
    port_ranges,
)
from pyskl.enums import Protocol
from pyskl.labels import Labels
from pyskl.pinned import PinnedStore
from pyskl.registry import GROUPS, SLOTS, Registry, Wanted, of_kind
from pyskl.report import Count, Counters, Decision, Diff, LabelStatus, Registration, Status
from pyskl.reuseport import siblings_of, socket_of
from pyskl.store import ABI, EXPLAIN, FULL_SPEED, NETNS_COOKIE, NETNS_INODE, PROGRAM, STICKY, Store
from pyskl.table import Table
from pyskl.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from socket import AddressFamily

    from pyskl.address import Address, ProtocolLike
    from pyskl.binding import OnMissing
    from pyskl.link import Link
    from pyskl.maps import Map
    from pyskl.netns import NetNS, NetNSLike
    from pyskl.pinning import StrPath
    from pyskl.program import Program
    from pyskl.registry import Slot
    from pyskl.sockets import Socket

_logger: Final = logging.getLogger("pyskl.dispatcher")
_MAX_LABELS: Final = 4096
_MAX_SOCKETS: Final = 4096
_TIMEOUT: Final = 10.0
_U24: Final = 0xFFFFFF
_DECISION: Final = struct.Struct("=IIIiI4x")  # struct pyskl_decision
_POLICY: Final = struct.Struct("=HHI")  # struct pyskl_policy
_EVENTS: Final = struct.Struct("=8Q")  # struct pyskl_counters
_REASONS: Final = ("unbound", "selected", "sticky", "sibling", "hold", "fallthrough", "reset")
_SELECTED: Final = frozenset({"selected", "sticky", "sibling"})
_FAMILIES: Final[dict[object, AddressFamily]] = {
    "ipv4": socket.AF_INET,
    "ipv6": socket.AF_INET6,
    4: socket.AF_INET,
    6: socket.AF_INET6,
    socket.AF_INET: socket.AF_INET,
    socket.AF_INET6: socket.AF_INET6,
}


class Dispatcher(Closable):
    """Bindings of addresses and ports to labels, and the sockets that are registered under these.

    `create` makes one that lives as long as this process. What is changed is in force when the call returns, in one
    step: each look-up sees what was before or what is after. It may be used from several threads.
    """

    _closed = True  # until there is something to close

    def __init__(self, store: Store) -> None:
        self._store = store
        self._labels = Labels(store.maps["names"], store.memory("state"))  # type: ignore[arg-type] # by their names
        self._registry = Registry(store.maps, *map(store.memory, ("labels", "groups", "alone")))
        self._parking = parking.Parking()
        self._closed = False
        if not store.read_only and store.netns is not None:
            self._parking = parking.Parking.keep(store.maps["parking"], store.netns)  # type: ignore[arg-type]

    # --- life ---------------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        netns: NetNSLike = None,
        *,
        path: StrPath | None = None,
        max_labels: int = _MAX_LABELS,
        max_sockets: int = _MAX_SOCKETS,
        group: int | str | None = None,
        group_sockets: bool = False,
        timeout: float = _TIMEOUT,
    ) -> Dispatcher:
        """Make a dispatcher and attach it to a network namespace.

        Args:
            netns: the namespace; the calling thread's own where None.
            path: a new folder on bpffs, in which everything is pinned, so that it outlives the process; None: it lives
                as long as the process.
            max_labels: how many labels there can be.
            max_sockets: how many sockets can be registered.
            group: whose members may read what is pinned: its name or number.
            group_sockets: whether they may register sockets, too.
            timeout: how long calls wait for other processes' changes, in seconds.

        Raises:
            AlreadyLoaded: there is a dispatcher at the path.
            PermissionDenied: the process lacks CAP_BPF or CAP_NET_ADMIN. CAP_PERFMON buys full speed.
            NotSupported: the kernel has no sk_lookup (Linux 5.9).
            BpfError: the namespace has 64 programs already (E2BIG), or the path is not on bpffs (EPERM).
            KeyError: there is no such group.
        """
        for what, number in (("max_labels", max_labels), ("max_sockets", max_sockets)):
            if not 0 < number < _U24:
                raise ValueError(f"{what} is between 1 and {_U24 - 1}, not {number!r}")
        if path is None:
            return cls(Store.create(netns, max_labels, max_sockets))
        return cls(
            PinnedStore.load(
                path,
                netns,
                max_labels,
                max_sockets,
                group=grp.getgrnam(group).gr_gid if isinstance(group, str) else group,
                group_sockets=group_sockets,
                timeout=timeout,
            )
        )

    @classmethod
    def open(cls, path: StrPath, *, read_only: bool = False, timeout: float = _TIMEOUT) -> Dispatcher:
        """Open the dispatcher that is pinned at a path.

        Args:
            path: its folder.
            read_only: whether only to read: that takes no lock and changes nothing.
            timeout: how long this call, and each change, waits for other processes' changes, in seconds.

        Raises:
            NotLoaded: there is none.
            Incompatible: another version made it, with other maps.
            Damaged: something of it is missing, or its link is attached to nothing.
            Busy: another process held the lock for longer than that; `pid` tells which.
            PermissionError: this user may not.
        """
        return cls(PinnedStore.open(path, read_only=read_only, timeout=timeout))

    @staticmethod
    def remove(path: StrPath, *, timeout: float = _TIMEOUT) -> None:
        """Detach and remove what is pinned at a path, in whatever state it is.

        Raises:
            NotLoaded: there is nothing.
            Busy: another process held the lock for too long.
        """
        PinnedStore.remove(path, timeout=timeout)

    @staticmethod
    def repair(path: StrPath, *, timeout: float = _TIMEOUT) -> tuple[str, ...]:
        """Mend the dispatcher at a path: missing pins, foreign files, a link that was severed.

        Returns:
            What was done, in sentences; none where all was well.

        Raises:
            NotLoaded: there is nothing.
            Incompatible: another version made it.
            Damaged: it can't be mended.
            PermissionDenied: the process lacks CAP_SYS_ADMIN, which opening by id needs.
            Busy: another process held the lock for too long.
        """
        return mending.repair(path, timeout=timeout)

    def unload(self) -> None:
        """Detach the program for all, remove what is pinned, and close.

        Raises:
            NotLoaded: it was unloaded already; what somebody made in its place since stays.
            Busy: another process held the lock for too long.
            BpfError: it was opened for reading alone (EACCES).
            PermissionError: this user may not.
        """
        self._open().unload()
        self.close()

    def upgrade(self) -> None:
        """Put the programs of this version of pyskl in the place of those that run: in one step, under traffic.

        Raises:
            PermissionDenied: the process lacks CAP_BPF or CAP_NET_ADMIN.
        """
        self._open_for("state").upgrade()

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def close(self) -> None:
        """Close it; what was not pinned is gone. Once more does nothing."""
        if not self._closed:
            self._closed = True
            self._parking.close()
            self._store.close()
            del self._labels, self._registry  # with their maps' memory

    def fileno(self) -> int:
        """Give the fd of the link."""
        return self._open().attached().fileno()

    def _open(self) -> Store:
        if self._closed:
            raise ValueError("operation on a closed Dispatcher")
        self._store.refresh()
        return self._store

    def _open_for(self, name: str) -> Store:
        """Give the store to who may change a map of this name."""
        store = self._open()
        if not store.read_only:
            store.require(name)
        return store

    @property
    def path(self) -> str | None:
        """The folder on bpffs, or None where it is ephemeral."""
        return self._open().path

    @property
    def program(self) -> Program:
        """The attached program."""
        return self._open().program(PROGRAM)

    @property
    def link(self) -> Link:
        """What keeps the program attached."""
        return self._open().attached()

    @property
    def maps(self) -> Mapping[str, Map[Any, Any]]:
        """The program's maps, by name (bpf/abi.h says what is in them)."""
        return MappingProxyType(self._open().maps)

    def __repr__(self) -> str:
        return f"<Dispatcher {'closed' if self._closed else self._store.path or 'ephemeral'}>"

    # --- bindings -----------------------------------------------------------------------------------------------------

    def bind(
        self,
        label: str,
        protocol: ProtocolLike,
        prefix: PrefixLike,
        ports: PortsLike | Iterable[PortsLike] = None,
        *,
        replace: bool = False,
    ) -> tuple[Binding, ...]:
        """Bind a prefix and ports to a label, all in one step. What is bound so already stays.

        Args:
            label: 1 to 255 bytes of UTF-8.
            protocol: ``"tcp"``, ``"udp"`` or a `Protocol`.
            prefix: of destination addresses.
            ports: None (all), ``80``, ``"1024-65535"``, a range, or an iterable of these.
            replace: whether a binding that another label has moves over.

        Returns:
            The bindings, by precedence.

        Raises:
            ValueError: a value that can't be; nothing has changed.
            BindingConflict: another label has the same protocol, prefix and range; or ranges overlap in part.
            LimitReached: there is no room for one more label.
        """
        wanted = _bindings(label, protocol, prefix, ports)
        with self._open_for("tables").writing() as table:
            before = table.get(wanted[0]._packed)
            numbers = self._labels.numbers()
            number = numbers.get(wanted[0].label, 0)  # 0: a new label, which has its number once nothing contradicts
            kept = before
            if replace:
                kept = _without(before, {_ports(binding._packed) for binding in wanted})
            group = kept + b"".join(_numbered(binding, number) for binding in wanted)
            self._prepare(group, lambda: {0: wanted[0].label, **self._labels.names()})
            if not number:
                number = self._labels.assign([label], lambda: self._unused(table))[wanted[0].label]
                group = kept + b"".join(_numbered(binding, number) for binding in wanted)
                _sys.bindings_prepare(group)
            self._set(table, group, wanted[0]._packed)
        return wanted

    def unbind(
        self,
        label: str,
        protocol: ProtocolLike,
        prefix: PrefixLike,
        ports: PortsLike | Iterable[PortsLike] = None,
    ) -> tuple[Binding, ...]:
        """Take bindings away, all in one step: just these, not those of wider or narrower ranges.

        Returns:
            The bindings that were there, by precedence.

        Raises:
            KeyError: one of them is not there, or another label's; nothing has changed.
        """
        unwanted = _bindings(label, protocol, prefix, ports)
        with self._open_for("tables").writing() as table:
            group = table.get(unwanted[0]._packed)
            names = self._labels.names()
            owners = {_ports(record): names.get(_number(record), "?") for record in _split(group)}
            for binding in unwanted:
                owner = owners.get(_ports(binding._packed))
                if owner is None:
                    raise KeyError(f"{binding} is not bound")
                if owner != binding.label:
                    raise KeyError(f"{binding} is not bound: it is {owner!r}'s")
            group = _without(group, {_ports(binding._packed) for binding in unwanted})
            self._set(table, group, unwanted[0]._packed)
        return unwanted

    def _prepare(self, records: bytearray, names: Callable[[], Mapping[int, str]]) -> None:
        """Sort packed bindings for the table, or say which two contradict each other."""
        if (two := _sys.bindings_prepare(records)) is not None:
            first, second = (
                Binding._unpack(record, names()[_number(record)])
                for record in (bytes(records[place * RECORD_SIZE : (place + 1) * RECORD_SIZE]) for place in two)
            )
            raise conflict(first, second)

    def _set(self, table: Table, group: bytearray, prefix: bytes) -> None:
        """Let one prefix have these bindings, prepared: in place, or in a new table where the old one is full."""
        count = len(group) // RECORD_SIZE
        if table.set(group or prefix, count):
            return
        key = _prefix(prefix)
        records = bytearray().join(record for record in _split(table.scan()) if _prefix(record) != key) + group
        _sys.bindings_prepare(records)
        self._swap(records, self._policies(table))

    def _swap(self, records: bytearray, policies: Mapping[int, int]) -> None:
        """Put a new table in force."""
        self._store.swap(Table.build(records, self._labels.limit + 1, policies))

    def _policies(self, table: Table) -> dict[int, int]:
        """Give what policies there are, packed, by number of the label."""
        every = ((number, table.policy(number)) for number in self._labels.names())
        return {number: policy for number, policy in every if policy}

    def _pack_policy(self, policy: Policy, before: int) -> int:
        """Give the word of a policy; a label that begins to remember flows does so in an epoch of its own."""
        epoch = 0
        if policy.udp_sticky:
            _, epoch, remembered = _POLICY.unpack(before.to_bytes(8, sys.byteorder))
            if not remembered:
                self._store.remember_flows()
                epoch = self._store.state[STICKY] & 0xFFFF
        word = _POLICY.pack(ON_MISSING.index(policy.on_missing), epoch, policy.udp_sticky)
        return int.from_bytes(word, sys.byteorder)

    def bindings(self) -> Bindings:
        """Give all bindings, by precedence: a sequence of which each is made when it is looked at."""
        names, records = self._read()
        return Bindings(_by_precedence(records), names)

    def _read(self) -> tuple[dict[int, str], bytearray]:
        """Read all bindings, and the labels of all their numbers."""
        store = self._open()
        while True:
            records = store.table().scan()
            names = self._labels.names()
            if all(number in names for number in _used(_sys.bindings_uses(records, self._labels.limit + 1))):
                return dict(names), records  # else a label was made in between

    def _uses(self, table: Table) -> dict[int, int]:
        """Count the bindings of each number of a label that has any."""
        return _used(table.uses(self._labels.limit + 1))

    def replace(
        self,
        bindings: Iterable[Binding],
        policies: Mapping[str, Policy] | None = None,
    ) -> Diff:
        """Replace all bindings, in one step: each look-up sees the old ones or the new ones.

        A label without a socket is allowed; it is logged as a warning, and told by `status`.

        Args:
            bindings: the bindings; those of a bindings file, or of another dispatcher, are not even unpacked.
            policies: of labels; those that are not in it have the defaults. None: policies stay as they are.

        Raises:
            TypeError: an element is no binding; nothing has changed.
            BindingConflict: two contradict each other; nothing has changed.
            LimitReached: there is no room for so many labels; nothing has changed.
            BpfError: the kernel has no memory for the table (ENOMEM); nothing has changed.
        """
        labels, records = _packed(bindings)
        wanted = {check_label(label): check_policy(*policy) for label, policy in (policies or {}).items()}
        self._prepare(records, lambda: dict(enumerate(labels)))
        with self._open_for("tables").writing() as table:
            numbers = self._labels.assign([*labels, *wanted], lambda: self._unused(table))
            _sys.bindings_relabel(records, [numbers[label] for label in labels])
            if policies is None:
                in_force = self._policies(table)
            else:
                of_numbers = {numbers[label]: policy for label, policy in wanted.items()}
                in_force = {each: self._pack_policy(of_numbers[each], table.policy(each)) for each in of_numbers}
            names = dict(self._labels.names())
            diff = _diff(table.scan(), records, names)
            self._swap(records, in_force)
        if unserved := self._unserved(names, records):
            _logger.warning("labels without a live socket: %s", ", ".join(map(repr, unserved)))
        return diff

    def diff(self, bindings: Iterable[Binding]) -> Diff:
        """Tell what `replace` would change, and change nothing; with the same errors but `LimitReached`."""
        labels, records = _packed(bindings)
        self._prepare(records, lambda: dict(enumerate(labels)))
        known, old = self._read()
        numbers = {label: number for number, label in known.items()}
        for new in [label for label in labels if label not in numbers]:
            numbers[new] = len(numbers) + self._labels.limit + 1
        _sys.bindings_relabel(records, [numbers[label] for label in labels])
        return _diff(old, records, {number: label for label, number in numbers.items()})

    # --- policies -----------------------------------------------------------------------------------------------------

    def set_policy(self, label: str, *, on_missing: OnMissing | None = "reset", udp_sticky: int | None = 0) -> Policy:
        """Say what is done for a label beyond its bindings.

        Args:
            label: the label, which need not have bindings or sockets yet.
            on_missing: what a client gets while the label has no live socket: ``"reset"`` (refused at once), ``"hold"``
                (silence: it tries again, and a restart is not seen), or ``"fallthrough"`` (the ordinary look-up goes
                on). ``"hold"`` lasts while some process keeps the parking sockets, as each does that has the dispatcher
                open for writing. None leaves it as it is.
            udp_sticky: for how many seconds of silence a UDP flow goes on reaching the socket that it reached, while
                that is open; 0 lets all flows go. None leaves it as it is.

        Returns:
            What it is now.

        Raises:
            ValueError: a value that can't be; nothing has changed.
            LimitReached: there is no room for one more label.
        """
        check_policy("reset" if on_missing is None else on_missing, 0 if udp_sticky is None else udp_sticky)
        check_label(label)
        with self._open_for("tables").writing() as table:
            number = self._labels.assign([label], lambda: self._unused(table))[label]
            word = table.policy(number)
            before = _unpack_policy(word)
            policy = Policy(
                before.on_missing if on_missing is None else on_missing,
                before.udp_sticky if udp_sticky is None else udp_sticky,
            )
            table.set_policy(number, self._pack_policy(policy, word))
        return policy

    def policies(self) -> dict[str, Policy]:
        """Give the policy of each label that has another than the defaults."""
        table = self._open().table()
        names = self._labels.names()
        every = {label: _unpack_policy(table.policy(number)) for number, label in sorted(names.items())}
        return {label: policy for label, policy in every.items() if policy != Policy()}

    # --- sockets ------------------------------------------------------------------------------------------------------

    def register(self, label: str, sock: Socket, *, slot: int = 0) -> Registration:
        """Register a socket under a label: from now on new flows of its bindings reach it.

        One that is registered in the same slot, of the same protocol and family, is replaced in one step, and no client
        is lost: it keeps what it accepted, or can still accept. A dual-stack socket is of IPv6, and gets IPv4 where the
        label has no socket of IPv4 that lives. With several slots, flows spread over them by their addresses and ports.

        Args:
            label: the label, which need not have bindings yet.
            sock: TCP that listens, or UDP that is bound and not connected, in the dispatcher's namespace.
            slot: 0 to 63.

        Raises:
            BadSocket: it can't be steered to; `reason` says why. Nothing has changed.
            ValueError: the label or the slot can't be.
            LimitReached: there is no room for one more socket or label.
        """
        return self.register_all(label, sock, slot=slot)[0]

    def register_all(self, label: str, *socks: Socket, slot: int = 0) -> tuple[Registration, ...]:
        """Register several sockets under a label: all of them, or none. Each replaces another as `register` says.

        The first of each protocol and family has this slot, and more of them the next ones. A socket that is given
        twice is registered once.

        Args:
            label: the label.
            socks: the sockets.
            slot: 0 to 63.

        Raises:
            BadSocket: one of them can't be steered to. Nothing has changed.
            ValueError: the label or a slot can't be, or there is no socket.
            LimitReached: there is no room for so many more sockets, or for the label. Nothing has changed.
            BpfError: the kernel refuses one of them. Nothing has changed.
        """
        check_label(label)
        if not socks:
            raise ValueError("there is no socket to register")
        if not 0 <= (slot := operator.index(slot)) < SLOTS:
            raise ValueError(f"a slot is between 0 and {SLOTS - 1}, not {slot!r}")
        store = self._open_for("sockets")
        examined = [
            (sock, sockets.examine(sock, store.state[NETNS_INODE], store.state[NETNS_COOKIE])) for sock in socks
        ]
        wanted: dict[int, Wanted] = {}  # by cookie
        next_slot: dict[int, int] = {}
        for sock, facts in examined:
            if facts.cookie in wanted:
                continue
            each = Wanted(slot, sock, facts)
            each = each._replace(slot=next_slot.get(each.kind, slot))
            if each.slot >= SLOTS:
                raise ValueError(f"{len(socks)} sockets need more slots than there are from {slot} to {SLOTS - 1}")
            next_slot[each.kind] = each.slot + 1
            wanted[facts.cookie] = each
        with contextlib.ExitStack() as closing, store.writing() as table:
            number = self._labels.assign([label], lambda: self._unused(table))[label]
            for each in wanted.values():
                if each.facts.reuseport and store.netns:
                    copies = [closing.enter_context(copy) for copy in siblings_of(each.facts, store.netns)]
                    wanted[each.facts.cookie] = each._replace(siblings=copies)
            self._registry.put(number, [*wanted.values()], self._unused_groups)
        return tuple(
            Registration(label, facts.protocol, facts.family, slot, facts.cookie, facts.address, alive=True)
            for slot, _, facts, _ in wanted.values()
        )

    def register_pid(
        self,
        label: str,
        pid: int,
        protocol: ProtocolLike,
        address: str,
        port: int,
        *,
        slot: int = 0,
    ) -> Registration:
        """Register a socket that another process holds, which goes on as it is (pidfd_getfd(2)).

        Args:
            label: the label.
            pid: of the process.
            protocol: ``"tcp"``, ``"udp"`` or a `Protocol`.
            address: that the socket is bound to.
            port: that the socket is bound to.
            slot: 0 to 63.

        Raises:
            BadSocket: the process has no such socket, or it can't be steered to.
            ProcessLookupError: there is no such process.
            PermissionDenied: the process is another user's, and this one lacks CAP_SYS_PTRACE.
        """
        of = parse_protocol(protocol)
        version, packed, number = parse_endpoint((address, port))
        with contextlib.closing(socket_of(pid, of, version, packed, number)) as copy:  # closed at once: it is theirs
            return self.register(label, copy, slot=slot)

    def unregister(
        self,
        label: str,
        *,
        protocol: ProtocolLike | None = None,
        family: AddressFamily | str | int | None = None,
        slot: int | None = None,
    ) -> tuple[Registration, ...]:
        """Take sockets from a label; they stay open.

        Args:
            label: the label.
            protocol: of the sockets; both where None.
            family: AF_INET or AF_INET6, ``"ipv4"`` or ``"ipv6"``; both where None.
            slot: of the sockets; all where None.

        Returns:
            What was registered.

        Raises:
            KeyError: the label has no such socket.
        """
        of = None if protocol is None else parse_protocol(protocol)
        if family is not None and family not in _FAMILIES:
            raise ValueError(f"a family is 'ipv4' or 'ipv6', not {family!r}")
        with self._open_for("sockets").writing():
            number = self._labels.numbers().get(label, 0)
            chosen = [
                each
                for each in (self._registry.filled(number) if number else ())
                if of in {None, of_kind(each.kind)[0]}
                and (family is None or _FAMILIES[family] == of_kind(each.kind)[1])
                and slot in {None, each.slot}
            ]
            if not chosen:
                words = " ".join(str(word) for word in (protocol, family, slot) if word is not None)
                raise KeyError(f"no socket is registered under {label!r}" + (f" as {words}" if words else ""))
            listening = _listening(self._store.netns)
            gone = tuple(self._registration(label, each, listening) for each in chosen)
            for each in chosen:
                self._registry.empty(each)
        return gone

    def sockets(self, label: str | None = None) -> tuple[Registration, ...]:
        """List the registered sockets, by label, protocol, family and slot; one that died is told so.

        Args:
            label: whose; all of them where None.
        """
        store = self._open()
        numbers = self._labels.numbers()
        chosen = sorted(numbers) if label is None else [label] if label in numbers else []
        slots = [(each, slot) for each in chosen for slot in self._registry.filled(numbers[each])]
        listening = _listening(store.netns) if slots else {}
        made = (self._registration(each, slot, listening) for each, slot in slots)
        return tuple(sorted(made, key=lambda each: (each.label, each.protocol, each.family, each.slot)))

    def _registration(self, label: str, slot: Slot, listening: Mapping[int, Address] | None) -> Registration:
        """Tell what is in a slot; `listening` are the listening sockets of the namespace, where they can be asked."""
        protocol, family = of_kind(slot.kind)
        cookie = self._registry.cookie(slot.place)
        last, address = self._registry.record(slot.place)
        alive = bool(cookie)
        if protocol == Protocol.TCP and listening is not None:
            alive = cookie in listening  # one that was shut down stays in its slot
            address = listening.get(cookie, address)
        return Registration(label, protocol, family, slot.slot, cookie or last, address, alive)

    def _unused_groups(self) -> set[int]:
        """Take back what died or has no socket, when there is no room left."""
        numbers = self._labels.numbers().values()
        for number in numbers:
            for slot in list(self._registry.dead(number)):
                self._registry.empty(slot)
        free = self._registry.forget(numbers)
        self._store.synchronize()
        return free

    def _unused(self, table: Table) -> set[int]:
        """Take back the numbers of labels that nothing holds any more, when there are none left."""
        names = self._labels.names()
        used = self._uses(table)
        idle = [number for number in names if number not in used and not table.policy(number)]
        for number in idle:
            for slot in list(self._registry.dead(number)):
                self._registry.empty(slot)
        self._registry.forget(names)
        unused = {number for number in idle if not self._registry.has_groups(number)}
        self._store.synchronize()
        for number in unused:
            self.maps["counters"][number] = (bytes(_EVENTS.size),) * _sys.possible_cpus()
        return unused

    # --- questions ----------------------------------------------------------------------------------------------------

    def explain(self, protocol: ProtocolLike, destination: Address, source: Address | None = None) -> Decision:
        """Ask what becomes of a new connection or a datagram: the program itself decides, in the kernel, on its tables.

        Args:
            protocol: ``"tcp"``, ``"udp"`` or a `Protocol`.
            destination: a (host, port) pair.
            source: likewise; it matters where several slots are filled. None: no address and no port.

        Raises:
            ValueError: an address is none, or of another family than the other.
            NotSupported: the kernel has no test runs of sk_lookup programs (Linux 5.13).
        """
        of = parse_protocol(protocol)
        version, host, port = parse_endpoint(destination)
        origin = source or ("::" if version == 6 else "0.0.0.0", 0)  # noqa: S104 - an address of nobody
        with self._open().explaining() as table:
            run = self._store.program(EXPLAIN).test_run(of, destination, origin)
            reason, number, length, slot, _ = _DECISION.unpack(self._store.maps["explained"][0])
            if not reason:  # then the rest is that of an earlier question
                return Decision(run.verdict, None, None, None, 0, _REASONS[reason])
            group = table.get(_covering(of, version, host, length))
        label = self._labels.names()[number]
        ranges = [record for record in _split(group) if _number(record) == number and _has_port(record, port)]
        binding = Binding._unpack(min(ranges, key=_width), label) if ranges else None  # None: unbound meanwhile
        return Decision(
            run.verdict,
            binding,
            label,
            slot if _REASONS[reason] == "selected" else None,
            run.cookie if _REASONS[reason] in _SELECTED else 0,
            _REASONS[reason],
        )

    def events(self, label: str | None = None) -> Trace:
        """Follow the look-ups that a binding matches: an iterator, to be closed, over each as it comes.

        Where nobody follows them they cost nothing.

        Args:
            label: whose; all of them where None. The kernel passes over the others.

        Raises:
            KeyError: there is no such label.
            LimitReached: 8 processes follow them already.
            PermissionDenied: the process lacks CAP_BPF.
        """
        store = self._open_for("state")
        if label is not None and label not in self._labels.numbers():
            raise KeyError(f"there is no label {label!r}")
        return Trace(store, self._labels.names, self._labels.numbers()[label] if label else 0, _REASONS)

    def counters(self) -> dict[str, Counters]:
        """Give the look-ups of each label that is known."""
        counts: Any = self.maps["counters"]
        return {
            label: _counters([_EVENTS.unpack(cpu) for cpu in counts[number]])
            for label, number in sorted(self._labels.numbers().items())
        }

    def status(self) -> Status:
        """Tell what there is."""
        store = self._open()
        table = store.table()
        uses = self._uses(table)
        names = self._labels.names()  # afterwards: a label is known before it has bindings
        registered: dict[str, list[Registration]] = {}
        for each in self.sockets():
            registered.setdefault(each.label, []).append(each)
        labels = []
        for number, label in sorted(names.items(), key=lambda item: item[1]):
            of_label = registered.get(label, [])
            alive = sum(each.alive for each in of_label)
            policy = _unpack_policy(table.policy(number))
            if number in uses or of_label or policy != Policy():
                labels.append(LabelStatus(label, uses.get(number, 0), alive, len(of_label) - alive, *policy))
        link = None if store.link is None else store.link.info
        return Status(
            path=store.path,
            abi=store.state[ABI],
            netns_inode=store.state[NETNS_INODE],
            program_id=None if link is None else link.prog_id,
            link_id=None if link is None else link.id,
            attached=None if link is None else link.netns_inode == store.state[NETNS_INODE],
            full_speed=bool(store.state[FULL_SPEED]),
            bindings=sum(uses.values()),
            sockets=sum(label.sockets for label in labels),
            dead=sum(label.dead for label in labels),
            max_labels=self._labels.limit,
            max_sockets=self._registry.limit,
            keepers=parking.keepers(store.maps["parking"]),  # type: ignore[arg-type] # by its name
            labels=tuple(labels),
            unserved=tuple(label.label for label in labels if label.bindings and not label.sockets),
        )

    def _unserved(self, names: Mapping[int, str], records: bytearray) -> list[str]:
        served = {each.label for each in self.sockets() if each.alive}
        uses = _used(_sys.bindings_uses(records, self._labels.limit + 1))
        return sorted({names[number] for number in uses} - served)


def _bindings(
    label: str,
    protocol: ProtocolLike,
    prefix: PrefixLike,
    ports: PortsLike | Iterable[PortsLike],
) -> tuple[Binding, ...]:
    """Make the bindings of one prefix and several ranges of ports, by precedence."""
    ranges = port_ranges(ports)
    return tuple(sorted(Binding(label, protocol, prefix, range(first, last + 1)) for first, last in ranges))


def _used(uses: list[int]) -> dict[int, int]:
    """Give the counts that are not 0, by their numbers."""
    return {number: count for number, count in enumerate(uses) if count}


# Packed bindings, which are struct pyskl_binding of bpf/abi.h:


def _number(record: bytes) -> int:
    return int.from_bytes(record[16:20], sys.byteorder)


def _numbered(binding: Binding, number: int) -> bytes:
    return binding._packed[:16] + number.to_bytes(4, sys.byteorder) + binding._packed[20:]


def _ports(record: bytes) -> bytes:
    return record[20:24]


def _has_port(record: bytes, port: int) -> bool:
    first, last = struct.unpack("=HH", _ports(record))
    return bool(first <= port <= last)


def _width(record: bytes) -> int:
    first, last = struct.unpack("=HH", _ports(record))
    return int(last - first)


def _prefix(record: bytes) -> bytes:
    return record[:16] + record[24:27]


def _split(records: bytes | bytearray) -> list[bytes]:
    return [bytes(records[at : at + RECORD_SIZE]) for at in range(0, len(records), RECORD_SIZE)]


def _without(records: bytearray, ports: set[bytes]) -> bytearray:
    return bytearray().join(record for record in _split(records) if _ports(record) not in ports)


def _covering(protocol: Protocol, version: int, host: bytes, length: int) -> bytes:
    """Pack the prefix of a length that an address is in."""
    bits = 8 * len(host)
    network = int.from_bytes(host, "big") >> (bits - length) << (bits - length)
    kind = ipaddress.IPv6Network if version == 6 else ipaddress.IPv4Network
    return Binding("-", protocol, kind((network, length)))._packed


def _packed(bindings: Iterable[Binding]) -> tuple[list[str], bytearray]:
    """Give the labels of bindings, and the bindings packed, with the place of the label in the list as its number."""
    if isinstance(bindings, Bindings):
        records, names = bytearray(bindings._records), bindings._labels
        uses = _sys.bindings_uses(records, max(names, default=0) + 1)
        used = [number for number, count in enumerate(uses) if count]
        places = {number: place for place, number in enumerate(used)}
        _sys.bindings_relabel(records, [places.get(number, 0) for number in range(len(uses))])
        return [names[number] for number in used], records
    every = bindings if isinstance(bindings, list) else list(bindings)
    for place, each in enumerate(every) if set(map(type, every)) - {Binding} else ():
        if type(each) is not Binding:
            raise TypeError(f"element {place} is no Binding: {each!r}")
    labels: dict[str, int] = {}
    numbers = array("I", [labels.setdefault(binding._label, len(labels)) for binding in every])
    records = bytearray().join([binding._packed for binding in every])
    if every:
        memoryview(records).cast("I")[4 :: RECORD_SIZE // 4] = memoryview(numbers)
    return list(labels), records


def _by_precedence(records: bytearray) -> bytes:
    _sys.bindings_by_precedence(records)
    return bytes(records)


def _diff(old: bytearray, records: bytearray, names: Mapping[int, str]) -> Diff:
    """Compare packed bindings."""
    new = bytearray(records)
    _sys.bindings_prepare(old)
    _sys.bindings_prepare(new)
    both = _sys.bindings_diff(old, new)
    return Diff(Bindings(_by_precedence(new), names), Bindings(_by_precedence(old), names), both)


def _unpack_policy(word: int) -> Policy:
    on_missing, _, udp_sticky = _POLICY.unpack(word.to_bytes(8, sys.byteorder))
    return Policy(ON_MISSING[on_missing], udp_sticky)


def _counters(cpus: list[tuple[int, ...]]) -> Counters:
    """Add up the counters of a label."""
    totals = [sum(column) for column in zip(*cpus, strict=True)]
    by = {of_kind(kind): Count(totals[kind], totals[GROUPS + kind]) for kind in range(GROUPS)}
    return Counters(sum(totals[:GROUPS]), sum(totals[GROUPS:]), MappingProxyType(by))


def _listening(netns: NetNS | None) -> dict[int, Address] | None:
    """Give the cookies and addresses of the sockets that listen in a namespace; None where it can't be entered."""
    found: dict[int, Address] = {}
    if netns is None:
        return None
    try:
        with netns.visited():
            for family in (socket.AF_INET, socket.AF_INET6):
                for entry in sock_diag.bound_sockets(Protocol.TCP, family):
                    host = socket.inet_ntop(family, entry.address)
                    found[entry.cookie] = (host, entry.port) if family == socket.AF_INET else (host, entry.port, 0, 0)
    except OSError:
        return None
    return found
