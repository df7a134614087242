# SPDX-License-Identifier: BSD-2-Clause
"""Steer connections to sockets: BPF sk_lookup from Python.

A program of type ``BPF_PROG_TYPE_SK_LOOKUP``, attached to a network namespace, chooses the socket that receives a new
TCP connection or a UDP datagram. `BpfObject` and `Program` load such programs, `Link` keeps them attached, and
`SockMap` holds the sockets that they choose from.
"""

from pyskl._sys import BPF_F_MMAPABLE, BPF_F_NO_PREALLOC
from pyskl.address import Address, ProtocolLike
from pyskl.enums import AttachType, MapType, ProgramType, Protocol, Verdict
from pyskl.errors import (
    BadSocket,
    BpfError,
    NoSuchKey,
    NoSuchPin,
    NotSupported,
    PermissionDenied,
    PinExists,
    PysklError,
    SocketRefused,
    VerifierError,
)
from pyskl.features import Feature, features
from pyskl.link import Link, LinkInfo, links
from pyskl.maps import (
    ArrayMap,
    ArrayOfMaps,
    HashMap,
    HashOfMaps,
    LpmTrie,
    LruHashMap,
    LruPerCpuHashMap,
    Map,
    MapInfo,
    PerCpuArrayMap,
    PerCpuHashMap,
    ProgArray,
    ReuseportSockArray,
    SockHash,
    SockMap,
)
from pyskl.netns import NetNS
from pyskl.object import BpfObject
from pyskl.program import REDIRECT, Program, ProgramInfo, TestRun, query
from pyskl.sockets import Socket, socket_cookie

__all__ = [
    "BPF_F_MMAPABLE",
    "BPF_F_NO_PREALLOC",
    "REDIRECT",
    "Address",
    "ArrayMap",
    "ArrayOfMaps",
    "AttachType",
    "BadSocket",
    "BpfError",
    "BpfObject",
    "Feature",
    "HashMap",
    "HashOfMaps",
    "Link",
    "LinkInfo",
    "LpmTrie",
    "LruHashMap",
    "LruPerCpuHashMap",
    "Map",
    "MapInfo",
    "MapType",
    "NetNS",
    "NoSuchKey",
    "NoSuchPin",
    "NotSupported",
    "PerCpuArrayMap",
    "PerCpuHashMap",
    "PermissionDenied",
    "PinExists",
    "ProgArray",
    "Program",
    "ProgramInfo",
    "ProgramType",
    "Protocol",
    "ProtocolLike",
    "PysklError",
    "ReuseportSockArray",
    "SockHash",
    "SockMap",
    "Socket",
    "SocketRefused",
    "TestRun",
    "Verdict",
    "VerifierError",
    "features",
    "links",
    "query",
    "socket_cookie",
]
