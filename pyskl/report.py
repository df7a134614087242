# SPDX-License-Identifier: BSD-2-Clause
"""What a dispatcher tells: its answers as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from socket import AddressFamily

    from pyskl.address import Address
    from pyskl.binding import Binding, OnMissing
    from pyskl.enums import Protocol, Verdict


class Registration(NamedTuple):
    """A socket that is registered under a label.

    Attributes:
        label: the label.
        protocol: TCP or UDP.
        family: AF_INET or AF_INET6; a dual-stack socket is one of AF_INET6.
        slot: 0 to 63.
        cookie: of the socket (`pyskl.socket_cookie`).
        address: that the socket is bound to, as ``getsockname()`` gives it.
        alive: whether it can still be selected: false once it is closed or shut down.
    """

    label: str
    protocol: Protocol
    family: AddressFamily
    slot: int
    cookie: int
    address: Address
    alive: bool


class Decision(NamedTuple):
    """What the program decides about a look-up.

    Attributes:
        verdict: what it returns to the kernel.
        binding: that the destination matches, or None.
        label: of that binding, or None.
        slot: of the socket among the label's, or None where none is selected, or one that is in no slot.
        cookie: of the socket that is selected, or 0.
        reason: ``"unbound"`` (no binding matches: the ordinary look-up goes on), ``"selected"``, ``"sticky"`` (the flow
            went to this socket before), ``"sibling"`` (the registered socket died, and another of its SO_REUSEPORT
            group lives), or why no socket of the label is: ``"reset"``, ``"hold"`` or ``"fallthrough"``.
    """

    verdict: Verdict
    binding: Binding | None
    label: str | None
    slot: int | None
    cookie: int
    reason: str


class Diff(NamedTuple):
    """What a replacement of all bindings changes.

    Attributes:
        added: the bindings that were not there, by precedence.
        removed: those that are not there any more, by precedence.
        unchanged: how many stay.
    """

    added: Sequence[Binding]
    removed: Sequence[Binding]
    unchanged: int


class Count(NamedTuple):
    """Look-ups that matched a label's bindings, since the label is known.

    Attributes:
        selected: a socket was selected.
        missed: the label had no live socket, and its policy was followed.
    """

    selected: int
    missed: int


class Counters(NamedTuple):
    """The look-ups of a label: TCP counts SYNs, UDP datagrams.

    Attributes:
        selected: a socket was selected.
        missed: the label had no live socket, and its policy was followed.
        by: the same for each protocol and family.
    """

    selected: int
    missed: int
    by: Mapping[tuple[Protocol, AddressFamily], Count]


class LabelStatus(NamedTuple):
    """A label.

    Attributes:
        label: its name.
        bindings: how many lead to it.
        sockets: how many live ones are registered under it.
        dead: how many were registered and are closed or shut down.
        on_missing: what a client gets while it has no live socket.
        udp_sticky: for how many seconds of silence a UDP flow keeps its socket.
    """

    label: str
    bindings: int
    sockets: int
    dead: int
    on_missing: OnMissing
    udp_sticky: int


class Status(NamedTuple):
    """A dispatcher.

    Attributes:
        path: its folder on bpffs, or None where it is ephemeral.
        abi: the number of its maps' layout.
        netns_inode: of its network namespace.
        program_id: of the attached program; None where this user may not open the link.
        link_id: of the link, likewise.
        attached: whether the link holds the program in the namespace, likewise; false once that is gone, or the link
            detached.
        full_speed: whether the program was loaded with CAP_PERFMON, and so without the barriers against speculation.
        bindings: how many there are.
        sockets: how many live sockets are registered.
        dead: how many were registered and are closed or shut down.
        max_labels: how many labels there can be.
        max_sockets: how many sockets can be registered.
        keepers: how many processes keep parking sockets, without which ``"hold"`` is ``"reset"``.
        labels: all labels that have a binding, a socket or a policy, by name.
        unserved: those that have bindings and no live socket.
    """

    path: str | None
    abi: int
    netns_inode: int
    program_id: int | None
    link_id: int | None
    attached: bool | None
    full_speed: bool
    bindings: int
    sockets: int
    dead: int
    max_labels: int
    max_sockets: int
    keepers: int
    labels: tuple[LabelStatus, ...]
    unserved: tuple[str, ...]
