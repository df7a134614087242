"""What owns an fd: closed in any order, once, in silence or with a warning, and never by somebody else."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import inspect
import itertools
import os
import pickle
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import support
from support import V4, ask_tcp, bpf_object, tcp_listener

import pyskl
from pyskl import BpfObject, HashMap, Link, Map, NetNS, Program, SockMap, Verdict


def attached(ns: NetNS) -> int:
    """How many programs are attached to a namespace, asked of the kernel without any of the objects."""
    return len(pyskl.query(ns))


def load_first() -> Program:
    return Program.load(bpf_object("obj_many"), "first")


@contextlib.contextmanager
def things(ns: NetNS) -> Iterator[dict[str, object]]:
    """One of everything that owns an fd."""
    with contextlib.ExitStack() as stack:
        obj = stack.enter_context(BpfObject.load(bpf_object("obj_many")))
        prog = stack.enter_context(obj.programs["first"])
        sockets = stack.enter_context(prog.maps["sockets"])
        link = stack.enter_context(prog.attach(ns))
        plain = stack.enter_context(HashMap.create(key_size=4, value_size=8, max_entries=4))
        where = stack.enter_context(NetNS.from_fd(ns.fileno()))
        yield {
            "BpfObject": obj,
            "Program": prog,
            "SockMap": sockets,
            "Link": link,
            "HashMap": plain,
            "NetNS": where,
        }


NAMES = ("BpfObject", "Program", "SockMap", "Link", "HashMap", "NetNS")
MAKE: dict[str, Callable[[NetNS], object]] = {
    "BpfObject": lambda ns: BpfObject.load(bpf_object("obj_many")),
    "Program": lambda ns: load_first(),
    "SockMap": lambda ns: SockMap.create(1),
    "HashMap": lambda ns: HashMap.create(),
    "NetNS": lambda ns: NetNS.from_fd(ns.fileno()),
    "Link": lambda ns: _link(ns),
}


def _link(ns: NetNS) -> Link:
    with load_first() as prog:
        return prog.attach(ns)


# -- closing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*itertools.permutations(("obj", "prog", "sockets", "link"))], ids="-".join)
def test_closing_in_any_order(netns: NetNS, order: tuple[str, ...]) -> None:
    """Each stays what it is until its own close(): the link attached, the map a map."""
    obj = BpfObject.load(bpf_object("obj_many"))
    owners = {"obj": obj, "prog": obj.programs["first"], "sockets": obj.maps["sockets"]}
    link = owners["link"] = owners["prog"].attach(netns)
    sockets, prog = owners["sockets"], owners["prog"]
    with tcp_listener(netns) as server:
        sockets[0] = server
        for name in order:
            owners[name].close()
            assert owners[name].closed
            owners[name].close()
            assert attached(netns) == (not link.closed)
            if not link.closed:
                assert ask_tcp(netns, V4, 80, server) is server
            if not sockets.closed:
                assert sockets[0] == support.cookie(server)
            if not prog.closed:
                assert prog.test_run("tcp", (V4, 80), ("192.0.2.9", 1)).verdict is Verdict.PASS


@pytest.mark.parametrize("name", NAMES)
def test_closed_by_with_and_again(netns: NetNS, name: str) -> None:
    with MAKE[name](netns) as thing:
        assert not thing.closed
    assert thing.closed
    thing.close()
    assert thing.closed
    assert "closed" in repr(thing)
    with pytest.raises(ValueError, match="closed"), thing:
        pass


@pytest.mark.parametrize("name", NAMES)
def test_with_closes_when_its_body_fails(netns: NetNS, name: str) -> None:
    with pytest.raises(ZeroDivisionError), MAKE[name](netns) as thing:
        raise ZeroDivisionError
    assert thing.closed


ARGUMENTS: dict[str, Callable[[dict[str, object]], object]] = {
    "netns": lambda t: None,
    "path": lambda t: support.BPFFS / "pyskl-never",
    "protocol": lambda t: "tcp",
    "destination": lambda t: (V4, 80),
    "source": lambda t: (V4, 81),
    "program": lambda t: t["Program"],
    "key": lambda t: 0,
}
OPERATORS: dict[type, tuple[str, ...]] = {
    Map: ("__len__", "__iter__", "__getitem__", "__setitem__", "__delitem__", "__contains__"),
    object: ("__enter__",),
}


def operations(cls: type) -> list[str]:
    """The public methods and properties of a class, and the operators of its kind."""
    found = [n for base, names in OPERATORS.items() if issubclass(cls, base) for n in names]
    for name in dir(cls):
        static = inspect.getattr_static(cls, name)
        if not name.startswith("_") and not isinstance(static, (classmethod, staticmethod)):
            found.append(name)
    return [name for name in found if name not in {"close", "closed", "inode", "read_only"}]


def operate(thing: object, name: str, world: dict[str, object]) -> object:
    """Use an attribute: a method with arguments by its parameters' names, and what it gives, through."""
    attribute = getattr(thing, name)
    if callable(attribute):
        given = {"__setitem__": ("key", "value")}.get(name)
        if given is None:
            parameters = inspect.signature(attribute).parameters.values()
            given = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
            given = ["key" if n == "item" else n for n in given]
        value = 0 if isinstance(thing, SockMap) else bytes(8)
        arguments = ARGUMENTS | {"value": lambda t: value, "other": lambda t: {0: value}}
        if name == "update" and isinstance(thing, Map):
            given = ["other"]
        attribute = attribute(*(arguments[n](world) for n in given))
    if hasattr(attribute, "__enter__") and not isinstance(attribute, Map):
        with attribute:
            pass
    return list(attribute) if hasattr(attribute, "__iter__") else attribute


USES = [
    (name, operation)
    for name in NAMES
    for operation in operations(getattr(pyskl, name))
]  # fmt: skip


@pytest.mark.portable
@pytest.mark.parametrize(("name", "operation"), USES)
def test_after_close_every_operation_is_a_value_error(netns: NetNS, name: str, operation: str) -> None:
    with things(netns) as world:
        world[name].close()
        with pytest.raises(ValueError, match="closed") as caught:
            operate(world[name], operation, world)
        assert not isinstance(caught.value, OSError)


def test_the_operations_are_found() -> None:
    assert {("Program", "attach"), ("Link", "detach"), ("HashMap", "items"), ("SockMap", "put")} <= {*USES}


def test_taken_out_after_close(netns: NetNS) -> None:
    """What a closed object or program still had in it can't be reached any more."""
    obj = BpfObject.load(bpf_object("obj_many"))
    programs, maps = obj.programs, obj.maps
    obj.close()
    for mapping, name in ((programs, "first"), (maps, "sockets")):
        with pytest.raises((ValueError, KeyError)):
            assert mapping[name].info


# -- being forgotten -------------------------------------------------------------------------------


def forget(make: Callable[[], object]) -> list[warnings.WarningMessage]:
    """The warnings of making a thing and dropping it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
        gc.collect()
    return caught


@pytest.mark.parametrize("name", NAMES)
def test_a_forgotten_thing_warns_and_is_closed(netns: NetNS, name: str) -> None:
    before = support.fds()
    caught = forget(lambda: MAKE[name](netns))
    assert {w.category for w in caught} == {ResourceWarning}
    assert any(name in str(w.message) for w in caught)
    assert len(caught) == 1
    assert support.fds() == before
    assert attached(netns) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_thing_does_not_warn(netns: NetNS, name: str) -> None:
    assert forget(lambda: MAKE[name](netns).close()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_cycle_is_collected_and_warns(netns: NetNS, name: str) -> None:
    before = support.fds()

    class Holder:
        pass

    def make() -> None:
        holder = Holder()
        holder.itself, holder.thing = holder, MAKE[name](netns)

    assert {w.category for w in forget(make)} == {ResourceWarning}
    assert support.fds() == before


@pytest.mark.parametrize("holder", ["obj", "prog"])
def test_what_somebody_holds_warns_and_what_nobody_holds_does_not(holder: str) -> None:
    """A map that was taken out and forgotten is the taker's: its holder's close() says nothing of it."""

    def make(*, take: bool) -> None:
        owner = BpfObject.load(bpf_object("obj_many")) if holder == "obj" else load_first()
        assert len(owner.maps["sockets"]) == 0
        taken = owner.maps["sockets"] if take else None
        owner.close()
        assert taken is None or not taken.closed

    assert forget(lambda: make(take=False)) == []
    (warning,) = forget(lambda: make(take=True))
    assert warning.category is ResourceWarning
    assert "sockets" in str(warning.message)


README = """
import gc, socket, sys, warnings
import pyskl
from pyskl import NetNS, Program

with NetNS.named(sys.argv[1]) as ns:
    with ns.entered():
        s = socket.create_server(("127.0.0.1", 0))
    with s, Program.load(sys.argv[2], "first") as p, p.attach(ns) as l:
        p.maps["sockets"][0] = s
        assert p.maps["sockets"][0] == pyskl.socket_cookie(s)
        print(l.info.prog_id == p.info.id, len(pyskl.query(ns)))
    print(len(pyskl.query(ns)))
gc.collect()
"""


def test_the_readmes_use_warns_of_nothing(netns_name: str) -> None:
    result = support.python(README, netns_name, str(bpf_object("obj_many")))
    assert (result.stdout, result.stderr) == ("True 1\n0\n", "")


EXIT = """
import sys, pyskl
ns = pyskl.NetNS.current()
obj = pyskl.BpfObject.load(sys.argv[1])
prog = obj.programs["first"]
sockets = prog.maps["sockets"]
link = prog.attach(ns)
plain = pyskl.HashMap.create()
lone = pyskl.Program.load(sys.argv[1], "drop")
if sys.argv[2:] == ["raise"]:
    raise SystemExit(3)
"""


@pytest.mark.portable
@pytest.mark.parametrize("how", ["fall off", "raise"])
@pytest.mark.parametrize("flags", [[], ["-W", "default"], ["-X", "dev"]], ids=["", "default", "dev"])
def test_an_interpreter_that_exits_prints_warnings_at_most(netns: NetNS, how: str, flags: list[str]) -> None:
    with netns.entered():
        result = subprocess.run(
            [sys.executable, "-I", *flags, "-c", EXIT, bpf_object("obj_many"), how],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
        )
    assert result.returncode == {"fall off": 0, "raise": 3}[how]
    lines = [line for line in result.stderr.splitlines() if "tracemalloc" not in line]
    wrong = [
        line for line in lines if "ResourceWarning" not in line and not line.startswith(("  ", "Object allocated"))
    ]
    assert wrong == []
    assert bool(lines) == bool(flags)
    assert support.eventually(lambda: attached(netns) == 0)


# -- other processes -------------------------------------------------------------------------------


@contextlib.contextmanager
def fork(work: Callable[[], None]) -> Iterator[None]:
    """A child that does a piece of work and ends; its failure is ours."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    yield


@pytest.mark.parametrize("how", ["close", "exit", "forget"])
def test_a_child_that_lets_go_takes_nothing_from_its_parent(netns: NetNS, how: str) -> None:
    with things(netns) as world, tcp_listener(netns) as server:
        world["SockMap"][0] = server

        def work() -> None:
            if how == "close":
                for thing in world.values():
                    thing.close()
                assert all(thing.closed for thing in world.values())
            elif how == "forget":
                warnings.simplefilter("ignore")
                world.clear()
                gc.collect()

        with fork(work):
            assert attached(netns) == 1
            assert ask_tcp(netns, V4, 80, server) is server
            assert world["SockMap"][0] == support.cookie(server)
            assert world["Link"].info.prog_id == world["Program"].info.id


def test_a_child_goes_on_with_what_its_parent_made(netns: NetNS) -> None:
    """The fds are shared: who inherits them may use them after the parent closed its own."""
    reader, writer = os.pipe()
    with things(netns) as world:
        pid = os.fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)  # until the parent has closed
            ok = attached(netns) == 1 and world["Link"].info.netns_inode == netns.inode
            os._exit(0 if ok else 1)
        os.close(reader)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert support.eventually(lambda: attached(netns) == 0)


def test_fds_are_closed_on_exec(netns: NetNS, bpffs: Path) -> None:
    """Nothing that was made, opened, loaded or copied reaches a program that is started."""
    with things(netns) as world, contextlib.ExitStack() as stack:
        opened = [*world.values()]
        for thing in (world["Program"], world["SockMap"], world["Link"]):
            thing.pin(bpffs / type(thing).__name__)
            opened += [
                stack.enter_context(type(thing).from_pin(bpffs / type(thing).__name__)),
                stack.enter_context(type(thing).from_id(thing.info.id)),
                stack.enter_context(type(thing).from_fd(thing.fileno())),
            ]
        opened.append(stack.enter_context(NetNS.current()))
        opened.append(stack.enter_context(NetNS.from_path("/proc/self/ns/net")))
        fds = {thing.fileno() for thing in opened if hasattr(thing, "fileno")}
        assert len(fds) > 12
        assert [fd for fd in fds if os.get_inheritable(fd)] == []
        listing = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
        )
        assert "-> " in listing.stdout
        assert "bpf" not in listing.stdout
        assert "net:" not in listing.stdout


PINNER = """
import sys, pyskl
ns = pyskl.NetNS.named(sys.argv[1])
with ns, pyskl.Program.load(sys.argv[2], "first") as p:
    with p.maps["sockets"] as m:
        m.pin(sys.argv[3] + "/sockets")
    with p.attach(ns) as l:
        if sys.argv[4] == "pin":
            l.pin(sys.argv[3] + "/link")
"""


@pytest.mark.parametrize(("how", "left"), [("pin", 1), ("none", 0)])
def test_a_pinned_link_outlives_its_process(netns: NetNS, netns_name: str, bpffs: Path, how: str, left: int) -> None:
    support.python(PINNER, netns_name, str(bpf_object("obj_many")), str(bpffs), how)
    assert attached(netns) == left
    if left:
        with (
            tcp_listener(netns) as server,
            Map.from_pin(bpffs / "sockets") as sockets,
            Link.from_pin(bpffs / "link") as link,
        ):
            sockets[0] = server
            assert ask_tcp(netns, V4, 80, server) is server
            link.unpin()
        assert support.eventually(lambda: attached(netns) == 0)


@pytest.mark.parametrize("pinned", [False, True])
def test_closing_detaches_what_is_not_pinned(netns: NetNS, bpffs: Path, pinned: bool) -> None:
    with load_first() as prog:
        link = prog.attach(netns)
        if pinned:
            link.pin(bpffs / "link")
        link.close()
    assert attached(netns) == pinned
    if pinned:
        with Link.from_pin(bpffs / "link") as again:
            assert again.info.netns_inode == netns.inode
            again.detach()
            assert attached(netns) == 0
            again.detach()
            assert again.info.netns_inode == 0


def test_unpin_lets_go_of_every_pin_and_of_none_that_is_anothers(bpffs: Path) -> None:
    with HashMap.create() as m, HashMap.create() as other:
        for name in ("one", "two"):
            m.pin(bpffs / name)
        other.pin(bpffs / "other")
        with HashMap.from_pin(bpffs / "two") as again:
            m.unpin()
            assert os.listdir(bpffs) == ["other"]
            other.unpin()
            assert os.listdir(bpffs) == []
            assert again.info == m.info


# -- threads ---------------------------------------------------------------------------------------

THREADS = 8


def together(work: Callable[[int], object]) -> list[object]:
    """The same piece of work in many threads that start at once."""
    barrier = threading.Barrier(THREADS, timeout=support.TIMEOUT)

    def run(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.portable
@pytest.mark.parametrize("name", NAMES)
def test_a_race_to_close_closes_once(netns: NetNS, name: str) -> None:
    """An fd that is closed twice is by then somebody else's: here one that each thread opens anew."""
    for _ in range(10):
        thing = MAKE[name](netns)

        def work(number: int, thing: object = thing) -> bool:
            thing.close()
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
            thing.close()
            for fd in fds:
                os.close(fd)  # EBADF if somebody closed it before
            return thing.closed

        assert together(work) == [True] * THREADS


def test_threads_share_a_map() -> None:
    with HashMap.create(key_size=4, value_size=8, max_entries=THREADS * 100) as m:

        def work(number: int) -> None:
            for n in range(number * 100, number * 100 + 100):
                m[n] = n.to_bytes(8, "little")
                assert int.from_bytes(m[n], "little") == n
                assert len(dict(m.items())) >= n - number * 100 + 1

        together(work)
        assert len(m) == THREADS * 100


def test_threads_attach_update_and_detach(netns: NetNS) -> None:
    with BpfObject.load(bpf_object("obj_pair")) as obj, obj.programs["yes"] as yes, obj.programs["no"] as no:

        def work(number: int) -> None:
            for _ in range(50):
                with yes.attach(netns) as link:
                    link.update(no, expected=yes)
                    assert link.info.prog_id == no.info.id
                    link.detach()

        together(work)
        assert attached(netns) == 0


def test_what_another_thread_closes_is_closed_for_all(netns: NetNS) -> None:
    """A call that was on its way meets EBADF as with a file; the next one in each thread says it is closed."""
    for _ in range(20):
        m = HashMap.create(key_size=4, value_size=8, max_entries=4)
        m[0] = bytes(8)

        def work(number: int, m: HashMap = m) -> int:
            on_its_way = 0
            for n in itertools.count():
                if number == 0 and n == 50:
                    m.close()
                try:
                    assert m[0] == bytes(8)
                except pyskl.BpfError as error:
                    assert error.errno == errno.EBADF
                    on_its_way += 1
                except ValueError as error:
                    assert "closed" in str(error)
                    return on_its_way
            raise AssertionError

        assert max(together(work)) <= 1


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.portable
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_owner_of_an_fd_is_not_copied(netns: NetNS, name: str, how: Callable[[object], object]) -> None:
    """Two objects with one fd would close it twice."""
    with MAKE[name](netns) as thing, pytest.raises(TypeError):
        how(thing)


@pytest.mark.parametrize("name", NAMES)
def test_things_are_hashable_and_equal_to_themselves(netns: NetNS, name: str) -> None:
    with MAKE[name](netns) as one, MAKE[name](netns) as other:
        assert len({one, other, one}) == 2


def test_a_socket_in_a_map_is_not_kept_alive(netns: NetNS) -> None:
    """The map holds no reference: who registers a socket has to keep it."""
    with SockMap.create(1) as m:
        sock = tcp_listener(netns)
        m[0] = sock
        sock.close()
        assert support.eventually(lambda: len(m) == 0)
        assert isinstance(sock, socket.socket)


AGAIN = """
import ctypes, importlib, logging, sys
import pyskl._sys
importlib.reload(pyskl._sys)
libbpf = ctypes.CDLL("libbpf.so.1")
print(libbpf.bpf_object__open(b"/nonexistent"))  # another user of libbpf, whose messages go where they went before
"""


def test_importing_again_leaves_the_messages_of_others_as_they_were() -> None:
    ran = subprocess.run([sys.executable, "-I", "-c", AGAIN], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert ran.stderr.startswith("libbpf: ")
    assert ran.stderr.count("\n") == 1
