# SPDX-License-Identifier: BSD-2-Clause
"""Register several sockets under one label: all of them, or none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pyskl import sockets
from pyskl.errors import BadSocket
from pyskl.registry import SLOTS
from pyskl.store import NETNS_COOKIE, NETNS_INODE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyskl.dispatcher import Dispatcher
    from pyskl.report import Registration
    from pyskl.systemd import Inherited


def register_all(dispatcher: Dispatcher, label: str, inherited: Iterable[Inherited], slot: int) -> list[Registration]:
    """Register sockets, the first of each protocol and family in a slot, more of them in the next ones.

    All are looked at before the first is registered, and those that fill a slot anew go before those that replace
    another: so what may still fail is undone.

    Args:
        dispatcher: to register them with.
        label: the label.
        inherited: the sockets; one that comes twice is registered once.
        slot: the first slot.

    Raises:
        BadSocket: one of them can't be steered to; the message has its name. Nothing has changed.
        ValueError: there are more than the slots that follow.
        LimitReached: there is no room for all of them. Nothing has changed.
    """
    state = dispatcher._store.state
    taken = {(each.protocol, each.family, each.slot) for each in dispatcher.sockets(label)}
    next_slot: dict[tuple[object, object], int] = {}
    seen: set[int] = set()
    chosen = []
    for each in inherited:
        try:
            facts = sockets.examine(each, state[NETNS_INODE], state[NETNS_COOKIE])
        except BadSocket as error:
            named = BadSocket(f"fd {each.fd} ({each.name}): {error}")
            named.reason = error.reason
            raise named from None
        if facts.cookie in seen:
            continue
        seen.add(facts.cookie)
        kind = facts.protocol, facts.family
        place = next_slot.get(kind, slot)
        next_slot[kind] = place + 1
        if place >= SLOTS:
            raise ValueError(f"fd {each.fd} ({each.name}): no slot is left after {SLOTS - 1} for one more socket")
        chosen.append(((*kind, place) in taken, each, place))
    made: list[Registration] = []
    with contextlib.ExitStack() as undo:
        for replaces, each, place in sorted(chosen, key=lambda choice: choice[0]):
            done = dispatcher.register(label, each, slot=place)
            made.append(done)
            if not replaces:
                undo.callback(dispatcher.unregister, label, protocol=done.protocol, family=done.family, slot=place)
        undo.pop_all()
    return sorted(made, key=lambda each: (each.protocol, each.family, each.slot))
