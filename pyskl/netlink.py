# SPDX-License-Identifier: BSD-2-Clause
"""netlink(7): dumps, of whatever protocol."""

from __future__ import annotations

import os
import struct
import sys
from typing import TYPE_CHECKING

from pyskl.errors import BpfError

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_NLA_TYPE_MASK = 0x3FFF
_ALIGN = 4
_ROOM = 1 << 16


def dump(sock: socket.socket, call: str, kind: int, body: bytes) -> Iterator[bytes]:
    """Ask for all of something in a socket's namespace; gives the payload of each message.

    Args:
        sock: of family AF_NETLINK.
        call: the kernel's name for the request, for errors.
        kind: type of the request.
        body: its payload.

    Raises:
        BpfError: the kernel refuses.
    """
    sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0) + body)
    while True:
        data = sock.recv(_ROOM)
        while data:
            size, kind, *_ = _HEADER.unpack_from(data)
            payload, data = data[_HEADER.size : size], data[_aligned(size) :]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -int.from_bytes(payload[:4], sys.byteorder, signed=True)
                raise BpfError(number, os.strerror(number), call=call)
            yield payload


def attributes(data: bytes) -> dict[int, bytes]:
    """Take the attributes that follow the fixed part of a payload apart."""
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        found[kind & _NLA_TYPE_MASK] = data[_ATTRIBUTE.size : size]
        data = data[_aligned(max(size, _ATTRIBUTE.size)) :]
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
