# SPDX-License-Identifier: BSD-2-Clause
"""The whole path of a look-up for a person: namespace, programs in order, binding, label, slot, socket, process."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from pyskl import program, sock_diag
from pyskl.errors import BpfError, PysklError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyskl.dispatcher import Dispatcher
    from pyskl.enums import Protocol
    from pyskl.netns import NetNS
    from pyskl.report import Decision

_REASONS = {
    "unbound": "no binding matches: the ordinary look-up goes on",
    "selected": "the socket of this slot is selected",
    "sticky": "the flow stays with the socket that it reached before",
    "sibling": "the registered socket died, and another of its SO_REUSEPORT group is selected",
    "reset": "the label has no live socket: the client is refused",
    "hold": "the label has no live socket: the client hears nothing, and tries again",
    "fallthrough": "the label has no live socket: the ordinary look-up goes on",
}


def path_of(dispatcher: Dispatcher, protocol: Protocol, decision: Decision) -> Iterator[str]:
    """Say, step by step, where a look-up goes: lines for a person."""
    status = dispatcher.status()
    yield f"namespace  {status.netns_inode}"
    yield from _programs(dispatcher._store.netns, status.program_id)
    yield f"binding    {decision.binding or '-'}"
    if decision.label is not None:
        yield f"label      {decision.label}"
    if decision.slot is not None:
        yield f"slot       {decision.slot}"
    if decision.cookie:
        yield from _socket(dispatcher, protocol, decision.cookie)
    yield f"verdict    {decision.verdict.name.lower()}: {_REASONS[decision.reason]}"


def _programs(netns: NetNS | None, own: int | None) -> Iterator[str]:
    """Tell the programs of the namespace, in order."""
    if netns is None:
        yield "programs   unknown: this user may not open the link"
        return
    try:
        attached = program.query(netns)
    except (PysklError, OSError) as error:
        yield f"programs   unknown: {str(error).splitlines()[0]}"
        return
    for place, each in enumerate(attached, 1):
        name = "" if each.name is None else f" {each.name}"
        yield f"program    {place} of {len(attached)}: {each.id}{name}{' (this dispatcher)' if each.id == own else ''}"


def _socket(dispatcher: Dispatcher, protocol: Protocol, cookie: int) -> Iterator[str]:
    """Tell the socket of a cookie, and the processes that have it open."""
    yield f"socket     cookie {cookie}"
    netns = dispatcher._store.netns
    found = None
    with contextlib.suppress(OSError, BpfError):
        if netns is not None:
            with netns.visited():
                found = _find(protocol, cookie)
    if found is None:
        return
    address, inode = found
    yield f"address    {address}"
    holders = list(_holders(inode))
    for pid, name in holders:
        yield f"process    {pid} {name}"
    if not holders:
        yield "process    unknown: it is of another user, or the socket is kept by the kernel alone"


def _find(protocol: Protocol, cookie: int) -> tuple[str, int] | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in sock_diag.bound_sockets(protocol, family):
            if entry.cookie == cookie:
                host = socket.inet_ntop(family, entry.address)
                return (f"[{host}]" if ":" in host else host) + f":{entry.port}", entry.inode
    return None


def _holders(inode: int) -> Iterator[tuple[int, str]]:
    """List the processes that have a socket open."""
    wanted = f"socket:[{inode}]"
    for pid in sorted(map(int, filter(str.isdecimal, os.listdir("/proc")))):
        with contextlib.suppress(OSError):
            if any(_reads(f"/proc/{pid}/fd/{fd}", wanted) for fd in os.listdir(f"/proc/{pid}/fd")):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as comm:
                    yield pid, repr(comm.read().removesuffix("\n"))[1:-1]


def _reads(path: str, wanted: str) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(path) == wanted
    return False
