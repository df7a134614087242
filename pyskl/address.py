# SPDX-License-Identifier: BSD-2-Clause
"""Addresses, ports and protocols as Python writes them, checked and packed. Pure: no input, no output."""

from __future__ import annotations

import ipaddress
from typing import Literal, TypeAlias

from pyskl.enums import Protocol

ProtocolLike: TypeAlias = Protocol | Literal["tcp", "udp"]
Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


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
