# SPDX-License-Identifier: BSD-2-Clause
"""UDP servers whose replies leave from where the question was sent to, whatever address and port that was.

A socket that a look-up selects receives datagrams that were sent to other addresses and ports than its own, and a
client ignores a reply that comes from elsewhere. `Endpoint` is a bound UDP socket that knows each datagram's
destination, and `create_datagram_endpoint()` the same for asyncio.

The destination is told by IP_RECVORIGDSTADDR and IPV6_RECVORIGDSTADDR (ip(7)). A reply leaves from the socket itself
where the destination is the socket's own port, by IP_PKTINFO where the address differs. For any other port it leaves
from a socket bound there, of which an endpoint keeps those that it used last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, TypeVar

from pyskl import _sys
from pyskl._fd import Closable, fd_of
from pyskl.address import DatagramAddress, from_sockaddr, is_of_many, split_sockaddr, to_sockaddr
from pyskl.reply import IPV6_FREEBIND, ReplySockets
from pyskl.sockets import refuse

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

    from pyskl.address import Address
    from pyskl.sockets import Socket

    Protocol_T = TypeVar("Protocol_T", bound=asyncio.BaseProtocol)
    Key = TypeVar("Key")
    Value = TypeVar("Value")

__all__ = ["Datagram", "DatagramAddress", "Endpoint", "create_datagram_endpoint"]

_IP_RECVORIGDSTADDR: Final = 20
_IPV6_RECVORIGDSTADDR: Final = 74
_MOST: Final = 1024  # datagrams that the kernel takes in one call (UIO_MAXIOV)
_TOGETHER: Final = 64  # datagrams that are sent in one call
_REMEMBERED: Final = 4096  # addresses of each kind
_new: Final = tuple.__new__


Outgoing: TypeAlias = tuple[socket.socket, bytes, bytes]
"""A datagram that is ready to be sent: the socket that it leaves from, what `_sys` needs to know, and its data."""
_Resolved: TypeAlias = tuple[bytes, tuple[bool, bytes], bytes]


class _Fields(NamedTuple):
    data: bytes
    source: Address
    destination: Address


class Datagram(_Fields):
    """A datagram: `data`, the `source` it comes from and the `destination` it goes to.

    Of one that was received, `source` is as recvfrom(2) of the socket gives it, and `destination` the (address, port)
    that the client sent to: IPv4's own where it came over a dual-stack socket, with ``%`` and the number of the
    interface where the address is link-local.

    Attributes:
        truncated: whether it was longer than there was room for, and the rest is lost (MSG_TRUNC).
    """

    truncated: bool = False

    def reply(self, data: Buffer) -> Datagram:
        """Make the datagram that answers this one: from where it was sent to, to where it came from."""
        data = data if isinstance(data, bytes) else bytes(memoryview(data))
        return _new(Datagram, (data, self.destination, self.source))


class _Sources(dict[bytes, "Address"]):
    """Addresses as recvfrom(2) gives them, of those that the kernel gave of late."""

    def __missing__(self, sockaddr: bytes) -> Address:
        return _remember(self, sockaddr, from_sockaddr(sockaddr))


class _Destinations(dict[bytes, "Address"]):
    """Addresses that clients sent to, likewise."""

    def __init__(self, default: Address) -> None:
        self._default = default  # where the kernel does not tell

    def __missing__(self, sockaddr: bytes) -> Address:
        host, port, *rest = from_sockaddr(sockaddr) if sockaddr[0] or sockaddr[1] else self._default
        scope = f"%{rest[1]}" if rest and rest[1] else ""
        return _remember(self, sockaddr, (host + scope, port))


class _Sockaddrs(dict["Address", bytes]):
    """The same the other way round, for a socket's family."""

    def __init__(self, family: int) -> None:
        self._family = family

    def __missing__(self, address: Address) -> bytes:
        return _remember(self, address, to_sockaddr(self._family, address))


class _Ways(dict["Address | None", tuple[bool, bytes]]):
    """Whether what leaves from an address needs a socket of its own, and the address; none for the socket's own."""

    def __init__(self, sockaddrs: _Sockaddrs, own: Address) -> None:
        self._sockaddrs = sockaddrs
        self._own = split_sockaddr(sockaddrs[own])

    def __missing__(self, source: Address | None) -> tuple[bool, bytes]:
        if source is None:
            return False, b""
        sockaddr = self._sockaddrs[source]
        host, port = split_sockaddr(sockaddr)
        if port == self._own[1] and (host == self._own[0] or is_of_many(host)):
            sockaddr = b""
        return _remember(self, source, (port != self._own[1], sockaddr))


class Endpoint(Closable):
    """A bound UDP socket that tells where each datagram was sent to, and replies from there.

    It takes the socket over: `close()` closes both. An object that only has a ``fileno()`` is duplicated. Time-outs are
    the socket's own. Threads may share an endpoint.

    Args:
        sock: IPv4, IPv6 or dual-stack; bound, and not connected. An fd is one that is the endpoint's from now on.
        max_reply_sockets: how many sockets are kept for replies from other ports than the socket's own, an fd each.

    Raises:
        BadSocket: it is no such socket.
        BpfError: it is no socket at all (ENOTSOCK, EBADF).
    """

    def __init__(self, sock: Socket, *, max_reply_sockets: int = 256) -> None:
        self._closed = True  # there is nothing to close yet
        if max_reply_sockets < 1:
            raise ValueError(f"max_reply_sockets is at least 1, not {max_reply_sockets}")
        _check(fd_of(sock))
        self._sock = _adopted(sock)
        self._closed = False
        self.family: Final = self._sock.family
        v6 = self.family == socket.AF_INET6
        self._sock.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)
        if v6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
            self._sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        self._name: Address = self._sock.getsockname()
        self._sources = _Sources()
        self._destinations = _Destinations(self._name)
        self._sockaddrs = _Sockaddrs(self.family)
        self._ways = _Ways(self._sockaddrs, self._name)
        self._replies = ReplySockets(self._sock, max_reply_sockets)
        self._spare: list[_sys.DatagramBatch] = []
        self._kept: deque[Datagram] = deque()  # what came coalesced with one that was given

    # -- what a socket has ---------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Give the file descriptor of the socket.

        Raises:
            ValueError: it is closed.
        """
        if self._closed:
            raise ValueError("operation on a closed Endpoint")
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def close(self) -> None:
        """Close the socket, and those that replies left from."""
        if not self._closed:
            self._closed = True
            self._sock.close()
            self._replies.clear()
            self._spare.clear()
            self._kept.clear()

    @property
    def sock(self) -> socket.socket:
        """The socket itself, for its options."""
        return self._sock

    def getsockname(self) -> Address:
        """Give the address that the socket is bound to."""
        return self._name

    def gettimeout(self) -> float | None:
        """Give the time-out in seconds: None waits without limit, 0 never."""
        return self._sock.gettimeout()

    def settimeout(self, timeout: float | None) -> None:
        """Set the time-out in seconds: None waits without limit, 0 never (socket.socket.settimeout)."""
        self.fileno()
        self._sock.settimeout(timeout)

    def setblocking(self, flag: bool) -> None:
        """Wait without limit, or never."""
        self.settimeout(None if flag else 0)

    # -- receiving -----------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int = 65535) -> Datagram:
        """Receive one datagram; of one that is longer than `bufsize` bytes the rest is lost.

        With UDP_GRO, the datagrams that came together with this one are given by the next calls, and select(2) and its
        kin do not know of them: where these are waited on, `recv_many` is what to call.

        Raises:
            BlockingIOError: there is none, and the endpoint does not wait.
            TimeoutError: none came in time.
            OSError: what recv(2) of the socket says, an error that is pending on it among others.
        """
        came = self._kept and self._take_kept(1)
        if not came:
            came = self._receive(1, bufsize)
            if len(came) > 1:
                self._kept.extend(came[1:])
        return came[0]

    def recv_many(self, n: int, bufsize: int = 65535) -> list[Datagram]:
        """Receive up to `n` datagrams at once, and at most 1024: recvmmsg(2). It waits for the first alone.

        Where the socket has UDP_GRO (udp(7)), the kernel hands over several datagrams of one sender as one of up to
        65,535 bytes. They are given as the datagrams that they were, all of them, so that there may be more than `n`;
        `bufsize` is then for all that came together.

        Raises:
            BlockingIOError, TimeoutError, OSError: as `recv` does.
        """
        if n < 1:
            raise ValueError(f"at least one datagram is to be received, not {n}")
        return (self._kept and self._take_kept(n)) or self._receive(min(n, _MOST), bufsize)

    def _take_kept(self, count: int) -> list[Datagram]:
        taken: list[Datagram] = []
        with contextlib.suppress(IndexError):  # no more, or another thread had it
            while len(taken) < count:
                taken.append(self._kept.popleft())
        return taken

    def _receive(self, count: int, size: int) -> list[Datagram]:
        if size < 0:
            raise ValueError(f"a size is not negative: {size}")
        fd, timeout = self.fileno(), self._sock.gettimeout()
        deadline = timeout and time.monotonic() + timeout
        try:
            batch = self._spare.pop()
        except IndexError:
            batch = _sys.DatagramBatch(count, size)
        if batch.count < count or batch.size < size:
            batch = _sys.DatagramBatch(max(count, batch.count), max(size, batch.size))
        try:
            while True:
                try:
                    came, cut = batch.receive(fd, count, size, self._sources, self._destinations)
                    break
                except InterruptedError:
                    pass  # by a signal whose handler raised nothing
                except BlockingIOError:
                    if not deadline:
                        raise
                    if late := _late(fd, select.POLLIN, deadline):
                        raise late from None
        finally:
            self._spare.append(batch)
        datagrams = [_new(Datagram, each) for each in came]
        for number in cut:
            datagrams[number].truncated = True
        return datagrams

    # -- sending -------------------------------------------------------------------------------------------------------

    def reply(self, datagram: Datagram, data: Buffer) -> int:
        """Answer a datagram, from the address and port that it was sent to; the number of bytes that went out.

        Raises:
            PermissionDenied: it was sent to a privileged port, and the process lacks CAP_NET_BIND_SERVICE.
            BpfError: nothing can be sent from there, or there is no fd left for it.
            BlockingIOError, TimeoutError, OSError: as sendto(2) of a socket.
        """
        return self.send(data, datagram.source, source=datagram.destination)

    def send(self, data: Buffer, to: Address, *, source: Address | None = None) -> int:
        """Send a datagram to an address, from another; the number of bytes that went out.

        Args:
            data: the datagram, which may be empty.
            to: an IP address and a port.
            source: likewise; None sends from the socket itself.

        Raises:
            ValueError: what stands for an address is none, or of the other family.
            PermissionDenied, BpfError, BlockingIOError, TimeoutError, OSError: as `reply` does.
        """
        self.fileno()
        resolved = self._resolved(data, source, to)
        _, described, payload = self._prepared(*resolved)
        sent, number = _sys.send_datagrams((described,), (payload,))
        if not sent:
            if number not in {errno.EAGAIN, errno.EINTR}:
                raise OSError(number, os.strerror(number))
            self._send([resolved])
        return len(payload)

    def send_many(self, datagrams: Iterable[tuple[Buffer, Address | None, Address]]) -> int:
        """Send datagrams, each from its source to its destination, in order: sendmmsg(2). It gives how many went out.

        They are as `Datagram.reply` makes them. When one can't be sent, those before it are, and it gives their number;
        where there are none it raises the error, as sendmmsg(2) does.

        Raises:
            ValueError, PermissionDenied, BpfError, BlockingIOError, TimeoutError, OSError: as `send` does.
        """
        return self._send([self._resolved(*each) for each in datagrams])

    def prepare(self, data: Buffer, source: Address | None, to: Address) -> Outgoing:
        """Find the socket that a datagram leaves from; errors as those of `send`."""
        return self._prepared(*self._resolved(data, source, to))

    def transmit(self, ready: list[Outgoing]) -> tuple[int, int]:
        """Send what is ready, without waiting: how many went out, and the errno that stopped the next or 0."""
        return _sys.send_datagrams([described for _, described, _ in ready], [data for _, _, data in ready])

    def _resolved(self, data: Buffer, source: Address | None, to: Address) -> _Resolved:
        data = data if isinstance(data, bytes) else bytes(memoryview(data))
        return data, self._ways[source], self._sockaddrs[to]

    def _prepared(self, data: bytes, way: tuple[bool, bytes], to: bytes) -> Outgoing:
        elsewhere, source = way
        sock = self._sock
        if elsewhere:
            sock, source = self._replies.get(source), b""
        return sock, _sys.outgoing(sock.fileno(), len(data), to, source), data

    def _ready(self, datagrams: list[_Resolved]) -> tuple[list[Outgoing], OSError | None]:
        """Prepare datagrams, up to the first that can't be."""
        ready: list[Outgoing] = []
        try:
            ready.extend(self._prepared(*each) for each in datagrams)
        except OSError as error:
            return ready, error
        return ready, None

    def _send(self, datagrams: list[_Resolved]) -> int:
        self.fileno()
        timeout = self._sock.gettimeout()
        deadline = timeout and time.monotonic() + timeout
        done = 0
        while done < len(datagrams):
            ready, error = self._ready(datagrams[done : done + _TOGETHER])
            sent, number = self.transmit(ready)
            done += sent
            if number == errno.EAGAIN and deadline != 0:
                error = _late(ready[sent][0].fileno(), select.POLLOUT, deadline)
            elif number and number != errno.EINTR:
                error = OSError(number, os.strerror(number))
            if error and done:
                break
            if error:
                raise error
        return done

    def __repr__(self) -> str:
        return "<Endpoint closed>" if self._closed else f"<Endpoint fd={self._sock.fileno()} {self._name[:2]}>"


async def create_datagram_endpoint(
    protocol_factory: Callable[[], Protocol_T], sock: Socket, *, max_reply_sockets: int = 256
) -> tuple[asyncio.DatagramTransport, Protocol_T]:
    """Serve UDP by a protocol of asyncio, as its loop's create_datagram_endpoint(), with replies from where they must.

    The address that ``datagram_received`` gets is a `DatagramAddress`: a tuple as asyncio's, with `destination` as an
    attribute; ``transport.sendto(data, addr)`` with it replies from there. With any other address it sends from the
    socket itself.

    Args:
        protocol_factory: makes the asyncio.DatagramProtocol.
        sock: as for `Endpoint`; the transport takes it over.
        max_reply_sockets: as for `Endpoint`.

    Raises:
        BadSocket, BpfError: as `Endpoint`.
    """
    from asyncio import get_running_loop  # noqa: PLC0415 - only who uses asyncio pays for it

    from pyskl.datagram_transport import DatagramTransport  # noqa: PLC0415

    loop = get_running_loop()
    protocol = protocol_factory()
    transport = DatagramTransport(loop, Endpoint(sock, max_reply_sockets=max_reply_sockets), protocol)
    await transport.started()
    return transport, protocol


def _remember(memo: dict[Key, Value], key: Key, value: Value) -> Value:
    if len(memo) >= _REMEMBERED:
        memo.clear()
    memo[key] = value
    return value


def _late(fd: int, event: int, deadline: float | None) -> TimeoutError | None:
    """Wait until an fd is ready, and give an error where it is not by the deadline; None waits without limit."""
    left = None if deadline is None else max(0, deadline - time.monotonic()) * 1000
    poller = select.poll()
    poller.register(fd, event)
    return None if poller.poll(left) else TimeoutError("timed out")


def _check(fd: int) -> None:
    """Refuse what can't be an endpoint's socket."""
    state = _sys.socket_state(fd)
    reason = None
    if state.domain not in {socket.AF_INET, socket.AF_INET6} or state.protocol != socket.IPPROTO_UDP:
        reason = "it is no UDP socket of IPv4 or IPv6"
    elif not state.port:
        reason = "it is not bound: call bind() first"
    elif state.connected:
        reason = "it is connected, and receives from its peer alone"
    if reason:
        refuse(reason, "be an Endpoint's")


def _adopted(sock: Socket) -> socket.socket:
    """Make a socket object that is ours of whatever has an fd."""
    if isinstance(sock, socket.socket):
        return sock
    ours = socket.socket(fileno=sock if isinstance(sock, int) else _sys.dup(fd_of(sock)))
    if not os.get_blocking(ours.fileno()):
        ours.setblocking(False)
    return ours
