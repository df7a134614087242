"""A dispatcher on bpffs: many processes, rights, upgrades, and what a person breaks."""

import concurrent.futures
import contextlib
import fcntl
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import support

import pyskl
from pyskl import Binding, Dispatcher

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]
WHOLE = "PYSKL_TEST_WHOLE" in os.environ
FORK = multiprocessing.get_context("fork")
WEB, API = Binding("web", "tcp", "192.0.2.0/24", 80), Binding("api", "udp", "2001:db8::/64", "1-99")


@pytest.fixture
def path(bpffs, netns):
    with netns.entered():
        yield str(bpffs / "edge")
        with contextlib.suppress(pyskl.NotLoaded):
            Dispatcher.remove(str(bpffs / "edge"))


@pytest.fixture
def d(path):
    with Dispatcher.create(path=path) as dispatcher:
        yield dispatcher


def state(d):
    return list(d.bindings()), d.policies(), d.sockets()


def test_it_outlives_who_made_it_and_is_gone_when_unloaded(path):
    with socket.create_server(("", 0)) as server:
        with Dispatcher.create(path=path) as made:
            made.replace([WEB, API])
            made.set_policy("web", on_missing="hold")
            made.register("web", server)
            assert made.path == made.status().path == path
        assert len(pyskl.query()) == 1
        with socket.create_connection(("192.0.2.1", 80), 5), server.accept()[0]:
            pass
        with Dispatcher.open(path) as opened:
            assert set(opened.bindings()) == {WEB, API}
            assert opened.policies() == {"web": pyskl.Policy("hold")}
            assert opened.sockets()[0].cookie == pyskl.socket_cookie(server)
            assert opened.explain("tcp", ("192.0.2.1", 80)).slot == 0
            opened.unload()
        assert pyskl.query() == ()
        assert not os.path.exists(path)
    for call in (Dispatcher.open, Dispatcher.remove):
        with pytest.raises(pyskl.NotLoaded, match="edge"):
            call(path)


def test_everybody_sees_what_anybody_changes(path, d):
    with Dispatcher.open(path) as other, Dispatcher.open(path, read_only=True) as reader:
        d.bind("web", "tcp", "192.0.2.0/24", 80)
        assert list(other.bindings()) == list(reader.bindings()) == [WEB]
        other.replace([API])
        assert list(d.bindings()) == list(reader.bindings()) == [API]
        d.bind("new", "tcp", "::/0")
        other.unbind("new", "tcp", "::/0")
        other.set_policy("api", udp_sticky=9)
        assert d.policies() == reader.policies() == {"api": pyskl.Policy("reset", 9)}
        assert reader.explain("udp", ("2001:db8::1", 5)).label == "api"


def test_a_second_one_at_the_path(path, d):
    d.bind("web", "tcp", "192.0.2.0/24", 80)
    with pytest.raises(pyskl.AlreadyLoaded, match="edge"):
        Dispatcher.create(path=path)
    assert list(d.bindings()) == [WEB]
    assert len(pyskl.query()) == 1
    assert not [name for name in os.listdir(os.path.dirname(path)) if "~" in name]


def test_unload_removes_no_other_than_its_own(path, d):
    d.bind("web", "tcp", "192.0.2.0/24", 80)
    Dispatcher.remove(path)
    with Dispatcher.create(path=path) as new:
        new.replace([API])
        for call in (d.unload, lambda: d.bind("a", "tcp", "::/0"), d.upgrade):
            with pytest.raises(pyskl.NotLoaded, match="unloaded"):
                call()
        with Dispatcher.open(path) as opened:
            assert list(opened.bindings()) == list(new.bindings()) == [API]
        new.unload()
    assert pyskl.query() == ()


@pytest.mark.parametrize("name", ["a.b", "a~b"])
def test_a_name_that_bpffs_does_not_take(bpffs, name):
    with pytest.raises(ValueError, match="name"):
        Dispatcher.create(path=bpffs / name)


@pytest.mark.parametrize("name", ["a.b/edge", "x" * 256, "a\0b"])
def test_a_name_that_no_folder_can_have_leaves_nothing(netns, bpffs, name):
    with netns.entered(), pytest.raises((OSError, ValueError)):
        Dispatcher.create(path=bpffs / name)
    assert os.listdir(bpffs) == []


def test_a_path_that_is_not_on_bpffs(tmp_path):
    with pytest.raises(pyskl.BpfError, match="bpffs"):
        Dispatcher.create(path=tmp_path / "edge")
    assert not os.listdir(tmp_path)
    with pytest.raises(pyskl.NotLoaded):
        Dispatcher.open(tmp_path / "edge")


def test_who_only_reads_changes_nothing(path, d):
    before = sorted(os.listdir(path))
    with Dispatcher.open(path, read_only=True) as reader, socket.create_server(("", 0)) as server:
        for call in (
            lambda: reader.bind("a", "tcp", "::/0"),
            lambda: reader.unbind("a", "tcp", "::/0"),
            lambda: reader.replace([WEB]),
            lambda: reader.set_policy("a", on_missing="hold"),
            lambda: reader.register("a", server),
            lambda: reader.unregister("a"),
            reader.upgrade,
            reader.unload,
            reader.events,
        ):
            with pytest.raises(OSError, match="reading"):
                call()
        assert reader.status().keepers == 1
    assert state(d) == ([], {}, ())
    assert sorted(os.listdir(path)) == before


def test_the_lock_has_a_holder_and_a_limit(path):
    with Dispatcher.create(path=path, timeout=0.01) as d:
        d.bind("web", "tcp", "192.0.2.0/24", 80)
        _while_another_holds_the_lock(path, d)


def _while_another_holds_the_lock(path, d):
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(1, flush=True); input()"
    holder = support.child(code, path)
    try:
        holder.stdout.readline()
        with pytest.raises(pyskl.Busy, match=str(holder.pid)) as caught:
            Dispatcher.open(path, timeout=0.05)
        assert caught.value.pid == holder.pid
        with Dispatcher.open(path, read_only=True) as reader, socket.create_server(("", 0)) as server:  # needs no lock
            assert list(reader.bindings()) == [WEB]
            assert reader.status().bindings == 1
            assert (reader.policies(), reader.sockets()) == ({}, ())
            assert reader.counters()["web"].selected == 0
            assert list(reader.diff([WEB, API]).added) == [API]
            assert reader.explain("tcp", ("192.0.2.1", 80)).label == "web"
            before = d.status()
            for call in (
                lambda: d.bind("a", "tcp", "::/0"),
                lambda: d.unbind("web", "tcp", "192.0.2.0/24", 80),
                lambda: d.replace([API]),
                lambda: d.set_policy("web", on_missing="hold"),
                lambda: d.register("web", server),
                lambda: d.unregister("web"),
                d.upgrade,
                d.unload,
                lambda: Dispatcher.remove(path, timeout=0.01),
                lambda: Dispatcher.repair(path, timeout=0.01),
            ):
                with pytest.raises(pyskl.Busy) as caught:
                    call()
                assert caught.value.pid == holder.pid
            assert d.status() == before
            assert state(d) == ([WEB], {}, ())
    finally:
        support.kill(holder)
    d.bind("a", "tcp", "::/0")  # it died with its holder


def test_another_abi_is_incompatible(path, d):
    entry = d.maps["state"][0]
    d.maps["state"][0] = (99).to_bytes(8, sys.byteorder) + entry[8:]
    for read_only in (False, True):
        with pytest.raises(pyskl.Incompatible, match="99"):
            Dispatcher.open(path, read_only=read_only)
    d.maps["explained"].pin(f"{path}/of_that_version")
    before = sorted(os.listdir(path))
    with pytest.raises(pyskl.Incompatible, match="99"):
        Dispatcher.repair(path)
    assert sorted(os.listdir(path)) == before  # that version's pins are not foreign
    os.unlink(f"{path}/of_that_version")
    os.unlink(f"{path}/state")
    with pytest.raises(pyskl.Incompatible, match="99"):
        Dispatcher.repair(path)  # told from the map that the programs hold
    d.maps["state"][0] = entry
    assert len(Dispatcher.repair(path)) == 1
    Dispatcher.open(path).close()
    d.maps["state"][0] = (99).to_bytes(8, sys.byteorder) + entry[8:]
    Dispatcher.remove(path)  # what the message asks for
    assert support.eventually(lambda: pyskl.query() == ())


def test_each_missing_pin_is_told_and_mended(path, d):
    d.replace([WEB, API])
    d.set_policy("web", on_missing="hold")
    for pin in sorted(set(os.listdir(path)) - {"asking"}):
        os.unlink(f"{path}/{pin}")
        for read_only in (True, False):
            with pytest.raises(pyskl.Damaged, match=pin):
                Dispatcher.open(path, read_only=read_only)
        assert not os.path.exists(f"{path}/{pin}")  # nothing was made anew
        done = Dispatcher.repair(path)
        assert done, pin
        assert len(pyskl.query()) == (2 if pin == "link" else 1)  # the old link is d's
        if pin == "link":
            d.link.detach()
        with Dispatcher.open(path) as opened:
            assert set(opened.bindings()) == {WEB, API}
            assert opened.policies() == {"web": pyskl.Policy("hold")}
            assert opened.explain("tcp", ("192.0.2.1", 80)).reason == "hold"
            assert opened.status().attached
    assert Dispatcher.repair(path) == ()


def test_who_asks_is_told_that_the_lock_of_those_who_ask_is_missing_or_that_all_is_gone(path, d):
    os.rmdir(f"{path}/asking")
    with pytest.raises(pyskl.Damaged, match="asking"):
        d.explain("tcp", ("192.0.2.1", 80))
    assert len(Dispatcher.repair(path)) == 1
    assert d.explain("tcp", ("192.0.2.1", 80)).reason == "unbound"
    Dispatcher.remove(path)
    with pytest.raises(pyskl.NotLoaded, match="unloaded"):
        d.explain("tcp", ("192.0.2.1", 80))


def test_foreign_files_and_a_severed_link_are_mended(path, d):
    d.replace([WEB])
    os.mkdir(f"{path}/foreign")
    d.maps["explained"].pin(f"{path}/stranger")
    assert len(Dispatcher.repair(path)) == 2
    d.link.detach()
    assert not d.status().attached
    with pytest.raises(pyskl.Damaged, match="attached to nothing"):
        Dispatcher.open(path)
    with pytest.raises(pyskl.AlreadyLoaded, match="severed"):
        Dispatcher.create(path=path)
    assert len(Dispatcher.repair(path)) == 1
    with Dispatcher.open(path) as opened:
        assert opened.explain("tcp", ("192.0.2.1", 80)).label == "web"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("192.0.2.1", 80), 5)


def test_a_namespace_that_is_gone_and_another_at_the_same_path(bpffs):
    path = bpffs / "edge"
    with pyskl.NetNS.create() as first, first.entered(), Dispatcher.create(path=path) as made:
        made.bind("web", "tcp", "192.0.2.0/24", 80)
    with pyskl.Link.from_pin(path / "link") as link:
        assert support.eventually(lambda: not link.info.netns_inode)
    with pyskl.NetNS.create() as second, second.entered():
        with pytest.raises(pyskl.Damaged, match="gone"):
            Dispatcher.open(path)
        with Dispatcher.create(path=path) as made:  # the old one's remains are no obstacle
            assert made.bindings() == ()
            assert made.status().attached
            assert len(pyskl.query()) == 1
            made.unload()


@contextlib.contextmanager
def traffic(server):
    """Connections to 192.0.2.1:80, one after the other, which all must reach a server; waits for the next ones."""
    stop, failed, made = threading.Event(), [], []

    def client():
        try:
            with here.entered():
                while not stop.is_set():
                    with socket.create_connection(("192.0.2.1", 80), 5), server.accept()[0]:
                        made.append(1)
        except BaseException as error:
            failed.append(error)

    def goes_on():
        made.clear()
        assert support.eventually(lambda: len(made) > 1 or failed)
        assert not failed

    with pyskl.NetNS.current() as here:
        server.settimeout(5)
        thread = threading.Thread(target=client)
        thread.start()
        try:
            yield goes_on
        finally:
            stop.set()
            thread.join()
    assert not failed


def test_a_namespace_that_an_fd_alone_has(bpffs):
    path = bpffs / "edge"
    with pyskl.NetNS.create() as ns:
        with ns.entered():
            Dispatcher.create(path=path).close()
        with Dispatcher.open(path) as opened:
            assert opened.status().netns_inode == ns.inode
            opened.unload()


def test_upgrade_and_replace_run_under_traffic_and_for_all(path, d):
    d.bind("web", "tcp", "192.0.2.0/24", 80)
    with socket.create_server(("", 0)) as server, Dispatcher.open(path) as other:
        d.register("web", server)
        with traffic(server) as goes_on:
            for number in range(100 if WHOLE else 6):
                (d, other)[number % 2].upgrade()
                goes_on()
            for number in range(100 if WHOLE else 6):
                other.replace([WEB, Binding("api", "tcp", "192.0.2.0/24", 1000 + number)])
                goes_on()
        assert d.status().program_id == other.program.info.id
    assert not [name for name in os.listdir(path) if name.endswith("_new")]


def test_a_program_of_another_build_is_opened_and_upgraded(path, d):
    """Nothing goes by a program's tag, which a kernel may make in another way than the one before it."""
    d.bind("web", "tcp", "192.0.2.0/24", 80)
    with pyskl.Program.load(pyskl.REDIRECT) as another:
        assert another.info.tag != d.program.info.tag
        os.unlink(f"{path}/program")
        another.pin(f"{path}/program")
        d.link.update(another)
    with Dispatcher.open(path) as opened:
        assert opened.status().attached
        assert opened.bindings() == d.bindings()
        opened.bind("api", "tcp", "192.0.2.0/24", 81)
        opened.upgrade()
        assert opened.program.info.tag == d.program.info.tag
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("192.0.2.1", 81), 5)
    assert d.counters()["api"].missed == 1


def test_a_repair_runs_under_traffic(path, d):
    d.bind("web", "tcp", "192.0.2.0/24", 80)
    with socket.create_server(("", 0)) as server:
        d.register("web", server)
        with traffic(server) as goes_on:
            for pin in sorted(set(os.listdir(path)) - {"asking", "link"}):
                os.unlink(f"{path}/{pin}")
                goes_on()
                assert Dispatcher.repair(path), pin
                goes_on()


def test_it_serves_when_every_process_that_used_it_was_killed(path):
    code = """if True:
        import socket, sys
        from pyskl import Dispatcher
        server = socket.socket(fileno=int(sys.argv[2]))
        how = Dispatcher.create if sys.argv[3] == "create" else Dispatcher.open
        d = how(path=sys.argv[1])
        d.bind("web", "tcp", "192.0.2.0/24", [80, 81], replace=True)
        d.register("web", server)
        print("ready", flush=True)
        input()"""
    with socket.create_server(("", 0)) as server, contextlib.ExitStack() as stack:
        for how in ("create", "open", "open"):
            process = support.child(code, path, server.fileno(), how, pass_fds=[server.fileno()])
            stack.callback(support.kill, process)
            assert process.stdout.readline() == "ready\n"
        with traffic(server) as goes_on:
            stack.close()
            goes_on()
        with Dispatcher.open(path) as d:
            assert [each.alive for each in d.sockets()] == [True]
            assert d.status().keepers == 1


def test_an_upgrade_that_was_interrupted_is_finished_or_undone(path, d):
    new = d._store.new_programs()
    for name, pin in (("dispatch", "program"), ("explain", "explain")):
        new[name].pin(f"{path}/{pin}_new")
    before = d.program.info.id
    Dispatcher.open(path).close()
    assert not [name for name in os.listdir(path) if name.endswith("_new")]  # undone
    for name, pin in (("dispatch", "program"), ("explain", "explain")):
        new[name].pin(f"{path}/{pin}_new")
    d.link.update(new["dispatch"])
    os.rename(f"{path}/explain_new", f"{path}/explain")
    with Dispatcher.open(path) as opened:
        assert opened.program.info.id == new["dispatch"].info.id != before
    assert not [name for name in os.listdir(path) if name.endswith("_new")]  # finished
    for program in new.values():
        program.close()


def test_what_who_died_was_making_or_removing_is_removed(path, bpffs):
    with Dispatcher.create(path=path):
        pass
    os.rename(path, f"{path}~1234~beef")  # as if killed in unload()
    assert len(pyskl.query()) == 1
    with pytest.raises(pyskl.NotLoaded):
        Dispatcher.open(path)
    assert support.eventually(lambda: pyskl.query() == ())
    assert os.listdir(bpffs) == []


# -- many at once ----------------------------------------------------------------------------------------------------


def _write(path, number, until):
    with Dispatcher.open(path, timeout=60) as d, socket.create_server(("", 0)) as server:
        for port in itertools.count(1):
            d.bind(f"label {number}", "tcp", "192.0.2.0/24", number * 5000 + port)
            d.bind("passing", "udp", f"2001:db8::{number}", port)
            d.set_policy(f"label {number}", on_missing="hold", udp_sticky=port)
            d.register(f"label {number}", server, slot=port % 3)
            assert {each.slot for each in d.sockets(f"label {number}")} >= {port % 3}
            d.unbind("passing", "udp", f"2001:db8::{number}", port)
            if port == 5000 - 1 or (port >= _PORTS and time.monotonic() > until):
                assert d.policies()[f"label {number}"] == ("hold", port)
                return


def _read(path, stop):
    with Dispatcher.open(path, read_only=True) as d:
        while not stop.is_set():
            ports = {}
            for binding in d.bindings():
                ports.setdefault(binding.label, []).append(binding.ports)
            ports.pop("passing", None)
            for label, seen in ports.items():  # each writer's are there in the order in which it made them
                first = int(label.split()[1]) * 5000 + 1
                assert sorted(seen) == list(range(first, first + len(seen))), label
            assert d.status().bindings >= 0


_MANY, _PORTS, _SECONDS = (8, 40, 60) if WHOLE else (4, 40, 0)


def test_many_write_and_read_at_once_and_nothing_is_lost(path, d):
    stop, until = FORK.Event(), time.monotonic() + _SECONDS
    readers = [FORK.Process(target=_read, args=(path, stop)) for _ in range(_MANY)]
    writers = [FORK.Process(target=_write, args=(path, number, until)) for number in range(1, _MANY + 1)]
    for process in (*readers, *writers):
        process.start()
    for process in writers:
        process.join()
    stop.set()
    for process in readers:
        process.join()
    assert [process.exitcode for process in (*readers, *writers)] == [0] * 2 * _MANY
    bound = Counter(binding.label for binding in d.bindings())
    assert len(bound) == _MANY
    assert min(bound.values()) >= _PORTS
    assert d.policies() == {label: pyskl.Policy("hold", ports) for label, ports in bound.items()}
    assert d.status().keepers == 1
    print(f"{bound.total()} bindings by {_MANY} writers", file=sys.stderr)


def test_half_of_a_policy_leaves_the_other_half(path, d):
    d.set_policy("web", on_missing="hold", udp_sticky=3)
    with pytest.raises(ValueError):
        d.set_policy("web", on_missing="wait", udp_sticky=None)

    def change_one_half(settings):
        with Dispatcher.open(path, timeout=60) as other:
            for setting in settings:
                policy = other.set_policy("web", **{"on_missing": None, "udp_sticky": None, **setting})
                assert setting.items() <= policy._asdict().items()
                assert setting.items() <= other.policies()["web"]._asdict().items()

    halves = [[{"udp_sticky": number} for number in range(1, 200)]]
    halves += [[{"on_missing": word} for word in ("hold", "fallthrough") * 100]]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(change_one_half, halves))
    assert d.policies() == {"web": pyskl.Policy("fallthrough", 199)}


def test_the_lock_is_held_for_no_longer_than_a_call(path, d):
    d.bind("a", "tcp", "::/0")
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)


def test_hold_lasts_as_long_as_somebody_keeps_it(path):
    with Dispatcher.create(path=path) as d:
        d.bind("web", "tcp", "192.0.2.0/24", 80)
        d.set_policy("web", on_missing="hold")
        with Dispatcher.open(path) as other:
            assert (d.status().keepers, other.explain("tcp", ("192.0.2.1", 80)).reason) == (2, "hold")
    with Dispatcher.open(path, read_only=True) as reader:
        assert reader.status().keepers == 0
        assert reader.explain("tcp", ("192.0.2.1", 80)).reason == "reset"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("192.0.2.1", 80), 5)


def test_hold_is_kept_by_another_process_until_it_dies(path, netns):
    with Dispatcher.create(path=path) as d:
        d.bind("web", "tcp", "192.0.2.0/24", 80)
        d.set_policy("web", on_missing="hold")
    code = "import sys, pyskl; d = pyskl.Dispatcher.open(sys.argv[1]); print(1, flush=True); input()"
    keeper = support.child(code, path)
    try:
        assert keeper.stdout.readline()
        with Dispatcher.open(path, read_only=True) as reader, socket.create_server(("", 0)) as server:
            assert reader.status().keepers == 1
            assert reader.explain("tcp", ("192.0.2.1", 80)).reason == "hold"
            with support.unanswered(netns, "192.0.2.1", 80):  # it waits, and is served after all
                with Dispatcher.open(path) as d:
                    d.register("web", server)
        support.kill(keeper)
        with Dispatcher.open(path, read_only=True) as reader:
            assert support.eventually(lambda: reader.status().keepers == 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("192.0.2.1", 80), 5)
    finally:
        support.kill(keeper)


# -- rights ----------------------------------------------------------------------------------------------------------

_GROUP = 54321
_MEMBER = """if True:
    import mmap, os, socket, sys
    import pyskl
    from pyskl import Binding, Dispatcher
    path, granted = sys.argv[1], sys.argv[2] == "granted"
    server = socket.create_server(("", 0))
    os.setgroups([])
    os.setresgid(54321, 54321, 54321)
    os.setresuid(65534, 65534, 65534)
    try:
        reader = Dispatcher.open(path, read_only=True)
    except PermissionError as error:
        print("refused", error)
        sys.exit()
    except pyskl.BpfError as error:
        print("refused", error.errno)
        sys.exit()
    assert [str(binding) for binding in reader.bindings()] == ["web tcp 192.0.2.0/24 80"]
    assert reader.status().bindings == 1 and reader.counters()["web"].selected == 0
    assert reader.status().attached is None and reader.policies() == {} and reader.sockets() == ()
    d = Dispatcher.open(path)
    refused = [
        lambda: d.bind("a", "tcp", "::/0"),
        lambda: d.bind("web", "tcp", "::/0"),
        lambda: d.unbind("web", "tcp", "192.0.2.0/24", 80),
        lambda: d.replace([Binding("web", "tcp", "::/0")]),
        lambda: d.set_policy("web", on_missing="hold"),
        lambda: d.explain("tcp", ("192.0.2.1", 80)),
        lambda: d.set_policy("new", udp_sticky=3),
        d.upgrade, d.events, d.unload, reader.unload, lambda: d.program, lambda: d.link,
        lambda: Dispatcher.remove(path), lambda: Dispatcher.repair(path),
    ]
    if not granted:
        refused += [lambda: d.register("web", server), lambda: d.unregister("web")]
    for number, call in enumerate(refused):
        try:
            call()
        except OSError:
            continue
        print("allowed", number)
    if granted:
        print(d.register("web", server).alive, d.sockets()[0].alive)
        print(len(d.unregister("web")))
    print("done")
"""


@pytest.mark.parametrize("granted", [False, True])
def test_a_member_of_the_group_reads_and_registers_where_that_was_granted(path, granted):
    with Dispatcher.create(path=path, group=_GROUP, group_sockets=granted) as d:
        os.chmod(os.path.dirname(path), 0o755)
        d.bind("web", "tcp", "192.0.2.0/24", 80)
        before = state(d)
        command = [sys.executable, "-I", "-c", _MEMBER, path, "granted" if granted else "not"]
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if told.stdout.startswith("refused"):
            pytest.skip("unprivileged_bpf: this kernel lets nobody without capabilities open a pin")
        assert told.returncode == 0, told.stderr
        assert told.stdout.splitlines() == (["True True", "1"] if granted else []) + ["done"], told.stdout
        assert state(d) == before


@pytest.mark.parametrize("group", [{}, {"group": _GROUP}, {"group": _GROUP, "group_sockets": True}])
def test_what_is_mended_has_the_rights_that_it_had(path, group):
    def modes():
        status = {pin: os.stat(f"{path}/{pin}") for pin in os.listdir(path)}
        return {pin: (oct(each.st_mode), each.st_gid) for pin, each in status.items()}, oct(os.stat(path).st_mode)

    with Dispatcher.create(path=path, **group) as d:
        before = modes()
        assert before[0]["program"][0][-3:] == before[0]["link"][0][-3:] == "600"
        for pin in sorted(set(before[0])):
            (os.rmdir if pin == "asking" else os.unlink)(f"{path}/{pin}")
            assert Dispatcher.repair(path), pin
            assert modes() == before, pin
        d.link.detach()


def test_nobody_else_may_anything(path):
    code = """if True:
        import os, sys
        from pyskl import Dispatcher
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
        for read_only in (False, True):
            try:
                Dispatcher.open(sys.argv[1], read_only=read_only)
            except PermissionError:
                print("no")"""
    with Dispatcher.create(path=path, group=_GROUP):
        os.chmod(os.path.dirname(path), 0o755)
        assert support.python(code, path).stdout.split() == ["no", "no"]
