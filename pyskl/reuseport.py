# SPDX-License-Identifier: BSD-2-Clause
"""The other members of a socket's SO_REUSEPORT group (socket(7)).

Selecting one member spreads over all of them, and when the one that a map holds is closed, the others are not found any
more: so a dispatcher keeps them too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from pyskl import _sys, sock_diag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyskl.netns import NetNS
    from pyskl.sockets import Steerable


def siblings_of(facts: Steerable, netns: NetNS) -> list[socket.socket]:
    """Open copies of the other members, of this process and of those whose sockets it may take; to be closed soon.

    Where the namespace's sockets can't be listed, there are none.
    """
    host, port, *_ = facts.address
    address = socket.inet_pton(facts.family, str(host).partition("%")[0])
    try:
        with netns.visited():
            members = {
                entry.inode: entry.cookie
                for entry in sock_diag.bound_sockets(facts.protocol, facts.family)
                if (entry.address, entry.port) == (address, port) and entry.cookie != facts.cookie
            }
    except OSError:
        return []
    return list(_copies(members)) if members else []


def _copies(members: dict[int, int]) -> Iterator[socket.socket]:
    """Copy sockets by their inodes, from wherever they are open."""
    wanted = {f"socket:[{inode}]": inode for inode in members}
    for pid in sorted(filter(str.isdecimal, os.listdir("/proc")), key=lambda pid: int(pid) != os.getpid()):
        with contextlib.suppress(OSError):  # gone, or another user's
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    name = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if name in wanted and (copy := copy_of(int(pid), int(fd))) is not None:
                        del wanted[name]
                        yield copy
        if not wanted:
            return


def copy_of(pid: int, fd: int) -> socket.socket | None:
    """Duplicate a socket of a process (pidfd_getfd(2), Linux 5.6); None where it is none.

    Raises:
        OSError: the process is gone (ESRCH), or it is another user's (EPERM).
    """
    if pid == os.getpid():
        copy = _sys.dup(fd)
    else:
        process = os.pidfd_open(pid)
        try:
            copy = _sys.pidfd_getfd(process, fd)
        finally:
            os.close(process)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
