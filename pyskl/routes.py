# SPDX-License-Identifier: BSD-2-Clause
"""What is local to a network namespace: its addresses, and its routes of type ``local`` (rtnetlink(7))."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import TYPE_CHECKING, TypeAlias

from pyskl import netlink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyskl.binding import IPNetwork

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_NETLINK_ROUTE = 0
_RTM_GETADDR, _RTM_GETROUTE = 22, 26
_IFA_ADDRESS, _IFA_LOCAL, _RTA_DST = 1, 2, 1
_RTN_LOCAL = 2
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")


def local_routes(family: int) -> Iterator[IPNetwork]:
    """List the prefixes that the calling thread's namespace takes for its own, in any table.

    Raises:
        BpfError: the kernel refuses.
    """
    body = _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
    for message in _dump("RTM_GETROUTE", _RTM_GETROUTE, body):
        of, length, _, _, _, _, _, kind, _ = _RTMSG.unpack_from(message)
        if of == family and kind == _RTN_LOCAL:
            size = 4 if family == socket.AF_INET else 16
            address = netlink.attributes(message[_RTMSG.size :]).get(_RTA_DST, bytes(size))
            yield ipaddress.ip_network((address, length))


def own_addresses() -> Iterator[IPAddress]:
    """List the addresses of the interfaces of the calling thread's namespace.

    Raises:
        BpfError: the kernel refuses.
    """
    body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    for message in _dump("RTM_GETADDR", _RTM_GETADDR, body):
        found = netlink.attributes(message[_IFADDRMSG.size :])
        # Of a point-to-point interface, IFA_ADDRESS is the peer's.
        if (address := found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))) is not None:
            yield ipaddress.ip_address(address)


def _dump(call: str, kind: int, body: bytes) -> Iterator[bytes]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as sock:
        yield from netlink.dump(sock, call, kind, body)
