# SPDX-License-Identifier: BSD-2-Clause
"""BPF maps as mutable mappings: bpf(2), and Documentation/bpf/maps.rst in the kernel's source.

A class says how keys and values of its map types look from user space, and no more: the mapping itself is written once,
in `Map`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import sys
from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, Sequence, ValuesView
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

from pyskl import _sys, sockets
from pyskl._fd import fd_of
from pyskl.enums import MapType
from pyskl.errors import BpfError, NoSuchKey, NotSupported
from pyskl.pinning import KernelObject, StrPath, fd_of_kind

if TYPE_CHECKING:
    from typing_extensions import Self

Key: TypeAlias = bytes | int
Mode: TypeAlias = Literal["any", "noexist", "exist"]
K = TypeVar("K")
V = TypeVar("V")

_MODES = {"any": _sys.BPF_ANY, "noexist": _sys.BPF_NOEXIST, "exist": _sys.BPF_EXIST}
_BATCH = 1 << 18  # bytes that are read at once
_NAME_MAX = 15  # BPF_OBJ_NAME_LEN, less the NUL
_U32_MAX = 0xFFFFFFFF
_REQUIRED: Any = object()
_ORDER: Literal["little", "big"] = sys.byteorder
_BYTES = (bytes, bytearray, memoryview)


class MapInfo(NamedTuple):
    """What the kernel says of a map (struct bpf_map_info); sizes in bytes."""

    id: int
    type: MapType
    name: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class BeyondEnd(IndexError, KeyError):
    """An index that is not in the array: so, to a mapping, a key that is absent."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError's would quote the sentence


class Map(KernelObject, MutableMapping[K, V]):
    """A BPF map: a mutable mapping of bytes to bytes, of the sizes that it was made with.

    An int will do for a key of 4 bytes. Every operation asks the kernel, so that other processes and programs see it at
    once and are seen; iteration is not a snapshot. Two maps are equal when they are one object, whatever they hold.

    Errors of every operation: ValueError and TypeError for a key or a value of the wrong size or type, before the
    kernel is asked; `NoSuchKey` (a KeyError) for an absent key; `BpfError` for what else the kernel says, with its
    errno: E2BIG where the map is full, EPERM where it is frozen.
    """

    _kind = "map"
    _classes: ClassVar[dict[MapType, type[Map[Any, Any]]]] = {}
    read_only = False  # whether it was opened for reading alone
    _batches: ClassVar[bool] = True  # whether any kernel reads and writes many entries at once

    def _learn(self) -> None:
        super()._learn()
        found = _sys.map_info(self._fd)
        self._info = MapInfo(
            found.id,
            MapType(found.type),
            _sys.text(found.name),
            found.key_size,
            found.value_size,
            found.max_entries,
            found.map_flags,
        )
        # What every operation needs, at hand:
        self._key_size: int = found.key_size
        self._value_size: int = found.value_size
        self._entries: int = found.max_entries
        self._room = self._value_size  # of a value as user space sees it

    @classmethod
    def _class_of(cls, fd: int) -> type[Self]:
        kind = MapType(_sys.map_info(fd).type)
        fitting = Map._classes.get(kind, Map)
        if not issubclass(fitting, cls):
            raise TypeError(f"this is a BPF map of type {kind.name}, and {cls.__name__} is another")
        return fitting

    @classmethod
    def create(
        cls,
        type: MapType,  # noqa: A002 - the kernel's word
        key_size: int = 4,
        value_size: int = 4,
        max_entries: int = 1,
        *,
        flags: int = 0,
        name: str = "",
        inner: Map[Any, Any] | None = None,
    ) -> Self:
        """Make a map (``BPF_MAP_CREATE``).

        Args:
            type: the map's type.
            key_size: of a key, in bytes.
            value_size: of a value, in bytes.
            max_entries: how many it can hold.
            flags: ``BPF_F_*``; an LPM trie always has the one that it needs.
            name: up to 15 letters, digits, dots and underscores.
            inner: for a map of maps, one like those that it will hold.

        Raises:
            PermissionDenied: the process lacks CAP_BPF (for sockmaps and sockhashes CAP_NET_ADMIN too).
            BpfError: the kernel does not take the type with these sizes and flags (EINVAL), or has no memory.
        """
        kind = MapType(type)
        sizes = {"key_size": key_size, "value_size": value_size, "max_entries": max_entries, "flags": flags}
        for what, number in sizes.items():
            if not 0 <= number <= _U32_MAX:
                raise ValueError(f"{what} is a number of 32 bits, not {number}")
        if (kind in {MapType.ARRAY_OF_MAPS, MapType.HASH_OF_MAPS}) != (inner is not None):
            raise TypeError("a map of maps, and no other, needs an inner map to know what it will hold")
        if not isinstance(name, str):
            raise TypeError(f"a name is a str, not {name.__class__.__name__}")
        encoded = name.encode("ascii", "replace")
        if len(encoded) > _NAME_MAX or encoded.translate(None, _NAME_BYTES):
            raise ValueError(f"a name has up to {_NAME_MAX} letters, digits, dots and underscores, unlike {name!r}")
        if kind == MapType.LPM_TRIE:
            flags |= _sys.BPF_F_NO_PREALLOC
        like = None if inner is None else fd_of_kind(inner, "map")
        return cls.own(_sys.map_create(kind, encoded, key_size, value_size, max_entries, flags, like))

    @classmethod
    def from_pin(cls, path: StrPath, *, read_only: bool = False) -> Self:
        """Open a map that is pinned at a path (``BPF_OBJ_GET``).

        Args:
            path: on bpffs.
            read_only: whether for reading alone (``BPF_F_RDONLY``), which read permission on the file is enough for.

        Raises:
            NoSuchPin: nothing is there (a FileNotFoundError, too).
            TypeError: another kind of object is pinned there.
            BpfError: the path is not on bpffs, or its mode forbids it (EACCES).
        """
        opened = super()._from_pin(path, read_only=read_only)
        opened.read_only = read_only
        return opened

    @property
    def info(self) -> MapInfo:
        """What the kernel says of the map (``BPF_OBJ_GET_INFO_BY_FD``)."""
        self.fileno()
        return self._info

    def freeze(self) -> None:
        """Let user space change nothing any more (``BPF_MAP_FREEZE``); programs still can."""
        _sys.map_freeze(self.fileno())

    # What a class with other keys or values says of them:

    def _encode_key(self, key: Any) -> bytes:
        return _as_bytes("key", key, self._key_size)

    def _decode_key(self, key: bytes) -> Any:
        return key

    def _encode_value(self, value: Any) -> bytes:
        return _exactly("value", value, self._value_size)

    def _decode_value(self, value: bytes) -> Any:
        return value

    def _store(self, key: bytes, value: Any, flags: int) -> None:
        _sys.map_update(self.fileno(), key, self._encode_value(value), flags)

    def _delete(self, key: bytes) -> None:
        _sys.map_delete(self.fileno(), key)

    # The mapping:

    def __getitem__(self, key: K | Key) -> V:
        value: V = self._decode_value(_sys.map_lookup(self.fileno(), self._encode_key(key), self._room))
        return value

    def __setitem__(self, key: K | Key, value: V) -> None:
        self._store(self._encode_key(key), value, _sys.BPF_ANY)

    def put(self, key: K | Key, value: V, *, mode: Mode = "any") -> None:
        """Set an entry (``BPF_MAP_UPDATE_ELEM``).

        Args:
            key: its key.
            value: its value.
            mode: ``"noexist"`` (``BPF_NOEXIST``): only where there is none, else `BpfError` with EEXIST; ``"exist"``
                (``BPF_EXIST``): only where there is one, else `NoSuchKey`; ``"any"``: in any case.
        """
        if mode not in _MODES:
            raise ValueError(f"the mode is one of {', '.join(_MODES)}, not {mode!r}")
        self._store(self._encode_key(key), value, _MODES[mode])

    def __delitem__(self, key: K | Key) -> None:
        self._delete(self._encode_key(key))

    def __iter__(self) -> Iterator[K]:
        return (self._decode_key(key) for key, _ in self._raw_items())

    def __len__(self) -> int:
        return sum(1 for _ in self._raw_items())

    def items(self) -> ItemsView[K, V]:
        """View the entries; iteration reads many at once where the kernel can."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """View the values; iteration reads many at once where the kernel can."""
        return _Values(self)

    def update(self, other: Any = (), /, **entries: Any) -> None:
        """Set many entries, at once where the kernel can (``BPF_MAP_UPDATE_BATCH``).

        All keys and values are checked first. Where the kernel then stops half-way, because the map is full, what went
        before stays.
        """
        pairs = _pairs(other, entries)
        raw = {self._encode_key(key): self._encode_value(value) for key, value in pairs}
        fd = self.fileno()
        if self._batches and raw:
            with contextlib.suppress(NotSupported):
                return _sys.map_update_batch(fd, b"".join(raw), b"".join(raw.values()), len(raw))
        for key, value in raw.items():
            _sys.map_update(fd, key, value, _sys.BPF_ANY)
        return None

    def pop(self, key: K | Key, default: Any = _REQUIRED) -> Any:
        """Delete an entry and give its value, or the default where there is none; another may set it in between."""
        try:
            value = self[key]
            del self[key]
        except KeyError:
            if default is _REQUIRED:
                raise
            return default
        return value

    def clear(self) -> None:
        """Delete all entries."""
        for key in list(self._raw_keys()):
            with contextlib.suppress(NoSuchKey):  # an empty slot, or gone since
                self._delete(key)

    def _raw_items(self) -> Iterator[tuple[bytes, bytes]]:
        size = self._key_size
        count = max(1, min(self._entries, _BATCH // (size + self._room)))
        batch = None
        if self._batches:
            with contextlib.suppress(NotSupported):
                batch = _sys.map_lookup_batch(self.fileno(), None, size, self._room, count)
        if batch is None:
            yield from self._raw_items_singly()
            return
        left = self._entries  # a key that goes meanwhile makes some types begin again
        while True:
            keys, values, position = batch
            pairs = zip(_slices(keys, size), _slices(values, self._room), strict=True)
            yield from itertools.islice(pairs, left)
            left -= len(keys) // size
            if position is None or left <= 0:
                return
            batch = _sys.map_lookup_batch(self.fileno(), position, size, self._room, count)

    def _raw_keys(self) -> Iterator[bytes]:
        key = _sys.map_next_key(self.fileno(), None, self._key_size)
        for _ in range(self._entries):  # a key that goes meanwhile makes the kernel begin again
            if key is None:
                return
            yield key
            key = _sys.map_next_key(self.fileno(), key, self._key_size)

    def _raw_items_singly(self) -> Iterator[tuple[bytes, bytes]]:
        for key in self._raw_keys():
            try:
                yield key, _sys.map_lookup(self.fileno(), key, self._room)
            except NoSuchKey:  # an empty slot, or gone since
                continue

    def __eq__(self, other: object) -> bool:
        return object.__eq__(self, other)  # and not by the entries, as of other mappings

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {self._info.name!r} {self._info.type.name} id={self._info.id} {state}>"


_NAME_BYTES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_."


class _Items(ItemsView[K, V]):
    _mapping: Map[K, V]

    def __iter__(self) -> Iterator[tuple[K, V]]:
        this = self._mapping
        return ((this._decode_key(key), this._decode_value(value)) for key, value in this._raw_items())


class _Values(ValuesView[V]):
    _mapping: Map[Any, V]

    def __iter__(self) -> Iterator[V]:
        return (self._mapping._decode_value(value) for _, value in self._mapping._raw_items())


def _pairs(other: Any, entries: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Give what dict.update() would take, as a list, which keeps the values and so their fds open."""
    return [*(other.items() if isinstance(other, Mapping) else other), *entries.items()]


def _exactly(what: str, given: Any, size: int) -> bytes:
    """Check bytes for their size."""
    if type(given) is bytes and len(given) == size:
        return given
    if not isinstance(given, _BYTES):
        raise TypeError(f"a {what} of this map is {size} bytes, not {type(given).__name__}")
    raw = bytes(given)
    if len(raw) != size:
        raise ValueError(f"a {what} of this map has {size} bytes, not {len(raw)}")
    return raw


def _as_bytes(what: str, given: Any, size: int) -> bytes:
    """Check bytes for their size, or make them of an int where they are 4."""
    if size != 4 or isinstance(given, bytes) or not hasattr(given, "__index__"):
        return _exactly(what, given, size)
    try:
        return bytes(given.__index__().to_bytes(4, _ORDER))
    except OverflowError:
        raise ValueError(f"an int for a {what} of 4 bytes is between 0 and {_U32_MAX}, not {given}") from None


def _slices(whole: bytes, size: int) -> Iterator[bytes]:
    return (whole[start : start + size] for start in range(0, len(whole), size))


class _Typed(Map[K, V]):
    """A class of its own for one type of map."""

    _type: ClassVar[MapType]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_type" in cls.__dict__:
            Map._classes[cls._type] = cls

    @classmethod
    def create(  # type: ignore[override] # the class is the type
        cls,
        key_size: int = 4,
        value_size: int = 4,
        max_entries: int = 1,
        *,
        flags: int = 0,
        name: str = "",
        inner: Map[Any, Any] | None = None,
    ) -> Self:
        """Make a map of this type (``BPF_MAP_CREATE``): see `Map.create`."""
        return super().create(cls._type, key_size, value_size, max_entries, flags=flags, name=name, inner=inner)


class _Indexed(_Typed[K, V]):
    """Keys are the indices of an array, none of which can be deleted or added."""

    def _encode_key(self, key: Any) -> bytes:
        try:
            if 0 <= key < self._entries:
                return key.to_bytes(4, _ORDER)  # type: ignore[no-any-return]
        except (TypeError, AttributeError):
            if not isinstance(key, _BYTES):
                raise TypeError(f"a key of this map is an int, not {type(key).__name__}") from None
            return self._encode_key(int.from_bytes(_exactly("key", key, 4), _ORDER))
        raise BeyondEnd(f"index {key} of a map with {self._entries} entries")

    def _decode_key(self, key: bytes) -> int:
        return int.from_bytes(key, _ORDER)

    def _raw_keys(self) -> Iterator[bytes]:
        self.fileno()
        return (index.to_bytes(4, _ORDER) for index in range(self._entries))


class _Full(_Indexed[int, V]):
    """An array in which every entry is always there."""

    def __delitem__(self, key: Key) -> None:
        raise TypeError(f"an entry of a {type(self).__name__} can't be deleted: set it to zeros")

    def clear(self) -> None:
        """Refuse: an array has all its entries always."""
        raise TypeError(f"the entries of a {type(self).__name__} can't be deleted: set them to zeros")

    def __len__(self) -> int:
        self.fileno()
        return self._entries


class _PerCpu(_Typed[K, tuple[bytes, ...]]):
    """A value is a tuple of bytes, one for each possible CPU (``libbpf_num_possible_cpus()``)."""

    def _learn(self) -> None:
        super()._learn()
        self._stride = -(-self._value_size // 8) * 8
        self._cpus = _sys.possible_cpus()
        self._room = self._stride * self._cpus

    def _encode_value(self, value: Any) -> bytes:
        if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray, str, memoryview)):
            raise TypeError(f"a value of this map is {self._cpus} bytes objects, one for each possible CPU")
        if len(value) != self._cpus:
            raise ValueError(f"a value of this map has {self._cpus} parts, one for each possible CPU, not {len(value)}")
        return b"".join(super(_PerCpu, self)._encode_value(part).ljust(self._stride, b"\0") for part in value)

    def _decode_value(self, value: bytes) -> tuple[bytes, ...]:
        return tuple(part[: self._value_size] for part in _slices(value, self._stride))


class _OfFds(_Typed[K, int]):
    """A value is set as an object of the kernel's, and read as the number by which the kernel knows it."""

    _holds: ClassVar[str]
    _batches = False  # a batch that comes upon an empty slot fails with EINTR, on many kernels

    if TYPE_CHECKING:

        def __setitem__(self, key: K | Key, value: KernelObject) -> None: ...  # type: ignore[override]
        def put(self, key: K | Key, value: KernelObject, *, mode: Mode = "any") -> None: ...  # type: ignore[override]

    def _encode_value(self, value: Any) -> bytes:
        return fd_of_kind(value, self._holds).to_bytes(self._value_size, _ORDER)

    def _decode_value(self, value: bytes) -> int:
        return int.from_bytes(value, _ORDER)


class _OfSockets(_OfFds[K]):
    """A value is set as a socket and read as its cookie; what the kernel does not take is `SocketRefused`."""

    if TYPE_CHECKING:

        def __setitem__(self, key: K | Key, value: sockets.Socket) -> None: ...
        def put(self, key: K | Key, value: sockets.Socket, *, mode: Mode = "any") -> None: ...

    def _store(self, key: bytes, value: Any, flags: int) -> None:
        fd = fd_of(value)
        try:
            _sys.map_update_socket(self._fd, key, fd, self._room, flags)
        except BpfError as error:
            self.fileno()  # it is closed: say that instead
            raise sockets.refusal(error, fd) from None

    def _delete(self, key: bytes) -> None:
        _sys.map_delete(self.fileno(), key, empty=errno.EINVAL)  # as a sockmap says of an empty slot

    def update(self, other: Any = (), /, **entries: Any) -> None:
        """Set many entries, one after the other: no kernel takes sockets at once.

        All keys are checked first. Where the kernel refuses a socket, those before it stay.
        """
        pairs = _pairs(other, entries)
        raw = {self._encode_key(key): fd_of(value) for key, value in pairs}
        done, error = _sys.map_update_sockets(self.fileno(), raw, self._value_size)
        if error is not None:
            raise sockets.refusal(error, list(raw.values())[done])


class HashMap(_Typed[bytes, bytes]):
    """``BPF_MAP_TYPE_HASH``."""

    _type = MapType.HASH


class LruHashMap(_Typed[bytes, bytes]):
    """``BPF_MAP_TYPE_LRU_HASH``: what was not used for long makes room for what is new."""

    _type = MapType.LRU_HASH


class PerCpuHashMap(_PerCpu[bytes]):
    """``BPF_MAP_TYPE_PERCPU_HASH``: a value is a tuple of bytes, one for each possible CPU."""

    _type = MapType.PERCPU_HASH


class LruPerCpuHashMap(_PerCpu[bytes]):
    """``BPF_MAP_TYPE_LRU_PERCPU_HASH``: a value is a tuple of bytes, one for each possible CPU."""

    _type = MapType.LRU_PERCPU_HASH


class PerCpuCgroupStorage(_PerCpu[bytes]):
    """``BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE``: a value is a tuple of bytes, one for each possible CPU."""

    _type = MapType.PERCPU_CGROUP_STORAGE


class LpmTrie(_Typed[bytes, bytes]):
    """``BPF_MAP_TYPE_LPM_TRIE``: a key is a length in bits (4 bytes, in the machine's order), then the prefix.

    Reading a key gives the entry of the longest prefix that contains it.
    """

    _type = MapType.LPM_TRIE

    def _encode_key(self, key: Any) -> bytes:
        raw = super()._encode_key(key)
        if (bits := int.from_bytes(raw[:4], _ORDER)) > (most := 8 * (len(raw) - 4)):
            raise ValueError(f"a prefix of this trie has up to {most} bits, not {bits}")
        return raw


class ArrayMap(_Full[bytes]):
    """``BPF_MAP_TYPE_ARRAY``: keys are indices, and every entry is always there."""

    _type = MapType.ARRAY

    def mmap(self, *, readonly: bool = False) -> memoryview:
        """Map the whole array into memory (mmap(2)), which user space and programs then share.

        An entry begins at each multiple of the value's size, rounded up to 8 bytes. The memory stays mapped as long as
        the memoryview lives, also when the map is closed.

        Raises:
            ValueError: the map was made without the flag `BPF_F_MMAPABLE`.
            BpfError: the map is frozen, and writing was asked for (EPERM).
        """
        if not self._info.flags & _sys.BPF_F_MMAPABLE:
            raise ValueError("only a map that was made with the flag BPF_F_MMAPABLE can be mapped into memory")
        size = -(-self._value_size // 8) * 8 * self._entries
        view = memoryview(_sys.mmap(self.fileno(), size, readonly=readonly))[:size]
        return view.toreadonly() if readonly else view

    def snapshot(self) -> bytearray:
        """Read the whole array as `mmap` would show it now, for who may not map it: it was opened for reading alone."""
        whole = bytearray()
        for value in self.values():
            whole += value
        return whole


class PerCpuArrayMap(_PerCpu[int], _Full[tuple[bytes, ...]]):
    """``BPF_MAP_TYPE_PERCPU_ARRAY``: keys are indices; a value is a tuple of bytes, one for each possible CPU."""

    _type = MapType.PERCPU_ARRAY


class ArrayOfMaps(_OfFds[int], _Indexed[int, int]):
    """``BPF_MAP_TYPE_ARRAY_OF_MAPS``: set a `Map`, read its id (`Map.from_id`)."""

    _type = MapType.ARRAY_OF_MAPS
    _holds = "map"


class HashOfMaps(_OfFds[bytes]):
    """``BPF_MAP_TYPE_HASH_OF_MAPS``: set a `Map`, read its id (`Map.from_id`)."""

    _type = MapType.HASH_OF_MAPS
    _holds = "map"


class ProgArray(_OfFds[int], _Indexed[int, int]):
    """``BPF_MAP_TYPE_PROG_ARRAY``, for tail calls: set a `Program`, read its id (`Program.from_id`)."""

    _type = MapType.PROG_ARRAY
    _holds = "prog"


class _SockArray(_OfSockets[int], _Indexed[int, int]):
    """Sockets by index."""

    @classmethod
    def create(cls, max_entries: int, *, name: str = "") -> Self:  # type: ignore[override] # the sizes are known
        """Make such a map (``BPF_MAP_CREATE``), whose values are cookies of 8 bytes.

        Raises:
            PermissionDenied: the process lacks CAP_BPF, or for a sockmap CAP_NET_ADMIN.
        """
        return super().create(4, 8, max_entries, name=name)


class SockMap(_SockArray):
    """``BPF_MAP_TYPE_SOCKMAP``: sockets by index, for ``bpf_sk_assign()``.

    Set a socket, read its cookie (`socket_cookie`). It takes TCP sockets that listen or are established, and UDP
    sockets that are bound. The kernel empties a slot when its socket is closed for the last time.
    """

    _type = MapType.SOCKMAP


class SockHash(_OfSockets[bytes]):
    """``BPF_MAP_TYPE_SOCKHASH``: sockets by keys of any size; otherwise as `SockMap`."""

    _type = MapType.SOCKHASH

    @classmethod
    def create(cls, max_entries: int, *, key_size: int = 4, name: str = "") -> Self:  # type: ignore[override] # likewise
        """Make a sockhash (``BPF_MAP_CREATE``), whose values are cookies of 8 bytes.

        Raises:
            PermissionDenied: the process lacks CAP_BPF or CAP_NET_ADMIN.
        """
        return super().create(key_size, 8, max_entries, name=name)


class ReuseportSockArray(_SockArray):
    """``BPF_MAP_TYPE_REUSEPORT_SOCKARRAY``: members of SO_REUSEPORT groups, for ``bpf_sk_select_reuseport()``."""

    _type = MapType.REUSEPORT_SOCKARRAY
