"""Network namespaces: naming one in every way, entering it, and coming back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import support
from support import NETNS, bpf_object

import pyskl
from pyskl import NetNS, Program


def inode_here() -> int:
    """The calling thread's namespace, asked of /proc."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def path_of(ns: NetNS) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{ns.fileno()}")


@pytest.fixture
def resident(netns: NetNS) -> Iterator[int]:
    """The pid of a process that lives in the namespace."""
    with netns.entered():
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    yield child.pid
    child.communicate()


def test_the_fixtures_namespace_is_another(netns: NetNS) -> None:
    assert netns.inode == path_of(netns).stat().st_ino != inode_here()


def test_every_way_to_name_one(netns: NetNS, netns_name: str, resident: int) -> None:
    path = NETNS / netns_name
    with path.open("rb") as file, contextlib.ExitStack() as stack:
        ways = [
            NetNS.named(netns_name),
            NetNS.from_path(path),
            NetNS.from_path(str(path)),
            NetNS.from_path(f"/proc/{resident}/ns/net"),
            NetNS.from_pid(resident),
            NetNS.from_fd(file.fileno()),
        ]
        for ns in ways:
            stack.enter_context(ns)
        assert {ns.inode for ns in ways} == {netns.inode}


def test_current_is_the_threads(netns: NetNS) -> None:
    """Of a thread that went elsewhere, not of the process's first thread."""

    def elsewhere() -> tuple[int, int]:
        with netns.entered(), NetNS.current() as ns:
            return ns.inode, inode_here()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result() == (netns.inode, netns.inode)
    with NetNS.current() as ns:
        assert ns.inode == inode_here() != netns.inode


def test_entering_moves_this_thread_and_leaving_brings_it_back(netns: NetNS) -> None:
    home = inode_here()
    with netns.entered() as entered:
        assert entered is netns
        assert inode_here() == netns.inode
        assert os.listdir("/sys/class/net") != []
        sock = support.new_socket(netns, 2, 1)
    assert inode_here() == home
    with sock:
        sock.bind((support.V4, 0))  # local there alone: a socket keeps its namespace


def test_an_exception_brings_it_back(netns: NetNS) -> None:
    home = inode_here()
    with pytest.raises(ZeroDivisionError), netns.entered():
        raise ZeroDivisionError
    assert inode_here() == home


def test_namespaces_nest(netns: NetNS) -> None:
    home = inode_here()
    with support.namespace() as inner:
        with netns.entered():
            with inner.entered():
                assert inode_here() == inner.inode
                with netns.entered():
                    assert inode_here() == netns.inode
                assert inode_here() == inner.inode
            assert inode_here() == netns.inode
    assert inode_here() == home


def test_the_same_object_is_entered_by_many_threads(netns: NetNS) -> None:
    inside = threading.Barrier(4, timeout=support.TIMEOUT)

    def visit() -> tuple[int, int]:
        with netns.entered():
            inside.wait()
            there = inode_here()
            inside.wait()
        return there, inode_here()

    home = inode_here()
    with ThreadPoolExecutor(4) as pool:
        visits = [pool.submit(visit) for _ in range(4)]
        assert inode_here() == home
        assert [v.result() for v in visits] == [(netns.inode, home)] * 4


def test_a_namespace_lives_while_its_object_does() -> None:
    """Deleting its name takes the name: who holds it can still enter."""
    name = f"pyskl-{os.getpid()}-held"
    subprocess.run(["ip", "netns", "add", name], check=True)
    ns = NetNS.named(name)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    with ns:
        with ns.entered():
            assert inode_here() == ns.inode
        with pytest.raises(FileNotFoundError, match=name):
            NetNS.named(name)


def test_after_close(netns: NetNS) -> None:
    ns = NetNS.from_fd(netns)
    ns.close()
    ns.close()
    for operation in (
        lambda: ns.entered().__enter__(),
        ns.fileno,
        lambda: pyskl.query(ns),
        lambda: pyskl.links(ns),
    ):
        with pytest.raises(ValueError, match="closed"):
            operation()


def test_from_fd_takes_a_copy(netns: NetNS) -> None:
    fd = os.open(path_of(netns), os.O_RDONLY)
    ns = NetNS.from_fd(fd)
    os.close(fd)
    with ns, ns.entered():
        assert inode_here() == netns.inode


def test_repr_names_the_inode(netns: NetNS) -> None:
    assert str(netns.inode) in repr(netns)


# -- what "netns" may be wherever one is asked for -------------------------------------------------

GIVEN: dict[str, Callable[[NetNS], object]] = {
    "NetNS": lambda ns: ns,
    "Path": path_of,
    "str": lambda ns: str(path_of(ns)),
    "fd": lambda ns: ns.fileno(),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_namespace_in_every_form(netns: NetNS, given: str) -> None:
    where = GIVEN[given](netns)
    with Program.load(bpf_object("obj_globals")) as prog, prog.attach(where) as link:
        assert link.info.netns_inode == netns.inode
        assert [p.id for p in pyskl.query(where)] == [prog.info.id]
        assert pyskl.links(where) == (link.info,)
        assert prog.info.id not in [p.id for p in pyskl.query()]


def test_none_is_the_calling_threads_own(netns: NetNS) -> None:
    with Program.load(bpf_object("obj_globals")) as prog, netns.entered():
        with prog.attach() as link:
            assert link.info.netns_inode == netns.inode == inode_here()
            assert [p.id for p in pyskl.query()] == [prog.info.id]
            assert pyskl.links() == (link.info,)


def test_none_in_a_thread_that_went_elsewhere(netns: NetNS) -> None:
    def elsewhere(prog: Program) -> int:
        with netns.entered(), prog.attach(None) as link:
            return link.info.netns_inode

    with Program.load(bpf_object("obj_globals")) as prog, ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere, prog).result() == netns.inode


def test_a_namespace_given_is_left_open_and_not_entered(netns: NetNS) -> None:
    home, fd = inode_here(), netns.fileno()
    with Program.load(bpf_object("obj_globals")) as prog:
        for where in (netns, fd):
            prog.attach(where).close()
            pyskl.query(where)
    os.fstat(fd)
    assert inode_here() == home


def test_entering_in_a_child_leaves_the_parent(netns: NetNS, netns_name: str) -> None:
    code = (
        "import os, sys, pyskl\n"
        "with pyskl.NetNS.named(sys.argv[1]) as ns, ns.entered():\n"
        "    print(os.stat('/proc/self/ns/net').st_ino)\n"
    )
    out = support.python(code, netns_name).stdout
    assert int(out) == netns.inode != inode_here()
