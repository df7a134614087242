"""Every refusal: its type, errno, call and hint, a quiet standard error, and nothing left over."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import privileges
import pytest
import support
from support import V4, V6, bpf_object

import pyskl
from pyskl import (
    ArrayMap,
    ArrayOfMaps,
    BpfError,
    BpfObject,
    HashMap,
    HashOfMaps,
    Link,
    LpmTrie,
    Map,
    MapType,
    NetNS,
    NoSuchKey,
    NoSuchPin,
    NotSupported,
    PerCpuArrayMap,
    PermissionDenied,
    PinExists,
    ProgArray,
    Program,
    ReuseportSockArray,
    SocketRefused,
    SockHash,
    SockMap,
    VerifierError,
)

T = TypeVar("T")
KEY, VALUE = b"\0" * 4, b"\0" * 8
NOBODY = 2**31 - 1  # an id and a pid that nobody has


class given(functools.cached_property):
    """What a case takes for granted: made when first used, and a failure to make it is no refusal."""

    def __init__(self, make: Callable[[World], T]) -> None:
        def sure(world: World) -> T:
            try:
                return make(world)
            except Exception as error:
                raise AssertionError(f"no {make.__name__}: {error!r}") from error

        super().__init__(sure)


class World:
    """The things that the cases misuse."""

    def __init__(self, stack: contextlib.ExitStack, ns: NetNS, pins: Path, tmp: Path) -> None:
        self.keep = stack.enter_context
        self.later = stack.callback
        self.ns, self.pins, self.tmp = ns, pins, tmp

    def sock(self, *how: int, bind: object = None, listen: bool = False) -> socket.socket:
        try:
            sock = self.keep(socket.socket(*how))
        except OSError as error:
            kinds = {support.IPPROTO_MPTCP: "mptcp", support.IPPROTO_UDPLITE: "udplite"}
            name = kinds.get(how[-1]) or socket.AddressFamily(how[0]).name.removeprefix("AF_").lower()
            support.unavailable(name, f"no such socket: {error.strerror}")
        if bind:
            sock.bind(bind)
        if listen:
            sock.listen()
        return sock

    def need(self, *names: str) -> None:
        """Make these now: what comes next can't, in a child without rights or without fds."""
        for name in names:
            getattr(self, name)

    def member(self) -> socket.socket:
        """A listener of a SO_REUSEPORT group."""
        return self.keep(socket.create_server(("127.0.0.1", 0), reuse_port=True))

    def sized(self, key_size: int, value_size: int) -> HashMap:
        return self.keep(HashMap.create(key_size=key_size, value_size=value_size))

    def program(self, name: str, of: str = "obj_pair") -> Program:
        return self.keep(Program.load(bpf_object(of), name))

    @given
    def content(self) -> bytes:
        return bpf_object("obj_many").read_bytes()

    @given
    def yes(self) -> Program:
        return self.program("yes")

    @given
    def no(self) -> Program:
        return self.program("no")

    @given
    def reuseport(self) -> Program:
        return self.program("choose", "obj_many")

    @given
    def link(self) -> Link:
        return self.keep(self.yes.attach(self.ns))

    @given
    def detached(self) -> Link:
        self.link.detach()
        return self.link

    @given
    def orphan(self) -> Link:
        """A link whose namespace is gone."""
        with support.namespace() as ns:
            link = self.keep(self.yes.attach(ns))
        assert support.eventually(lambda: link.info.netns_inode == 0)
        return link

    @given
    def crowded(self) -> NetNS:
        for _ in range(64):
            self.keep(self.yes.attach(self.ns))
        return self.ns

    @given
    def hash(self) -> HashMap:
        return self.keep(HashMap.create(key_size=4, value_size=8, max_entries=2))

    @given
    def full(self) -> HashMap:
        self.hash.update({b"aaaa": VALUE, b"bbbb": VALUE})
        return self.hash

    @given
    def frozen(self) -> HashMap:
        self.full.freeze()
        return self.hash

    @given
    def trie(self) -> LpmTrie:
        return self.keep(LpmTrie.create(key_size=8, value_size=8, max_entries=2))

    @given
    def full_trie(self) -> LpmTrie:
        for n in range(2):
            self.trie[struct.pack("=I4B", 32, n, n, n, n)] = VALUE
        return self.trie

    @given
    def array(self) -> ArrayMap:
        return self.keep(ArrayMap.create(value_size=8, max_entries=2))

    @given
    def sockets(self) -> SockMap:
        return self.keep(SockMap.create(2))

    @given
    def sockhash(self) -> SockHash:
        return self.keep(SockHash.create(1))

    @given
    def group(self) -> ReuseportSockArray:
        return self.keep(ReuseportSockArray.create(max_entries=2))

    @given
    def maps(self) -> ArrayOfMaps:
        return self.keep(ArrayOfMaps.create(max_entries=2, inner=self.hash))

    @given
    def programs(self) -> ProgArray:
        return self.keep(ProgArray.create(max_entries=2))

    @given
    def closed_map(self) -> HashMap:
        self.hash.close()
        return self.hash

    @given
    def closed_program(self) -> Program:
        self.no.close()
        return self.no

    @given
    def listener(self) -> socket.socket:
        return self.keep(socket.create_server(("127.0.0.1", 0)))

    @given
    def closed_fd(self) -> int:
        """A number that is no fd, and that nothing gets before the test is over."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1

    @given
    def null(self) -> int:
        fd = os.open("/dev/null", os.O_RDWR)
        self.later(os.close, fd)
        return fd

    @given
    def text_file(self) -> Path:
        path = self.tmp / "file"
        path.write_text("nothing that BPF knows")
        return path

    @given
    def pinned(self) -> dict[type, Path]:
        """One pin of each kind."""
        paths = {Program: self.pins / "prog", Map: self.pins / "map", Link: self.pins / "link"}
        for path, thing in zip(paths.values(), (self.yes, self.hash, self.link), strict=True):
            thing.pin(path)
        return paths

    @given
    def selects_a_group(self) -> Program:
        prog = self.program("first", "obj_many")
        prog.maps["sockets"][0] = self.member()
        return prog


@pytest.fixture
def world(netns: NetNS, bpffs: Path, tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(stack, netns, bpffs, tmp_path)


def bad(
    name: str,
    do: Callable[[World], object],
    error: type[Exception] | tuple[type[Exception], ...],
    number: int | None = None,
    call: str | None = None,
    hint: str | None = None,
    *,
    says: str = "",
) -> object:
    """A case: what is done, and the refusal it meets. `hint` and `says` are parts of its texts."""
    marks = [pytest.mark.portable] if call in (None, OPEN) else []  # the kernel is not asked
    return pytest.param(do, error, number, call, hint, says, id=name, marks=marks)


OPEN = "bpf_object__open_mem"
TO, FROM = (V4, 80), ("192.0.2.9", 4711)


def elf(world: World, at: int, new: bytes) -> bytes:
    """A good object with a few bytes of its header changed."""
    return world.content[:at] + new + world.content[at + len(new) :]


NOT_OBJECTS: dict[str, Callable[[World], object]] = {
    "a text": lambda w: b"#!/bin/sh\necho " * 20,
    "no bytes": lambda w: b"",
    "zeros": lambda w: bytes(1000),
    "the magic alone": lambda w: w.content[:4],
    "a header alone": lambda w: w.content[:64],
    "half an object": lambda w: w.content[: len(w.content) // 2],
    "all but its last byte": lambda w: w.content[:-1],
    "a path to an executable": lambda w: "/bin/true",
    "the bytes of an executable": lambda w: Path("/bin/true").read_bytes(),
    "a path to a text": lambda w: w.text_file,
    "an empty file": lambda w: "/dev/null",
    "another machine's": lambda w: elf(w, 18, b"\x3e\0"),
    "a 32-bit one": lambda w: elf(w, 4, b"\1"),
    "of the other byte order": lambda w: elf(w, 5, b"\2"),
    "of no sections": lambda w: elf(w, 40, bytes(8)),
    "whose sections lie beyond the end": lambda w: elf(w, 40, b"\xff" * 7),
    "an executable BPF file": lambda w: elf(w, 16, b"\2\0"),
}


def load(w: World, name: str = "obj_globals", **how: object) -> BpfObject:
    return BpfObject.load(bpf_object(name), **how)  # type: ignore[arg-type]


OBJECTS = [
    *(
        bad(f"{how.__qualname__} of {name}", do, BpfError, errno.ENOEXEC, OPEN, "clang")
        for name, source in NOT_OBJECTS.items()
        for how in (BpfObject.load, Program.load)
        for do in [lambda w, source=source, how=how: how(source(w))]
    ),
    bad("a missing file", lambda w: BpfObject.load(w.tmp / "absent.o"),
        FileNotFoundError, errno.ENOENT, says="absent.o"),
    bad("a missing folder", lambda w: Program.load(w.tmp / "a/b.o"), FileNotFoundError, errno.ENOENT, says="a/b.o"),
    bad("a folder", lambda w: BpfObject.load(w.tmp), IsADirectoryError, errno.EISDIR),
    bad("a file as a folder", lambda w: BpfObject.load(w.text_file / "x"), NotADirectoryError, errno.ENOTDIR),
    bad("a NUL in a path", lambda w: BpfObject.load("a\0b"), ValueError),
    bad("no source", lambda w: BpfObject.load(None), TypeError),
    bad("a number for a source", lambda w: BpfObject.load(w.null), TypeError),
    bad("a list for a source", lambda w: Program.load([]), TypeError),
    bad("no program in an object", lambda w: Program.load(bpf_object("obj_maps")), ValueError, says="program"),
    bad("several programs and no name", lambda w: Program.load(bpf_object("obj_pair")), ValueError, says="yes"),
    bad("several programs, all named", lambda w: Program.load(w.content), ValueError, says="choose"),
    bad("an absent program", lambda w: Program.load(w.content, "absent"), KeyError, says="choose"),
    bad("an absent program picked", lambda w: load(w, programs=["report", "absent"]), KeyError, says="report"),
    bad("a text of programs", lambda w: load(w, programs="report"), (KeyError, TypeError)),
    bad("an absent constant", lambda w: load(w, constants={"absent": 1}), KeyError, says="u32"),
    bad("a map for a constant", lambda w: load(w, "obj_many", constants={"runs": 1}),
        (KeyError, ValueError), says="runs"),
    bad("a variable that is no constant", lambda w: load(w, constants={"fixed": 1}), ValueError, says="const volatile"),
    bad("a variable in .bss", lambda w: load(w, constants={"seen": bytes(40)}), ValueError, says="const volatile"),
    *(
        bad(f"{value} in a constant {name}", lambda w, n=name, v=value: load(w, constants={n: v}),
            ValueError, says=name)
        for bits in (8, 16, 32, 64)
        for name, values in {
            f"u{bits}": (-1, 2**bits, 2**99),
            f"s{bits}": (-(2 ** (bits - 1)) - 1, 2 ** (bits - 1), -(2**99)),
        }.items()
        for value in values
    ),
    *(
        bad(f"{value!r} in a constant {name}", lambda w, n=name, v=value: load(w, constants={n: v}),
            ValueError, says=name)
        for name, value in [("u32", b"abc"), ("u32", b"abcde"), ("key", b""), ("key", b"abcde"), ("flag", 256)]
    ),
    *(
        bad(f"{value!r} for a constant", lambda w, v=value: load(w, constants={"u32": v}), TypeError)
        for value in ("1", 1.0, None, [1])
    ),
    bad("the size of an absent map", lambda w: load(w, "obj_many", max_entries={"absent": 1}),
        KeyError, says="sockets"),
    bad("a negative size", lambda w: load(w, "obj_many", max_entries={"sockets": -1}), ValueError),
    bad("a size of 33 bits", lambda w: load(w, "obj_many", max_entries={"sockets": 2**32}), ValueError),
    bad("a size that is a text", lambda w: load(w, "obj_many", max_entries={"sockets": "4"}), TypeError),
    bad("a size of 0", lambda w: load(w, "obj_many", max_entries={"sockets": 0}), ValueError, says="max_entries"),
    bad("a size beyond all memory", lambda w: load(w, "obj_maps", max_entries={"hash": 2**32 - 1}),
        BpfError, errno.E2BIG, "BPF_MAP_CREATE"),
    bad("reuse for an absent map", lambda w: load(w, "obj_many", reuse={"absent": w.sockets}),
        KeyError, says="sockets"),
    bad("reuse of another type", lambda w: load(w, "obj_many", reuse={"sockets": w.sockhash}),
        ValueError, says="SOCKHASH"),
    bad("reuse of a hash for an array", lambda w: load(w, "obj_many", reuse={"runs": w.hash}), ValueError, says="HASH"),
    bad("reuse of another key size", lambda w: load(w, "obj_maps", reuse={"hash": w.sized(8, 8)}),
        ValueError, says="key"),
    bad("reuse of another value size", lambda w: load(w, "obj_maps", reuse={"hash": w.sized(4, 4)}),
        ValueError, says="value"),
    bad("reuse of a closed map", lambda w: load(w, "obj_maps", reuse={"hash": w.closed_map}),
        ValueError, says="closed"),
    bad("reuse of a program", lambda w: load(w, "obj_maps", reuse={"hash": w.yes}), TypeError),
    bad("reuse of an fd", lambda w: load(w, "obj_maps", reuse={"hash": w.hash.fileno()}), TypeError),
    bad("a negative log level", lambda w: load(w, log_level=-1), ValueError, says="log_level"),
    bad("a log level of nothing", lambda w: load(w, log_level=64), ValueError, says="log_level"),
    *(
        bad(f"the verifier: {name}", lambda w, n=name: load(w, "obj_rejected", programs=[n]),
            VerifierError, number, "BPF_PROG_LOAD", says=says)
        for name, number, says in [
            ("leaks_socket", errno.EINVAL, "leaks_socket"),
            ("unchecked_null", errno.EACCES, "processed"),
            ("beyond_context", errno.EACCES, "invalid bpf_context access"),
            ("bad_verdict", errno.EINVAL, "R0"),
            ("endless", errno.EINVAL, "infinite loop"),
            ("long_log", errno.EACCES, "invalid bpf_context access"),
        ]
    ),
    bad("the verifier: all", lambda w: load(w, "obj_rejected"), VerifierError, errno.EINVAL, "BPF_PROG_LOAD"),
    bad("the verifier: one", lambda w: Program.load(bpf_object("obj_rejected"), "bad_verdict"),
        VerifierError, errno.EINVAL, "BPF_PROG_LOAD"),
]  # fmt: skip

CREATE, UPDATE = "BPF_MAP_CREATE", "BPF_MAP_UPDATE_ELEM"
DELETE, LOOKUP = "BPF_MAP_DELETE_ELEM", "BPF_MAP_LOOKUP_ELEM"

MAPS = [
    bad("no entries", lambda w: HashMap.create(key_size=4, value_size=8, max_entries=0),
        BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("a SockMap of no entries", lambda w: SockMap.create(0), BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("no key", lambda w: HashMap.create(key_size=0, value_size=8, max_entries=1),
        BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("no value", lambda w: HashMap.create(key_size=4, value_size=0, max_entries=1),
        BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("an array of long keys", lambda w: ArrayMap.create(key_size=8, value_size=8, max_entries=1),
        BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("a sockmap of long keys", lambda w: Map.create(MapType.SOCKMAP, 8, 8, 1),
        BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("a trie without a prefix", lambda w: LpmTrie.create(key_size=4, value_size=8, max_entries=1),
        BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("an unknown flag", lambda w: HashMap.create(key_size=4, value_size=8, max_entries=1, flags=1 << 30),
        BpfError, errno.EINVAL, CREATE, "sizes"),
    bad("too many entries", lambda w: HashMap.create(key_size=4, value_size=8, max_entries=2**32 - 1),
        BpfError, errno.E2BIG, CREATE),
    bad("too long a key", lambda w: HashMap.create(key_size=2**31, value_size=8, max_entries=1),
        BpfError, errno.E2BIG, CREATE),
    bad("too long a value", lambda w: HashMap.create(key_size=4, value_size=2**31, max_entries=1),
        BpfError, errno.E2BIG, CREATE),
    bad("too much of both", lambda w: ArrayMap.create(key_size=4, value_size=2**31, max_entries=2**31),
        BpfError, errno.E2BIG, CREATE),
    bad("too long a value per CPU", lambda w: PerCpuArrayMap.create(key_size=4, value_size=2**15 + 1, max_entries=1),
        BpfError, errno.E2BIG, CREATE),
    bad("too long a key of sockets", lambda w: SockHash.create(1, key_size=513), BpfError, errno.E2BIG, CREATE),
    bad("33 bits of entries", lambda w: SockMap.create(2**32), ValueError),
    bad("-1 entries", lambda w: SockMap.create(-1), ValueError),
    bad("33 bits of key", lambda w: HashMap.create(key_size=2**32, value_size=8, max_entries=1), ValueError),
    bad("-1 bytes of value", lambda w: HashMap.create(key_size=4, value_size=-1, max_entries=1), ValueError),
    bad("entries in words", lambda w: SockMap.create("four"), TypeError),
    bad("entries in halves", lambda w: SockMap.create(2.0), TypeError),
    bad("too long a name", lambda w: SockMap.create(1, name="x" * 16), ValueError, says="15"),
    bad("a name with a space", lambda w: SockMap.create(1, name="a b"), ValueError),
    bad("a name with a NUL", lambda w: SockMap.create(1, name="a\0b"), ValueError),
    bad("a name beyond ASCII", lambda w: SockMap.create(1, name="karteé"), ValueError),
    bad("a name that is bytes", lambda w: SockMap.create(1, name=b"name"), TypeError),
    bad("a type for a class that has one", lambda w: HashMap.create(type=MapType.ARRAY), TypeError, says="type"),
    bad("a map of maps without an inner one", lambda w: ArrayOfMaps.create(max_entries=1), TypeError, says="inner"),
    bad("an inner map of a plain type",
        lambda w: HashMap.create(key_size=4, value_size=4, max_entries=1, inner=w.array), TypeError, says="inner"),
    bad("a map of maps of maps", lambda w: ArrayOfMaps.create(max_entries=1, inner=w.maps),
        BpfError, errno.EINVAL, CREATE),
    bad("a map of program arrays", lambda w: HashOfMaps.create(max_entries=1, inner=w.programs),
        NotSupported, errno.EOPNOTSUPP, CREATE),
    bad("a closed inner map", lambda w: ArrayOfMaps.create(max_entries=1, inner=w.closed_map),
        ValueError, says="closed"),
    bad("an absent key", lambda w: w.hash[KEY], NoSuchKey, errno.ENOENT, LOOKUP),
    bad("an absent key to delete", lambda w: w.hash.__delitem__(KEY), NoSuchKey, errno.ENOENT, DELETE),
    bad("an absent key to pop", lambda w: w.hash.pop(KEY), NoSuchKey, errno.ENOENT, LOOKUP),
    bad("an absent key to replace", lambda w: w.hash.put(KEY, VALUE, mode="exist"), NoSuchKey, errno.ENOENT, UPDATE),
    bad("a key that exists", lambda w: w.full.put(b"aaaa", VALUE, mode="noexist"), BpfError, errno.EEXIST, UPDATE),
    bad("a full map", lambda w: w.full.__setitem__(b"cccc", VALUE), BpfError, errno.E2BIG, UPDATE, "full"),
    bad("a full trie", lambda w: w.full_trie.__setitem__(struct.pack("=I4x", 1), VALUE),
        BpfError, errno.ENOSPC, UPDATE, "full"),
    bad("a full sockhash", lambda w: w.sockhash.update([(1, w.listener), (2, w.listener)]),
        BpfError, errno.E2BIG, UPDATE, "full"),
    bad("too long a prefix", lambda w: w.trie.__setitem__(struct.pack("=I4x", 33), VALUE), ValueError, says="32 bits"),
    bad("a frozen map", lambda w: w.frozen.__setitem__(KEY, VALUE), BpfError, errno.EPERM, UPDATE, "frozen"),
    bad("a frozen map's entry", lambda w: w.frozen.__delitem__(b"aaaa"), BpfError, errno.EPERM, DELETE, "frozen"),
    bad("an absent entry of a sockmap", lambda w: w.sockets[0], NoSuchKey, errno.ENOENT, LOOKUP),
    bad("an absent entry of a sockmap to delete", lambda w: w.sockets.__delitem__(0), NoSuchKey, errno.ENOENT, DELETE),
    bad("an index beyond", lambda w: w.sockets[2], IndexError),
    bad("an index beyond to set", lambda w: w.sockets.__setitem__(2, w.listener), IndexError),
    bad("an index beyond to delete", lambda w: w.sockets.__delitem__(2), IndexError),
    bad("an index beyond an array", lambda w: w.array[2], IndexError),
    bad("an index below", lambda w: w.array[-1], IndexError),
    bad("an index that is a text", lambda w: w.array["0"], TypeError),
    bad("a slice", lambda w: w.array[0:1], TypeError),
    bad("a deletion from an array", lambda w: w.array.__delitem__(0), TypeError),
    bad("a short key", lambda w: w.hash[b"abc"], ValueError, says="4"),
    bad("a short value", lambda w: w.hash.__setitem__(KEY, b"abc"), ValueError, says="8"),
    bad("a value that is a number", lambda w: w.hash.__setitem__(KEY, 1), TypeError),
    bad("an unknown mode", lambda w: w.hash.put(KEY, VALUE, mode="replace"), ValueError, says="noexist"),
    bad("memory of a plain array", lambda w: w.array.mmap(), ValueError, says="BPF_F_MMAPABLE"),
    bad("a map of another shape in a map", lambda w: w.maps.__setitem__(0, w.array), BpfError, errno.EINVAL, UPDATE),
    bad("a program in a map of maps", lambda w: w.maps.__setitem__(0, w.yes), TypeError),
    bad("a closed map in a map", lambda w: w.maps.__setitem__(0, (w.maps, w.closed_map)[1]), ValueError, says="closed"),
    bad("a map in a program array", lambda w: w.programs.__setitem__(0, w.hash), TypeError),
    bad("a closed program in a program array", lambda w: w.programs.__setitem__(0, w.closed_program),
        ValueError, says="closed"),
    bad("programs of two types in an array", lambda w: w.programs.update([(0, w.yes), (1, w.reuseport)]),
        BpfError, errno.EINVAL, UPDATE),
    bad("a closed map", lambda w: w.closed_map[KEY], ValueError, says="closed"),
]  # fmt: skip

INET, INET6, STREAM, DGRAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
HOME = ("127.0.0.1", 0)
REFUSED: dict[str, tuple[Callable[[World], object], int, str]] = {
    "TCP unbound": (lambda w: w.sock(INET, STREAM), errno.EOPNOTSUPP, "bind"),
    "TCP bound": (lambda w: w.sock(INET, STREAM, bind=HOME), errno.EOPNOTSUPP, "listen"),
    "TCP over IPv6, bound": (lambda w: w.sock(INET6, STREAM, bind=("::", 0)), errno.EOPNOTSUPP, "listen"),
    "UDP unbound": (lambda w: w.sock(INET, DGRAM), errno.EOPNOTSUPP, "bound"),
    "UDP over IPv6, unbound": (lambda w: w.sock(INET6, DGRAM), errno.EOPNOTSUPP, "bound"),
    "MPTCP": (lambda w: w.sock(INET, STREAM, support.IPPROTO_MPTCP, bind=HOME, listen=True), errno.EOPNOTSUPP, "MPTCP"),
    "UDP-Lite": (lambda w: w.sock(INET, DGRAM, support.IPPROTO_UDPLITE, bind=HOME), errno.EOPNOTSUPP, "UDP"),
    "raw": (lambda w: w.sock(INET, socket.SOCK_RAW, socket.IPPROTO_UDP), errno.EOPNOTSUPP, "raw"),
    "packet": (lambda w: w.sock(socket.AF_PACKET, socket.SOCK_RAW), errno.EOPNOTSUPP, ""),
    "netlink": (lambda w: w.sock(socket.AF_NETLINK, socket.SOCK_RAW), errno.EOPNOTSUPP, ""),
    "vsock": (lambda w: w.sock(socket.AF_VSOCK, STREAM), errno.EOPNOTSUPP, ""),
    "unix, unconnected stream": (lambda w: w.sock(socket.AF_UNIX, STREAM), errno.EOPNOTSUPP, ""),
    "unix, seqpacket": (lambda w: w.sock(socket.AF_UNIX, socket.SOCK_SEQPACKET), errno.EOPNOTSUPP, ""),
    "no socket but a file": (lambda w: w.null, errno.ENOTSOCK, "socket"),
    "no socket but a map": (lambda w: w.hash, errno.ENOTSOCK, "socket"),
    "a closed fd": (lambda w: w.closed_fd, errno.EBADF, ""),
    "fd -1": (lambda w: -1, errno.EINVAL, ""),
}  # fmt: skip


def closed_socket(w: World) -> socket.socket:
    w.listener.close()
    return w.listener


def shut_socket(w: World) -> socket.socket:
    w.listener.shutdown(socket.SHUT_RDWR)
    return w.listener


REFUSED["a closed socket"] = (closed_socket, errno.EINVAL, "closed")
REFUSED["a listener that was shut down"] = (shut_socket, errno.EOPNOTSUPP, "listen")

SOCKETS = [
    *(
        bad(f"{name} in a {where}", lambda w, s=sock, m=where: getattr(w, m).put(0, s(w)),
            SocketRefused, number, UPDATE, says=says)
        for name, (sock, number, says) in REFUSED.items()
        for where in ("sockets", "sockhash")
    ),
    bad("a name for a socket", lambda w: w.sockets.__setitem__(0, "socket"), TypeError),
    bad("None for a socket", lambda w: w.sockets.__setitem__(0, None), TypeError),
    bad("bytes for a socket", lambda w: w.sockhash.__setitem__(0, bytes(8)), TypeError),
    bad("a socket in a frozen map", lambda w: (w.sockets.freeze(), w.sockets.put(0, w.listener)),
        BpfError, errno.EPERM, UPDATE, "frozen"),
    bad("a listener outside any group", lambda w: w.group.__setitem__(0, w.listener),
        SocketRefused, errno.EINVAL, UPDATE, says="SO_REUSEPORT"),
    bad("a socket in two kinds of maps",
        lambda w: [m.__setitem__(0, s) for s in [w.member()] for m in (w.group, w.sockets)],
        SocketRefused, errno.EBUSY, UPDATE, says="map"),
    bad("a full slot", lambda w: [w.sockets.put(0, w.listener, mode="noexist") for _ in range(2)],
        BpfError, errno.EEXIST, UPDATE),
    bad("an empty slot", lambda w: w.sockets.put(0, w.listener, mode="exist"), NoSuchKey, errno.ENOENT, UPDATE),
    bad("a cookie of a file", lambda w: pyskl.socket_cookie(w.null), (OSError, ValueError)),
    bad("a cookie of a closed socket", lambda w: pyskl.socket_cookie(closed_socket(w)), (OSError, ValueError)),
    bad("a cookie of a text", lambda w: pyskl.socket_cookie("socket"), TypeError),
]  # fmt: skip

PIN, GET = "BPF_OBJ_PIN", "BPF_OBJ_GET"
KINDS = {Program: "program", Map: "map", Link: "link"}
PINS = [
    bad("a pin outside bpffs", lambda w: w.hash.pin(w.tmp / "pin"), BpfError, errno.EPERM, PIN, "bpffs"),
    bad("a program's pin outside bpffs", lambda w: w.yes.pin("/tmp/pin"), BpfError, errno.EPERM, PIN, "bpffs"),
    bad("a pin on procfs", lambda w: w.link.pin("/proc/pin"), NoSuchPin, errno.ENOENT, PIN),
    bad("a pin that exists", lambda w: w.hash.pin(w.pinned[Map]), PinExists, errno.EEXIST, PIN, says="map"),
    bad("a pin over a folder", lambda w: w.hash.pin(w.pins), PinExists, errno.EEXIST, PIN),
    bad("a pin in a missing folder", lambda w: w.hash.pin(w.pins / "a/b"), NoSuchPin, errno.ENOENT, PIN, says="a/b"),
    bad("a pin below a pin", lambda w: w.yes.pin(w.pinned[Map] / "x"), BpfError, errno.ENOTDIR, PIN),
    bad("too long a pin", lambda w: w.hash.pin(w.pins / ("x" * 256)), BpfError, errno.ENAMETOOLONG, PIN),
    *(
        bad(f"a dot in a pin's name: {name!r}", lambda w, n=name: w.hash.pin(w.pins / n), ValueError, says=".")
        for name in ("a.b", ".a", "a.", "a..b")
    ),
    bad("a dot in a link's pin", lambda w: w.link.pin(w.pins / "l.1"), ValueError, says="."),
    bad("a NUL in a pin", lambda w: w.hash.pin(f"{w.pins}/a\0b"), ValueError),
    bad("a number for a pin", lambda w: w.hash.pin(3), TypeError),
    bad("unpin without a pin", lambda w: w.hash.unpin(), ValueError, says="pin"),
    bad("unpin twice", lambda w: (w.pinned, w.hash.unpin(), w.hash.unpin()), ValueError, says="pin"),
    *(
        bad(f"{kind.__name__}.from_pin of a {KINDS[other]}", lambda w, k=kind, o=other: k.from_pin(w.pinned[o]),
            TypeError, says=says)
        for kind in KINDS
        for other in KINDS
        if kind is not other
        for says in (KINDS[other], KINDS[kind])
    ),
    *(
        bad(f"{kind.__name__}.from_fd of a {thing}", lambda w, k=kind, t=thing: k.from_fd(getattr(w, t).fileno()),
            TypeError, says=says)
        for kind in KINDS
        for thing, other in {"yes": Program, "hash": Map, "link": Link}.items()
        if kind is not other
        for says in (KINDS[other], KINDS[kind])
    ),
    bad("SockMap.from_pin of a hash map", lambda w: SockMap.from_pin(w.pinned[Map]), TypeError, says="HASH"),
    bad("HashMap.from_fd of a sockmap", lambda w: HashMap.from_fd(w.sockets.fileno()), TypeError, says="SOCKMAP"),
    bad("HashMap.from_id of a sockmap", lambda w: HashMap.from_id(w.sockets.info.id), TypeError, says="SOCKMAP"),
    *(
        bad(f"{kind.__name__}.{way} of {name}", lambda w, k=kind, m=make: k.from_pin(m(w)),
            error, number, GET, hint, says=says)
        for kind in KINDS
        for way in ["from_pin"]
        for name, make, error, number, hint, says in [
            ("nothing", lambda w: w.pins / "none", NoSuchPin, errno.ENOENT, None, "none"),
            ("a regular file", lambda w: w.text_file, BpfError, errno.EACCES, "mount -t bpf", ""),
            ("a folder", lambda w: w.pins, BpfError, errno.EACCES, "no pin", ""),
            ("a device", lambda w: "/dev/null", BpfError, errno.EACCES, "mount -t bpf", ""),
        ]
    ),
    bad("from_pin of a number", lambda w: Map.from_pin(3), TypeError),
    *(
        bad(f"{kind.__name__}.from_id of an absent id", lambda w, k=kind: k.from_id(NOBODY),
            BpfError, errno.ENOENT, call)
        for kind, call in {
            Program: "BPF_PROG_GET_FD_BY_ID",
            Map: "BPF_MAP_GET_FD_BY_ID",
            Link: "BPF_LINK_GET_FD_BY_ID",
        }.items()
    ),
    *(
        bad(f"{kind.__name__}.from_id({value!r})", lambda w, k=kind, v=value: k.from_id(v), error)
        for kind in KINDS
        for value, error in {-1: ValueError, 2**32: ValueError, "1": TypeError}.items()
    ),
    *(
        bad(f"{kind.__name__}.from_fd of a {name}", lambda w, k=kind, m=make: k.from_fd(m(w)), error, number)
        for kind in KINDS
        for name, make, error, number in [
            ("file", lambda w: w.null, TypeError, None),
            ("socket", lambda w: w.listener.fileno(), TypeError, None),
            ("closed fd", lambda w: w.closed_fd, OSError, errno.EBADF),
            ("text", lambda w: "fd", TypeError, None),
        ]
    ),
]  # fmt: skip

ATTACH, RENEW = "BPF_LINK_CREATE", "BPF_LINK_UPDATE"
NO_NAMESPACES: dict[str, tuple[Callable[[World], object], type[Exception]]] = {
    "a file": (lambda w: w.null, ValueError),
    "a path to a file": (lambda w: w.text_file, ValueError),
    "a path to a device": (lambda w: "/dev/null", ValueError),
    "a path to a folder": (lambda w: w.tmp, ValueError),
    "a namespace of another kind": (lambda w: "/proc/self/ns/uts", ValueError),
    "a socket": (lambda w: w.listener.fileno(), ValueError),
    "a map": (lambda w: w.hash.fileno(), ValueError),
    "a missing path": (lambda w: w.tmp / "absent", FileNotFoundError),
    "a closed fd": (lambda w: w.closed_fd, OSError),
    "fd -1": (lambda w: -1, (OSError, ValueError)),
    "a fraction": (lambda w: 1.5, TypeError),
    "a program": (lambda w: object(), TypeError),
}

LINKS = [
    *(
        bad(f"{name} to {what}", lambda w, d=do, m=make: d(w, m(w)), error)
        for what, (make, error) in NO_NAMESPACES.items()
        for name, do in {
            "attach": lambda w, to: w.yes.attach(to),
            "query": lambda w, to: pyskl.query(to),
            "links": lambda w, to: pyskl.links(to),
        }.items()
    ),
    bad("attach of sk_reuseport", lambda w: w.reuseport.attach(w.ns), ValueError, says="SO_ATTACH_REUSEPORT_EBPF"),
    bad("attach of a closed program", lambda w: w.closed_program.attach(w.ns), ValueError, says="closed"),
    bad("the 65th link", lambda w: w.yes.attach(w.crowded), BpfError, errno.E2BIG, ATTACH, "64"),
    bad("update in a dead namespace", lambda w: w.orphan.update(w.no), BpfError, errno.ENOLINK, RENEW, "namespace"),
    bad("update of a detached link", lambda w: w.detached.update(w.no), BpfError, errno.ENOLINK, RENEW, "detach"),
    bad("update with another expected", lambda w: w.link.update(w.no, expected=w.no),
        BpfError, errno.EPERM, RENEW, "expected"),
    bad("update to sk_reuseport", lambda w: w.link.update(w.reuseport), (ValueError, BpfError)),
    bad("update to a closed program", lambda w: w.link.update(w.closed_program), ValueError, says="closed"),
    bad("update from a closed program", lambda w: (w.link, w.no, w.closed_program, w.link.update(w.yes, expected=w.no)),
        ValueError, says="closed"),
    bad("update to a map", lambda w: w.link.update(w.hash), (TypeError, BpfError)),
    bad("update to nothing", lambda w: w.link.update(None), TypeError),
    bad("update from a map", lambda w: w.link.update(w.no, expected=w.hash), (TypeError, BpfError)),
    bad("a Link of nothing", lambda w: Link(), TypeError),
    bad("a Program of nothing", lambda w: Program(), TypeError),
    bad("a Map of nothing", lambda w: Map(), TypeError),
    bad("a BpfObject of nothing", lambda w: BpfObject(), TypeError),
]  # fmt: skip

NAMES = [
    *(
        bad(f"a namespace's name {name!r}", lambda w, n=name: NetNS.named(n), ValueError)
        for name in ("", ".", "..", "a/b", "/etc/passwd", "a\0b")
    ),
    bad("a namespace's absent name", lambda w: NetNS.named("pyskl-absent"),
        FileNotFoundError, errno.ENOENT, says="pyskl-absent"),
    bad("a namespace's long name", lambda w: NetNS.named("x" * 256), (OSError, ValueError)),
    bad("a namespace's number", lambda w: NetNS.named(3), TypeError),
    bad("a namespace's absent path", lambda w: NetNS.from_path(w.tmp / "none"),
        FileNotFoundError, errno.ENOENT, says="none"),
    bad("a namespace's path to a file", lambda w: NetNS.from_path(w.text_file), ValueError, says="namespace"),
    bad("a namespace's path to a UTS namespace", lambda w: NetNS.from_path("/proc/self/ns/uts"),
        ValueError, says="namespace"),
    bad("a namespace's fd of a file", lambda w: NetNS.from_fd(w.null), ValueError, says="namespace"),
    bad("a namespace's fd of a socket", lambda w: NetNS.from_fd(w.listener.fileno()), ValueError),
    bad("a namespace's closed fd", lambda w: NetNS.from_fd(w.closed_fd), OSError, errno.EBADF),
    bad("an absent pid", lambda w: NetNS.from_pid(NOBODY), ProcessLookupError, errno.ESRCH, says=str(NOBODY)),
    bad("pid -1", lambda w: NetNS.from_pid(-1), (ValueError, ProcessLookupError)),
    bad("pid 0", lambda w: NetNS.from_pid(0), (ValueError, ProcessLookupError)),
    bad("a pid in words", lambda w: NetNS.from_pid("self"), TypeError),
]  # fmt: skip

RUN = "BPF_PROG_TEST_RUN"
RUNS = [
    bad("a bad protocol", lambda w: w.yes.test_run("sctp", TO, FROM), ValueError, says="sctp"),
    bad("a protocol's bad number", lambda w: w.yes.test_run(132, TO, FROM), ValueError),
    bad("no protocol", lambda w: w.yes.test_run(None, TO, FROM), (TypeError, ValueError)),
    bad("a bad host", lambda w: w.yes.test_run("tcp", ("192.0.2.256", 80), FROM), ValueError, says="192.0.2.256"),
    bad("a name for a host", lambda w: w.yes.test_run("tcp", ("localhost", 80), FROM), ValueError, says="localhost"),
    bad("a bad source host", lambda w: w.yes.test_run("tcp", TO, ("2001:db8::g", 80)), ValueError, says="2001:db8::g"),
    bad("a network for a host", lambda w: w.yes.test_run("udp", ("192.0.2.0/24", 80), FROM), ValueError),
    bad("no host", lambda w: w.yes.test_run("udp", ("", 80), FROM), ValueError),
    bad("two families", lambda w: w.yes.test_run("tcp", TO, (V6, 80)), ValueError, says="famil"),
    bad("two families the other way", lambda w: w.yes.test_run("udp", (V6, 80), FROM), ValueError, says="famil"),
    *(
        bad(f"port {port}{side}", lambda w, a=arguments: w.yes.test_run("tcp", *a), ValueError, says="port")
        for port in (-1, 65536, 2**40)
        for side, arguments in {"": ((V4, port), FROM), " of the source": (TO, (V4, port))}.items()
    ),
    bad("a port that is a text", lambda w: w.yes.test_run("tcp", (V4, "80"), FROM), TypeError),
    bad("an address that is a text", lambda w: w.yes.test_run("tcp", "192.0.2.1:80", FROM), (TypeError, ValueError)),
    bad("no address", lambda w: w.yes.test_run("tcp", None, FROM), TypeError),
    bad("no source", lambda w: w.yes.test_run("tcp", TO, None), TypeError),
    *(
        bad(f"repeat {n}", lambda w, n=n: w.yes.test_run("tcp", TO, FROM, repeat=n), ValueError, says="repeat")
        for n in (0, -1, 2**32)
    ),
    bad("repeat in words", lambda w: w.yes.test_run("tcp", TO, FROM, repeat="twice"), TypeError),
    bad("a test run of sk_reuseport", lambda w: w.reuseport.test_run("tcp", TO, FROM), ValueError, says="sk_lookup"),
    bad("a test run of a closed program", lambda w: w.closed_program.test_run("tcp", TO, FROM),
        ValueError, says="closed"),
    bad("a test run that selects a group", lambda w: w.selects_a_group.test_run("tcp", TO, FROM),
        BpfError, errno.EOPNOTSUPP, RUN, "REUSEPORT"),
]  # fmt: skip

CASES = [*OBJECTS, *MAPS, *SOCKETS, *PINS, *LINKS, *NAMES, *RUNS]


@pytest.mark.parametrize(("do", "error", "number", "call", "hint", "says"), CASES)
def test_a_refusal(
    world: World,
    capfd: pytest.CaptureFixture[str],
    do: Callable[[World], object],
    error: type[Exception],
    number: int | None,
    call: str | None,
    hint: str | None,
    says: str,
) -> None:
    with pytest.raises(error) as caught:
        do(world)
    refusal, text = caught.value, str(caught.value)
    assert says.lower() in text.lower()
    assert "Unknown error" not in text
    if number is not None:
        assert isinstance(refusal, OSError)
        assert errno.errorcode[refusal.errno] == errno.errorcode[number]
    if isinstance(error, type) and issubclass(error, BpfError):
        assert type(refusal) is error, "no more and no less than it says"
        assert refusal.call == call
        assert refusal.call in text
        if hint is not None:
            assert hint.lower() in refusal.hint.lower()
        assert refusal.hint is None or refusal.hint in text
    elif not isinstance(error, tuple) and not issubclass(error, OSError):
        assert not isinstance(refusal, OSError), "found before the kernel is asked"
    assert capfd.readouterr() == ("", "")


# -- the verifier's log ----------------------------------------------------------------------------


def test_the_verifiers_log_is_whole_and_its_end_is_shown() -> None:
    """Four thousand rounds of a loop make a log of megabytes: all of it, from first line to last."""
    with pytest.raises(VerifierError) as caught:
        BpfObject.load(bpf_object("obj_rejected"), programs=["long_log"])
    log, text = caught.value.log, str(caught.value)
    assert len(log) > 1_000_000
    assert log.lstrip().startswith(("0:", "func#0", "R1 type=ctx", "reg type", "Unrecognized arg#0"))
    assert log.count("+= ") > 4000
    assert "processed 40" in log.splitlines()[-1]
    last = [line for line in log.splitlines() if line][-3:]
    assert all(line in text for line in last)
    assert len(text) < 5000


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_log_is_there_whether_asked_for_or_not(level: int) -> None:
    with pytest.raises(VerifierError) as caught:
        BpfObject.load(bpf_object("obj_rejected"), programs=["bad_verdict"], log_level=level)
    assert "processed" in caught.value.log


# -- capabilities ----------------------------------------------------------------------------------

BPF, NET_ADMIN, SYS_ADMIN = "CAP_BPF", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"
GETS = {kind: f"BPF_{short}_GET_FD_BY_ID" for kind, short in {Program: "PROG", Map: "MAP", Link: "LINK"}.items()}
DENIED: dict[str, tuple[set[str], Callable[[World], object], str, tuple[str, ...]]] = {
    "a load": (set(), lambda w: load(w), "BPF_PROG_LOAD", (BPF,)),
    "a load with a sockmap": (set(), lambda w: load(w, "obj_nested"), "BPF_PROG_LOAD", (BPF, NET_ADMIN)),
    "a load with a sockmap, CAP_BPF": ({BPF}, lambda w: load(w, "obj_nested"), CREATE, (NET_ADMIN,)),
    "a sockmap": (set(), lambda w: SockMap.create(1), CREATE, (BPF, NET_ADMIN)),
    "a sockmap, CAP_BPF": ({BPF}, lambda w: SockMap.create(1), CREATE, (NET_ADMIN,)),
    "a sockmap, CAP_NET_ADMIN": ({NET_ADMIN}, lambda w: SockMap.create(1), CREATE, (BPF,)),
    "a sockhash": (set(), lambda w: SockHash.create(1), CREATE, (BPF, NET_ADMIN)),
    "a trie": (set(), lambda w: LpmTrie.create(key_size=8), CREATE, (BPF,)),
    "a query": ({BPF}, lambda w: pyskl.query(w.ns), "BPF_PROG_QUERY", (NET_ADMIN,)),
    "entering a namespace": ({BPF, NET_ADMIN}, lambda w: w.ns.entered().__enter__(), "setns", (SYS_ADMIN,)),
    **{
        f"a {KINDS[kind]} by its id": (
            {BPF, NET_ADMIN}, lambda w, k=kind, t=thing: k.from_id(getattr(w, t).info.id), call, (SYS_ADMIN,)
        )
        for (kind, call), thing in zip(GETS.items(), ("yes", "hash", "link"), strict=True)
    },
    "the links": ({BPF, NET_ADMIN}, lambda w: pyskl.links(w.ns), "BPF_LINK_GET_NEXT_ID", (SYS_ADMIN,)),
}  # fmt: skip


@pytest.mark.parametrize("name", DENIED)
def test_a_denial_names_what_is_missing(world: World, capfd: pytest.CaptureFixture[str], name: str) -> None:
    keep, do, call, missing = DENIED[name]
    world.need("yes", "hash", "link", "ns")
    with pytest.raises(PermissionDenied) as caught:
        privileges.run(lambda: do(world), keep=keep)
    denial = caught.value
    assert isinstance(denial, PermissionError)
    assert (denial.errno, denial.call) == (errno.EPERM, call)
    assert denial.missing == missing
    assert all(capability in str(denial) for capability in missing)
    assert capfd.readouterr() == ("", "")


REFUSALS_TO_THE_ABLE: dict[str, tuple[Callable[[World], object], str]] = {
    "a frozen map": (lambda w: w.frozen.__setitem__(b"aaaa", VALUE), "BPF_MAP_UPDATE_ELEM"),
    "another program expected": (lambda w: w.link.update(w.no, expected=w.no), "BPF_LINK_UPDATE"),
    "a pin outside bpffs": (lambda w: w.hash.pin(w.tmp / "pin"), "BPF_OBJ_PIN"),
}


@pytest.mark.parametrize("name", REFUSALS_TO_THE_ABLE)
@pytest.mark.parametrize("keep", [set(), {BPF, NET_ADMIN}], ids=["none", "some"])
def test_an_eperm_that_no_capability_would_change_is_no_denial(world: World, name: str, keep: set[str]) -> None:
    do, call = REFUSALS_TO_THE_ABLE[name]
    world.need("frozen", "link", "no")
    with pytest.raises(BpfError) as caught:
        privileges.run(lambda: do(world), keep=keep | {BPF})
    assert not isinstance(caught.value, PermissionError)
    assert (caught.value.errno, caught.value.call) == (errno.EPERM, call)


def test_without_cap_sys_admin_a_query_gives_ids_alone(world: World) -> None:
    assert world.link
    ids = [prog.id for prog in pyskl.query(world.ns)]
    (info,) = privileges.run(lambda: pyskl.query(world.ns), keep={BPF, NET_ADMIN})
    assert info.id == ids[0] == world.yes.info.id
    assert [value for value in info._replace(id=None) if value is not None] == []


def test_an_fd_is_all_the_authority_that_its_holder_needs(world: World) -> None:
    """Whoever got the fds attaches, updates, detaches, puts, gets, runs and asks without any right."""
    prog = world.program("first", "obj_many")
    sockets = world.keep(prog.maps["sockets"])
    world.need("yes", "listener")

    def use() -> tuple[object, ...]:
        with prog.attach(world.ns) as link:
            link.update(world.yes, expected=prog)
            sockets[0] = world.listener
            run = prog.test_run("tcp", TO, FROM)
            link.detach()
            return link.info.prog_id, run.cookie, sockets[0], prog.info.name, len(sockets)

    cookie = support.cookie(world.listener)
    expected = (world.yes.info.id, cookie, cookie, "first", 1)
    assert privileges.run(use, keep={BPF}) == expected


# -- running out of fds ----------------------------------------------------------------------------

NEEDS_FDS: dict[str, Callable[[World], contextlib.AbstractContextManager[object]]] = {
    "load of one program": lambda w: Program.load(bpf_object("obj_many"), "first"),
    "load of all": lambda w: load(w, "obj_maps"),
    "load of globals": lambda w: load(w),
    "load of maps in maps": lambda w: load(w, "obj_nested"),
    "a map": lambda w: SockMap.create(1),
    "attach": lambda w: w.yes.attach(),
    "attach by path": lambda w: w.yes.attach("/proc/self/ns/net"),
    "from_pin": lambda w: Map.from_pin(w.pinned[Map]),
    "from_id": lambda w: Program.from_id(w.yes.info.id),
    "from_fd": lambda w: Link.from_fd(w.link.fileno()),
    "entering": lambda w: w.ns.entered(),
}


@contextlib.contextmanager
def fds_left(count: int) -> Iterator[None]:
    """No more than so many new fds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = {fd for fd, _ in support.fds() if os.path.exists(f"/proc/self/fd/{fd}")}
    free = [fd for fd in range(max(held) + count + 2) if fd not in held]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", NEEDS_FDS)
def test_out_of_fds_at_every_step(world: World, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """One fd more each time, until it succeeds: each failure says EMFILE, and leaves nothing."""
    do = NEEDS_FDS[name]
    world.need("yes", "hash", "link", "pinned")
    with do(world):  # whatever is found out once a process is known now
        pass
    before = support.fds()
    for count in range(100):
        try:
            with fds_left(count), do(world):
                break
        except OSError as error:
            assert errno.errorcode[error.errno] == "EMFILE", (count, error)
            assert support.fds() == before
    assert 0 < count < 99
    assert capfd.readouterr() == ("", "")
