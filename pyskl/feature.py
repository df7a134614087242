# SPDX-License-Identifier: BSD-2-Clause
"""What this kernel lets this process do. Each feature is found by trying it, never by comparing version numbers."""

from __future__ import annotations

import errno
import functools
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from pyskl import _sys, capabilities
from pyskl.enums import AttachType, MapType, ProgramType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BPFFS = "/sys/fs/bpf"
_BTF = "/sys/kernel/btf/vmlinux"


class Feature(NamedTuple):
    """Something that a kernel or a process may lack; true where it can be used.

    Attributes:
        name: the key in `features()`.
        since: the first version of Linux that is known to have it.
        reason: why it can't be used, or None.
    """

    name: str
    since: str
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether it can be used."""
        return self.reason is None

    def __bool__(self) -> bool:
        return self.available


def _insn(opcode: int, registers: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """Pack a struct bpf_insn."""
    return bytes((opcode, registers)) + offset.to_bytes(2, sys.byteorder) + immediate.to_bytes(4, sys.byteorder)


_RETURN_PASS = _insn(0xB7, immediate=1) + _insn(0x95)  # r0 = 1; exit
# r0 = *(u32 *)(r1 + 64), the field ingress_ifindex; the nibbles of the registers stand in the order of the machine.
_LOAD_IFINDEX = _insn(0x61, 0x10 if sys.byteorder == "little" else 0x01, offset=64)


def _program(instructions: bytes = b"") -> int:
    return _sys.prog_load(ProgramType.SK_LOOKUP, AttachType.SK_LOOKUP, instructions + _RETURN_PASS)


def _map(kind: MapType, key: int = 4, entries: int = 1, flags: int = 0, inner: int | None = None) -> int:
    return _sys.map_create(kind, b"", key, 4 if key else 0, entries, flags, inner)


def _try_link() -> str | None:
    """Attach to no namespace: a kernel that can attach says that this is none (EBADF)."""
    program = _program()
    try:
        _sys.link_create(program, -1)
    except OSError as error:
        return None if error.errno == errno.EBADF else str(error)
    finally:
        os.close(program)
    return None


def _try_batch(kind: MapType, key: int = 4, flags: int = 0, inner: int | None = None) -> None:
    fd = _map(kind, key, flags=flags, inner=inner)
    try:
        _sys.map_lookup_batch(fd, None, key, 4, 1)
    finally:
        os.close(fd)


def _try_nested(attempt: Callable[[int], int | None]) -> None:
    inner = _map(MapType.ARRAY)
    try:
        _close(attempt(inner))
    finally:
        os.close(inner)


def _try_loop() -> str | None:
    _close(_program())  # the probe of a helper answers alike for no permission and for no such helper
    return (
        None
        if _sys.helper_exists(ProgramType.SK_LOOKUP, _sys.BPF_FUNC_loop)
        else "this kernel has no helper bpf_loop()"
    )


def _try_capability(name: str) -> str | None:
    return f"the process lacks {name}" if capabilities.missing((name,)) else None


def _try_bpffs() -> str | None:
    if _sys.is_bpffs(BPFFS):
        return None
    if not _sys.has_bpffs():
        return "this kernel has no BPF file system: it was built without CONFIG_BPF_SYSCALL"
    return f"no BPF file system is at {BPFFS} ({_sys.MOUNT_BPFFS})"


def _try_btf() -> str | None:
    return None if os.path.exists(_BTF) else f"{_BTF} is missing: the kernel was built without CONFIG_DEBUG_INFO_BTF"


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


# Each attempt gives an fd to close, or why it can't be done, or None; or it raises what the kernel said.
_ATTEMPTS: Mapping[str, tuple[str, Callable[[], int | str | None]]] = {
    "sk_lookup": (_sys.PROGRAMS_SINCE[ProgramType.SK_LOOKUP], _program),
    "sk_lookup_ingress_ifindex": ("5.17", lambda: _program(_LOAD_IFINDEX)),
    "netns_link": (_sys.PROGRAMS_SINCE[ProgramType.SK_LOOKUP], _try_link),
    "sockmap": (_sys.MAPS_SINCE[MapType.SOCKMAP], lambda: _map(MapType.SOCKMAP)),
    "sockhash": (_sys.MAPS_SINCE[MapType.SOCKHASH], lambda: _map(MapType.SOCKHASH)),
    "map_in_map": ("4.12", lambda: _try_nested(lambda inner: _map(MapType.ARRAY_OF_MAPS, inner=inner))),
    "map_batch": ("5.6", lambda: _try_batch(MapType.HASH)),
    "lpm_trie_batch": ("6.1", lambda: _try_batch(MapType.LPM_TRIE, 8, _sys.BPF_F_NO_PREALLOC)),
    "map_in_map_batch": (
        "6.1",
        lambda: _try_nested(lambda inner: _try_batch(MapType.ARRAY_OF_MAPS, inner=inner)),
    ),
    "mmapable": ("5.5", lambda: _map(MapType.ARRAY, flags=_sys.BPF_F_MMAPABLE)),
    "ringbuf": (_sys.MAPS_SINCE[MapType.RINGBUF], lambda: _map(MapType.RINGBUF, 0, os.sysconf("SC_PAGE_SIZE"))),
    "user_ringbuf": (
        _sys.MAPS_SINCE[MapType.USER_RINGBUF],
        lambda: _map(MapType.USER_RINGBUF, 0, os.sysconf("SC_PAGE_SIZE")),
    ),
    "bpf_loop": ("5.17", _try_loop),
    "object_ids": ("5.8", lambda: next((None for _ in _sys.link_ids()), None)),
    "perfmon": ("5.8", lambda: _try_capability("CAP_PERFMON")),
    "btf": ("5.4", _try_btf),
}


@functools.cache
def _tried(_: frozenset[str]) -> dict[str, Feature]:
    """Try each feature, once for each set of capabilities that the process comes to have."""
    found = {}
    for name, (since, attempt) in _ATTEMPTS.items():
        try:
            result = attempt()
        except OSError as error:
            result = str(error)
        _close(result if isinstance(result, int) else None)
        found[name] = Feature(name, since, result if isinstance(result, str) else None)
    return found


def features() -> Mapping[str, Feature]:
    """Tell what this kernel lets this process do, by name, each with the reason where it can't.

    Each is found by trying it, and remembered as long as the process keeps its capabilities. The names:
    ``sk_lookup``, ``sk_lookup_ingress_ifindex`` (the field of the context), ``netns_link``, ``sockmap``, ``sockhash``,
    ``map_in_map``, ``map_batch``, ``lpm_trie_batch``, ``map_in_map_batch``, ``mmapable``, ``ringbuf``,
    ``user_ringbuf``, ``bpf_loop``, ``object_ids`` (`from_id`, `links` and the details of `query`), ``perfmon``,
    ``btf``, and ``bpffs`` (at /sys/fs/bpf, now).
    """
    bpffs = Feature("bpffs", "4.4", _try_bpffs())
    return MappingProxyType({**_tried(capabilities.effective()), bpffs.name: bpffs})
