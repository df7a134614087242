# SPDX-License-Identifier: BSD-2-Clause
"""The one door to the kernel: flat functions over libbpf, one for each call, on file descriptors and bytes.

Nothing else touches the ffi. Each function knows the name of its call, and turns a refusal into the error that fits,
with a hint at what to do. No pointer into C outlives a call, but for those of an `OpenObject` inside its ``with``.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from pyskl import capabilities

try:
    from pyskl._libbpf import ffi, lib
except ImportError as error:
    if "libbpf.so" not in str(error):
        raise
    words = f"{error}: install libbpf 1.1 or later (apt-get install libbpf1; Fedora: dnf install libbpf)"
    raise ImportError(words, name=error.name, path=error.path) from None
from pyskl.enums import AttachType, MapType, ProgramType
from pyskl.errors import (
    BpfError,
    NoSuchKey,
    NoSuchPin,
    NotSupported,
    PermissionDenied,
    PinExists,
    VerifierError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from typing_extensions import Self

Name = TypeVar("Name")

BPF_ANY: Final[int] = lib.BPF_ANY
BPF_NOEXIST: Final[int] = lib.BPF_NOEXIST
BPF_EXIST: Final[int] = lib.BPF_EXIST
BPF_F_NO_PREALLOC: Final[int] = lib.BPF_F_NO_PREALLOC
BPF_F_MMAPABLE: Final[int] = lib.BPF_F_MMAPABLE
BPF_F_INNER_MAP: Final[int] = lib.BPF_F_INNER_MAP
BPF_FUNC_loop: Final[int] = lib.BPF_FUNC_loop
LINK_TYPE_NETNS: Final[int] = lib.BPF_LINK_TYPE_NETNS
_MAX_LINKS: Final = 64  # of one attach type in one network namespace (MAX_PROGS in the kernel)

# An errno that the kernel gives and errno(3) does not name.
_ENOTSUPP: Final = 524
# libbpf's own errnos begin here; those that mean that it could not read the file as an object.
_LIBBPF_ERRNO: Final = 4000
_LIBBPF_FORMAT: Final = 4001
_LIBBPF_UNREADABLE: Final = frozenset({4000, _LIBBPF_FORMAT, 4003})  # LIBELF, FORMAT, ENDIAN

_SIOCGSKNS: Final = 0x894C  # <linux/sockios.h>

MOUNT_BPFFS: Final = "mount -t bpf bpf /sys/fs/bpf"

_NO_BPF: Final = "this kernel was built without CONFIG_BPF_SYSCALL, or a seccomp filter keeps bpf(2) away"
_NO_BTF: Final = "the object refers to the kernel's own types, and this kernel was built without CONFIG_DEBUG_INFO_BTF"

_NOT_BY_CAPABILITY: Final = "a security module forbids it, or RLIMIT_MEMLOCK is too low (before Linux 5.11)"

_HINTS: Final = {
    ("bpf_object__open_mem", errno.ENOEXEC): "it must be an object that clang -O2 -g -target bpf makes",
    ("bpf_object__open_mem", errno.EINVAL): "it must be an object that clang -O2 -g -target bpf makes",
    ("BPF_LINK_CREATE", errno.E2BIG): (
        f"a network namespace takes {_MAX_LINKS} sk_lookup programs; pyskl.links() lists those attached: detach one"
    ),
    (
        "BPF_LINK_UPDATE",
        errno.EPERM,
    ): "the link does not hold the expected program; its info.prog_id says which it holds",
    (
        "BPF_LINK_UPDATE",
        errno.ENOLINK,
    ): "the link was detached, or its network namespace is gone: attach the program anew",
    ("BPF_LINK_UPDATE", errno.EINVAL): "a link takes only a program of the type and attach type that it was made with",
    ("BPF_MAP_CREATE", errno.EPERM): _NOT_BY_CAPABILITY,
    ("BPF_PROG_LOAD", errno.EPERM): _NOT_BY_CAPABILITY,
    ("BPF_MAP_CREATE", errno.EINVAL): "this kernel takes no map of this type with these sizes and flags",
    ("BPF_MAP_CREATE", errno.E2BIG): "the map would be larger than the kernel can address: lower max_entries",
    ("BPF_MAP_CREATE", errno.ENOMEM): "the kernel has no memory for a map of this size: lower max_entries",
    ("BPF_MAP_UPDATE_ELEM", errno.EPERM): "the map is frozen, or was opened for reading alone",
    ("BPF_MAP_UPDATE_ELEM", errno.E2BIG): "the map is full: delete entries, or make it with more max_entries",
    ("BPF_MAP_UPDATE_ELEM", errno.ENOSPC): "the map is full: delete entries, or make it with more max_entries",
    ("BPF_MAP_UPDATE_ELEM", errno.EEXIST): "the key has an entry; mode='any' replaces it",
    ("BPF_MAP_UPDATE_ELEM", errno.EINVAL): "a map of this type takes no such entry, or no such mode",
    ("BPF_MAP_FREEZE", errno.EBUSY): "the map is mapped into memory for writing: let the memoryview go first",
    ("BPF_OBJ_PIN", errno.EACCES): "the folder's mode keeps this user from making files in it",
    ("mmap", errno.EPERM): "the map is frozen: readonly=True maps it for reading",
    ("BPF_MAP_DELETE_ELEM", errno.EPERM): "the map is frozen, or was opened for reading alone",
    ("BPF_MAP_LOOKUP_ELEM", errno.ENOSPC): "a map of sockets tells their cookies only where its values have 8 bytes",
    ("BPF_PROG_TEST_RUN", errno.EOPNOTSUPP): (
        "the program selected a socket of a SO_REUSEPORT group, which a test run can't do; "
        "BPF_SK_LOOKUP_F_NO_REUSEPORT in bpf_sk_assign() selects that member itself"
    ),
    ("BPF_OBJ_GET", errno.EACCES): "the pin's mode keeps this user out, or the file is no pin",
    ("BPF_OBJ_GET", errno.EPERM): f"only what is on bpffs can be opened so ({MOUNT_BPFFS})",
    ("BPF_OBJ_GET", errno.ENOENT): "nothing is pinned there",
    ("BPF_OBJ_PIN", errno.EEXIST): "open it with from_pin(), or remove it first",
    ("BPF_OBJ_PIN", errno.ENOENT): "its folder does not exist",
    ("BPF_PROG_GET_FD_BY_ID", errno.ENOENT): "no program has this id (any more)",
    ("BPF_MAP_GET_FD_BY_ID", errno.ENOENT): "no map has this id (any more)",
    ("BPF_LINK_GET_FD_BY_ID", errno.ENOENT): "no link has this id (any more)",
}

# What a call needs, where it does not depend on what it is asked for.
_BY_ID: Final = ("CAP_SYS_ADMIN",)
_NEEDS: Final = {
    "BPF_PROG_QUERY": ("CAP_NET_ADMIN",),
    "BPF_PROG_GET_FD_BY_ID": _BY_ID,
    "BPF_MAP_GET_FD_BY_ID": _BY_ID,
    "BPF_LINK_GET_FD_BY_ID": _BY_ID,
    "BPF_LINK_GET_NEXT_ID": _BY_ID,
    "setns": ("CAP_SYS_ADMIN",),
    "SIOCGSKNS": ("CAP_NET_ADMIN",),
    "unshare": ("CAP_SYS_ADMIN",),
}

# The classes that are Python's own for an errno, by the call's group.
_CLASSES: Final[dict[tuple[str, int], type[BpfError]]] = {
    ("BPF_OBJ_GET", errno.ENOENT): NoSuchPin,
    ("BPF_OBJ_PIN", errno.ENOENT): NoSuchPin,
    ("BPF_OBJ_PIN", errno.EEXIST): PinExists,
}

# What the kernel means when it says ENOTSUPP to a call, and since when some kernel does it (None: none, or not known).
_UNSUPPORTED: Final = {
    "BPF_MAP_LOOKUP_BATCH": ("looking up many entries of such a map at once", None),
    "BPF_MAP_UPDATE_BATCH": ("updating many entries of such a map at once", None),
    "BPF_MAP_LOOKUP_ELEM": ("reading an entry of such a map", None),
    "BPF_MAP_UPDATE_ELEM": ("updating an entry of such a map", None),
    "BPF_MAP_DELETE_ELEM": ("deleting an entry of such a map", None),
    "BPF_MAP_GET_NEXT_KEY": ("iterating over such a map", None),
    "BPF_PROG_TEST_RUN": ("a test run of a sk_lookup program", "5.13"),
}

# What a kernel says EINVAL to that does not know the command, or what it is about; nothing else here makes it say so.
_UNKNOWN: Final = {
    "BPF_PROG_QUERY": ("programs of type SK_LOOKUP", "5.9"),
    "BPF_LINK_GET_FD_BY_ID": ("ids of links", "5.8"),
    "BPF_LINK_GET_NEXT_ID": ("ids of links", "5.8"),
}

# Since when Linux has the types that came later than maps and programs did, or that some kernels are built without.
# Two tables, since members of two enumerations are equal where their numbers are.
PROGRAMS_SINCE: Final = {
    ProgramType.SK_REUSEPORT: "4.19",
    ProgramType.SK_LOOKUP: "5.9",
    ProgramType.SYSCALL: "5.14",
    ProgramType.NETFILTER: "6.4",
}
MAPS_SINCE: Final = {
    MapType.SOCKMAP: "4.14",
    MapType.SOCKHASH: "4.18",
    MapType.REUSEPORT_SOCKARRAY: "4.19",
    MapType.RINGBUF: "5.8",
    MapType.INODE_STORAGE: "5.10",
    MapType.TASK_STORAGE: "5.11",
    MapType.BLOOM_FILTER: "5.16",
    MapType.USER_RINGBUF: "6.1",
    MapType.CGRP_STORAGE: "6.2",
}

# What needs more than CAP_BPF: map_create(), is_net_admin_prog_type(), is_perfmon_prog_type() in kernel/bpf/syscall.c.
_NET_ADMIN_MAPS: Final = frozenset(
    {MapType.SOCKMAP, MapType.SOCKHASH, MapType.DEVMAP, MapType.DEVMAP_HASH, MapType.XSKMAP}
)
_NET_ADMIN_PROGRAMS: Final = frozenset(
    {
        ProgramType.SCHED_CLS,
        ProgramType.SCHED_ACT,
        ProgramType.XDP,
        ProgramType.LWT_IN,
        ProgramType.LWT_OUT,
        ProgramType.LWT_XMIT,
        ProgramType.LWT_SEG6LOCAL,
        ProgramType.SK_SKB,
        ProgramType.SK_MSG,
        ProgramType.FLOW_DISSECTOR,
        ProgramType.CGROUP_DEVICE,
        ProgramType.CGROUP_SOCK,
        ProgramType.CGROUP_SOCK_ADDR,
        ProgramType.CGROUP_SOCKOPT,
        ProgramType.CGROUP_SYSCTL,
        ProgramType.SOCK_OPS,
        ProgramType.EXT,
        ProgramType.NETFILTER,
    }
)
_PERFMON_PROGRAMS: Final = frozenset(
    {
        ProgramType.KPROBE,
        ProgramType.TRACEPOINT,
        ProgramType.PERF_EVENT,
        ProgramType.RAW_TRACEPOINT,
        ProgramType.RAW_TRACEPOINT_WRITABLE,
        ProgramType.TRACING,
        ProgramType.LSM,
        ProgramType.STRUCT_OPS,
        ProgramType.EXT,
    }
)

logging.getLogger("pyskl").addHandler(logging.NullHandler())
_logger: Final = logging.getLogger("pyskl.libbpf")
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)  # enum libbpf_print_level

lib.pyskl_init()


# --- refusals ---------------------------------------------------------------------------------------------------------


def _not_supported(
    call: str,
    number: int,
    feature: str,
    since: str | None,
    *,
    hint: str | None = None,
    words: str | None = None,
    filename: str | None = None,
) -> NotSupported:
    """Make the error of what the kernel does not know."""
    if hint is None:
        older = f"it is older than Linux {since}, or" if since else "it is"
        hint = f"this kernel has no {feature}: {older} built without them"
    refused = NotSupported(number, words or os.strerror(number), call=call, hint=hint, filename=filename)
    refused.feature, refused.since = feature, since
    return refused


def _unknown_type(call: str, kind: MapType | ProgramType) -> NotSupported | None:
    """Make the error of a type that the kernel does not know, or give None where it knows it.

    It says EINVAL to one, as to much else, so libbpf is asked to try it: for who may, since it tells no cause.
    """
    if capabilities.missing(map_needs(kind) if isinstance(kind, MapType) else program_needs(kind)):
        return None
    with _Messages():  # each probe gives less than 0 where libbpf does not know the type itself
        if isinstance(kind, MapType):
            what, since, known = "maps", MAPS_SINCE.get(kind), lib.libbpf_probe_bpf_map_type(kind, ffi.NULL)
        else:
            what, since, known = "programs", PROGRAMS_SINCE.get(kind), lib.libbpf_probe_bpf_prog_type(kind, ffi.NULL)
    return None if known else _not_supported(call, errno.EINVAL, f"{what} of type {kind.name}", since)


def _error(
    call: str,
    number: int,
    *,
    needs: tuple[str, ...] = (),
    words: str | None = None,
    filename: str | None = None,
) -> BpfError:
    """Make the error that fits what the kernel, or libbpf, said of a call."""
    if number >= _LIBBPF_ERRNO:
        words = words or _libbpf_words(number)
        number = errno.ENOEXEC if number in _LIBBPF_UNREADABLE else errno.EINVAL
    if number == _ENOTSUPP:
        refused = NotSupported(errno.EOPNOTSUPP, "not supported by the kernel", call=call, filename=filename)
        refused.feature, refused.since = _UNSUPPORTED.get(call, (call, None))
        return refused
    if number == errno.ENOSYS and call.startswith(("BPF_", "bpf_object__load")):
        return _not_supported(call, number, "bpf(2)", "3.18", hint=_NO_BPF, filename=filename)
    if number == errno.EINVAL and call in _UNKNOWN:
        return _not_supported(call, number, *_UNKNOWN[call])
    if number == errno.EPERM and (missing := capabilities.missing(needs or _NEEDS.get(call, ()))):
        lacking = f"the process lacks {' and '.join(missing)}"
        if call.startswith("BPF_") and capabilities.in_user_namespace():
            lacking += ", which no user namespace but the initial one can give it"
        denied = PermissionDenied(number, os.strerror(number), call=call, hint=lacking, filename=filename)
        denied.missing = missing
        return denied
    kind, hint = _CLASSES.get((call, number), BpfError), _HINTS.get((call.replace("_BATCH", "_ELEM"), number))
    return kind(number, words or os.strerror(number), call=call, hint=hint, filename=filename)


def _check(
    call: str,
    result: int,
    *,
    needs: tuple[str, ...] = (),
    filename: str | None = None,
) -> int:
    """Give the result of a call on, or raise what the kernel said of it."""
    if result < 0:
        raise _error(call, -result, needs=needs, filename=filename)
    return result


def _libbpf_words(number: int) -> str:
    text = ffi.new("char[]", 128)
    lib.libbpf_strerror(number, text, 128)
    return str(ffi.string(text).decode())


class _Messages:
    """What libbpf prints inside a ``with`` goes to logging, and stays here for the error."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __enter__(self) -> Self:
        lib.pyskl_capture_begin()
        return self

    def __exit__(self, *_: object) -> None:
        size = ffi.new("size_t *")
        text = lib.pyskl_capture_end(size)
        records = ffi.buffer(text, size[0])[:].split(b"\0")[:-1] if text else []
        lib.free(text)
        least = _logger.getEffectiveLevel()
        for record in records:
            level = _LEVELS[record[0] - ord("0")]
            if level < min(least, logging.WARNING):
                continue
            message = record[1:].decode(errors="replace").rstrip()
            if level == logging.WARNING:
                self.warnings.append(message.removeprefix("libbpf: "))
            _logger.log(level, "%s", message)

    def find(self, text: str) -> str | None:
        return next((message for message in self.warnings if text in message), None)


# --- maps -------------------------------------------------------------------------------------------------------------


def map_needs(kind: int) -> tuple[str, ...]:
    """Name the capabilities that making a map of this type needs."""
    return ("CAP_BPF", "CAP_NET_ADMIN") if kind in _NET_ADMIN_MAPS else ("CAP_BPF",)


def program_needs(kind: int) -> tuple[str, ...]:
    """Name the capabilities that loading a program of this type needs."""
    net_admin = ("CAP_NET_ADMIN",) if kind in _NET_ADMIN_PROGRAMS else ()
    perfmon = ("CAP_PERFMON",) if kind in _PERFMON_PROGRAMS else ()
    return ("CAP_BPF", *net_admin, *perfmon)


def map_create(
    kind: int,
    name: bytes,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: int,
    inner: int | None,
) -> int:
    """BPF_MAP_CREATE: the new map's fd."""
    options = ffi.new("struct bpf_map_create_opts *", {"map_flags": flags})
    options.sz = ffi.sizeof(options[0])
    if inner is not None:
        options.inner_map_fd = inner
    with _Messages():
        fd = lib.bpf_map_create(kind, name, key_size, value_size, max_entries, options)
    if fd == -errno.EINVAL and (unknown := _unknown_type("BPF_MAP_CREATE", MapType(kind))):
        raise unknown
    return _check("BPF_MAP_CREATE", fd, needs=map_needs(kind))


def _absent(call: str, key: bytes) -> NoSuchKey:
    return NoSuchKey(errno.ENOENT, f"nothing under key {key!r}", call=call)


def map_lookup(fd: int, key: bytes, size: int) -> bytes:
    """BPF_MAP_LOOKUP_ELEM: the value, of `size` bytes as user space sees it."""
    value = ffi.new("char[]", size)
    result = lib.bpf_map_lookup_elem(fd, key or ffi.NULL, value)  # a queue has no keys
    if result:
        raise _absent("BPF_MAP_LOOKUP_ELEM", key) if result == -errno.ENOENT else _error("BPF_MAP_LOOKUP_ELEM", -result)
    found: bytes = ffi.unpack(value, size)
    return found


def map_update(fd: int, key: bytes, value: bytes, flags: int) -> None:
    """BPF_MAP_UPDATE_ELEM."""
    result = lib.bpf_map_update_elem(fd, key or ffi.NULL, value, flags)
    if result:
        raise _update_error(key, -result, flags)


def _update_error(key: bytes, number: int, flags: int) -> BpfError:
    if number == errno.ENOENT and flags == BPF_EXIST:
        return _absent("BPF_MAP_UPDATE_ELEM", key)
    return _error("BPF_MAP_UPDATE_ELEM", number)


def map_update_socket(fd: int, key: bytes, socket: int, value_size: int, flags: int) -> None:
    """BPF_MAP_UPDATE_ELEM of a map of sockets."""
    result = lib.pyskl_socket_update(fd, key, socket, value_size, flags)
    if result:
        raise _update_error(key, -result, flags)


def map_update_sockets(fd: int, entries: dict[bytes, int], value_size: int) -> tuple[int, BpfError | None]:
    """BPF_MAP_UPDATE_ELEM of a map of sockets, again and again: how many were set, and what was said of the next."""
    done = ffi.new("uint32_t *")
    keys, sockets = b"".join(entries), ffi.new("int[]", list(entries.values()))
    key_size = len(keys) // (len(entries) or 1)
    result = lib.pyskl_sockets_update(fd, keys, key_size, sockets, len(entries), value_size, done)
    return done[0], _error("BPF_MAP_UPDATE_ELEM", -result) if result else None


def map_delete(fd: int, key: bytes, *, empty: int = errno.ENOENT) -> None:
    """BPF_MAP_DELETE_ELEM; `empty` is a further errno that says that there is nothing."""
    result = lib.bpf_map_delete_elem(fd, key)
    if result:
        absent = -result in (errno.ENOENT, empty)
        raise _absent("BPF_MAP_DELETE_ELEM", key) if absent else _error("BPF_MAP_DELETE_ELEM", -result)


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """BPF_MAP_GET_NEXT_KEY: the key after this one, or the first; None after the last."""
    following = ffi.new("char[]", key_size)
    result = lib.bpf_map_get_next_key(fd, ffi.NULL if key is None else key, following)
    if result == -errno.ENOENT:
        return None
    _check("BPF_MAP_GET_NEXT_KEY", result)
    return bytes(ffi.buffer(following))


def map_lookup_batch(
    fd: int, position: bytes | None, key_size: int, value_size: int, count: int
) -> tuple[bytes, bytes, bytes | None]:
    """BPF_MAP_LOOKUP_BATCH: up to `count` entries from a position on, or more where a hash bucket holds more.

    Gives their keys and their values, each in one piece, and the position of the next, or None.
    """
    following = ffi.new("char[]", max(key_size, 4))  # a key, or the number of a bucket
    read = ffi.new("uint32_t *")
    while True:
        keys, values = ffi.new("char[]", key_size * count), ffi.new("char[]", value_size * count)
        read[0] = count
        start = ffi.NULL if position is None else ffi.from_buffer(position)
        result = lib.bpf_map_lookup_batch(fd, start, following, keys, values, read, ffi.NULL)
        if result == -errno.ENOSPC:
            count *= 2
        elif result != -errno.EINTR:  # the entry that came next was deleted while it was read
            break
    if result != -errno.ENOENT:
        _check("BPF_MAP_LOOKUP_BATCH", result)
    return (
        bytes(ffi.buffer(keys, key_size * read[0])),
        bytes(ffi.buffer(values, value_size * read[0])),
        None if result else bytes(ffi.buffer(following)),
    )


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> None:
    """BPF_MAP_UPDATE_BATCH."""
    written = ffi.new("uint32_t *", count)
    _check("BPF_MAP_UPDATE_BATCH", lib.bpf_map_update_batch(fd, keys, values, written, ffi.NULL))


def map_freeze(fd: int) -> None:
    """BPF_MAP_FREEZE."""
    _check("BPF_MAP_FREEZE", lib.bpf_map_freeze(fd))


def mmap(fd: int, size: int, *, readonly: bool) -> Any:
    """mmap(2) of a map, whole pages of it: Python's own object, which unmaps it when nobody uses it."""
    import mmap as _mmap  # noqa: PLC0415 - few need it, and it is not free

    protection = _mmap.PROT_READ if readonly else _mmap.PROT_READ | _mmap.PROT_WRITE
    try:
        return _mmap.mmap(fd, -(-size // _mmap.PAGESIZE) * _mmap.PAGESIZE, _mmap.MAP_SHARED, protection)
    except OSError as error:
        raise _error("mmap", error.errno or 0) from None


class RingBuffer:
    """The memory of a map of type RINGBUF, from which one reader takes records."""

    def __init__(self, fd: int, size: int) -> None:
        import mmap as _mmap  # noqa: PLC0415 - few need it, and it is not free

        page = _mmap.PAGESIZE
        self._size = size
        try:
            self._consumer = _mmap.mmap(fd, page)
            self._producer = _mmap.mmap(fd, page + 2 * size, prot=_mmap.PROT_READ, offset=page)
        except OSError as error:
            raise _error("mmap", error.errno or 0) from None
        self._data_at = page

    def read(self, size: int, room: int) -> bytes:
        """Take up to `room` records of a size, in one piece."""
        out = ffi.new("char[]", size * room)
        producer = ffi.from_buffer(self._producer)
        data = ffi.cast("char *", producer) + self._data_at
        consumer = ffi.from_buffer(self._consumer, require_writable=True)
        count = lib.pyskl_ring_read(consumer, producer, data, self._size, out, size, room)
        return bytes(ffi.buffer(out, count * size))


def possible_cpus() -> int:
    """Count the CPUs that a per-CPU value has a part for."""
    with _Messages():
        count = lib.libbpf_num_possible_cpus()
    return _check("libbpf_num_possible_cpus", count)


# --- programs and links -----------------------------------------------------------------------------------------------


def prog_load(kind: int, attach_type: int, instructions: bytes) -> int:
    """BPF_PROG_LOAD of a few instructions, to try what the kernel takes: the program's fd."""
    options = ffi.new("struct bpf_prog_load_opts *", {"expected_attach_type": attach_type})
    options.sz = ffi.sizeof(options[0])
    with _Messages():
        fd = lib.bpf_prog_load(kind, ffi.NULL, b"Dual BSD/GPL", instructions, len(instructions) // 8, options)
    if fd == -errno.EINVAL and (unknown := _unknown_type("BPF_PROG_LOAD", ProgramType(kind))):
        raise unknown
    return _check("BPF_PROG_LOAD", fd, needs=("CAP_BPF",))


def helper_exists(kind: int, helper: int) -> bool:
    """Ask libbpf to try a helper in a program of a type."""
    with _Messages():
        return bool(lib.libbpf_probe_bpf_helper(kind, helper, ffi.NULL) == 1)


def prog_test_run(
    fd: int,
    protocol: int,
    family: int,
    local: bytes,
    local_port: int,
    remote: bytes,
    remote_port: int,
    repeat: int,
) -> tuple[int, int, int]:
    """BPF_PROG_TEST_RUN with the context of a look-up: verdict, cookie, nanoseconds a run."""
    verdict, cookie, duration = ffi.new("uint32_t *"), ffi.new("uint64_t *"), ffi.new("uint32_t *")
    done = spent = 0
    at_once = repeat
    while done < repeat:
        at_once = min(at_once, repeat - done)
        result = lib.pyskl_test_run(
            fd, protocol, family, local, local_port, remote, remote_port, at_once, verdict, cookie, duration
        )
        if result == -errno.EINTR:  # by a signal, whose handler let us go on; what was run is lost
            at_once = max(at_once // 2, 1)
            continue
        _check("BPF_PROG_TEST_RUN", result)
        done += at_once
        spent += at_once * duration[0]
        at_once *= 2
    return verdict[0], cookie[0], spent // repeat


def prog_query(netns: int) -> tuple[int, ...]:
    """BPF_PROG_QUERY: the ids of a namespace's sk_lookup programs, in the order in which they run."""
    ids = ffi.new("uint32_t[]", _MAX_LINKS)
    count = ffi.new("uint32_t *", _MAX_LINKS)
    _check("BPF_PROG_QUERY", lib.bpf_prog_query(netns, AttachType.SK_LOOKUP, 0, ffi.NULL, ids, count))
    return tuple(ids[0 : count[0]])


def link_create(program: int, netns: int) -> int:
    """BPF_LINK_CREATE of a sk_lookup program in a network namespace: the link's fd."""
    return _check("BPF_LINK_CREATE", lib.bpf_link_create(program, netns, AttachType.SK_LOOKUP, ffi.NULL))


def link_update(link: int, program: int, expected: int | None) -> None:
    """BPF_LINK_UPDATE, with the program that it must hold where one is given."""
    options = ffi.new("struct bpf_link_update_opts *")
    options.sz = ffi.sizeof(options[0])
    if expected is not None:
        options.flags, options.old_prog_fd = lib.BPF_F_REPLACE, expected
    _check("BPF_LINK_UPDATE", lib.bpf_link_update(link, program, options))


def link_detach(link: int) -> None:
    """BPF_LINK_DETACH."""
    _check("BPF_LINK_DETACH", lib.bpf_link_detach(link))


# --- any object -------------------------------------------------------------------------------------------------------


def dup(fd: int) -> int:
    """Duplicate an fd, close-on-exec (fcntl(2)); never as 0, 1 or 2, which a daemon replaces."""
    return _check("fcntl", lib.pyskl_dup(fd))


def obj_pin(fd: int, path: str) -> None:
    """BPF_OBJ_PIN."""
    result = lib.bpf_obj_pin(fd, os.fsencode(path))
    if result < 0:
        raise _pin_error("BPF_OBJ_PIN", -result, path)


def obj_get(path: str, *, read_only: bool = False) -> int:
    """BPF_OBJ_GET: an fd of what is pinned there; of a map, for reading alone where asked for (BPF_F_RDONLY)."""
    options = ffi.new("struct bpf_obj_get_opts *", {"file_flags": lib.BPF_F_RDONLY if read_only else 0})
    options.sz = ffi.sizeof(options[0])
    fd: int = lib.bpf_obj_get_opts(os.fsencode(path), options)
    if fd < 0:
        raise _pin_error("BPF_OBJ_GET", -fd, path)
    return fd


def _pin_error(call: str, number: int, path: str) -> BpfError:
    """Make the error of a pin. The kernel says EPERM and EACCES of what is not on bpffs, whoever asks."""
    error = _error(call, number, filename=path)
    folder = os.path.dirname(path) or "."
    if number in (errno.EPERM, errno.EACCES, errno.ENOENT) and os.path.isdir(folder) and not is_bpffs(folder):
        error.hint = f"this is not on a BPF file system; pins live on bpffs ({MOUNT_BPFFS})"
    return error


def is_bpffs(path: str) -> bool:
    """Whether a path is on a BPF file system: statfs(2)."""
    return bool(lib.pyskl_filesystem(os.fsencode(path)) == lib.BPF_FS_MAGIC)


def has_bpffs() -> bool:
    """Whether the kernel has the BPF file system, mounted or not: filesystems(5)."""
    with open("/proc/filesystems", "rb") as known:
        return any(line.split()[-1] == b"bpf" for line in known)


def fd_by_id(kind: str, number: int) -> int:
    """BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID or BPF_LINK_GET_FD_BY_ID, for "prog", "map" or "link"."""
    return _check(f"BPF_{kind.upper()}_GET_FD_BY_ID", getattr(lib, f"bpf_{kind}_get_fd_by_id")(number))


def link_ids() -> Iterator[int]:
    """BPF_LINK_GET_NEXT_ID: the id of every link, in the order in which they were made."""
    following = ffi.new("uint32_t *")
    while (result := lib.bpf_link_get_next_id(following[0], following)) != -errno.ENOENT:
        _check("BPF_LINK_GET_NEXT_ID", result)
        yield following[0]


def _info(fd: int, info: Any) -> Any:
    size = ffi.new("uint32_t *", ffi.sizeof(info[0]))
    _check("BPF_OBJ_GET_INFO_BY_FD", lib.bpf_obj_get_info_by_fd(fd, info, size))
    return info


def prog_info(fd: int) -> tuple[Any, tuple[int, ...]]:
    """BPF_OBJ_GET_INFO_BY_FD of a program: its struct bpf_prog_info, and the ids of its maps."""
    info = _info(fd, ffi.new("struct bpf_prog_info *"))
    ids = ffi.new("uint32_t[]", info.nr_map_ids)
    if len(ids):
        pointer = int(ffi.cast("uintptr_t", ids))
        info = _info(fd, ffi.new("struct bpf_prog_info *", {"nr_map_ids": len(ids), "map_ids": pointer}))
    return info, tuple(ids)


def map_info(fd: int) -> Any:
    """BPF_OBJ_GET_INFO_BY_FD of a map: its struct bpf_map_info."""
    return _info(fd, ffi.new("struct bpf_map_info *"))


def link_info(fd: int) -> Any:
    """BPF_OBJ_GET_INFO_BY_FD of a link: what pyskl/_libbpf.c takes from its struct bpf_link_info."""
    info = ffi.new("struct pyskl_link_info *")
    _check("BPF_OBJ_GET_INFO_BY_FD", lib.pyskl_link_info(fd, info))
    return info


def text(field: Any) -> str:
    """Decode a name in one of the kernel's structs."""
    return str(ffi.string(field).decode(errors="replace"))


# --- namespaces and sockets -------------------------------------------------------------------------------------------


def setns(fd: int) -> None:
    """setns(2): move the calling thread into a network namespace."""
    _check("setns", lib.pyskl_setns(fd))


def unshare_netns() -> None:
    """unshare(2): move the calling thread into a new network namespace."""
    _check("unshare", lib.pyskl_unshare())


def is_netns(fd: int) -> bool:
    """Whether an fd is of a network namespace: ioctl_ns(2). What is no namespace at all answers ENOTTY."""
    kind = lib.pyskl_namespace_type(fd)
    if kind != -errno.ENOTTY:
        _check("ioctl", kind)
    return bool(kind == lib.CLONE_NEWNET)


def socket_state(fd: int) -> Any:
    """Ask getsockopt(2) and getsockname(2) about a socket: the struct pyskl_socket_state of pyskl/_libbpf.c."""
    state = ffi.new("struct pyskl_socket_state *")
    _check("getsockopt", lib.pyskl_socket_state(fd, state))
    return state


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): duplicate an fd of another process, close-on-exec."""
    return _check("pidfd_getfd", lib.pyskl_pidfd_getfd(pidfd, fd), needs=("CAP_SYS_PTRACE",))


def no_access(path: str, needs: tuple[str, ...]) -> BpfError:
    """Make the error of a file in /proc that this process may not look at, for want of these capabilities."""
    return _error("open", errno.EPERM, needs=needs, filename=path)


def socket_cookie(fd: int) -> int:
    """SO_COOKIE of getsockopt(2)."""
    cookie = ffi.new("uint64_t *")
    _check("getsockopt", lib.pyskl_socket_cookie(fd, cookie))
    return int(cookie[0])


def socket_netns(fd: int) -> int:
    """SIOCGSKNS: an fd of the network namespace that a socket is in."""
    import fcntl  # noqa: PLC0415 - few need it

    try:
        return fcntl.ioctl(fd, _SIOCGSKNS)
    except OSError as error:
        raise _error("SIOCGSKNS", error.errno or 0) from None


def grace_period() -> bool:
    """MEMBARRIER_CMD_GLOBAL: wait until no packet is on its way with what a look-up found before; whether it could.

    It is synchronize_rcu() in the kernel, and takes some 10 ms. A kernel that keeps CPUs free of ticks (nohz_full)
    refuses it, and so may a seccomp filter.
    """
    return bool(lib.pyskl_grace_period() == 0)


# --- the table of a dispatcher ----------------------------------------------------------------------------------------

BINDING_SIZE: Final[int] = ffi.sizeof("struct pyskl_binding")
LINE_SIZE: Final[int] = lib.PYSKL_LINE
ABI: Final[int] = lib.PYSKL_ABI


def _records(records: bytes | bytearray | memoryview) -> tuple[Any, int]:
    return ffi.from_buffer("struct pyskl_binding[]", records), len(records) // BINDING_SIZE


def parse_prefixes(text: bytes, records: bytearray) -> bool:
    """Put prefixes, one a line, into packed bindings; one whose mark is n shares its line with the n that follow.

    False: a line has no prefix that `ipaddress` would take without a scope, or there are more or fewer lines.
    """
    pointer, count = _records(records)
    return not lib.pyskl_parse_prefixes(ffi.from_buffer(text), len(text), pointer, count)


def bindings_prepare(records: bytearray) -> tuple[int, int] | None:
    """Sort packed bindings for a table, and drop what is there twice; or tell which two contradict each other."""
    conflict = ffi.new("int64_t[2]")
    pointer, count = _records(records)
    kept = lib.pyskl_bindings_prepare(pointer, count, conflict)
    ffi.release(pointer)
    if kept == -1:
        return conflict[0], conflict[1]
    _check("malloc", kept)
    del records[kept * BINDING_SIZE :]
    return None


def bindings_by_precedence(records: bytearray) -> None:
    """Sort packed bindings by precedence."""
    lib.pyskl_bindings_by_precedence(*_records(records))


def bindings_diff(old: bytearray, new: bytearray) -> int:
    """Leave in two prepared lists what the other does not have: how many are in both."""
    both: int = lib.pyskl_bindings_diff(*_records(old), *_records(new))
    for records in (old, new):
        pointer, count = _records(records)
        kept = lib.pyskl_bindings_marked(pointer, count)
        ffi.release(pointer)
        del records[kept * BINDING_SIZE :]
    return both


def bindings_relabel(records: bytearray, labels: list[int]) -> None:
    """Put in the place of each label its element of a list."""
    lib.pyskl_bindings_relabel(*_records(records), ffi.new("uint32_t[]", labels), ffi.NULL)


def bindings_uses(records: bytes | bytearray, labels: int) -> list[int]:
    """Count the bindings of each label, by its number."""
    uses = ffi.new("uint32_t[]", labels)
    lib.pyskl_bindings_relabel(*_records(records), ffi.NULL, uses)
    return list(uses)


class Plan:
    """Where the parts of a table are, for bindings that are prepared."""

    def __init__(self, records: bytes | bytearray, labels: int, spare: int) -> None:
        self._plan = ffi.new("struct pyskl_plan *")
        _check("malloc", lib.pyskl_table_plan(*_records(records), labels, spare, self._plan))
        self.lines: int = self._plan.lines

    def fill(self, memory: memoryview, records: bytes | bytearray, seed: int, number: int) -> bool:
        """Build the table in memory that is all 0. False: the seed does not do."""
        result = lib.pyskl_table_fill(ffi.from_buffer(memory), self._plan, *_records(records), seed, number)
        return bool(result != -errno.EAGAIN and not _check("malloc", result))


def _writable(memory: memoryview) -> Any:
    if memory.readonly:
        raise _error("BPF_MAP_UPDATE_ELEM", errno.EPERM)
    return ffi.from_buffer(memory, require_writable=True)


def table_set(memory: memoryview, group: bytes | bytearray, count: int) -> bool:
    """Let one prefix have these bindings, prepared. False: the table has no room."""
    pointer, _ = _records(group)
    result = lib.pyskl_table_set(_writable(memory), pointer, count)
    return bool(result != -errno.ENOSPC and not _check("malloc", result))


def table_get(memory: memoryview, prefix: bytes) -> bytearray:
    """Read the packed bindings of the prefix that a packed binding has."""
    start, (of, _) = ffi.from_buffer(memory), _records(prefix)
    found = bytearray(lib.pyskl_table_get(start, of, ffi.NULL, 0) * BINDING_SIZE)
    lib.pyskl_table_get(start, of, *_records(found))
    return found


def table_uses(memory: memoryview, labels: int) -> list[int]:
    """Count the bindings of each label, by its number."""
    uses = ffi.new("uint32_t[]", labels)
    lib.pyskl_table_scan(ffi.from_buffer(memory), ffi.NULL, 0, uses)
    return list(uses)


def table_scan(memory: memoryview) -> bytearray:
    """Read all packed bindings, in no order."""
    start = ffi.from_buffer(memory)
    found = bytearray(lib.pyskl_table_scan(start, ffi.NULL, 0, ffi.NULL) * BINDING_SIZE)
    pointer, count = _records(found)
    count = min(count, lib.pyskl_table_scan(start, pointer, count, ffi.NULL))
    ffi.release(pointer)
    del found[count * BINDING_SIZE :]
    return found


def table_policy(memory: memoryview, label: int) -> int:
    """Read a label's policy: the word of a struct pyskl_policy."""
    word: int = lib.pyskl_table_policy(ffi.from_buffer(memory), label)
    return word


def table_set_policy(memory: memoryview, label: int, policy: int) -> None:
    """Write a label's policy, in one step."""
    lib.pyskl_table_set_policy(_writable(memory), label, policy)


# --- datagrams --------------------------------------------------------------------------------------------------------


# The structs of pyskl/_datagrams.c; an address is 28 bytes as the kernel has it (struct sockaddr_in6), or zeros.
_RECEIVED: Final = struct.Struct("=IHH28s28s")
_OUTGOING: Final = struct.Struct("=iI28s28s")


class DatagramBatch:
    """Room for up to `count` datagrams, of up to `size` bytes each. One thread uses it at a time."""

    def __init__(self, count: int, size: int) -> None:
        batch = lib.pyskl_batch_new(count, size)
        if not batch:
            raise MemoryError(f"no memory for {count} datagrams of {size} bytes")
        self._batch = ffi.gc(batch, lib.pyskl_batch_free)
        self._data = ffi.buffer(batch.data, count * size)
        self._received = ffi.buffer(batch.received, count * _RECEIVED.size)
        self._places = range(0, count * size, size) if size else [0] * count
        self.count, self.size = count, size

    def receive(
        self, fd: int, count: int, size: int, sources: Mapping[bytes, Name], destinations: Mapping[bytes, Name]
    ) -> tuple[list[tuple[bytes, Name, Name]], list[int]]:
        """recvmmsg(2) with MSG_WAITFORONE: up to `count` datagrams of up to `size` bytes.

        Gives the data, source and destination of each, the latter two as they stand in the mappings; and which of them
        were longer than `size`. Where the kernel has coalesced datagrams (UDP_GRO) there are more than `count`.

        Raises:
            OSError: as recv(2) of a socket says, so BlockingIOError where there is none.
        """
        came = lib.pyskl_batch_receive(self._batch, fd, count, size)
        if came < 0:
            raise OSError(-came, os.strerror(-came))
        if self._batch.coalesced:
            return self._separate(came, sources, destinations)
        data = self._data
        if came == 1:  # the same in less time
            size, _, cut, source, destination = _RECEIVED.unpack_from(self._received)
            return [(data[:size], sources[source], destinations[destination])], [0] if cut else []
        received = self._received[: came * _RECEIVED.size]
        cut = self._batch.truncated and [i for i, (_, _, cut, *_) in enumerate(_RECEIVED.iter_unpack(received)) if cut]
        return [
            (data[place : place + size], sources[source], destinations[destination])
            for place, (size, _, _, source, destination) in zip(self._places, _RECEIVED.iter_unpack(received))  # noqa: B905
        ], cut or []

    def _separate(
        self, came: int, sources: Mapping[bytes, Name], destinations: Mapping[bytes, Name]
    ) -> tuple[list[tuple[bytes, Name, Name]], list[int]]:
        """Give what came as `receive` does, where some of it is several datagrams, one after the other in one place."""
        separate: list[tuple[bytes, Name, Name]] = []
        cut = []
        for number in range(came):
            size, segment, truncated, source, destination = _RECEIVED.unpack_from(
                self._received, number * _RECEIVED.size
            )
            place = self._places[number]
            together, step = self._data[place : place + size], segment or size or 1
            parts = [together[start : start + step] for start in range(0, size or 1, step)]
            separate += [(part, sources[source], destinations[destination]) for part in parts]
            cut += [len(separate) - 1] if truncated else []
        return separate, cut


def outgoing(fd: int, size: int, to: bytes, source: bytes) -> bytes:
    """Describe a datagram that `send_datagrams` is to send; from the socket's own address where `source` is empty."""
    return _OUTGOING.pack(fd, size, to, source)


def send_datagrams(described: Sequence[bytes], data: Sequence[bytes]) -> tuple[int, int]:
    """sendmmsg(2), without waiting: how many went out, and the errno that stopped the next or 0."""
    result = lib.pyskl_send(b"".join(described), len(described), b"".join(data))
    return result & 0xFFFFFFFF, result >> 32


def mute(fd: int) -> None:
    """SO_ATTACH_FILTER: let a socket receive nothing, for good."""
    _check("SO_ATTACH_FILTER", lib.pyskl_mute(fd))


# --- ELF objects ------------------------------------------------------------------------------------------------------


MapSpec: TypeAlias = tuple[int, int, int]
"""The type of a map, and the sizes of its keys and values."""


class Variable:
    """A global variable of an object that is open, at an offset in the map of its section."""

    def __init__(self, name: str, section: str, offset: int, size: int, *, integer: bool, signed: bool) -> None:
        self.name = name
        self.section = section
        self.offset = offset
        self.size = size
        self.integer = integer
        self.signed = signed


class OpenObject:
    """An ELF object that libbpf has opened and not yet loaded; it lives as long as its ``with``."""

    def __init__(self, elf: bytes, name: str) -> None:
        options = ffi.new("struct bpf_object_open_opts *")
        options.sz = ffi.sizeof(options[0])
        encoded = ffi.new("char[]", name.encode("ascii", "replace"))
        options.object_name = encoded
        with _Messages() as messages:
            self._object = lib.bpf_object__open_mem(elf, len(elf), options)
            number = ffi.errno
        if not self._object:
            number = number if elf else _LIBBPF_FORMAT  # it calls an empty file an invalid argument
            words = messages.warnings[-1] if messages.warnings else None
            raise _error("bpf_object__open_mem", number, words=words)
        self._programs: dict[str, Any] = {}
        self._maps: dict[str, Any] = {}
        program = lib.bpf_object__next_program(self._object, ffi.NULL)
        while program:
            self._programs[text(lib.bpf_program__name(program))] = program
            program = lib.bpf_object__next_program(self._object, program)
        entry = lib.bpf_object__next_map(self._object, ffi.NULL)
        while entry:
            self._maps[section_name(text(lib.bpf_map__name(entry)))] = entry
            entry = lib.bpf_object__next_map(self._object, entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _Messages():
            lib.bpf_object__close(self._object)

    @property
    def programs(self) -> dict[str, ProgramType]:
        return {name: ProgramType(lib.bpf_program__type(program)) for name, program in self._programs.items()}

    @property
    def maps(self) -> dict[str, MapSpec]:
        return {
            name: (lib.bpf_map__type(entry), lib.bpf_map__key_size(entry), lib.bpf_map__value_size(entry))
            for name, entry in self._maps.items()
        }

    @property
    def variables(self) -> dict[str, Variable]:
        count = lib.pyskl_variables(self._object, ffi.NULL, 0)
        found = ffi.new("struct pyskl_variable[]", count)
        lib.pyskl_variables(self._object, found, count)
        return {
            text(each.name): Variable(
                text(each.name),
                text(each.section),
                each.offset,
                each.size,
                integer=bool(each.integer),
                signed=bool(each.is_signed),
            )
            for each in found
        }

    def forget_pins(self) -> None:
        """Pin no map by its name, as LIBBPF_PIN_BY_NAME in the source asks for."""
        for entry in self._maps.values():
            _check("bpf_map__set_pin_path", lib.bpf_map__set_pin_path(entry, ffi.NULL))

    def leave_out(self, program: str) -> None:
        _check("bpf_program__set_autoload", lib.bpf_program__set_autoload(self._programs[program], False))

    def set_initial(self, variable: Variable, value: bytes) -> None:
        entry = self._maps[variable.section]
        size = ffi.new("size_t *")
        start = lib.bpf_map__initial_value(entry, size)
        section = bytearray(ffi.buffer(start, size[0]))
        section[variable.offset : variable.offset + variable.size] = value
        result = lib.bpf_map__set_initial_value(entry, ffi.from_buffer(section), len(section))
        _check("bpf_map__set_initial_value", result)

    def follow_calls(self) -> None:
        """Have the verifier follow the calls of what takes the context: Linux 5.10 takes it in no other way."""
        lib.pyskl_follow_calls(self._object)

    def resize(self, name: str, max_entries: int) -> None:
        _check("bpf_map__set_max_entries", lib.bpf_map__set_max_entries(self._maps[name], max_entries))

    def reuse(self, name: str, fd: int) -> None:
        with _Messages():
            result = lib.bpf_map__reuse_fd(self._maps[name], fd)
        _check("bpf_map__reuse_fd", result)

    def load(self, log_level: int, needs: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
        """Load it into the kernel: fds of our own for its programs and its maps, by name."""
        for program in self._programs.values():
            lib.bpf_program__set_log_level(program, log_level)
        with _Messages() as messages:
            result = lib.bpf_object__load(self._object)
        if result < 0:
            raise self._unknown(-result, messages) or _load_error(-result, messages, needs)
        programs: dict[str, int] = {}
        maps: dict[str, int] = {}
        try:
            for ours, theirs, fd_of in (
                (programs, self._programs, lib.bpf_program__fd),
                (maps, self._maps, lib.bpf_map__fd),
            ):
                ours.update((name, dup(fd)) for name, each in theirs.items() if (fd := fd_of(each)) >= 0)
        except BaseException:
            for fd in (*programs.values(), *maps.values()):
                os.close(fd)
            raise
        return programs, maps

    def _unknown(self, number: int, messages: _Messages) -> NotSupported | None:
        """Make the error of a load that failed for a type which the kernel does not know."""
        if number != errno.EINVAL or messages.find(_LOG_BEGINS):
            return None
        for name, program in self._programs.items():
            if messages.find(f"prog '{name}': BPF program load failed"):
                return _unknown_type("BPF_PROG_LOAD", ProgramType(lib.bpf_program__type(program)))
        for name, entry in self._maps.items():
            if messages.find(f"map '{name}': failed to create"):
                return _unknown_type("BPF_MAP_CREATE", MapType(lib.bpf_map__type(entry)))
        return None


def section_name(name: str) -> str:
    """Name the map of a section (.rodata, .data, .bss) by that alone: libbpf puts the object's name before it."""
    return name[name.find(".") :] if "." in name else name


_LOG_BEGINS: Final = "-- BEGIN PROG LOAD LOG --\n"
_LOG_ENDS: Final = "-- END PROG LOAD LOG --"


def _load_error(number: int, messages: _Messages, needs: tuple[str, ...]) -> BpfError:
    """Make the error of an object that would not load, from what libbpf said about the step that failed."""
    of_program = messages.find("BPF program load failed") or messages.find("Couldn't load trivial BPF program")
    of_map = messages.find("failed to create")
    words = of_program or of_map or next(iter(messages.warnings), None)
    call = "BPF_PROG_LOAD" if of_program else "BPF_MAP_CREATE" if of_map else "bpf_object__load"
    if words and "failed to find valid kernel BTF" in words:
        return _not_supported(call, number, "BTF of its own", "5.4", hint=_NO_BTF, words=words)
    error = _error(call, number, needs=needs, words=words)
    log = messages.find(_LOG_BEGINS)
    if log is None or isinstance(error, PermissionDenied):
        return error
    rejected = VerifierError(error.errno or 0, error.strerror or "", call=call, hint=error.hint)
    rejected.log = log.partition(_LOG_BEGINS)[2].partition(_LOG_ENDS)[0]
    if capabilities.missing(("CAP_PERFMON",)):
        rejected.hint = "the process lacks CAP_PERFMON, without which the verifier rejects more programs"
    return rejected
