"""Maps against plain dicts: whatever is done to both, they hold the same."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterator, MutableMapping

import pytest
import support
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import pyskl
from pyskl import ArrayMap, HashMap, LpmTrie, Map, PerCpuArrayMap, PerCpuHashMap, SockHash, SockMap

COMMON = settings(
    deadline=None,
    max_examples=60 if support.LOAD >= 40_000 else 15,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
KEYS = st.integers(0, 5)  # few of them, so that most operations meet an entry
VALUES = st.integers(0, 2**32 - 1)


def make(cls: type[Map], key_size: int, value_size: int, max_entries: int) -> Map:
    return cls.create(key_size=key_size, value_size=value_size, max_entries=max_entries)


class Dicts(RuleBasedStateMachine):
    """A map and the dict that it should equal; its types differ in key(), spellings() and value()."""

    map: Map
    capacity: int

    def __init__(self) -> None:
        super().__init__()
        self.dict: dict[object, object] = {}
        self.stack = contextlib.ExitStack()

    def teardown(self) -> None:
        self.stack.close()

    def key(self, number: int) -> object:
        """The key of a number, in the form that iteration gives it."""
        raise NotImplementedError

    def spellings(self, number: int) -> list[object]:
        """The forms in which a caller may write that key."""
        raise NotImplementedError

    def value(self, number: int) -> tuple[object, object]:
        """A value to write, and what it is read as."""
        raise NotImplementedError

    def outside(self, number: int) -> bool:
        return False

    @contextlib.contextmanager
    def writing(self, number: int, read: object) -> Iterator[None]:
        """Where there is room the write succeeds, and the dict gets it as well."""
        key = self.key(number)
        if self.outside(number):
            with pytest.raises(IndexError) as caught:
                yield
            assert isinstance(caught.value, KeyError)
        elif key in self.dict or len(self.dict) < self.capacity:
            yield
            self.dict[key] = read
        else:
            with pytest.raises(pyskl.BpfError) as caught:
                yield
            assert caught.value.errno in {errno.E2BIG, errno.ENOSPC}

    def spelling(self, number: int, data: st.DataObject) -> object:
        return data.draw(st.sampled_from(self.spellings(number)))

    @rule(number=KEYS, value=VALUES, data=st.data())
    def setitem(self, number: int, value: int, data: st.DataObject) -> None:
        written, read = self.value(value)
        with self.writing(number, read):
            self.map[self.spelling(number, data)] = written

    @rule(number=KEYS, value=VALUES, data=st.data(), mode=st.sampled_from(["exist", "noexist"]))
    def put(self, number: int, value: int, data: st.DataObject, mode: str) -> None:
        written, read = self.value(value)
        spelling, present = self.spelling(number, data), self.key(number) in self.dict
        if self.outside(number) or present == (mode == "exist"):
            with self.writing(number, read):
                self.map.put(spelling, written, mode=mode)
        else:
            with pytest.raises(pyskl.BpfError) as caught:
                self.map.put(spelling, written, mode=mode)
            assert caught.value.errno == (errno.EEXIST if present else errno.ENOENT)
            assert isinstance(caught.value, KeyError) == (not present)

    @rule(number=KEYS, data=st.data())
    def getitem(self, number: int, data: st.DataObject) -> None:
        spelling, expected = self.spelling(number, data), self.dict.get(self.key(number))
        assert self.map.get(spelling) == expected
        assert (spelling in self.map) == (expected is not None)
        if expected is None:
            with pytest.raises(KeyError):
                self.map[spelling]
        else:
            assert self.map[spelling] == expected

    @rule(number=KEYS, data=st.data())
    def delitem(self, number: int, data: st.DataObject) -> None:
        present = self.dict.pop(self.key(number), None) is not None
        with contextlib.nullcontext() if present else pytest.raises(KeyError):
            del self.map[self.spelling(number, data)]

    @rule(number=KEYS, data=st.data())
    def pop(self, number: int, data: st.DataObject) -> None:
        expected = self.dict.pop(self.key(number), None)
        assert self.map.pop(self.spelling(number, data), None) == expected

    @rule()
    def popitem(self) -> None:
        if self.dict:
            key, value = self.map.popitem()
            assert self.dict.pop(key) == value
        else:
            with pytest.raises(KeyError):
                self.map.popitem()

    @rule(pairs=st.lists(st.tuples(KEYS, VALUES), max_size=8), as_dict=st.booleans())
    def update(self, pairs: list[tuple[int, int]], as_dict: bool) -> None:
        items = [(self.key(number), *self.value(value)) for number, value in pairs]
        after = self.dict | {key: read for key, _, read in items}
        if len(after) <= self.capacity and not any(self.outside(number) for number, _ in pairs):
            written = [(key, value) for key, value, _ in items]
            self.map.update(dict(written) if as_dict else written)
            self.dict = after

    @rule()
    def clear(self) -> None:
        self.map.clear()
        self.dict.clear()

    @invariant()
    def equal(self) -> None:
        if hasattr(self, "map"):
            assert len(self.map) == len(self.dict)
            assert dict(self.map.items()) == self.dict
            assert sorted(self.map) == sorted(self.dict)
            assert sorted(self.map.values()) == sorted(self.dict.values())
            assert isinstance(self.map, MutableMapping)


class Hashes(Dicts):
    @initialize(
        cls=st.sampled_from([HashMap, LpmTrie]),
        key_size=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 64]),
        value_size=st.sampled_from([1, 2, 3, 4, 7, 8, 9, 300]),
        capacity=st.integers(1, 6),
    )
    def create(self, cls: type[Map], key_size: int, value_size: int, capacity: int) -> None:
        self.bits = 8 * key_size
        if cls is LpmTrie and not support.full_trie_takes_updates():
            capacity = 7  # for it is never full then
        self.capacity = capacity
        length = 4 if cls is LpmTrie else 0  # the length of a prefix stands before it
        self.map = self.stack.enter_context(make(cls, length + key_size, value_size, capacity))
        self.value_size = value_size

    def key(self, number: int) -> bytes:
        data = number.to_bytes(self.bits // 8, sys.byteorder)
        return struct.pack("=I", self.bits) + data if isinstance(self.map, LpmTrie) else data

    def spellings(self, number: int) -> list[object]:
        key = self.key(number)
        return [key, bytearray(key), memoryview(key), *([number] if len(key) == 4 else [])]

    def value(self, number: int) -> tuple[bytes, bytes]:
        value = (number.to_bytes(4, "little") * 75)[: self.value_size]
        return value, value


class Sockets(Dicts):
    """Sockets go in and cookies come out; a socket that closes leaves its slots."""

    @initialize(cls=st.sampled_from([SockMap, SockHash]), capacity=st.integers(1, 6))
    def create(self, cls: type[SockMap | SockHash], capacity: int) -> None:
        self.capacity = capacity
        self.map = self.stack.enter_context(cls.create(capacity))
        self.socks = [self.listener() for _ in range(3)]

    def listener(self) -> socket.socket:
        return self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))

    def key(self, number: int) -> object:
        return number if isinstance(self.map, SockMap) else struct.pack("=I", number)

    def spellings(self, number: int) -> list[object]:
        return [number, struct.pack("=I", number)]

    def value(self, number: int) -> tuple[object, object]:
        sock = self.socks[number % len(self.socks)]
        return (sock if number & 1 else sock.fileno()), support.cookie(sock)

    def outside(self, number: int) -> bool:
        return isinstance(self.map, SockMap) and number >= self.capacity

    @rule(number=st.integers(0, 2))
    def close_a_socket(self, number: int) -> None:
        gone = support.cookie(self.socks[number])
        self.socks[number].close()
        self.socks[number] = self.listener()
        self.dict = {key: cookie for key, cookie in self.dict.items() if cookie != gone}
        assert support.eventually(lambda: len(self.map) == len(self.dict))


TestHashes = Hashes.TestCase
TestHashes.settings = COMMON
TestSockets = Sockets.TestCase
TestSockets.settings = COMMON


@given(
    size=st.integers(1, 20),
    entries=st.integers(1, 40),
    writes=st.lists(st.tuples(st.integers(-3, 45), st.binary(min_size=20, max_size=20)), max_size=60),
)
@COMMON
def test_arrays_are_lists(size: int, entries: int, writes: list[tuple[int, bytes]]) -> None:
    model = [bytes(size)] * entries
    with ArrayMap.create(value_size=size, max_entries=entries) as m:
        for index, data in writes:
            if 0 <= index < entries:
                m[index] = model[index] = data[:size]
            else:
                with pytest.raises(IndexError):
                    m[index] = data[:size]
        assert list(m.values()) == model
        assert dict(m) == dict(m.items()) == dict(enumerate(model))


@given(data=st.data(), size=st.integers(1, 20))
@COMMON
def test_each_cpu_has_a_value_of_its_own(data: st.DataObject, size: int) -> None:
    with PerCpuArrayMap.create(value_size=size, max_entries=1) as probe:
        cpus = len(probe[0])
    value = st.binary(min_size=size, max_size=size)
    values = st.lists(value, min_size=cpus, max_size=cpus).map(tuple)
    model = data.draw(st.dictionaries(st.binary(min_size=4, max_size=4), values, max_size=8))
    with make(PerCpuHashMap, 4, size, 8) as m:
        m.update(model)
        assert dict(m.items()) == model
        assert {key: m[key] for key in model} == model
