# SPDX-License-Identifier: BSD-2-Clause
"""Register sockets that were inherited, and say by its name which of them is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyskl import sockets
from pyskl.errors import BadSocket
from pyskl.store import NETNS_COOKIE, NETNS_INODE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyskl.dispatcher import Dispatcher
    from pyskl.report import Registration
    from pyskl.systemd import Inherited


def register_inherited(
    dispatcher: Dispatcher, label: str, inherited: Sequence[Inherited], slot: int
) -> list[Registration]:
    """Register sockets as `Dispatcher.register_all` does.

    Raises:
        BadSocket: one of them can't be steered to; the message has its name. Nothing has changed.
        ValueError, LimitReached, BpfError: as from there.
    """
    state = dispatcher._store.state
    for each in inherited:
        try:
            sockets.examine(each, state[NETNS_INODE], state[NETNS_COOKIE])
        except BadSocket as error:
            named = BadSocket(f"fd {each.fd} ({each.name}): {error}")
            named.reason = error.reason
            raise named from None
    made = dispatcher.register_all(label, *inherited, slot=slot)
    return sorted(made, key=lambda each: (each.protocol, each.family, each.slot))
