"""How long links live, what may be replaced by what, and which authority a file descriptor carries."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess

import privileges
import pytest
from support import (
    NO_REUSEPORT,
    V4,
    V4_B,
    ask,
    ask_tcp,
    bpf_object,
    child,
    chooser,
    choosing,
    cookie,
    eventually,
    kill,
    namespace,
    needs,
    pins,
    readable,
    result,
    server,
    sys_bpf,
    tcp_client,
    tcp_listener,
    unavailable,
)

import pyskl

NOBODY, GROUP = 65534, 54321


def steers(ns, sock):
    """Whether a program of the namespace sends port 80 to the socket."""
    try:
        return ask_tcp(ns, V4, 80, sock) is sock
    except ConnectionRefusedError:
        return False


# -- Links -----------------------------------------------------------------------------------------


def test_an_unpinned_link_goes_with_its_last_fd(netns):
    with tcp_listener(netns) as ours, chooser({0: ours}, slot=0) as program:
        with program.attach(netns) as link:
            number = link.info.id
            with pyskl.Link.from_fd(link.fileno()) as copy:
                link.close()
                assert steers(netns, ours)
                assert copy.info.id == number
            assert not steers(netns, ours)
        assert pyskl.query(netns) == ()
        with pytest.raises(pyskl.BpfError) as error:
            pyskl.Link.from_id(number)
        assert error.value.errno == errno.ENOENT


def test_a_pinned_link_does_not(netns, bpffs):
    with tcp_listener(netns) as ours, chooser({0: ours}, slot=0) as program:
        with program.attach(netns) as link:
            link.pin(bpffs / "link")
        assert steers(netns, ours)
        with pyskl.Link.from_pin(bpffs / "link") as link:
            assert link.info.prog_id == program.info.id
            link.unpin()
            assert steers(netns, ours)
        assert eventually(lambda: not steers(netns, ours))


def test_a_link_goes_with_its_process(netns):
    """However that ends."""
    with tcp_listener(netns) as ours, chooser({0: ours}, slot=0) as program:
        pid = os.fork()
        if not pid:
            _link = program.attach(netns)
            os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert steers(netns, ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not steers(netns, ours)


def test_an_update_with_a_wrong_old_program_is_eperm(netns):
    """And no PermissionDenied: no capability is missing. The link is as it was."""
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(tcp_listener(netns)) for _ in range(2))
        first, second = (stack.enter_context(chooser({0: sock}, slot=0)) for sock in (a, b))
        link = stack.enter_context(first.attach(netns))
        with pytest.raises(pyskl.BpfError) as error:
            link.update(second, expected=second)
        assert (error.value.errno, error.value.call) == (errno.EPERM, "BPF_LINK_UPDATE")
        assert not isinstance(error.value, pyskl.PermissionDenied)
        assert ask_tcp(netns, V4, 80, a, b) is a
        link.update(second, expected=first)
        assert ask_tcp(netns, V4, 80, a, b) is b
        assert link.info.prog_id == second.info.id


def test_the_link_of_a_dead_namespace_is_enolink_and_of_inode_0():
    with contextlib.ExitStack() as stack:
        with namespace() as ns:
            program = stack.enter_context(chooser())
            link = stack.enter_context(program.attach(ns))
            assert link.info.netns_inode == ns.inode
        assert eventually(lambda: link.info.netns_inode == 0)
        assert link.info.prog_id == program.info.id
        with pytest.raises(pyskl.BpfError) as error:
            link.update(program)
        assert (error.value.errno, error.value.call) == (errno.ENOLINK, "BPF_LINK_UPDATE")
        link.detach()


# -- Capabilities and file descriptors -------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "missing"),
    [
        (("CAP_BPF", "CAP_NET_ADMIN"), None),
        (("CAP_BPF",), "CAP_NET_ADMIN"),
        (("CAP_NET_ADMIN",), "CAP_BPF"),
        ((), "CAP_BPF"),
    ],
    ids=lambda it: " and ".join(it) or "none" if isinstance(it, tuple) else "",
)
@pytest.mark.parametrize("kind", ["SOCKMAP", "SOCKHASH"])
def test_creating_a_sockmap_needs_cap_bpf_and_cap_net_admin(keep, missing, kind):
    def create():
        pyskl.Map.create(pyskl.MapType[kind], 4, 8, 1).close()

    if missing is None:
        privileges.run(create, keep=keep)
        return
    with pytest.raises(pyskl.PermissionDenied) as error:
        privileges.run(create, keep=keep)
    assert error.value.errno == errno.EPERM
    assert missing in error.value.missing


@pytest.mark.parametrize("keep", [("CAP_BPF",), ("CAP_NET_ADMIN",), ()])
def test_a_program_alone_loads_with_cap_bpf(keep):
    path = bpf_object("alone")

    def load():
        with pyskl.Program.load(path) as program:
            return program.test_run("tcp", (V4, 80), (V4_B, 1234)).verdict

    if "CAP_BPF" in keep:
        assert privileges.run(load, keep=keep) is pyskl.Verdict.DROP
    else:
        with pytest.raises(pyskl.PermissionDenied) as error:
            privileges.run(load, keep=keep)
        assert "CAP_BPF" in error.value.missing


def unprivileged_bpf():
    """Skip where kernel.unprivileged_bpf_disabled closes bpf(2) as a whole, as it did before 5.19.

    Then the pin that is not there is not even looked for.
    """

    def ask_for_a_pin():
        path = ctypes.create_string_buffer(b"/sys/fs/bpf/no-such-pin")
        try:
            sys_bpf(7, struct.pack("=QII", ctypes.addressof(path), 0, 0))
        except OSError as error:
            return error.errno

    if privileges.run(ask_for_a_pin) == errno.EPERM:
        unavailable("unprivileged_bpf", "bpf(2) is closed without CAP_BPF")


def outcomes(operations):
    """What becomes of each of them: "ok", or the error's type and errno."""
    said = {}
    for name, operation in operations.items():
        try:
            operation()
            said[name] = "ok"
        except Exception as error:
            said[name] = f"{type(error).__name__} {errno.errorcode.get(getattr(error, 'errno', None))}"
    return said


def test_with_the_fds_and_no_capability_everything_works_but_query_and_opening_by_id(netns, bpffs):
    """The authority is the fd; and what was done so, is so for everybody."""
    unprivileged_bpf()
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(tcp_listener(netns)) for _ in range(2))
        first, second = (stack.enter_context(chooser({0: sock}, slot=0)) for sock in (a, b))
        sockets = stack.enter_context(second.maps["sockets"])
        detached = stack.enter_context(first.attach(netns))
        number = first.info.id, detached.info.id, sockets.info.id

        def without():
            with first.attach(netns) as attached:
                return outcomes(
                    {
                        "attach": lambda: attached.pin(bpffs / "link"),
                        "update": lambda: attached.update(second, expected=first),
                        "detach": detached.detach,
                        "put": lambda: sockets.put(0, a),
                        "put again": lambda: sockets.put(1, b),
                        "get": lambda: sockets[1],
                        "delete": lambda: sockets.pop(1),
                        "test_run": lambda: first.test_run("tcp", (V4, 80), (V4_B, 1234)),
                        "info of a program": lambda: first.info,
                        "info of a link": lambda: attached.info,
                        "info of a map": lambda: sockets.info,
                        "pin a map": lambda: sockets.pin(bpffs / "sockets"),
                        "pin a program": lambda: second.pin(bpffs / "program"),
                        "from_fd": lambda: pyskl.Program.from_fd(first.fileno()).close(),
                        "query": lambda: pyskl.query(netns),
                        "program by id": lambda: pyskl.Program.from_id(number[0]),
                        "link by id": lambda: pyskl.Link.from_id(number[1]),
                        "map by id": lambda: pyskl.Map.from_id(number[2]),
                    }
                )

        said = privileges.run(without)
        refused = {"query", "program by id", "link by id", "map by id"}
        assert said == {name: "PermissionDenied EPERM" if name in refused else "ok" for name in said}
        assert [info.id for info in pyskl.query(netns)] == [second.info.id]
        assert dict(sockets.items()) == {0: cookie(a)}
        assert ask_tcp(netns, V4, 80, a, b) is a
        assert {str(bpffs / name) for name in ("link", "sockets", "program")} <= pins()
        os.unlink(bpffs / "link")
        assert eventually(lambda: not steers(netns, a))


def test_query_without_cap_sys_admin_gives_ids_alone(netns):
    """Opening by id needs CAP_SYS_ADMIN; the order of ids is still that of attachment."""
    with chooser() as first, chooser() as second:
        with second.attach(netns), first.attach(netns):
            ids = [second.info.id, first.info.id]
            infos = privileges.run(lambda: pyskl.query(netns), keep=("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"))
            assert [info.id for info in infos] == ids
            assert {field for info in infos for field in info[1:]} == {None}
            assert [(info.id, info.name) for info in pyskl.query(netns)] == [(number, "choose") for number in ids]


def as_nobody(function):
    """The function's result, of a user without any capability who is in GROUP."""

    def switched():
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(NOBODY)
        return function()

    return privileges.run(switched, keep=("CAP_SETUID", "CAP_SETGID"))


@contextlib.contextmanager
def pinned(it, path, mode):
    """Something pinned, of GROUP, with this mode."""
    it.pin(path)
    os.chown(path, 0, GROUP)
    os.chmod(path, mode)
    yield path
    it.unpin()


def test_an_unprivileged_user_who_may_open_the_pin_updates_the_sockmap(netns, bpffs):
    """Mode 0660, and its group; with 0640 it may not, nor with 0600."""
    unprivileged_bpf()
    bpffs.chmod(0o755)
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(tcp_listener(netns)) for _ in range(2))
        program = stack.enter_context(choosing(netns, {0: a}, slot=0))
        path = bpffs / "sockets"
        stack.enter_context(pinned(program.maps["sockets"], path, 0o660))

        def update():
            with pyskl.SockMap.from_pin(path) as sockets:
                sockets[0] = b
                return sockets[0]

        assert ask_tcp(netns, V4, 80, a, b) is a
        assert as_nobody(update) == cookie(b)
        assert ask_tcp(netns, V4, 80, a, b) is b
        for mode in (0o640, 0o600):
            path.chmod(mode)
            with pytest.raises(OSError) as error:
                as_nobody(update)
            assert error.value.errno == errno.EACCES


def test_and_the_link_too_so_keep_the_pins_of_the_program_and_the_link_at_0600(netns, bpffs):
    unprivileged_bpf()
    bpffs.chmod(0o755)
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(tcp_listener(netns)) for _ in range(2))
        first, second = (stack.enter_context(chooser({0: sock}, slot=0)) for sock in (a, b))
        link = stack.enter_context(first.attach(netns))
        stack.enter_context(pinned(link, bpffs / "link", 0o660))
        stack.enter_context(pinned(second, bpffs / "program", 0o660))

        def update():
            with pyskl.Link.from_pin(bpffs / "link") as link:
                with pyskl.Program.from_pin(bpffs / "program") as program:
                    link.update(program)

        for name in ("link", "program"):
            (bpffs / name).chmod(0o600)
            with pytest.raises(OSError) as error:
                as_nobody(update)
            assert error.value.errno == errno.EACCES
            (bpffs / name).chmod(0o660)
        assert ask_tcp(netns, V4, 80, a, b) is a
        as_nobody(update)
        assert ask_tcp(netns, V4, 80, a, b) is b


# -- bpffs and network namespaces ------------------------------------------------------------------


def test_ip_netns_exec_hides_bpffs_and_nsenter_does_not(netns_name, bpffs):
    with chooser() as program:
        program.pin(bpffs / "program")
        for command, seen in (
            (["nsenter", f"--net=/run/netns/{netns_name}"], True),
            (["ip", "netns", "exec", netns_name], False),
        ):
            status = subprocess.run([*command, "test", "-e", bpffs / "program"], timeout=60)
            assert status.returncode == (0 if seen else 1)
        program.unpin()


# -- A socket of another process -------------------------------------------------------------------


def pidfd_getfd(pid, fd):
    """A copy of another process's file descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        copy = libc.syscall(438, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copy


_LISTENING = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.fileno(), flush=True)
    while True:
        with listener.accept()[0] as connection:
            connection.sendall(b"served")
"""


@contextlib.contextmanager
def listening_process(ns):
    """A process with a listener of its own: (process, the listener's fd there)."""
    process = child(_LISTENING, ns=ns)
    try:
        yield process, int(process.stdout.readline())
    finally:
        kill(process)


def test_a_socket_taken_by_pidfd_getfd_can_be_registered(netns):
    """Unchanged, and with the copy closed it is still only that process's."""
    with listening_process(netns) as (process, fd), choosing(netns, slot=0) as program:
        copy = pidfd_getfd(process.pid, fd)
        program.maps["sockets"][0] = copy
        os.close(copy)
        with tcp_client(netns, V4, 80) as client:
            assert client.recv(16) == b"served"
        kill(process)
        assert 0 not in program.maps["sockets"]
        with pytest.raises(ConnectionRefusedError):
            tcp_client(netns, V4, 80)


def test_a_copy_that_is_kept_open_fills_the_dead_servers_queue_unseen(netns):
    with listening_process(netns) as (process, fd), choosing(netns, slot=0) as program:
        with socket.socket(fileno=pidfd_getfd(process.pid, fd)) as copy:
            program.maps["sockets"][0] = copy
            kill(process)
            assert program.maps["sockets"][0] == cookie(copy)
            with tcp_client(netns, V4, 80) as client:  # connected, to nobody
                assert readable(client, timeout=0) == []
                assert readable(copy) == [copy]


# -- Test runs -------------------------------------------------------------------------------------


@needs("sk_lookup_ingress_ifindex")
def test_a_test_run_with_an_ifindex_other_than_0_is_einval(netns):
    with chooser() as program:
        for ifindex, expected in ((0, None), (1, errno.EINVAL)):
            context = struct.pack("=QII44xII4x", 0, socket.AF_INET, 6, 80, ifindex)
            buffer = ctypes.create_string_buffer(context, len(context))
            sizes = (0, 0, len(context), 0)  # repeat, duration, ctx_size_in, ctx_size_out
            attributes = struct.pack(
                "=IIIIQQIIIIQQ", program.fileno(), 0, 0, 0, 0, 0, *sizes, ctypes.addressof(buffer), 0
            )
            if expected is None:
                sys_bpf(10, attributes)
            else:
                with pytest.raises(OSError) as error:
                    sys_bpf(10, attributes)
                assert error.value.errno == expected
        assert result(program).runs == 1


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_test_run_that_selects_a_reuseport_socket_without_no_reuseport_is_eopnotsupp(netns, protocol):
    with server(netns, protocol, "127.0.0.1", reuseport=True) as ours:
        question = protocol, (V4, 80), (V4_B, 1234)
        with chooser({0: ours}, slot=0) as program:
            with pytest.raises(pyskl.BpfError) as error:
                program.test_run(*question)
            assert error.value.errno == errno.EOPNOTSUPP
            assert error.value.call == "BPF_PROG_TEST_RUN"
            with program.attach(netns):  # traffic has no such limit
                assert ask(protocol, netns, V4, 80, ours) is ours
        with chooser({0: ours}, slot=0, flags=NO_REUSEPORT) as program:
            assert program.test_run(*question)[:2] == (pyskl.Verdict.PASS, cookie(ours))


# -- Kinds -----------------------------------------------------------------------------------------


def test_the_name_of_a_links_fd_depends_on_where_it_came_from(netns, bpffs):
    """So its kind is asked of BPF_OBJ_GET_INFO_BY_FD, and never of the name."""

    def name(it):
        return os.readlink(f"/proc/self/fd/{it.fileno()}")

    with chooser() as program, program.attach(netns) as made:
        made.pin(bpffs / "link")
        with pyskl.Link.from_pin(bpffs / "link") as opened:
            assert (name(made), name(opened)) == ("anon_inode:bpf_link", "anon_inode:bpf-link")
            for it in (made, opened):
                with pyskl.Link.from_fd(it.fileno()) as copy:
                    assert copy.info == made.info
                with pytest.raises(TypeError):
                    pyskl.Program.from_fd(it.fileno())
        with pytest.raises(TypeError):
            pyskl.SockMap.from_pin(bpffs / "link")
        made.unpin()


@pytest.mark.parametrize(
    "other",
    [("HASH", 4, 8), ("SOCKHASH", 4, 8), ("SOCKMAP", 4, 4), ("ARRAY", 4, 8)],
    ids=lambda it: f"{it[0]} {it[1:]}",
)
def test_a_reused_map_of_another_type_or_size_is_refused(other):
    """libbpf would take it, in silence."""
    kind, key_size, value_size = other
    with pyskl.Map.create(pyskl.MapType[kind], key_size, value_size, 8) as it:
        with pytest.raises(ValueError):
            pyskl.Program.load(bpf_object("choose"), name="choose", reuse={"sockets": it})


def test_a_reused_map_of_the_same_type_and_sizes_is_that_map(netns):
    with pyskl.SockMap.create(8) as sockets, tcp_listener(netns) as ours:
        with choosing(netns, reuse={"sockets": sockets}, slot=7) as program:
            sockets[7] = ours
            assert ask_tcp(netns, V4, 80, ours) is ours
            assert program.maps["sockets"].info.id == sockets.info.id
