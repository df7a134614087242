# SPDX-License-Identifier: BSD-2-Clause
"""The other members of a socket's SO_REUSEPORT group (socket(7)).

Selecting one member spreads over all of them, and when the one that a map holds is closed, the others are not found any
more: so a dispatcher keeps them too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING

from pyskl import _sys, sock_diag, sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyskl.enums import Protocol
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


def socket_of(pid: int, protocol: Protocol, version: int, host: bytes, port: int) -> socket.socket:
    """Copy the socket of a process that is bound to an address; to be closed soon.

    Raises:
        BadSocket: the process has none.
        ProcessLookupError: there is no such process.
        PermissionDenied: it is another user's.
    """
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    address = socket.inet_ntop(family, host)
    try:
        fds = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None
    except PermissionError:
        raise _sys.no_access(f"/proc/{pid}/fd", ("CAP_SYS_PTRACE",)) from None
    for fd in fds:
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
                continue
            copy = copy_of(pid, fd)
            if copy is None:
                continue
            if (copy.family, copy.proto) == (family, protocol) and copy.getsockname()[:2] == (address, port):
                return copy
            copy.close()
    return sockets.refuse(f"process {pid} has no {protocol.name} socket that is bound to {address} port {port}")


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
