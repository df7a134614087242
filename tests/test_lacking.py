"""Kernels that lack something: each entry says what it is and since when Linux has it, and blames nothing else.

These are for kernels without the thing that $PYSKL_LACKS names (`./ci/vm without-bpf` builds one, and so on); without
bpf(2), any kernel will do: it is taken away.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path

import privileges
import pytest
from support import bpf_object, deny_bpf

import pyskl
from pyskl import BpfObject, HashMap, Link, Map, NetNS, NotSupported, Program

LACKS = os.environ.get("PYSKL_LACKS")
OTHERS = {"perfmon"}  # what a process may lack, and no kernel

if LACKS == "bpf" and "bpf" in Path("/proc/filesystems").read_text().split():
    deny_bpf()
    OTHERS |= {"btf", "bpffs"}  # which are there without it


def lacking(name: str) -> pytest.MarkDecorator:
    """For a kernel without this alone."""
    return pytest.mark.skipif(name != LACKS, reason=f"needs a kernel without {name}: PYSKL_LACKS={name}")


def refused(attempt: Callable[[], object]) -> NotSupported:
    """What an attempt says of the kernel; nothing that would send the reader elsewhere."""
    with pytest.raises(NotSupported) as caught:
        attempt()
    text = str(caught.value)
    assert not re.search(r"CAP_|lacks|permi|mount|MEMLOCK|sizes|Unknown error", text, re.IGNORECASE), text
    assert text.count("\n") == 0
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.feature, again.since, str(again)) == (caught.value.feature, caught.value.since, text)
    return caught.value


def unavailable() -> dict[str, str | None]:
    """The features that are not there, each with its reason."""
    return {name: feature.reason for name, feature in pyskl.features().items() if not feature}


def map_of_maps() -> object:
    with HashMap.create() as inner:
        return pyskl.ArrayOfMaps.create(max_entries=1, inner=inner)


ENTRIES: dict[str, Callable[[], object]] = {
    "load a program": lambda: Program.load(pyskl.REDIRECT),
    "load a program, with its log": lambda: Program.load(pyskl.REDIRECT, log_level=1),
    "load an object": lambda: BpfObject.load(pyskl.REDIRECT),
    "load an object's maps alone": lambda: BpfObject.load(pyskl.REDIRECT, programs=()),
    "make a map": HashMap.create,
    "make a sockmap": lambda: pyskl.SockMap.create(1),
    "make a sockhash": lambda: pyskl.SockHash.create(1),
    "make a map of maps": map_of_maps,
    "make a map that no kernel takes": lambda: HashMap.create(value_size=0),
    "list programs": pyskl.query,
    "list links": pyskl.links,
    "open a program's pin": lambda: Program.from_pin("/sys/fs/bpf/nothing"),
    "open a map's pin": lambda: Map.from_pin("/etc/hosts"),
    "open a link's pin": lambda: Link.from_pin("/nothing/there"),
    "open a program by id": lambda: Program.from_id(1),
    "open a map by id": lambda: Map.from_id(1),
    "open a link by id": lambda: Link.from_id(1),
}


@lacking("bpf")
class TestWithoutBpf:
    """CONFIG_BPF_SYSCALL is off: bpf(2) says ENOSYS to everything, and to everyone."""

    @pytest.mark.parametrize("entry", ENTRIES)
    def test_each_entry_says_so(self, entry: str) -> None:
        self.check(refused(ENTRIES[entry]))

    @pytest.mark.parametrize("entry", ENTRIES)
    def test_each_entry_says_so_to_who_has_no_capability_too(self, entry: str) -> None:
        self.check(refused(lambda: privileges.run(ENTRIES[entry])))

    def check(self, error: NotSupported) -> None:
        assert (error.errno, error.feature, error.since) == (errno.ENOSYS, "bpf(2)", "3.18")
        assert error.strerror == os.strerror(errno.ENOSYS)
        assert "CONFIG_BPF_SYSCALL" in str(error)
        assert error.call.startswith("BPF_")

    def test_no_feature_is_there(self) -> None:
        reasons = unavailable()
        assert set(reasons) == set(pyskl.features()) - OTHERS
        assert [name for name, reason in reasons.items() if "CONFIG_" not in reason] == []
        assert [name for name, reason in reasons.items() if re.search("CAP_|mount", reason)] == []

    def test_what_is_no_object_is_found_out_before(self) -> None:
        with pytest.raises(pyskl.BpfError, match="ENOEXEC"):
            BpfObject.load(b"no object")
        with open("/dev/null") as null, pytest.raises(TypeError, match="not a BPF object"):
            Map.from_fd(null)

    def test_namespaces_and_sockets_need_no_bpf(self, netns: NetNS) -> None:
        with NetNS.current() as here, netns.entered(), NetNS.current() as there, socket.socket() as sock:
            assert here.inode != there.inode == netns.inode
            assert pyskl.socket_cookie(sock) > 0


@lacking("btf")
class TestWithoutBtf:
    """CONFIG_DEBUG_INFO_BTF is off: only what refers to the kernel's own types misses it."""

    def test_nothing_else_is_lacking(self) -> None:
        assert set(unavailable()) == {"btf"}
        assert "CONFIG_DEBUG_INFO_BTF" in unavailable()["btf"]

    def test_a_connection_is_steered(self, netns: NetNS) -> None:
        constants = {"prefix4": socket.inet_aton("192.0.2.0"), "prefix4_len": 24}
        with netns.entered(), socket.create_server(("127.0.0.1", 0)) as server:
            with Program.load(pyskl.REDIRECT, constants=constants) as program, program.attach() as link:
                program.maps["sockets"][0] = server
                assert [info.id for info in pyskl.query()] == [program.info.id]
                assert [info.id for info in pyskl.links()] == [link.info.id]
                with socket.create_connection(("192.0.2.1", 7), timeout=5), server.accept()[0] as accepted:
                    assert accepted.getsockname() == ("192.0.2.1", 7)

    @pytest.mark.parametrize("load", [Program.load, BpfObject.load])
    def test_an_object_that_refers_to_the_kernels_types_says_so(self, load: Callable[[object], object]) -> None:
        error = refused(lambda: load(bpf_object("core")))
        assert (error.feature, error.since) == ("BTF of its own", "5.4")
        assert "CONFIG_DEBUG_INFO_BTF" in str(error)


@lacking("sk_lookup")
class TestWithoutSkLookup:
    """As before Linux 5.9: the kernel knows bpf(2), and neither the type of program nor what to attach it by."""

    @pytest.mark.parametrize(
        "entry", ["load a program", "load a program, with its log", "load an object", "list programs"]
    )
    def test_each_entry_says_so(self, entry: str) -> None:
        error = refused(ENTRIES[entry])
        assert (error.feature, error.since) == ("programs of type SK_LOOKUP", "5.9")
        assert error.call == ("BPF_PROG_QUERY" if entry == "list programs" else "BPF_PROG_LOAD")
        assert "SK_LOOKUP" in str(error)
        assert "5.9" in str(error)

    def test_who_lacks_a_capability_is_told_that(self) -> None:
        with pytest.raises(pyskl.PermissionDenied, match="CAP_BPF"):
            privileges.run(ENTRIES["load a program"])

    def test_the_features_that_are_not_there(self) -> None:
        reasons = unavailable()
        assert set(reasons) == {"sk_lookup", "sk_lookup_ingress_ifindex", "netns_link", "bpf_loop", "btf"}
        assert "CONFIG_DEBUG_INFO_BTF" in reasons.pop("btf")
        assert [name for name, reason in reasons.items() if "no programs of type SK_LOOKUP" not in reason] == []

    def test_all_else_works(self, netns: NetNS) -> None:
        assert pyskl.links(netns) == ()
        with BpfObject.load(bpf_object("reuseport")) as obj, BpfObject.load(pyskl.REDIRECT, programs=()) as maps:
            assert obj.programs
            with socket.create_server(("127.0.0.1", 0)) as server:
                maps.maps["sockets"][0] = server
        with pytest.raises(ValueError, match="SK_REUSEPORT"), Program.load(bpf_object("reuseport")) as other:
            other.attach(netns)
