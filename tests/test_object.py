"""Loading: from files and bytes, whole or in part, with constants, sizes and maps of the caller's own."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest
from support import (
    SO_ATTACH_REUSEPORT_EBPF,
    V4,
    ask_tcp,
    bpf_ids,
    bpf_object,
    cookie,
    fds,
    readable,
    tcp_client,
    tcp_listener,
)

import pyskl
from pyskl import BpfObject, MapType, Program, ProgramType, Verdict

TO, FROM = (V4, 80), ("192.0.2.9", 4711)


def verdict(prog: Program) -> Verdict:
    return prog.test_run("tcp", TO, FROM).verdict


# -- sources ---------------------------------------------------------------------------------------


class PathLike:
    """Neither str nor Path: what os.fspath() takes is a path."""

    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


SOURCES: dict[str, Callable[[Path], object]] = {
    "str": str,
    "Path": Path,
    "PathLike": lambda path: PathLike(str(path)),
    "PathLike of bytes": lambda path: PathLike(os.fsencode(path)),
    "content": Path.read_bytes,
    "content with something behind it": lambda path: path.read_bytes() + bytes(64),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", ["obj_globals", "obj_maps"])
def test_an_object_loads_from(name: str, make: Callable[[Path], object]) -> None:
    with BpfObject.load(make(bpf_object(name))) as obj:
        assert len(obj.maps) > 0


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_a_program_loads_from(make: Callable[[Path], object]) -> None:
    with Program.load(make(bpf_object("obj_globals"))) as prog:
        assert verdict(prog) is Verdict.PASS


def test_a_path_of_any_bytes_is_a_path(tmp_path: Path) -> None:
    """File names are bytes: surrogates, spaces and dots are as good as letters."""
    for name in ("with space.o", "no-suffix", "a.b.c.bpf.o", os.fsdecode(b"\xff\xfe.o"), "x" * 250):
        shutil.copy(bpf_object("obj_pair"), tmp_path / name)
        with BpfObject.load(tmp_path / name) as obj:
            assert set(obj.programs) == {"yes", "no"}


def test_relative_to_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bpf_object("obj_pair").parent)
    with BpfObject.load("obj_pair.bpf.o") as obj:
        assert len(obj.programs) == 2


def test_one_source_loads_many_times_each_with_state_of_its_own() -> None:
    content = bpf_object("obj_many").read_bytes()
    with BpfObject.load(content) as one, BpfObject.load(content) as other:
        verdict(one.programs["drop"])
        counts = [int.from_bytes(obj.maps["runs"][0], sys.byteorder) for obj in (one, other)]
        assert counts == [1, 0]


# -- programs --------------------------------------------------------------------------------------


def test_every_program_of_every_type_loads() -> None:
    with BpfObject.load(bpf_object("obj_many")) as obj:
        assert {name: prog.info.type for name, prog in obj.programs.items()} == {
            "first": ProgramType.SK_LOOKUP,
            "drop": ProgramType.SK_LOOKUP,
            "choose": ProgramType.SK_REUSEPORT,
        }
        assert {name: prog.info.name for name, prog in obj.programs.items()} == {name: name for name in obj.programs}


def test_programs_and_maps_are_mappings_of_the_same_objects_each_time() -> None:
    with BpfObject.load(bpf_object("obj_many")) as obj:
        for mapping in (obj.programs, obj.maps, obj.programs["first"].maps):
            assert isinstance(mapping, Mapping)
            assert len(mapping) == len(list(mapping)) > 0
            assert all(mapping[name] is thing for name, thing in mapping.items())
            assert "absent" not in mapping
            assert mapping.get("absent") is None
            with pytest.raises(TypeError):
                mapping["new"] = mapping  # type: ignore[index]
        assert obj.programs["first"].maps["sockets"] is obj.maps["sockets"]
        assert obj.programs["drop"].maps["runs"] is obj.programs["first"].maps["runs"]


def test_a_programs_maps_are_those_that_it_uses() -> None:
    with BpfObject.load(bpf_object("obj_many")) as obj:
        uses = {name: set(prog.maps) for name, prog in obj.programs.items()}
        assert uses == {"first": {"sockets", "runs"}, "drop": {"runs"}, "choose": {"group"}}
        assert all(set(prog.info.map_ids) == {m.info.id for m in prog.maps.values()} for prog in obj.programs.values())


@pytest.mark.parametrize("names", [["yes"], ("no",), {"yes", "no"}, {"no": None}.keys(), []], ids=repr)
def test_programs_picks_by_name(names: Collection[str]) -> None:
    before = bpf_ids()
    with BpfObject.load(bpf_object("obj_pair"), programs=names) as obj:
        assert sorted(obj.programs) == sorted(names)
        loaded = {number for kind, number in bpf_ids() - before if kind == "prog"}
        assert loaded == {prog.info.id for prog in obj.programs.values()}


def test_a_program_that_was_not_picked_is_not_shown_to_the_verifier() -> None:
    with BpfObject.load(bpf_object("obj_rejected"), programs=["fine"]) as obj:
        assert verdict(obj.programs["fine"]) is Verdict.PASS


def test_a_program_by_its_name_among_several() -> None:
    before = bpf_ids()
    with (
        Program.load(bpf_object("obj_pair"), "no") as no,
        Program.load(bpf_object("obj_pair"), name="yes") as yes,
    ):
        assert (verdict(no), verdict(yes)) == (Verdict.DROP, Verdict.PASS)
        assert len({i for i in bpf_ids() - before if i[0] == "prog"}) == 2


def test_a_lone_program_by_its_name() -> None:
    with Program.load(bpf_object("obj_globals"), "report") as prog:
        assert prog.info.name == "report"


def test_an_object_of_maps_alone() -> None:
    with BpfObject.load(bpf_object("obj_maps")) as obj:
        assert dict(obj.programs) == {}


def test_sk_reuseport_beside_sk_lookup_chooses_the_member(netns: pyskl.NetNS) -> None:
    """sk_lookup selects one of a group, sk_reuseport another: a socket can't be in both maps."""
    with (
        BpfObject.load(bpf_object("obj_many")) as obj,
        tcp_listener(netns, port=7000, reuseport=True) as first,
        tcp_listener(netns, port=7000, reuseport=True) as zero,
        tcp_listener(netns, port=7000, reuseport=True) as one,
        obj.programs["first"].attach(netns),
    ):
        choose = struct.pack("=i", obj.programs["choose"].fileno())
        first.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, choose)
        obj.maps["sockets"][0] = first
        obj.maps["group"].update({0: zero, 1: one})
        assert ask_tcp(netns, V4, 80, first, zero, one) is one


# -- constants and other globals -------------------------------------------------------------------

SEEN = struct.Struct("=QqIiHhBb?4sxI")
SEEN_NAMES = ("u64", "s64", "u32", "s32", "u16", "s16", "u8", "s8", "flag", "key", "fixed")
DEFAULTS = dict(zip(SEEN_NAMES, (4, -4, 3, -3, 2, -2, 1, -1, False, b"pysk", 7), strict=True))


def seen(obj: BpfObject) -> dict[str, object]:
    """What the program itself read from its constants, as it left it in .bss."""
    verdict(obj.programs["report"])
    value = obj.maps[".bss"][0]
    return dict(zip(SEEN_NAMES, SEEN.unpack(value[: SEEN.size]), strict=True))


def test_constants_default_to_the_objects() -> None:
    with BpfObject.load(bpf_object("obj_globals")) as obj:
        assert seen(obj) == DEFAULTS


LIMITS = [
    (f"{sign}{bits}", value)
    for bits in (8, 16, 32, 64)
    for sign, values in {
        "u": (0, 1, 2**bits - 1),
        "s": (-(2 ** (bits - 1)), -1, 0, 2 ** (bits - 1) - 1),
    }.items()
    for value in values
]


@pytest.mark.parametrize(
    ("name", "value"),
    [*LIMITS, ("flag", True), ("flag", False), ("key", b"\0\xff\1\2"), ("key", bytearray(4))],
)
def test_constants_of_every_size_arrive(name: str, value: object) -> None:
    with BpfObject.load(bpf_object("obj_globals"), constants={name: value}) as obj:
        assert seen(obj) == DEFAULTS | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "means"),
    [
        ("u32", b"\1\2\3\4", int.from_bytes(b"\1\2\3\4", sys.byteorder)),
        ("u64", memoryview(b"\1" * 8), 0x0101010101010101),
        ("s16", b"\xff\xff", -1),
        ("flag", 1, True),
        ("u8", True, 1),
    ],
)
def test_constants_may_be_given_as_their_bytes_and_bools_as_ints(name: str, value: object, means: object) -> None:
    with BpfObject.load(bpf_object("obj_globals"), constants={name: value}) as obj:
        assert seen(obj)[name] == means


def test_many_constants_at_once_decide_the_verdict() -> None:
    constants = {name: value for name, value in DEFAULTS.items() if name != "fixed"}
    constants |= {"flag": True, "u16": 443}
    with BpfObject.load(bpf_object("obj_globals"), constants=constants) as obj:
        assert verdict(obj.programs["report"]) is Verdict.DROP
        assert seen(obj)["u16"] == 443


def test_globals_are_maps_of_these_names() -> None:
    with BpfObject.load(bpf_object("obj_globals")) as obj:
        assert {".rodata", ".bss", ".data"} <= set(obj.maps)
        assert obj.programs["report"].maps[".bss"] is obj.maps[".bss"]
        assert obj.maps[".data"][0][:4] == (7).to_bytes(4, sys.byteorder)
        obj.maps[".data"][0] = (8).to_bytes(4, sys.byteorder).ljust(obj.maps[".data"].info.value_size, b"\0")
        assert seen(obj)["fixed"] == 8


def test_constants_are_frozen_once_loaded() -> None:
    """The verifier took them for constants: nobody may change them after."""
    with BpfObject.load(bpf_object("obj_globals"), constants={"u32": 99}) as obj:
        value = obj.maps[".rodata"][0]
        assert (99).to_bytes(4, sys.byteorder) in value
        with pytest.raises(pyskl.BpfError):
            obj.maps[".rodata"][0] = value


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hash": 1},
        {"hash": 100, "sockmap": 7, "lpm_trie": 3, "array_of_maps": 5},
        {name: 33 for name in ("array", "sockhash", "reuseport_sockarray", "queue", "hash_of_maps")},
    ],
    ids=["none", "one", "several", "others"],
)
def test_max_entries_sizes_maps_by_name(sizes: dict[str, int]) -> None:
    with BpfObject.load(bpf_object("obj_maps"), max_entries=sizes) as obj:
        default = {"array_of_maps": 4, "hash_of_maps": 4, "blue": 4, "green": 4}
        got = {name: m.info.max_entries for name, m in obj.maps.items()}
        assert got == {name: sizes.get(name, default.get(name, 16)) for name in obj.maps}


# -- the maps of an object -------------------------------------------------------------------------

TYPES = {
    "hash": (pyskl.HashMap, MapType.HASH),
    "lru_hash": (pyskl.LruHashMap, MapType.LRU_HASH),
    "percpu_hash": (pyskl.PerCpuHashMap, MapType.PERCPU_HASH),
    "lru_percpu_hash": (pyskl.LruPerCpuHashMap, MapType.LRU_PERCPU_HASH),
    "array": (pyskl.ArrayMap, MapType.ARRAY),
    "percpu_array": (pyskl.PerCpuArrayMap, MapType.PERCPU_ARRAY),
    "lpm_trie": (pyskl.LpmTrie, MapType.LPM_TRIE),
    "prog_array": (pyskl.ProgArray, MapType.PROG_ARRAY),
    "sockmap": (pyskl.SockMap, MapType.SOCKMAP),
    "sockhash": (pyskl.SockHash, MapType.SOCKHASH),
    "reuseport_sockarray": (pyskl.ReuseportSockArray, MapType.REUSEPORT_SOCKARRAY),
    "queue": (pyskl.Map, MapType.QUEUE),
    "array_of_maps": (pyskl.ArrayOfMaps, MapType.ARRAY_OF_MAPS),
    "hash_of_maps": (pyskl.HashOfMaps, MapType.HASH_OF_MAPS),
    "blue": (pyskl.SockMap, MapType.SOCKMAP),
    "green": (pyskl.SockMap, MapType.SOCKMAP),
}


def test_a_map_is_of_the_class_of_its_type() -> None:
    with BpfObject.load(bpf_object("obj_maps")) as obj:
        assert {name: (type(m), m.info.type) for name, m in obj.maps.items()} == TYPES
        assert all(m.info.name == name[:15] for name, m in obj.maps.items())


def test_maps_in_maps_are_filled_as_the_object_says() -> None:
    with BpfObject.load(bpf_object("obj_maps")) as obj:
        blue, green = (obj.maps[name].info.id for name in ("blue", "green"))
        assert dict(obj.maps["array_of_maps"].items()) == {1: blue, 3: green}
        assert len(obj.maps["hash_of_maps"]) == 0
        obj.maps["array_of_maps"][0] = obj.maps["green"]
        assert obj.maps["array_of_maps"][0] == green


def test_a_program_reads_its_sockets_through_the_map_in_force(netns: pyskl.NetNS) -> None:
    """Swapping the table is one slot of the outer map; each look-up sees one table or the other."""
    with (
        BpfObject.load(bpf_object("obj_nested")) as obj,
        tcp_listener(netns) as blue,
        tcp_listener(netns) as green,
        obj.programs["nested"].attach(netns),
    ):
        obj.maps["blue"][0] = blue
        obj.maps["green"][0] = green
        for table, server in (("blue", blue), ("green", green), ("blue", blue)):
            obj.maps["active"][0] = obj.maps[table]
            assert ask_tcp(netns, V4, 80, blue, green) is server
            assert obj.programs["nested"].test_run("tcp", TO, FROM).cookie == cookie(server)


def test_a_program_array_calls_what_stands_in_it() -> None:
    with (
        Program.load(bpf_object("obj_tail")) as jump,
        Program.load(bpf_object("obj_pair"), "no") as no,
        jump.maps["next"] as following,
    ):
        assert verdict(jump) is Verdict.PASS
        following[0] = no
        assert following[0] == no.info.id
        assert verdict(jump) is Verdict.DROP
        del following[0]
        assert verdict(jump) is Verdict.PASS


# -- reuse -----------------------------------------------------------------------------------------


def test_reuse_puts_the_callers_map_in_the_place_of_the_objects(netns: pyskl.NetNS) -> None:
    before = bpf_ids()
    with (
        pyskl.SockMap.create(4, name="mine") as mine,
        BpfObject.load(bpf_object("obj_many"), reuse={"sockets": mine}) as obj,
        tcp_listener(netns) as server,
    ):
        assert obj.maps["sockets"].info == mine.info
        assert obj.programs["first"].info.map_ids.count(mine.info.id) == 1
        assert len({i for i in bpf_ids() - before if i[0] == "map"}) == 3
        mine[0] = server
        with obj.programs["first"].attach(netns):
            assert ask_tcp(netns, V4, 80, server) is server


def test_reuse_shares_one_map_between_objects() -> None:
    with BpfObject.load(bpf_object("obj_many")) as one, one.maps["runs"] as runs:
        with BpfObject.load(bpf_object("obj_many"), reuse={"runs": runs}) as other:
            for obj, name in ((one, "drop"), (other, "drop"), (other, "first")):
                verdict(obj.programs[name])
            assert int.from_bytes(runs[0], sys.byteorder) == 3
        assert not runs.closed
        assert int.from_bytes(runs[0], sys.byteorder) == 3


def test_a_reused_maps_fd_stays_the_callers() -> None:
    """The object closes what is its own: never the fd that it was handed."""
    with pyskl.SockMap.create(4) as mine:
        BpfObject.load(bpf_object("obj_many"), reuse={"sockets": mine}).close()
        assert mine.info.max_entries == 4
        with Program.load(bpf_object("obj_globals")):
            assert len(mine) == 0


def test_a_reused_map_may_have_another_size() -> None:
    with (
        pyskl.SockMap.create(100) as mine,
        BpfObject.load(bpf_object("obj_many"), reuse={"sockets": mine}) as obj,
    ):
        assert obj.maps["sockets"].info.max_entries == 100


def test_a_pinned_map_is_reused_by_the_next_process(bpffs: Path) -> None:
    with BpfObject.load(bpf_object("obj_many")) as obj:
        verdict(obj.programs["drop"])
        obj.maps["runs"].pin(bpffs / "runs")
    with (
        pyskl.Map.from_pin(bpffs / "runs") as runs,
        BpfObject.load(bpf_object("obj_many"), reuse={"runs": runs}) as obj,
    ):
        verdict(obj.programs["drop"])
        assert int.from_bytes(runs[0], sys.byteorder) == 2


# -- lifetimes of what is in an object -------------------------------------------------------------


def test_what_was_taken_out_outlives_the_object() -> None:
    with BpfObject.load(bpf_object("obj_many")) as obj:
        drop, runs = obj.programs["drop"], obj.maps["runs"]
    assert obj.closed
    assert not drop.closed
    with drop, runs:
        assert verdict(drop) is Verdict.DROP
        assert int.from_bytes(runs[0], sys.byteorder) == 1


def test_what_was_never_taken_out_goes_with_the_object() -> None:
    fd_before, before = fds(), bpf_ids()
    obj = BpfObject.load(bpf_object("obj_many"))
    obj.maps["runs"][0] = bytes(8)
    verdict(obj.programs["drop"])
    assert bpf_ids() > before
    obj.close()
    obj.close()
    assert fds() == fd_before


def test_a_loaded_program_keeps_its_maps_and_no_other() -> None:
    with Program.load(bpf_object("obj_many"), "drop") as prog:
        assert set(prog.maps) == {"runs"}
        runs = prog.maps["runs"]
    with runs:
        assert int.from_bytes(runs[0], sys.byteorder) == 0


# -- libbpf's words --------------------------------------------------------------------------------


def test_libbpfs_messages_go_to_logging_and_nowhere_else(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "pyskl.libbpf")
    with pytest.raises(pyskl.VerifierError), BpfObject.load(bpf_object("obj_rejected")):
        pass
    assert {record.name for record in caplog.records} == {"pyskl.libbpf"}
    assert logging.WARNING in {record.levelno for record in caplog.records}
    assert any("leaks_socket" in record.getMessage() for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_success_is_quiet(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "pyskl")
    for name in ("obj_globals", "obj_many", "obj_maps", "obj_nested"):
        BpfObject.load(bpf_object(name)).close()
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("level", [1, 2, 4])
def test_log_level_has_the_verifiers_log_logged(
    level: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A program that the verifier takes has a log as well, for who asks."""
    caplog.set_level(logging.DEBUG, "pyskl.libbpf")
    with BpfObject.load(bpf_object("obj_pair"), log_level=level) as obj:
        assert len(obj.programs) == 2
    assert "processed" in caplog.text
    assert capfd.readouterr() == ("", "")


# -- many at once ----------------------------------------------------------------------------------


def test_the_loader_holds_no_more_than_it_must() -> None:
    """The fds of an object are one for each program and each map: libbpf's own are closed."""
    before = fds()
    with BpfObject.load(bpf_object("obj_many")) as obj:
        held = len(obj.programs) + len(obj.maps)
        assert len(fds() - before) <= held


def test_threads_load_at_once() -> None:
    """libbpf's log and error state are each load's own, whoever else is loading."""
    from concurrent.futures import ThreadPoolExecutor

    content = bpf_object("obj_rejected").read_bytes()

    def load(number: int) -> str:
        if number % 2:
            with BpfObject.load(content, programs=["fine"]) as obj:
                return verdict(obj.programs["fine"]).name
        name = ("leaks_socket", "bad_verdict")[number // 2 % 2]
        with pytest.raises(pyskl.VerifierError) as caught:
            BpfObject.load(content, programs=[name]).close()
        return "reference" if "reference" in caught.value.log else "R0"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(load, range(80)))
    assert results == ["reference", "PASS", "R0", "PASS"] * 20


def test_a_client_reaches_what_a_program_from_bytes_selects(netns: pyskl.NetNS) -> None:
    with (
        Program.load(bpf_object("obj_many").read_bytes(), "first") as prog,
        tcp_listener(netns) as server,
        prog.attach(netns),
    ):
        prog.maps["sockets"][0] = server
        with tcp_client(netns, V4, 8080) as client:
            assert readable(server) == [server]
            with server.accept()[0] as peer:
                assert peer.getsockname() == client.getpeername() == (V4, 8080)
