# SPDX-License-Identifier: BSD-2-Clause
"""What can be wrong with a dispatcher and with what is around it: checks, each with what mends it."""

from __future__ import annotations

import bisect
import contextlib
import ipaddress
import os
import shlex
import socket
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pyskl import capabilities, mending, program, routes
from pyskl.dispatcher import Dispatcher
from pyskl.enums import Protocol
from pyskl.errors import Damaged, Incompatible, NotLoaded, PysklError
from pyskl.feature import BPFFS, features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pyskl.binding import Binding, IPNetwork
    from pyskl.netns import NetNS
    from pyskl.report import Status

Outcome = Literal["ok", "note", "problem", "skipped"]

_NEEDED: Final = ("sk_lookup", "netns_link", "sockmap", "map_in_map", "mmapable", "btf")
_SHOWN: Final = 3  # of many of a kind
_CONF: Final = "/proc/sys/net/ipv4/conf"
_EPHEMERAL: Final = "/proc/sys/net/ipv4/ip_local_port_range"
_STRICT: Final = 1  # rp_filter: RFC 3704's strict reverse path


class Check(NamedTuple):
    """What was looked at.

    Attributes:
        name: of the check.
        outcome: ``"ok"``; ``"note"``: worth knowing, and nothing is wrong; ``"problem"``; ``"skipped"``: it could not
            be looked at.
        explanation: what was found.
        command: that mends it, or None.
    """

    name: str
    outcome: Outcome
    explanation: str
    command: str | None = None


class Doctor:
    """Looks at one dispatcher, from inside its namespace.

    Args:
        path: the dispatcher's folder.
        netns: the namespace that is meant.
        options: that select the same dispatcher, for the commands that are shown.
        inside: what runs other commands in the namespace, likewise.
    """

    def __init__(self, path: str, netns: NetNS, *, options: str = "", inside: str = "") -> None:
        self._path = path
        self._netns = netns
        self._pyskl = f"pyskl {options} " if options else "pyskl "
        self._inside = inside

    def examine(self) -> Iterator[Check]:
        """Make every check that can be made."""
        yield from _kernel()
        yield _bpffs()
        yield from _capabilities()
        yield from self._foreign()
        try:
            dispatcher = Dispatcher.open(self._path, read_only=True)
        except (PysklError, OSError) as error:
            yield self._not_open(error)
            return
        with dispatcher:
            status = dispatcher.status()
            yield Check("dispatcher", "ok", f"{status.path}, ABI {status.abi}: {status.bindings} bindings")
            yield from self._link(status)
            yield from self._labels(status)
            yield from self._sockets(dispatcher)
            yield self._hold(status)
            bindings = dispatcher.bindings()
        yield from self._surroundings(status, bindings)

    # --- the dispatcher -----------------------------------------------------------------------------------------------

    def _not_open(self, error: PysklError | OSError) -> Check:
        commands = {NotLoaded: "load", Damaged: "doctor --repair", Incompatible: "unload"}
        verb = next((verb for kind, verb in commands.items() if isinstance(error, kind)), None)
        command = f"{self._pyskl}{verb}" if verb else None
        if isinstance(error, PermissionError):
            command = f"sudo {self._pyskl}doctor"
        return Check("dispatcher", "problem", str(error).splitlines()[0], command)

    def _foreign(self) -> Iterator[Check]:
        try:
            found = mending.foreign(self._path)
        except OSError:
            return  # which opening it tells better
        if found:
            text = f"in the folder are files that are none of the dispatcher's: {_some(map(repr, found))}"
            yield Check("folder", "problem", text, f"{self._pyskl}doctor --repair")
        else:
            yield Check("folder", "ok", "no foreign files are in it")

    def _link(self, status: Status) -> Iterator[Check]:
        if status.attached is None:
            yield Check("link", "skipped", "this user may not open the link", f"sudo {self._pyskl}doctor")
            return
        if not status.attached:
            text = "the program is attached to nothing: the link was severed, or its namespace is gone"
            yield Check("link", "problem", text, f"{self._pyskl}doctor --repair")
            return
        try:
            order = [each.id for each in program.query(self._netns)]
        except (PysklError, OSError) as error:
            yield Check("link", "skipped", f"its place among others is not known: {str(error).splitlines()[0]}")
            return
        if status.program_id not in order:
            text = f"the program is not attached to this namespace ({self._netns.inode}) but to {status.netns_inode}"
            yield Check("link", "note", text)
            return
        place = order.index(status.program_id) + 1
        if len(order) == 1:
            yield Check("link", "ok", f"program {status.program_id} is attached, and alone")
        else:
            others = ", ".join(str(number) for number in order if number != status.program_id)
            text = (
                f"program {status.program_id} is number {place} of {len(order)}, beside {others}: "
                "where another selects a socket too, the last one wins"
            )
            yield Check("link", "note", text, "bpftool prog show")

    def _labels(self, status: Status) -> Iterator[Check]:
        for label in status.unserved:
            text = f"label {label!r} has bindings and no live socket"
            yield Check("labels", "problem", text, f"{self._pyskl}register {shlex.quote(label)}")
        if not status.unserved:
            yield Check("labels", "ok", "each label that has bindings has a live socket")
        for what, have, room in (
            ("labels", len(status.labels), status.max_labels),
            ("sockets", status.sockets + status.dead, status.max_sockets),
        ):
            if have >= room:
                text = f"there is no room for more {what} than the {room} there are"
                yield Check("room", "problem", text, f"{self._pyskl}unload; {self._pyskl}load --max-{what} {2 * room}")

    def _sockets(self, dispatcher: Dispatcher) -> Iterator[Check]:
        dead = [each for each in dispatcher.sockets() if not each.alive]
        for each in dead:
            family = "ipv6" if each.family == socket.AF_INET6 else "ipv4"
            protocol = each.protocol.name.lower()
            text = (
                f"the {protocol} socket of label {each.label!r} in slot {each.slot} ({family}) is closed or shut down"
            )
            words = f"unregister {shlex.quote(each.label)} {protocol} --family {family} --slot {each.slot}"
            yield Check("sockets", "problem", text, f"{self._pyskl}{words}")
        if not dead:
            yield Check("sockets", "ok", "no registered socket is dead")

    def _hold(self, status: Status) -> Check:
        held = [each.label for each in status.labels if each.on_missing == "hold"]
        if not held:
            return Check("hold", "ok", "no label has the policy 'hold'")
        if status.keepers:
            return Check("hold", "ok", f"'hold' is in force: {status.keepers} keep parking sockets")
        text = f"'hold' is 'reset', because no process keeps parking sockets: {_some(map(repr, held))}"
        return Check("hold", "problem", text, f"{self._pyskl}hold")

    # --- what is around it --------------------------------------------------------------------------------------------

    def _surroundings(self, status: Status, bindings: Iterable[Binding]) -> Iterator[Check]:
        names = ("routes", "rp_filter", "own addresses", "ephemeral ports")
        if self._netns.inode != status.netns_inode:
            for name in names:
                yield Check(name, "skipped", f"the dispatcher is in the namespace {status.netns_inode}: use --netns")
            return
        with contextlib.ExitStack() as inside:
            try:
                inside.enter_context(self._netns.visited())
            except (PysklError, OSError) as error:
                for name in names:
                    yield Check(name, "skipped", str(error).splitlines()[0])
                return
            bound = _Bound(bindings, self._pyskl, self._inside)
            for name, check in zip(names, (_routes, _rp_filter, _own_addresses, _ephemeral), strict=True):
                yield from _tried(name, check, bound)


def _tried(name: str, check: Callable[[_Bound], Iterator[Check]], bound: _Bound) -> Iterator[Check]:
    try:
        yield from check(bound)
    except (PysklError, OSError, ValueError) as error:
        yield Check(name, "skipped", str(error).splitlines()[0])


# --- the machine ------------------------------------------------------------------------------------------------------


def _kernel() -> Iterator[Check]:
    found = features()
    lacking = [found[name] for name in _NEEDED if not found[name]]
    for each in lacking:
        command = None if capabilities.missing(("CAP_BPF",)) else f"# boot Linux {each.since} or later"
        yield Check("kernel", "problem", f"{each.name} can't be used: {each.reason}", command)
    if not lacking:
        yield Check("kernel", "ok", f"Linux {os.uname().release} has all that is needed")


def _bpffs() -> Check:
    found = features()["bpffs"]
    if found:
        return Check("bpffs", "ok", f"it is mounted at {BPFFS}")
    return Check("bpffs", "problem", str(found.reason), f"mount -t bpf bpf {BPFFS}")


def _capabilities() -> Iterator[Check]:
    missing = capabilities.missing(("CAP_BPF", "CAP_NET_ADMIN"))
    if missing:
        text = f"this process lacks {' and '.join(missing)}, which loading and registering need"
        words = ",".join(
            f"+{name.removeprefix('CAP_').lower()}" for name in ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")
        )
        command = f"sudo setpriv --inh-caps {words} --ambient-caps {words} --reuid $USER pyskl …"
        yield Check("capabilities", "problem", text, command)
    elif capabilities.missing(("CAP_PERFMON",)):
        text = (
            "this process lacks CAP_PERFMON: a dispatcher that it loads has barriers against speculation, "
            "and looks up at a fifth of the speed less"
        )
        yield Check("capabilities", "note", text, "AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON")
    else:
        yield Check("capabilities", "ok", "CAP_BPF, CAP_NET_ADMIN, and CAP_PERFMON for the full speed")


# --- the namespace ----------------------------------------------------------------------------------------------------


class _Bound:
    """Bindings and their prefixes, each once; and how commands begin that mend them."""

    def __init__(self, bindings: Iterable[Binding], pyskl: str, inside: str) -> None:
        self.pyskl = pyskl
        self.inside = inside
        self.all = list(bindings)
        self.prefixes: list[IPNetwork] = sorted(
            {binding.prefix for binding in self.all}, key=lambda prefix: (prefix.version, prefix)
        )

    def of(self, version: int) -> list[IPNetwork]:
        return [prefix for prefix in self.prefixes if prefix.version == version]


def _routes(bound: _Bound) -> Iterator[Check]:
    """Look whether each prefix is local, without which nothing for it arrives."""
    missing = []
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        prefixes = bound.of(version)
        if not prefixes:
            continue
        local = sorted(ipaddress.collapse_addresses(routes.local_routes(family)))  # type: ignore[type-var] # one family
        for prefix in prefixes:
            place = bisect.bisect_right(local, prefix) - 1
            covered = place >= 0 and prefix.subnet_of(local[place])  # type: ignore[arg-type] # one family
            if prefix.prefixlen and not covered:  # all addresses are never local
                missing.append(prefix)
    for prefix in missing[:_SHOWN]:
        six = "-6 " if prefix.version == 6 else ""
        text = f"{prefix} is not local here, or not all of it: nothing arrives for it"
        yield Check("routes", "problem", text, f"{bound.inside}ip {six}route add local {prefix} dev lo")
    if len(missing) > _SHOWN:
        text = f"{len(missing) - _SHOWN} more prefixes are not local here"
        yield Check("routes", "problem", text, f"{bound.inside}ip route add local PREFIX dev lo")
    if not missing:
        yield Check("routes", "ok", "each prefix that is bound is local")


def _rp_filter(bound: _Bound) -> Iterator[Check]:
    """Look for strict reverse-path filters, which drop some of what arrives without a word."""
    strict = []
    if bound.of(4):
        every = _number(f"{_CONF}/all/rp_filter")
        names = sorted(set(os.listdir(_CONF)) - {"all", "default"})
        strict = [name for name in names if max(every, _number(f"{_CONF}/{name}/rp_filter")) == _STRICT]
    if strict:
        text = f"rp_filter is strict on {_some(strict)}: what arrives by another way than its reply goes is dropped"
        yield Check("rp_filter", "problem", text, f"{bound.inside}sysctl -w net.ipv4.conf.all.rp_filter=2")
    else:
        yield Check("rp_filter", "ok", "no interface filters by strict reverse paths")


def _own_addresses(bound: _Bound) -> Iterator[Check]:
    """Look for bindings that catch what is for this host itself."""
    caught = []
    for address in sorted(set(routes.own_addresses()), key=lambda each: (each.version, each)):
        owners = (binding for binding in bound.all if address in binding.prefix)
        owner = min(owners, key=lambda binding: binding.ports is not None, default=None)  # one of all ports, if any
        if owner is not None:
            caught.append((address, owner))
    wide = [(address, binding) for address, binding in caught if binding.ports is None]
    for address, binding in wide[:_SHOWN]:
        text = f"{binding} catches all ports of {address}, which is this host's own: its other services get none"
        yield Check("own addresses", "problem", text, f"{bound.pyskl}unbind {_words(binding)}")
    if not wide and caught:
        address, binding = caught[0]
        more = f", and {len(caught) - 1} more" if len(caught) > 1 else ""
        yield Check("own addresses", "note", f"{binding} catches ports of this host's own {address}{more}")
    if not caught:
        yield Check("own addresses", "ok", "no binding catches an address of this host's own")


def _ephemeral(bound: _Bound) -> Iterator[Check]:
    """Look for bindings that catch the replies to this host's own UDP clients."""
    with open(_EPHEMERAL, encoding="ascii") as file:
        first, last = map(int, file.read().split())
    own = set(routes.own_addresses())
    bad = [
        binding
        for binding in bound.all
        if binding.protocol == Protocol.UDP
        and _meets(binding, first, last)
        and any(address in binding.prefix for address in own)
    ]
    for binding in bad[:_SHOWN]:
        text = (
            f"{binding} catches ports {first}-{last} of this host's own addresses: replies to its UDP clients go astray"
        )
        yield Check("ephemeral ports", "problem", text, f"{bound.pyskl}unbind {_words(binding)}")
    if not bad:
        yield Check("ephemeral ports", "ok", f"no binding catches replies to this host's UDP clients ({first}-{last})")


def _meets(binding: Binding, first: int, last: int) -> bool:
    ports = binding.ports
    if isinstance(ports, int):
        return first <= ports <= last
    return ports is None or (ports.start <= last and first < ports.stop)


def _words(binding: Binding) -> str:
    return " ".join(map(shlex.quote, binding._words()))


def _number(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
