"""Maps: dicts of the kernel's, of every type."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import support
from support import bpf_object, needs

import pyskl
from pyskl import (
    ArrayMap,
    ArrayOfMaps,
    HashMap,
    HashOfMaps,
    LpmTrie,
    LruHashMap,
    LruPerCpuHashMap,
    Map,
    MapType,
    PerCpuArrayMap,
    PerCpuHashMap,
    ProgArray,
    Program,
    ReuseportSockArray,
    SockHash,
    SockMap,
)

CPUS = sum(
    int(last or first) - int(first) + 1
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", Path("/sys/devices/system/cpu/possible").read_text())
)


def listener(*, reuseport: bool = False) -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), reuse_port=reuseport)


def u32(number: int) -> bytes:
    return struct.pack("=I", number)


def u64(number: int) -> bytes:
    return struct.pack("=Q", number)


# -- one table of kinds, one set of tests ----------------------------------------------------------


class Stock(NamedTuple):
    """A map of four entries, empty; five keys and values for it, and what each value is read as."""

    map: Map
    keys: list[object]
    values: list[object]
    reads: list[object]


Make = Callable[[contextlib.ExitStack], Stock]


def of_bytes(cls: type[Map], *, int_keys: bool = False) -> Make:
    def make(stack: contextlib.ExitStack) -> Stock:
        m = stack.enter_context(cls.create(key_size=4, value_size=8, max_entries=4))
        values = [u64(2**40 + number) for number in range(5)]
        return Stock(m, [*range(5)] if int_keys else [u32(n * 7) for n in range(5)], values, values)

    return make


def per_cpu(cls: type[Map], size: int) -> Make:
    def make(stack: contextlib.ExitStack) -> Stock:
        m = stack.enter_context(cls.create(key_size=4, value_size=size, max_entries=4))
        values = [tuple(bytes([n, cpu]) * (size // 2) for cpu in range(CPUS)) for n in range(5)]
        return Stock(m, [u32(n) for n in range(5)], values, values)

    return make


def trie(stack: contextlib.ExitStack) -> Stock:
    """Prefixes none of which covers another, so that a look-up finds its own."""
    m = stack.enter_context(LpmTrie.create(key_size=8, value_size=8, max_entries=4))
    values = [u64(number) for number in range(5)]
    return Stock(m, [u32(8 + n) + bytes([n + 1, 0, 0, 0]) for n in range(5)], values, values)


def of_sockets(make_map: Callable[[], Map], keys: list[object], *, reuseport: bool = False) -> Make:
    def make(stack: contextlib.ExitStack) -> Stock:
        m = stack.enter_context(make_map())
        socks = [stack.enter_context(listener(reuseport=reuseport)) for _ in keys]
        return Stock(m, keys, socks, [support.cookie(sock) for sock in socks])

    return make


def of_maps(cls: type[Map]) -> Make:
    def make(stack: contextlib.ExitStack) -> Stock:
        inner = [stack.enter_context(SockMap.create(2, name=f"inner{n}")) for n in range(5)]
        m = stack.enter_context(cls.create(max_entries=4, inner=inner[0]))
        keys = [*range(5)] if cls is ArrayOfMaps else [u32(n) for n in range(5)]
        return Stock(m, keys, inner, [i.info.id for i in inner])

    return make


def of_programs(stack: contextlib.ExitStack) -> Stock:
    source = bpf_object("obj_pair")
    progs = [stack.enter_context(Program.load(source, ("yes", "no")[n % 2])) for n in range(5)]
    m = stack.enter_context(ProgArray.create(max_entries=4))
    return Stock(m, [*range(5)], progs, [prog.info.id for prog in progs])


SPARSE: dict[str, Make] = {
    "hash": of_bytes(HashMap),
    "lru_hash": of_bytes(LruHashMap),
    "percpu_hash": per_cpu(PerCpuHashMap, 8),
    "percpu_hash of an odd size": per_cpu(PerCpuHashMap, 12),
    "lru_percpu_hash": per_cpu(LruPerCpuHashMap, 2),
    "lpm_trie": trie,
    "sockmap": of_sockets(lambda: SockMap.create(4), [*range(5)]),
    "sockhash": of_sockets(lambda: SockHash.create(4), [u32(n) for n in range(5)]),
    "sockhash of long keys": of_sockets(lambda: SockHash.create(4, key_size=18), [bytes([n]) * 18 for n in range(5)]),
    "reuseport_sockarray": of_sockets(lambda: ReuseportSockArray.create(4), [*range(5)], reuseport=True),
    "array_of_maps": of_maps(ArrayOfMaps),
    "hash_of_maps": of_maps(HashOfMaps),
    "prog_array": of_programs,
}
INDEXED = {"sockmap", "reuseport_sockarray", "array_of_maps", "prog_array"}


@pytest.fixture(params=SPARSE)
def stock(request: pytest.FixtureRequest) -> Iterator[Stock]:
    """One of each kind, used on one CPU: each CPU keeps a list of an LRU map's free entries."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        with contextlib.ExitStack() as stack:
            yield SPARSE[request.param](stack)
    finally:
        os.sched_setaffinity(0, cpus)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["stock"]


def fill(stock: Stock, count: int) -> dict[object, object]:
    """Set the first entries; the dict that the map should now equal."""
    for key, value in list(zip(stock.keys, stock.values, strict=True))[:count]:
        stock.map[key] = value
    return dict(zip(stock.keys[:count], stock.reads[:count], strict=True))


def test_an_empty_map(stock: Stock) -> None:
    m, key = stock.map, stock.keys[0]
    assert (len(m), list(m), list(m.items()), list(m.values()), dict(m)) == (0, [], [], [], {})
    assert key not in m
    assert m.get(key) is None
    assert m.get(key, "default") == "default"
    assert m.pop(key, "default") == "default"
    m.clear()
    for operation in (lambda: m[key], lambda: m.pop(key), lambda: m.__delitem__(key)):
        with pytest.raises(pyskl.NoSuchKey) as caught:
            operation()
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(KeyError):
        m.popitem()


def test_what_was_set_is_read_back(stock: Stock) -> None:
    expected = fill(stock, 3)
    m = stock.map
    assert [m[key] for key in expected] == list(expected.values())
    assert [m.get(key) for key in expected] == list(expected.values())
    assert all(key in m for key in expected)
    assert stock.keys[3] not in m
    assert len(m) == 3


def test_iteration_gives_each_entry_once(stock: Stock) -> None:
    expected = fill(stock, 4)
    m = stock.map
    assert sorted(m) == sorted(m.keys()) == sorted(expected)
    assert len(list(m.items())) == 4
    assert dict(m.items()) == dict(m) == expected
    assert sorted(m.values()) == sorted(expected.values())


def test_overwriting_replaces(stock: Stock) -> None:
    expected = fill(stock, 2)
    stock.map[stock.keys[0]] = stock.values[4]
    assert dict(stock.map) == expected | {stock.keys[0]: stock.reads[4]}


def test_deleting(stock: Stock) -> None:
    expected = fill(stock, 3)
    m = stock.map
    del m[stock.keys[1]]
    assert m.pop(stock.keys[2]) == expected[stock.keys[2]]
    assert dict(m) == {stock.keys[0]: stock.reads[0]}
    with pytest.raises(pyskl.NoSuchKey) as caught:
        del m[stock.keys[1]]
    assert caught.value.call == "BPF_MAP_DELETE_ELEM"
    assert m.popitem() == (stock.keys[0], stock.reads[0])
    assert len(m) == 0


def test_update_and_clear(stock: Stock) -> None:
    m = stock.map
    pairs = list(zip(stock.keys, stock.values, strict=True))
    m.update(dict(pairs[:2]))
    m.update(iter(pairs[2:4]))
    m.update([])
    assert dict(m) == dict(zip(stock.keys[:4], stock.reads, strict=False))
    m.clear()
    assert len(m) == 0
    m.update(pairs[:4])
    assert len(m) == 4


def test_put_modes(stock: Stock, kind: str) -> None:
    m, key, (one, two, *_), reads = stock.map, stock.keys[0], stock.values, stock.reads
    if kind not in {"array_of_maps", "prog_array"}:  # their update takes no mode (EINVAL)
        with pytest.raises(pyskl.NoSuchKey) as caught:
            m.put(key, one, mode="exist")
        assert (caught.value.errno, caught.value.call) == (errno.ENOENT, "BPF_MAP_UPDATE_ELEM")
        assert key not in m
        m.put(key, one, mode="noexist")
        assert m[key] == reads[0]
        with pytest.raises(pyskl.BpfError) as caught:
            m.put(key, two, mode="noexist")
        assert (caught.value.errno, caught.value.call) == (errno.EEXIST, "BPF_MAP_UPDATE_ELEM")
        assert m[key] == reads[0]
        m.put(key, two, mode="exist")
        assert m[key] == reads[1]
    m.put(key, one)
    assert m[key] == reads[0]
    m.put(key, two, mode="any")
    assert m[key] == reads[1]
    with pytest.raises(ValueError, match="mode"):
        m.put(key, one, mode="create")


def test_one_entry_too_many(stock: Stock, kind: str) -> None:
    expected = fill(stock, 4)
    m, key, value = stock.map, stock.keys[4], stock.values[4]
    if kind.startswith("lru"):
        m[key] = value
        assert m[key] == stock.reads[4]
        assert len(m) <= 4  # what was used least recently has gone
        return
    with pytest.raises(IndexError if kind in INDEXED else pyskl.BpfError) as caught:
        m[key] = value
    if kind not in INDEXED:
        assert caught.value.errno in {errno.E2BIG, errno.ENOSPC}
        assert caught.value.call == "BPF_MAP_UPDATE_ELEM"
        assert not isinstance(caught.value, KeyError)
    assert dict(m) == expected
    if kind == "lpm_trie" and not support.full_trie_takes_updates():
        support.unavailable("lpm_trie_update_when_full", "this kernel replaces no entry of a full trie")
    m[stock.keys[0]] = value  # what is there can still change
    assert m[stock.keys[0]] == stock.reads[4]


def test_deleting_while_iterating_ends_and_empties(stock: Stock) -> None:
    fill(stock, 4)
    for seen, key in enumerate(stock.map):
        assert seen < 16
        stock.map.pop(key, None)
    assert len(stock.map) == 0


def test_freezing_stops_writes_and_no_reads(stock: Stock) -> None:
    expected = fill(stock, 2)
    m = stock.map
    m.freeze()
    for operation in (
        lambda: m.__setitem__(stock.keys[0], stock.values[0]),
        lambda: m.__setitem__(stock.keys[3], stock.values[3]),
        lambda: m.update({stock.keys[3]: stock.values[3]}),
        lambda: m.__delitem__(stock.keys[0]),
        lambda: m.pop(stock.keys[0]),
        m.clear,
        m.freeze,
    ):
        with pytest.raises(pyskl.BpfError) as caught:
            operation()
        assert caught.value.errno in {errno.EPERM, errno.EBUSY}
        assert not isinstance(caught.value, (PermissionError, KeyError, pyskl.BadSocket))
    assert dict(m) == expected


def test_the_same_map_by_fd_id_and_pin(stock: Stock, bpffs: Path) -> None:
    expected = fill(stock, 2)
    m = stock.map
    m.pin(bpffs / "map")
    for cls in (Map, type(m)):
        for again in (
            cls.from_fd(m.fileno()),
            cls.from_id(m.info.id),
            cls.from_pin(bpffs / "map"),
            cls.from_pin(str(bpffs / "map")),
        ):
            with again:
                assert type(again) is type(m)
                assert again.fileno() != m.fileno()
                assert again.info == m.info
                assert dict(again) == expected


def test_keys_of_another_shape(stock: Stock, kind: str) -> None:
    m, size = stock.map, stock.map.info.key_size
    wrong: list[tuple[object, type[Exception]]] = [
        (b"", ValueError),
        (bytes(size + 1), ValueError),
        (bytes(size - 1), ValueError),
        ("text", TypeError),
        (None, TypeError),
        (1.0, TypeError),
        ((1,), TypeError),
    ]
    if size != 4:
        wrong.append((1, TypeError))
    elif kind not in INDEXED:
        wrong += [(-1, ValueError), (2**32, ValueError)]
    for key, error in wrong:
        for operation in (
            lambda key=key: m[key],
            lambda key=key: m.__setitem__(key, stock.values[0]),
            lambda key=key: m.__delitem__(key),
            lambda key=key: m.put(key, stock.values[0]),
            lambda key=key: m.update([(key, stock.values[0])]),
        ):
            with pytest.raises(error) as caught:
                operation()
            assert not isinstance(caught.value, OSError)
    assert len(m) == 0


def test_values_of_another_shape(stock: Stock) -> None:
    m, key, good = stock.map, stock.keys[0], stock.values[0]
    bad: list[tuple[object, type[Exception] | tuple[type[Exception], ...]]]
    if isinstance(good, bytes):
        bad = [(b"", ValueError), (bytes(9), ValueError), (1, TypeError)]
    elif isinstance(good, tuple):
        bad = [((b"",) * CPUS, ValueError), (good * 2, ValueError), (good[0], (ValueError, TypeError))]
    else:
        bad = [(1.5, TypeError)]
    for value, error in [*bad, ("x" * 8, TypeError), (None, TypeError)]:
        for operation in (
            lambda value=value: m.__setitem__(key, value),
            lambda value=value: m.update([(key, value)]),
        ):
            with pytest.raises(error) as caught:
                operation()
            assert not isinstance(caught.value, OSError)
    assert len(m) == 0


def test_keys_and_values_may_be_any_bytes_like(stock: Stock) -> None:
    m = stock.map
    for n, like in enumerate((bytearray, memoryview)):
        key = stock.keys[n] if isinstance(stock.keys[n], bytes) else u32(stock.keys[n])
        value = stock.values[n]
        m[like(key)] = like(value) if isinstance(value, bytes) else value
        assert m[like(key)] == m[key] == m[stock.keys[n]] == stock.reads[n]
        del m[like(key)]


def test_an_int_is_a_four_byte_key(stock: Stock) -> None:
    m, number = stock.map, 3
    if m.info.key_size != 4:
        with pytest.raises(TypeError):
            m[number] = stock.values[0]
        return
    m[number] = stock.values[0]
    assert m[u32(number)] == m[number] == stock.reads[0]
    assert number in m
    assert m.pop(number) == stock.reads[0]


def test_repr_says_what_it_is(stock: Stock) -> None:
    assert type(stock.map).__name__ in repr(stock.map)


# -- creation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("create", "expected"),
    [
        (lambda: HashMap.create(key_size=4, value_size=8, max_entries=16), (HashMap, MapType.HASH, 4, 8, 16, "")),
        (
            lambda: HashMap.create(key_size=3, value_size=5, max_entries=7, name="odd"),
            (HashMap, MapType.HASH, 3, 5, 7, "odd"),
        ),
        (
            lambda: Map.create(MapType.HASH, 4, 8, 16, name="by_type"),
            (HashMap, MapType.HASH, 4, 8, 16, "by_type"),
        ),
        (lambda: Map.create(MapType.ARRAY), (ArrayMap, MapType.ARRAY, 4, 4, 1, "")),
        (lambda: Map.create(2, max_entries=3), (ArrayMap, MapType.ARRAY, 4, 4, 3, "")),
        (lambda: Map.create(MapType.QUEUE, 0, 8, 2), (Map, MapType.QUEUE, 0, 8, 2, "")),
        (
            lambda: ArrayMap.create(value_size=1000, max_entries=2, name="a.b_c"),
            (ArrayMap, MapType.ARRAY, 4, 1000, 2, "a.b_c"),
        ),
        (lambda: SockMap.create(3), (SockMap, MapType.SOCKMAP, 4, 8, 3, "")),
        (
            lambda: SockHash.create(3, key_size=6, name="x" * 15),
            (SockHash, MapType.SOCKHASH, 6, 8, 3, "x" * 15),
        ),
        (lambda: LpmTrie.create(key_size=20, value_size=1, max_entries=9), (LpmTrie, MapType.LPM_TRIE, 20, 1, 9, "")),
    ],
    ids=range(10),
)
def test_create(create: Callable[[], Map], expected: tuple[object, ...]) -> None:
    with create() as m:
        info = m.info
        got = (type(m), info.type, info.key_size, info.value_size, info.max_entries, info.name)
        assert got == expected
        assert isinstance(info, pyskl.MapInfo)
        assert isinstance(info.type, MapType)
        assert ("map", info.id) in support.bpf_ids()


def test_create_takes_the_kernels_flags() -> None:
    bpf_f_no_prealloc = 1
    with HashMap.create(key_size=4, value_size=8, max_entries=16, flags=bpf_f_no_prealloc) as m:
        assert m.info.flags == bpf_f_no_prealloc


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "value"), [(ArrayMap, bytes(6)), (PerCpuArrayMap, (bytes(6),) * CPUS)])
def test_an_array_is_full_of_zeros_from_the_start(cls: type[Map], value: object) -> None:
    with cls.create(value_size=6, max_entries=3) as m:
        assert dict(m) == {0: value, 1: value, 2: value}
        assert (len(m), list(m), list(m.items())) == (3, [0, 1, 2], [(n, value) for n in range(3)])
        assert 2 in m
        assert 3 not in m
        assert m.get(3) is m.get(-1) is None
        one = b"\1" * 6 if cls is ArrayMap else tuple(bytes([cpu]) * 6 for cpu in range(CPUS))
        m[1] = one
        m.update({2: one})
        m.put(0, one, mode="exist")
        assert list(m.values()) == [one] * 3
        with pytest.raises(pyskl.BpfError) as caught:
            m.put(0, value, mode="noexist")
        assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize("cls", [ArrayMap, PerCpuArrayMap])
def test_nothing_is_deleted_from_an_array(cls: type[Map]) -> None:
    with cls.create(value_size=8, max_entries=3) as m:
        for operation in (lambda: m.__delitem__(0), lambda: m.pop(1), m.popitem, m.clear):
            with pytest.raises(TypeError):
                operation()
        assert len(m) == 3


@pytest.mark.parametrize("index", [3, -1, 2**31, 2**32, 2**70, u32(3), b"\xff" * 4])
@pytest.mark.parametrize(
    "create",
    [
        lambda: ArrayMap.create(value_size=8, max_entries=3),
        lambda: PerCpuArrayMap.create(value_size=8, max_entries=3),
        lambda: SockMap.create(3),
        lambda: ReuseportSockArray.create(max_entries=3),
    ],
    ids=["array", "percpu_array", "sockmap", "reuseport_sockarray"],
)
def test_an_index_out_of_range(create: Callable[[], Map], index: object) -> None:
    """An IndexError as a sequence has it, and a KeyError, so that `in` and get() call it absent."""
    with create() as m, listener() as sock:
        value: object = sock
        if isinstance(m, (ArrayMap, PerCpuArrayMap)):
            value = bytes(8) if isinstance(m, ArrayMap) else (bytes(8),) * CPUS
        for operation in (lambda: m[index], lambda: m.__setitem__(index, value)):
            with pytest.raises(IndexError) as caught:
                operation()
            assert isinstance(caught.value, KeyError)
        assert index not in m
        assert m.get(index, "default") == "default"


def test_an_arrays_values_are_rounded_nowhere() -> None:
    """The kernel rounds each value up to eight bytes inside: none of that is seen."""
    with ArrayMap.create(value_size=3, max_entries=1000) as m:
        expected = {n: bytes([n % 251]) * 3 for n in range(1000)}
        m.update(expected)
        assert dict(m.items()) == dict(m) == expected


@needs("mmapable")
def test_mmap_is_the_maps_own_memory() -> None:
    with ArrayMap.create(value_size=8, max_entries=600, flags=pyskl.BPF_F_MMAPABLE) as m:
        with m.mmap() as view, m.mmap(readonly=True) as shown:
            assert isinstance(view, memoryview)
            assert len(view) >= 8 * 600
            assert not view.readonly
            assert shown.readonly
            view[8:16] = u64(77)
            assert m[1] == u64(77) == shown[8:16]
            m[599] = u64(5)
            assert view[599 * 8 : 600 * 8] == u64(5)
            with pytest.raises(TypeError):
                shown[0] = 1


@needs("mmapable")
def test_mmap_of_a_frozen_map_can_only_be_read() -> None:
    with ArrayMap.create(value_size=8, max_entries=1, flags=pyskl.BPF_F_MMAPABLE) as m:
        with m.mmap(), pytest.raises(pyskl.BpfError) as caught:
            m.freeze()  # while somebody could write
        assert (caught.value.errno, caught.value.call) == (errno.EBUSY, "BPF_MAP_FREEZE")
        m.freeze()
        with m.mmap(readonly=True) as view:
            assert bytes(view[:8]) == bytes(8)
        with pytest.raises(pyskl.BpfError) as caught:
            m.mmap()
        assert caught.value.errno == errno.EPERM
        assert not isinstance(caught.value, PermissionError)


@needs("mmapable")
def test_mmap_outlives_the_map_object() -> None:
    with ArrayMap.create(value_size=8, max_entries=1, flags=pyskl.BPF_F_MMAPABLE) as m:
        view = m.mmap()
    with view:
        view[:8] = u64(9)
        assert bytes(view[:8]) == u64(9)


def test_mmap_needs_the_flag() -> None:
    with (
        ArrayMap.create(value_size=8, max_entries=1) as m,
        pytest.raises(ValueError, match="BPF_F_MMAPABLE"),
    ):
        m.mmap()


# -- the longest prefix ----------------------------------------------------------------------------


def prefix(length: int, *octets: int) -> bytes:
    return u32(length) + bytes([*octets, 0, 0, 0, 0][:4])


def test_a_trie_finds_the_longest_prefix() -> None:
    with LpmTrie.create(key_size=8, value_size=1, max_entries=10) as m:
        m.update(
            {
                prefix(0): b"0",
                prefix(8, 10): b"8",
                prefix(24, 10, 1, 2): b"n",
                prefix(32, 10, 1, 2, 3): b"h",
            }
        )
        asked = {
            (10, 1, 2, 3): b"h",
            (10, 1, 2, 4): b"n",
            (10, 9): b"8",
            (11, 1): b"0",
        }
        assert {octets: m[prefix(32, *octets)] for octets in asked} == asked
        assert sorted(m) == sorted([prefix(0), prefix(8, 10), prefix(24, 10, 1, 2), prefix(32, 10, 1, 2, 3)])
        del m[prefix(32, 10, 1, 2, 3)]
        assert m[prefix(32, 10, 1, 2, 3)] == b"n"
        with pytest.raises(pyskl.NoSuchKey):
            del m[prefix(32, 10, 1, 2, 3)]
        with pytest.raises(ValueError, match="32 bits"):
            m[prefix(33)] = b"x"


# -- sockets ---------------------------------------------------------------------------------------

SOCKET_MAPS = {"sockmap": lambda: SockMap.create(4), "sockhash": lambda: SockHash.create(4)}


@pytest.fixture(params=SOCKET_MAPS)
def sockets(request: pytest.FixtureRequest) -> Iterator[SockMap | SockHash]:
    with SOCKET_MAPS[request.param]() as m:
        yield m


def test_a_socket_is_whatever_has_an_fd(sockets: SockMap) -> None:
    with listener() as sock, socket.socket(fileno=os.dup(sock.fileno())) as copy:

        class Wrapped:
            def fileno(self) -> int:
                return sock.fileno()

        for value in (sock, sock.fileno(), copy, Wrapped()):
            sockets[0] = value
            assert sockets[0] == support.cookie(sock) == pyskl.socket_cookie(value)
            del sockets[0]


@pytest.mark.parametrize(
    ("family", "kind", "host"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1"),
        (socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1"),
        (socket.AF_INET6, socket.SOCK_STREAM, "::1"),
        (socket.AF_INET6, socket.SOCK_DGRAM, "::1"),
        (socket.AF_INET6, socket.SOCK_STREAM, "::"),
    ],
)
def test_listeners_and_bound_udp_sockets_are_taken(
    netns: pyskl.NetNS,
    sockets: SockMap,
    family: socket.AddressFamily,
    kind: socket.SocketKind,
    host: str,
) -> None:
    with support.new_socket(netns, family, kind) as sock:
        sock.bind((host, 0))
        if kind is socket.SOCK_STREAM:
            sock.listen()
        sockets[2] = sock
        assert sockets[2] == support.cookie(sock)


def test_one_socket_stands_in_many_slots_and_maps(sockets: SockMap) -> None:
    with listener() as sock, SockMap.create(1) as other:
        sockets.update({n: sock for n in range(4)})
        other[0] = sock
        assert set(sockets.values()) == set(other.values()) == {support.cookie(sock)}
        assert len(sockets) == 4


def test_the_last_close_of_a_socket_empties_its_slots(sockets: SockMap) -> None:
    with listener() as stays:
        sock = listener()
        sockets.update({0: sock, 1: stays, 2: sock})
        copy = sock.dup()
        sock.close()
        assert len(sockets) == 3
        copy.close()
        assert support.eventually(lambda: len(sockets) == 1)
        assert list(sockets.values()) == [support.cookie(stays)]
        assert 0 not in sockets


def test_update_stops_at_the_first_refusal_and_keeps_what_it_did(sockets: SockMap) -> None:
    with listener() as good, socket.socket() as bad:
        with pytest.raises(pyskl.SocketRefused):
            sockets.update([(0, good), (1, bad), (2, good)])
        assert 1 not in sockets
        assert 0 in sockets


def test_sockhash_keys_of_other_sizes_are_bytes() -> None:
    with SockHash.create(4, key_size=1) as m, listener() as sock:
        m[b"\xff"] = sock
        assert list(m) == [b"\xff"]
        assert m[b"\xff"] == support.cookie(sock)


def test_socket_cookies_are_the_kernels() -> None:
    with listener() as one, listener() as other:
        assert pyskl.socket_cookie(one) == pyskl.socket_cookie(one.fileno()) == support.cookie(one)
        assert pyskl.socket_cookie(one) != pyskl.socket_cookie(other)
        assert pyskl.socket_cookie(one) > 0


# -- many entries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, pytest.param(70_000, marks=pytest.mark.portable)])
@pytest.mark.parametrize("value_size", [1, 8, 64])
def test_many_entries_of_a_hash(count: int, value_size: int) -> None:
    """Whatever the size of the batches is, nothing is lost or doubled at their edges."""
    expected = {u32(n): n.to_bytes(8, "little").ljust(value_size, b".")[:value_size] for n in range(count)}
    with HashMap.create(key_size=4, value_size=value_size, max_entries=max(count, 1)) as m:
        m.update(expected)
        pairs = list(m.items())
        assert len(pairs) == count == len(m)
        assert dict(pairs) == expected
        assert set(m) == set(expected)
        m.clear()
        assert len(m) == 0


@pytest.mark.parametrize(
    ("which", "count"),
    [
        *((which, count) for which in ("array", "lpm_trie", "percpu_hash", "sockhash") for count in (1, 5000)),
        ("array_of_maps", 1),
        ("array_of_maps", 100),  # each update waits for a grace period of RCU
    ],
)
def test_many_entries_of_other_types(which: str, count: int) -> None:
    with contextlib.ExitStack() as stack:
        if which == "array":
            m = ArrayMap.create(value_size=4, max_entries=count)
            entries = reads = {n: u32(n) for n in range(count)}
        elif which == "lpm_trie":
            m = LpmTrie.create(key_size=8, value_size=4, max_entries=count)
            entries = reads = {u32(32) + u32(n): u32(n) for n in range(count)}
        elif which == "percpu_hash":
            m = PerCpuHashMap.create(key_size=4, value_size=4, max_entries=count)
            entries = reads = {u32(n): (u32(n),) * CPUS for n in range(count)}
        elif which == "sockhash":
            m, sock = SockHash.create(count), stack.enter_context(listener())
            entries = dict.fromkeys(map(u32, range(count)), sock)
            reads = dict.fromkeys(entries, support.cookie(sock))
        else:
            inner = stack.enter_context(SockMap.create(1))
            m = ArrayOfMaps.create(max_entries=count, inner=inner)
            entries = dict.fromkeys(range(count), inner)
            reads = dict.fromkeys(entries, inner.info.id)
        stack.enter_context(m)
        m.update(entries)
        assert len(m) == count
        assert dict(m.items()) == reads


def test_a_batch_that_does_not_fit_says_so() -> None:
    with HashMap.create(key_size=4, value_size=4, max_entries=10) as m:
        with pytest.raises(pyskl.BpfError) as caught:
            m.update({u32(n): u32(n) for n in range(11)})
        assert caught.value.errno == errno.E2BIG
        assert "BPF_MAP_UPDATE" in caught.value.call
        assert len(m) <= 10
        m.clear()
        m.update({u32(n): u32(n) for n in range(10)})
        assert len(m) == 10


def test_update_checks_every_pair_of_a_batch() -> None:
    with HashMap.create(key_size=4, value_size=4, max_entries=10) as m:
        for bad in ((b"toolong", u32(0)), (u32(0), b"toolong")):
            with pytest.raises(ValueError):
                m.update([(u32(1), u32(1)), bad])


def test_the_last_of_equal_keys_wins_in_an_update() -> None:
    with HashMap.create(key_size=4, value_size=4, max_entries=2) as m:
        m.update([(u32(1), u32(n)) for n in range(100)])
        assert dict(m) == {u32(1): u32(99)}


# -- threads ---------------------------------------------------------------------------------------


def test_reading_while_others_write_sees_whole_entries() -> None:
    """Iteration over a map that changes ends, and every pair belongs together."""
    with HashMap.create(key_size=4, value_size=8, max_entries=4096) as m:
        steady = {u32(n): u64(n) for n in range(1000)}
        m.update(steady)
        stop = threading.Event()

        def churn() -> int:
            rounds = 0
            while not stop.is_set():
                m.update({u32(n): u64(n) for n in range(1000, 1064)})
                for n in range(1000, 1064):
                    m.pop(u32(n), None)
                rounds += 1
            return rounds

        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(churn) for _ in range(2)]
            try:
                for _ in range(30):
                    got = dict(m.items())
                    assert {k: got[k] for k in steady} == steady
                    assert all(value == u64(struct.unpack("=I", key)[0]) for key, value in got.items())
            finally:
                stop.set()
            assert all(writer.result() > 0 for writer in writers)


def test_each_type_whose_values_the_kernel_keeps_for_each_cpu_has_room_for_all() -> None:
    """The kernel writes a part for each CPU, whatever value_size says: bpf_map_value_size()."""
    percpu = {"PERCPU_HASH", "LRU_PERCPU_HASH", "PERCPU_ARRAY", "PERCPU_CGROUP_STORAGE"}
    assert {kind.name for kind in MapType if "PERCPU" in kind.name} == percpu
    for name in percpu:
        assert issubclass(Map._classes[MapType[name]], pyskl.maps._PerCpu), name
