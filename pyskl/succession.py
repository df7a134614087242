# SPDX-License-Identifier: BSD-2-Clause
"""One process after the other in the same place: the successor takes the slot, and the predecessor drains and goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal as _signal
import time
from typing import TYPE_CHECKING, Final

from pyskl.errors import Busy

if TYPE_CHECKING:
    from typing_extensions import Self

    from pyskl.dispatcher import Dispatcher
    from pyskl.pinning import StrPath
    from pyskl.report import Registration
    from pyskl.sockets import Socket

_PAUSE: Final = 0.005  # seconds between two tries to get a lock
_START_TIME: Final = 19  # of /proc/PID/stat, counted after the name of the program (proc_pid_stat(5))


class TakeOver:
    """Take the place of the process that serves a label, without a client noticing; a context manager.

    On entering, the sockets are registered, so that new clients are this process's; its pid is written; and the
    predecessor is sent a signal, at which it is to serve what its listeners still hold (`pyskl.drain`) and to exit.
    Inside, begin to serve. On leaving, the predecessor is waited for, which by then is mostly gone::

        with pyskl.TakeOver(dispatcher, "web", listener, predecessor="/run/web.pid"):
            start_serving(listener)

    ``async with`` does the same without blocking the loop. Where one of the sockets can't be registered, none is; then,
    and where the predecessor can't be sent a signal, that one goes on with all of its own.

    Args:
        dispatcher: where the sockets are registered.
        label: under which.
        socks: the sockets, of any protocol and family: as for `Dispatcher.register_all`.
        predecessor: its pid, or the file that its pid is in: then this process's is written there, for its successor.
            None, a file that is not there yet, and a process that is gone: then there is none.
        slot: likewise.
        signal: what the predecessor understands as "go".
        timeout: how long it may take for that, in seconds; None: as long as it likes.

    Attributes:
        registrations: of the sockets, in their order, with the slot of each.
        pid: of the predecessor, or None.

    Raises:
        TimeoutError: on leaving: the predecessor is still there. It can be left alone, or killed.
        Busy: on entering: another process is taking the same place, for longer than `timeout`; `pid` tells which.
        PermissionError: the predecessor is another user's.
        ValueError: the file holds no pid, or the predecessor is this very process.
        BadSocket, BpfError, and others: as `Dispatcher.register_all`.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        label: str,
        *socks: Socket,
        predecessor: int | StrPath | None,
        slot: int = 0,
        signal: int = _signal.SIGTERM,
        timeout: float | None = 30.0,
    ) -> None:
        if not socks:
            raise ValueError("there is no socket to take over with")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"a time-out is not negative: {timeout}")
        self.registrations: tuple[Registration, ...] = ()
        self.pid: int | None = None
        self._dispatcher = dispatcher
        self._what = label, socks, slot
        self._predecessor = predecessor
        self._signal = signal
        self._timeout = timeout
        self._open = contextlib.ExitStack()
        self._pidfd = -1

    def __enter__(self) -> Self:
        label, socks, slot = self._what
        with contextlib.ExitStack() as stack:
            file, self.pid = self._find(stack)
            if self.pid is not None:
                self._pidfd = os.pidfd_open(self.pid)
                stack.callback(os.close, self._pidfd)
                _signal.pidfd_send_signal(self._pidfd, 0)  # whether it may be sent one
            self.registrations = self._dispatcher.register_all(label, *socks, slot=slot)
            if file is not None:
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()}\n{_start_time(os.getpid())}\n".encode(), 0)
            if self.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    _signal.pidfd_send_signal(self._pidfd, self._signal)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._open:
            if self.pid is not None and kind is None:
                poller = select.poll()
                poller.register(self._pidfd, select.POLLIN)
                if not poller.poll(None if self._timeout is None else self._timeout * 1000):
                    raise self._still_there()

    async def __aenter__(self) -> Self:
        import asyncio  # noqa: PLC0415 - only who uses it pays for it

        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, kind: object, *_: object) -> None:
        with self._open:
            if self.pid is not None and kind is None:
                import asyncio  # noqa: PLC0415 - only who uses it pays for it

                loop, gone = asyncio.get_running_loop(), asyncio.Event()
                loop.add_reader(self._pidfd, gone.set)
                try:
                    await asyncio.wait_for(gone.wait(), self._timeout)
                except asyncio.TimeoutError:
                    raise self._still_there() from None
                finally:
                    loop.remove_reader(self._pidfd)

    def _still_there(self) -> TimeoutError:
        return TimeoutError(f"process {self.pid} has not gone within {self._timeout:g} s of its signal")

    def _find(self, stack: contextlib.ExitStack) -> tuple[int | None, int | None]:
        """Open and lock the pid file, where there is one, and find the process that is to go."""
        if isinstance(self._predecessor, int) or self._predecessor is None:
            return None, _running(self._predecessor, None)
        file = os.open(self._predecessor, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, file)
        self._lock(file, self._predecessor)
        pid, started = _read(file, self._predecessor)
        return file, _running(pid, started)

    def _lock(self, file: int, path: StrPath) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if deadline is not None and time.monotonic() >= deadline:
                    pid = _read(file, path)[0]
                    busy = Busy(f"process {pid} is taking the same place")
                    busy.pid = pid
                    raise busy from None
                time.sleep(_PAUSE)
            else:
                return


def _read(file: int, path: StrPath) -> tuple[int | None, str | None]:
    words = os.pread(file, 100, 0).decode(errors="replace").split()
    if not words:
        return None, None
    if not words[0].isdecimal():
        raise ValueError(f"{os.fspath(path)!r} holds no pid: {words[0]!r}")
    return int(words[0]), words[1] if len(words) > 1 else None


def _running(pid: int | None, started: str | None) -> int | None:
    """Give a pid on, unless that process is gone; another may have got its number since."""
    if pid == os.getpid():
        raise ValueError("the predecessor is this very process")
    if pid is None or (started or _start_time(pid)) != _start_time(pid) or _start_time(pid) is None:
        return None
    return pid


def _start_time(pid: int) -> str | None:
    """Tell when a process started, in the kernel's ticks; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[_START_TIME]
    except (FileNotFoundError, ProcessLookupError):
        return None
