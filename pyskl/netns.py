# SPDX-License-Identifier: BSD-2-Clause
"""Network namespaces (network_namespaces(7))."""

from __future__ import annotations

import contextlib
import errno
import operator
import os
from typing import TYPE_CHECKING, TypeAlias

from pyskl import _sys
from pyskl._fd import FdOwner, HasFileno, fd_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMED = "/run/netns"  # where ip-netns(8) keeps them
_CURRENT = "/proc/thread-self/ns/net"

NetNSLike: TypeAlias = "NetNS | str | os.PathLike[str] | HasFileno | int | None"


class NetNS(FdOwner):
    """A network namespace, which lives at least as long as this object is open."""

    def _learn(self) -> None:
        if not _sys.is_netns(self._fd):
            raise ValueError(f"{os.readlink(f'/proc/self/fd/{self._fd}')} is not a network namespace")

    @classmethod
    def _open(cls, path: str | os.PathLike[str]) -> NetNS:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return cls.own(_sys.dup(fd))
        finally:
            os.close(fd)

    @classmethod
    def current(cls) -> NetNS:
        """Open the calling thread's own namespace."""
        return cls._open(_CURRENT)

    @classmethod
    def create(cls) -> NetNS:
        """Make a new namespace, whose loopback interface is down (unshare(2)); the calling thread stays where it is.

        Raises:
            PermissionDenied: the process lacks CAP_SYS_ADMIN.
        """
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - few need it, and it is not free

        def make() -> NetNS:
            _sys.unshare_netns()
            return cls.current()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make).result()

    @classmethod
    def named(cls, name: str) -> NetNS:
        """Open a namespace by the name that ip-netns(8) gave it.

        Raises:
            ValueError: it can't be a name.
            FileNotFoundError: there is none of this name.
        """
        if not name or "/" in name or "\0" in name or name in {".", ".."}:
            raise ValueError(f"not a name of a network namespace: {name!r}")
        return cls._open(os.path.join(_NAMED, name))

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> NetNS:
        """Open a namespace by a file that it is mounted on, such as /proc/PID/ns/net.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: it is not a network namespace.
        """
        return cls._open(path)

    @classmethod
    def from_pid(cls, pid: int) -> NetNS:
        """Open the namespace of a process.

        Raises:
            ProcessLookupError: there is no such process.
            PermissionError: it is another user's (ptrace(2) says when).
        """
        try:
            return cls._open(f"/proc/{operator.index(pid)}/ns/net")
        except FileNotFoundError:
            raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None

    @classmethod
    def from_fd(cls, fd: HasFileno | int) -> NetNS:
        """Open the namespace that an fd is of; the fd itself is left alone.

        Raises:
            ValueError: it is not of a network namespace.
        """
        return cls.own(_sys.dup(fd_of(fd)))

    @property
    def inode(self) -> int:
        """The inode by which the kernel names it; a later namespace may get the same when this one is gone."""
        return os.fstat(self.fileno()).st_ino

    @contextlib.contextmanager
    def entered(self) -> Iterator[NetNS]:
        """Move the calling thread into the namespace for the length of a ``with``: setns(2).

        Sockets made there stay there. The thread returns to where it was, whatever happens inside.

        Raises:
            PermissionDenied: the process lacks CAP_SYS_ADMIN.
        """
        fd = self.fileno()
        with NetNS.current() as before:
            try:  # from before it moves: a signal's handler may raise just after
                _sys.setns(fd)
                yield self
            finally:
                home = before.fileno()
                try:
                    _sys.setns(home)
                finally:  # a handler may have raised just before
                    _sys.setns(home)

    @contextlib.contextmanager
    def visited(self) -> Iterator[NetNS]:
        """Be in the namespace for the length of a ``with``; a thread that is there already needs no privilege.

        Raises:
            PermissionDenied: the thread is elsewhere, and the process lacks CAP_SYS_ADMIN.
        """
        if os.stat(_CURRENT).st_ino == self.inode:
            yield self
            return
        with self.entered():
            yield self

    def __repr__(self) -> str:
        return "<NetNS closed>" if self.closed else f"<NetNS net:[{self.inode}]>"


@contextlib.contextmanager
def netns_fd(netns: NetNSLike) -> Iterator[int]:
    """Give an fd of a namespace in any of the forms that pyskl takes, for the length of a ``with``.

    Raises:
        ValueError: it is not a network namespace.
        FileNotFoundError: there is nothing at the path.
    """
    if netns is None:
        opened = NetNS.current()
    elif isinstance(netns, (str, os.PathLike)):
        opened = NetNS.from_path(netns)
    else:
        opened = NetNS.from_fd(netns)
    with opened:
        yield opened.fileno()
