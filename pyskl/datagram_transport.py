# SPDX-License-Identifier: BSD-2-Clause
"""asyncio's transport over an `Endpoint`, on any event loop that has add_reader()."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from asyncio.trsock import TransportSocket
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pyskl.address import DatagramAddress

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyskl.address import Address
    from pyskl.udp import Endpoint, Outgoing

_logger: Final = logging.getLogger("pyskl.udp")
_AT_ONCE: Final = 32  # datagrams that are received before other callbacks have their turn
_HEADER: Final = 8  # bytes of UDP's own, so that empty datagrams fill a buffer too


class DatagramTransport(asyncio.DatagramTransport):
    """The transport of pyskl.udp.create_datagram_endpoint().

    It does what asyncio's own does: what can't be sent at once is kept, and the protocol told to pause above the
    high-water mark; errors of the socket go to ``error_received``; `close` sends what is kept first, `abort` drops it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint, protocol: asyncio.BaseProtocol) -> None:
        sock = endpoint.sock
        extra = {"socket": TransportSocket(sock), "sockname": endpoint.getsockname(), "peername": None}
        super().__init__(extra)
        endpoint.setblocking(False)
        self._loop = loop
        self._endpoint = endpoint
        self._fd = endpoint.fileno()
        self._protocol: Any = protocol
        self._kept: deque[Outgoing] = deque()
        self._kept_bytes = 0
        self._waits_on: int | None = None  # the fd of the socket that can't take the first of them
        self._paused = False
        self._closing = False
        self._lost = False
        self.set_write_buffer_limits()

    async def started(self) -> None:
        """Tell the protocol that it has a transport, and begin to receive."""
        waiter = self._loop.create_future()
        self._loop.call_soon(self._protocol.connection_made, self)
        self._loop.call_soon(self._begin, waiter)
        try:
            await waiter
        except BaseException:
            self.abort()
            raise

    def _begin(self, waiter: asyncio.Future[None]) -> None:
        if not self._closing:  # connection_made() may have closed it
            self._loop.add_reader(self._fd, self._receive)
        if not waiter.done():
            waiter.set_result(None)

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        if self._closing:
            return
        try:
            datagrams = self._endpoint.recv_many(_AT_ONCE)
        except BlockingIOError:
            return
        except OSError as error:
            self._loop.remove_reader(self._fd)
            self._loop.add_reader(self._fd, self._receive)  # uvloop polls no more where poll(2) told of an error
            self._protocol.error_received(error)
            return
        for datagram in datagrams:
            try:
                self._protocol.datagram_received(datagram.data, DatagramAddress(datagram.source, datagram.destination))
            except Exception as error:  # noqa: BLE001 - the loop's handler has it; those that came with it are not lost
                self._report("datagram_received() failed", error)
            if self._closing:
                return

    # -- sending -------------------------------------------------------------------------------------------------------

    def sendto(self, data: Buffer, addr: Address | DatagramAddress | None = None) -> None:  # type: ignore[override]
        """Send a datagram: from where `addr` was sent to, where it is one that ``datagram_received`` got."""
        if addr is None:
            raise ValueError("the socket is not connected: sendto() needs an address")
        if self._lost:
            _logger.warning("sendto() on a transport that is closed: the datagram is dropped")
            return
        try:
            ready = self._endpoint.prepare(data, getattr(addr, "destination", None), addr)
        except OSError as error:
            self._protocol.error_received(error)
            return
        self._kept.append(ready)
        self._kept_bytes += len(ready[2]) + _HEADER
        if self._waits_on is None:
            self._send_kept()
        if self._kept_bytes > self._high and not self._paused:
            self._paused = True
            self._tell("pause_writing")

    def _send_kept(self) -> None:
        while self._kept:
            sent, number = self._endpoint.transmit(list(self._kept)[:_AT_ONCE])
            self._drop(sent)
            if number == errno.EAGAIN:
                self._wait_on(self._kept[0][0].fileno())
                break
            if number and number != errno.EINTR:
                self._drop(1)
                self._protocol.error_received(OSError(number, os.strerror(number)))
        else:
            self._wait_on(None)
        if self._paused and self._kept_bytes <= self._low:
            self._paused = False
            self._tell("resume_writing")
        if self._closing and not self._kept and not self._lost:
            self._lose(None)

    def _drop(self, count: int) -> None:
        for _ in range(min(count, len(self._kept))):  # the protocol may have aborted meanwhile
            self._kept_bytes -= len(self._kept.popleft()[2]) + _HEADER

    def _wait_on(self, fd: int | None) -> None:
        if fd == self._waits_on:
            return
        if self._waits_on is not None:
            self._loop.remove_writer(self._waits_on)
        self._waits_on = fd
        if fd is not None:
            self._loop.add_writer(fd, self._send_kept)

    def get_write_buffer_size(self) -> int:
        """Count the bytes that wait to be sent, with 8 for each datagram's header."""
        return self._kept_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Give the low-water and the high-water mark, in bytes."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks in bytes: above `high` the protocol is paused, and from `low` on resumed."""
        if high is None:
            high = 64 * 1024 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    # -- life ----------------------------------------------------------------------------------------------------------

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Give the protocol."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Go on with another protocol."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closing

    def close(self) -> None:
        """Send what is kept, receive no more, and close the socket."""
        if not self._closing:
            self._closing = True
            self._loop.remove_reader(self._fd)
            if not self._kept:
                self._lose(None)

    def abort(self) -> None:
        """Drop what is kept, and close the socket."""
        self._closing = True
        self._loop.remove_reader(self._fd)
        self._wait_on(None)
        self._kept.clear()
        self._kept_bytes = 0
        if not self._lost:
            self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        self._lost = True
        self._loop.call_soon(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._endpoint.close()

    def _tell(self, what: str) -> None:
        try:
            getattr(self._protocol, what)()
        except Exception as error:  # noqa: BLE001 - as asyncio does
            self._report(f"protocol.{what}() failed", error)

    def _report(self, message: str, error: Exception) -> None:
        context = {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
        self._loop.call_exception_handler(context)

    def __repr__(self) -> str:
        state = "closed" if self._endpoint.closed else "closing" if self._closing else "open"
        return f"<DatagramTransport {state} {self._endpoint!r} kept={self._kept_bytes}>"
