# SPDX-License-Identifier: BSD-2-Clause
"""Steer connections to sockets: BPF sk_lookup from Python.

A program of type ``BPF_PROG_TYPE_SK_LOOKUP``, attached to a network namespace, chooses the socket that receives a new
TCP connection or a UDP datagram. `BpfObject` and `Program` load such programs, `Link` keeps them attached, and
`SockMap` holds the sockets that they choose from.

A module is loaded when the first of its names is used (PEP 562), so that each daemon pays for what it uses alone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyskl import udp as udp
    from pyskl._sys import BPF_F_MMAPABLE as BPF_F_MMAPABLE
    from pyskl._sys import BPF_F_NO_PREALLOC as BPF_F_NO_PREALLOC
    from pyskl.address import Address as Address
    from pyskl.address import ProtocolLike as ProtocolLike
    from pyskl.binding import Binding as Binding
    from pyskl.binding import Bindings as Bindings
    from pyskl.binding import Policy as Policy
    from pyskl.binding import PortsLike as PortsLike
    from pyskl.binding import PrefixLike as PrefixLike
    from pyskl.dispatcher import Dispatcher as Dispatcher
    from pyskl.enums import AttachType as AttachType
    from pyskl.enums import MapType as MapType
    from pyskl.enums import ProgramType as ProgramType
    from pyskl.enums import Protocol as Protocol
    from pyskl.enums import Verdict as Verdict
    from pyskl.errors import AlreadyLoaded as AlreadyLoaded
    from pyskl.errors import BadSocket as BadSocket
    from pyskl.errors import BindingConflict as BindingConflict
    from pyskl.errors import BindingsFileError as BindingsFileError
    from pyskl.errors import BpfError as BpfError
    from pyskl.errors import Busy as Busy
    from pyskl.errors import Damaged as Damaged
    from pyskl.errors import Incompatible as Incompatible
    from pyskl.errors import LimitReached as LimitReached
    from pyskl.errors import NoSuchKey as NoSuchKey
    from pyskl.errors import NoSuchPin as NoSuchPin
    from pyskl.errors import NotLoaded as NotLoaded
    from pyskl.errors import NotSupported as NotSupported
    from pyskl.errors import PermissionDenied as PermissionDenied
    from pyskl.errors import PinExists as PinExists
    from pyskl.errors import PysklError as PysklError
    from pyskl.errors import SocketRefused as SocketRefused
    from pyskl.errors import VerifierError as VerifierError
    from pyskl.feature import Feature as Feature
    from pyskl.feature import features as features
    from pyskl.handover import Drain as Drain
    from pyskl.handover import drain as drain
    from pyskl.link import Link as Link
    from pyskl.link import LinkInfo as LinkInfo
    from pyskl.link import links as links
    from pyskl.maps import ArrayMap as ArrayMap
    from pyskl.maps import ArrayOfMaps as ArrayOfMaps
    from pyskl.maps import HashMap as HashMap
    from pyskl.maps import HashOfMaps as HashOfMaps
    from pyskl.maps import LpmTrie as LpmTrie
    from pyskl.maps import LruHashMap as LruHashMap
    from pyskl.maps import LruPerCpuHashMap as LruPerCpuHashMap
    from pyskl.maps import Map as Map
    from pyskl.maps import MapInfo as MapInfo
    from pyskl.maps import PerCpuArrayMap as PerCpuArrayMap
    from pyskl.maps import PerCpuCgroupStorage as PerCpuCgroupStorage
    from pyskl.maps import PerCpuHashMap as PerCpuHashMap
    from pyskl.maps import ProgArray as ProgArray
    from pyskl.maps import ReuseportSockArray as ReuseportSockArray
    from pyskl.maps import SockHash as SockHash
    from pyskl.maps import SockMap as SockMap
    from pyskl.netns import NetNS as NetNS
    from pyskl.netns import NetNSLike as NetNSLike
    from pyskl.object import BpfObject as BpfObject
    from pyskl.program import REDIRECT as REDIRECT
    from pyskl.program import Program as Program
    from pyskl.program import ProgramInfo as ProgramInfo
    from pyskl.program import TestRun as TestRun
    from pyskl.program import query as query
    from pyskl.report import Count as Count
    from pyskl.report import Counters as Counters
    from pyskl.report import Decision as Decision
    from pyskl.report import Diff as Diff
    from pyskl.report import LabelStatus as LabelStatus
    from pyskl.report import Registration as Registration
    from pyskl.report import Status as Status
    from pyskl.sockets import Socket as Socket
    from pyskl.sockets import socket_cookie as socket_cookie
    from pyskl.steering import steer as steer
    from pyskl.succession import TakeOver as TakeOver
    from pyskl.trace import Event as Event
    from pyskl.trace import Trace as Trace

# The same, for the interpreter; tests/test_public_names.py holds the two together.
_NAMES = {
    "pyskl._sys": "BPF_F_MMAPABLE BPF_F_NO_PREALLOC",
    "pyskl.address": "Address ProtocolLike",
    "pyskl.binding": "Binding Bindings Policy PortsLike PrefixLike",
    "pyskl.dispatcher": "Dispatcher",
    "pyskl.enums": "AttachType MapType ProgramType Protocol Verdict",
    "pyskl.errors": (
        "AlreadyLoaded BadSocket BindingConflict BindingsFileError BpfError Busy Damaged Incompatible LimitReached "
        "NoSuchKey NoSuchPin NotLoaded NotSupported PermissionDenied PinExists PysklError SocketRefused VerifierError"
    ),
    "pyskl.feature": "Feature features",
    "pyskl.handover": "Drain drain",
    "pyskl.link": "Link LinkInfo links",
    "pyskl.maps": (
        "ArrayMap ArrayOfMaps HashMap HashOfMaps LpmTrie LruHashMap LruPerCpuHashMap Map MapInfo "
        "PerCpuArrayMap PerCpuCgroupStorage PerCpuHashMap ProgArray ReuseportSockArray SockHash SockMap"
    ),
    "pyskl.netns": "NetNS NetNSLike",
    "pyskl.object": "BpfObject",
    "pyskl.program": "REDIRECT Program ProgramInfo TestRun query",
    "pyskl.report": "Count Counters Decision Diff LabelStatus Registration Status",
    "pyskl.sockets": "Socket socket_cookie",
    "pyskl.steering": "steer",
    "pyskl.succession": "TakeOver",
    "pyskl.trace": "Event Trace",
    "pyskl.udp": "udp",  # a module that is public as it is
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_HOMES)  # type checkers go by the imports


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyskl' has no attribute {name!r}")
    module = __import__(_HOMES[name], fromlist=[name])
    value: object = module if _HOMES[name] == f"pyskl.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
