# SPDX-License-Identifier: BSD-2-Clause
"""The end of a TCP listener whose place another has taken: what its queues still hold is served, nobody is reset."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pyskl import _sys
from pyskl._fd import fd_of
from pyskl.enums import Protocol
from pyskl.errors import BpfError
from pyskl.sock_diag import handshakes
from pyskl.sockets import refuse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from pyskl.sockets import Socket

Accepted: TypeAlias = tuple[socket.socket, Any]
"""A connection and its address, as socket.socket.accept() gives them."""

_TCP_INFO: Final = 104  # bytes of struct tcp_info that every kernel has
_TCPI_UNACKED: Final = 24  # the place of tcpi_unacked in it: of a listener, the length of its accept queue
_DEFAULT: Final = 3.0  # seconds: two retransmissions of a SYN-ACK, after 1 and 2 of them
_SHORTEST, _LONGEST = 0.001, 0.05  # seconds between two looks at the SYN queue
_RATHER: Final = 0.1  # seconds, where the kernel does not tell when a grace period is over

# What accept(2) says of one connection, which is then gone, and not of the listener.
_OF_ONE: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
    }
)


def drain(listener: Socket, *, timeout: float | None = _DEFAULT) -> Drain:
    """Hand out what the queues of a listener still hold, after another took its place; then close it.

    Overwriting a slot sends every new client to the successor; those that were under way to the old listener are in its
    accept queue, or in its SYN queue, and closing it would reset them::

        for connection, address in pyskl.drain(listener):
            serve(connection)
        listener.close()

    In asyncio, ``async for`` does the same without blocking the loop, and gives connections that do not block.

    It ends when both queues are empty: after a grace period (membarrier(2), about 10 ms), when no packet can be on its
    way to the listener any more, it waits until each handshake that was under way then is over. The kernel does not
    tell whose a handshake is, so those of other listeners in the namespace and address family count too.

    The listener does not block meanwhile. Errors of accept(2) that are about the listener, such as EMFILE, are raised;
    the iteration goes on with the next ``next()``.

    Under SYN cookies the kernel keeps no SYN queue: who sends the last step of the handshake after the hand-over
    reaches the successor, and is reset. A backlog that is large enough avoids them (listen(2)).

    Args:
        listener: a TCP socket that listens; a socket object, or anything with ``fileno()``, or an fd.
        timeout: seconds after which handshakes are not waited for any longer: a client that is gone never ends its own.
            The default leaves time for two retransmissions. None waits for all; 0 takes what there is now.

    Raises:
        BadSocket: it is no TCP socket that listens.
        ValueError: the socket is closed, or the time-out negative.
    """
    return Drain(listener, timeout)


class Drain:
    """The iterator, and asynchronous iterator, that `drain` gives."""

    def __init__(self, listener: Socket, timeout: float | None) -> None:
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"a time-out is not negative: {timeout}")
        fd = fd_of(listener)
        if fd < 0:
            raise ValueError("operation on a closed socket")
        state = _sys.socket_state(fd)
        if state.protocol != Protocol.TCP or not state.listens:
            refuse("it is no TCP socket that listens", "be drained")
        self._fd = fd
        self._steps = _steps(listener, timeout)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Accepted:
        while True:
            step = next(self._steps)
            if step is None:
                _settle()
            elif isinstance(step, float):
                _wait(self._fd, step)
            else:
                return _result(step)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Accepted:
        import asyncio  # noqa: PLC0415 - only who uses it pays for it

        for step in self._steps:
            if step is None:
                await asyncio.get_running_loop().run_in_executor(None, _settle)
            elif isinstance(step, float):
                await asyncio.sleep(min(step, 0.01))  # add_reader() would take the place of a server's own
            else:
                connection, address = _result(step)
                connection.setblocking(False)
                return connection, address
        raise StopAsyncIteration


_Step: TypeAlias = "Accepted | OSError | float | None"
"""What to do next: to hand out a connection, to raise an error, to wait so long for a connection, or to settle."""


def _steps(listener: Socket, timeout: float | None) -> Iterator[_Step]:
    """Tell what to do, one after the other; whether that blocks is the caller's business."""
    began = time.monotonic()
    deadline = None if timeout is None else began + timeout
    ours = not isinstance(listener, socket.socket)
    sock = listener if isinstance(listener, socket.socket) else socket.socket(fileno=_sys.dup(fd_of(listener)))
    before = sock.gettimeout(), os.get_blocking(sock.fileno())
    try:
        sock.setblocking(False)
        if timeout != 0:
            yield None
        under_way, pause = _under_way(sock), _SHORTEST
        yield from _accepted(sock)
        if under_way is None and deadline is None:
            deadline = began + _DEFAULT
        while under_way is None or under_way:
            left = _LONGEST if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            yield min(pause, left)
            yield from _accepted(sock)
            if under_way is not None:
                under_way &= handshakes(sock)
            pause = min(2 * pause, _LONGEST)
        else:
            if timeout != 0:
                yield None  # a handshake has left the one queue before it enters the other
            yield from _accepted(sock)
    finally:
        with contextlib.suppress(OSError):  # closed meanwhile
            sock.settimeout(before[0])
            os.set_blocking(sock.fileno(), before[1])
        if ours:
            sock.close()


def _accepted(sock: socket.socket) -> Iterator[Accepted | OSError]:
    """Accept as many as the accept queue holds now, and give an error of the listener's that the caller may mend."""
    left = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO), _TCPI_UNACKED)[0]
    while left:
        result: Accepted | OSError
        try:
            result = sock.accept()
        except BlockingIOError:  # another thread or process had it
            return
        except OSError as error:
            result = error
        if not isinstance(result, OSError):
            left -= 1
        elif result.errno in _OF_ONE:
            left -= 1
            continue
        yield result


def _under_way(sock: socket.socket) -> set[int] | None:
    """List the handshakes that may be this listener's; None where the kernel does not tell."""
    try:
        return handshakes(sock)
    except BpfError:  # no CONFIG_INET_DIAG, or a namespace that the process may not enter
        return None


def _result(step: Accepted | OSError) -> Accepted:
    if isinstance(step, OSError):
        raise step
    return step


def _settle() -> None:
    """Let every packet arrive that was looked up before."""
    if not _sys.grace_period():
        time.sleep(_RATHER)


def _wait(fd: int, timeout: float) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll(timeout * 1000)
