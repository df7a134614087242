# SPDX-License-Identifier: BSD-2-Clause
"""Addresses, ports and protocols as Python writes them, checked and packed. Pure: no input, no output."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from pyskl.enums import Protocol

if TYPE_CHECKING:
    from typing_extensions import Self

ProtocolLike: TypeAlias = Protocol | Literal["tcp", "udp"]
Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


class DatagramAddress(tuple[Any, ...]):  # noqa: SLOT001 - a tuple has none that are not empty
    """Where a datagram came from: a tuple as asyncio gives it, which carries where it was sent to.

    Attributes:
        destination: the (address, port) that the client sent to; what is sent to this address leaves from there.
    """

    destination: Address

    def __new__(cls, source: Address, destination: Address) -> Self:
        """Make it of the two addresses."""
        self = super().__new__(cls, source)
        self.destination = destination
        return self

    def __getnewargs__(self) -> tuple[tuple[Any, ...], Address]:
        return tuple(self), self.destination


def parse_protocol(protocol: ProtocolLike) -> Protocol:
    """Take ``"tcp"``, ``"udp"`` or a `Protocol`.

    Raises:
        ValueError: it is another one.
    """
    try:
        return Protocol[protocol.upper()] if isinstance(protocol, str) else Protocol(protocol)
    except (KeyError, ValueError):
        raise ValueError(f"the protocol must be 'tcp' or 'udp', not {protocol!r}") from None


def parse_endpoint(address: Address) -> tuple[int, bytes, int]:
    """Take a (host, port) pair; the host is the text of an IP address, or one of `ipaddress`.

    Raises:
        TypeError: it is no such pair.
        ValueError: the host is no IP address, or the port is none of 0 to 65535.
    """
    try:
        host, port, *_ = address  # an IPv6 socket's has a flow label and a scope, too
    except (TypeError, ValueError):
        raise TypeError(f"an address is a (host, port) pair, not {address!r}") from None
    if not isinstance(port, int):
        raise TypeError(f"a port is an int, not {port!r}")
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"a port is between 0 and 65535, not {port}")
    ip = ipaddress.ip_address(host)
    return ip.version, ip.packed, port


_SOCKADDR_IN: Final = struct.Struct("=H2s4s20x")  # with zeros, to the size of the other
_SOCKADDR_IN6: Final = struct.Struct("=H2s4s16sI")
_FAMILY: Final = struct.Struct("=H")
_MAPPED: Final = bytes(10) + b"\xff\xff"  # before an IPv4 address, for a socket of IPv6


def to_sockaddr(family: int, address: Address) -> bytes:
    """Pack an address for a socket of IPv4 or IPv6: struct sockaddr_in6, or sockaddr_in with zeros after it.

    A socket of IPv6 takes an IPv4 address too, as a mapped one; ``%`` and the interface may follow a host.

    Raises:
        TypeError: it is no (host, port) pair.
        ValueError: the host is no IP address, or of the other family, or the port is none of 0 to 65535.
    """
    try:
        host, port, *rest = address
    except (TypeError, ValueError):
        raise TypeError(f"an address is a (host, port) pair, not {address!r}") from None
    if not isinstance(port, int):
        raise TypeError(f"a port is an int, not {port!r}")
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"a port is between 0 and 65535, not {port}")
    flow, scope = (*rest, 0, 0)[:2]
    text, _, zone = str(host).partition("%")
    wire = port.to_bytes(2, "big")
    try:
        if family == socket.AF_INET:
            return _SOCKADDR_IN.pack(family, wire, socket.inet_pton(socket.AF_INET, text))
        if zone:
            scope = int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
        ip = socket.inet_pton(family, text) if ":" in text else _MAPPED + socket.inet_pton(socket.AF_INET, text)
        return _SOCKADDR_IN6.pack(family, wire, flow.to_bytes(4, "big"), ip, scope)
    except OSError:
        name = "IPv4" if family == socket.AF_INET else "IPv6"
        raise ValueError(f"{host!r} is no address for a socket of {name}") from None


def from_sockaddr(sockaddr: bytes) -> Address:
    """Give the address as a socket has it: a pair for IPv4, four members for IPv6."""
    if _FAMILY.unpack_from(sockaddr)[0] == socket.AF_INET:
        _, port, ip = _SOCKADDR_IN.unpack(sockaddr)
        return socket.inet_ntop(socket.AF_INET, ip), int.from_bytes(port, "big")
    _, port, flow, ip, scope = _SOCKADDR_IN6.unpack(sockaddr)
    host = socket.inet_ntop(socket.AF_INET6, ip)
    return host, int.from_bytes(port, "big"), int.from_bytes(flow, "big"), scope


def split_sockaddr(sockaddr: bytes) -> tuple[bytes, int]:
    """Give the packed host, 4 or 16 bytes, and the port."""
    port = int.from_bytes(sockaddr[2:4], "big")
    return (sockaddr[4:8] if _FAMILY.unpack_from(sockaddr)[0] == socket.AF_INET else sockaddr[8:24]), port


def is_of_many(host: bytes) -> bool:
    """Whether a packed address is multicast, or IPv4's broadcast address: no datagram leaves from it."""
    v4 = host.removeprefix(_MAPPED)
    return host[0] == 0xFF if len(v4) == 16 else v4[0] & 0xF0 == 0xE0 or v4 == b"\xff\xff\xff\xff"


def parse_host_port(text: str) -> Address:
    """Take ``"192.0.2.1:80"`` or ``"[2001:db8::1]:80"``, and give a (host, port) pair.

    Raises:
        ValueError: it is not written so; the message quotes it.
    """
    found = re.fullmatch(r"(?:\[([^]]*:[^]]*)\]|([^:]*)):([0-9]{1,5})", text)
    if not found:
        raise ValueError(f"an address and port is written 192.0.2.1:80 or [2001:db8::1]:80, not {text!r}")
    address = found[1] or found[2], int(found[3])
    try:
        parse_endpoint(address)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return address
