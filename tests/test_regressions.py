# SPDX-License-Identifier: BSD-2-Clause
"""What was found wrong once, and must not come back: signals, races, closed standard streams, large values."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import privileges
import pytest
import support

import pyskl


@contextmanager
def ticking(handler: Callable[..., object], seconds: float) -> Iterator[None]:
    """Get a signal again and again."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_links_while_others_attach_and_go(netns: pyskl.NetNS) -> None:
    """A link has its id before it can be opened: EAGAIN."""
    stop = threading.Event()
    with pyskl.Program.load(pyskl.REDIRECT) as program, program.attach(netns) as stays:

        def churn() -> None:
            while not stop.is_set():
                with program.attach(netns):
                    pass

        threads = [threading.Thread(target=churn) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(support.LOAD // 20):
                assert stays.info in pyskl.links(netns)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_test_run_ends_under_a_periodic_signal() -> None:
    ticks = []
    with pyskl.Program.load(pyskl.REDIRECT) as program, ticking(lambda *_: ticks.append(1), 0.01):
        run = program.test_run("tcp", (support.V4, 80), (support.V4_B, 1), repeat=3_000_000)
    assert run.verdict == pyskl.Verdict.PASS
    assert ticks


def test_a_value_of_a_megabyte_needs_no_more_than_it() -> None:
    with pyskl.ArrayMap.create(value_size=1 << 20, max_entries=1) as large:
        assert list(large.values()) == [bytes(1 << 20)]


def test_values_that_nobody_else_holds_stay_open_for_an_update() -> None:
    made = []

    def inner() -> pyskl.ArrayMap:
        one = pyskl.ArrayMap.create()
        made.append(one.info.id)
        one._held = True  # nobody is to blame when it goes
        return one

    with inner() as like, pyskl.ArrayOfMaps.create(max_entries=4, inner=like) as outer:
        made.clear()
        outer.update((index, inner()) for index in range(4))
        assert list(outer.values()) == made


CLOSED = """
import os, sys, pyskl
with pyskl.BpfObject.load(sys.argv[1]) as obj, pyskl.NetNS.current() as ns:
    fds = [*(p.fileno() for p in obj.programs.values()), *(m.fileno() for m in obj.maps.values()), ns.fileno()]
    with obj.programs["redirect"].attach() as link, pyskl.Program.from_fd(obj.programs["redirect"]) as again:
        fds += [link.fileno(), again.fileno()]
with open(sys.argv[2], "w") as file:
    print(min(fds), file=file)
"""


def test_no_fd_of_ours_takes_the_place_of_a_standard_stream(netns: pyskl.NetNS, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    with netns.entered():
        command = [sys.executable, "-I", "-c", CLOSED, pyskl.REDIRECT, str(answer)]
        subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True, timeout=60)
    assert int(answer.read_text()) > 2


DAMAGED = """
import sys, pyskl
try:
    pyskl.Program.load(open(sys.argv[1], "rb").read(), constants={"port_min": 1}).close()
except (pyskl.BpfError, TypeError) as error:
    print(type(error).__name__)
"""


def test_a_type_that_points_at_itself(tmp_path: Path) -> None:
    """Every typedef in the BTF of redirect.bpf.o is of itself, among them the one of the constant."""
    elf = bytearray(Path(pyskl.REDIRECT).read_bytes())
    btf = elf.index((0xEB9F).to_bytes(2, sys.byteorder) + b"\x01\x00")  # struct btf_header
    header, types, size = (int.from_bytes(elf[btf + at : btf + at + 4], sys.byteorder) for at in (4, 8, 12))
    at, number, damaged = btf + header + types, 1, 0
    more = {1: 4, 3: 12, 14: 4, 17: 4}  # by kind: what follows struct btf_type; and for each member
    each = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
    while at < btf + header + types + size:
        info = int.from_bytes(elf[at + 4 : at + 8], sys.byteorder)
        kind, members = info >> 24 & 0x1F, info & 0xFFFF
        if kind == 8:  # BTF_KIND_TYPEDEF
            elf[at + 8 : at + 12] = number.to_bytes(4, sys.byteorder)
            damaged += 1
        at += 12 + more.get(kind, 0) + each.get(kind, 0) * members
        number += 1
    assert damaged
    path = tmp_path / "damaged.bpf.o"
    path.write_bytes(elf)
    ran = subprocess.run([sys.executable, "-I", "-c", DAMAGED, path], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout in {"BpfError\n", "TypeError\n"}


def test_a_map_is_pinned_by_pin_alone(bpffs: Path) -> None:
    """LIBBPF_PIN_BY_NAME in an object would leave a pin that nobody knows of."""
    with pyskl.BpfObject.load(support.bpf_object("obj_pinned")) as obj, obj.maps["pyskl_pinned"] as pinned:
        assert not (support.BPFFS / "pyskl_pinned").exists()
        pinned.pin(bpffs / "map")
        pinned.unpin()
        assert not list(bpffs.iterdir())


def test_unpin_leaves_the_pin_of_another(bpffs: Path) -> None:
    path = bpffs / "map"
    with pyskl.ArrayMap.create() as one, pyskl.ArrayMap.create() as other:
        one.pin(path)
        path.unlink()
        other.pin(path)
        one.unpin()
        with pyskl.Map.from_pin(path) as there:
            assert there.info.id == other.info.id


def test_a_refused_socket_is_left_as_it_was() -> None:
    """Asking what is wrong with it must not change it; a Python socket made of its fd would, by its time-out."""
    with socket.socket() as sock, pyskl.SockMap.create(1) as sockets:
        socket.setdefaulttimeout(5)
        try:
            with pytest.raises(pyskl.SocketRefused):
                sockets[0] = sock.fileno()
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(sock.fileno())


@pytest.mark.parametrize("kind", ["SOCKMAP", "SOCKHASH", "DEVMAP", "XSKMAP"])
def test_cap_bpf_alone_makes_no_map_of_the_network(kind: str) -> None:
    def make() -> None:
        pyskl.Map.create(pyskl.MapType[kind], 4, 4, 4)

    with pytest.raises(pyskl.PermissionDenied) as caught:
        privileges.run(make, keep=["CAP_BPF"])
    assert caught.value.missing == ("CAP_NET_ADMIN",)


def test_many_entries_at_once_are_refused_with_the_hint_of_one() -> None:
    with pyskl.HashMap.create(4, 4, 1) as full:
        with pytest.raises(pyskl.BpfError) as one:
            full.update({0: bytes(4), 1: bytes(4)})
        with pytest.raises(pyskl.BpfError) as other:
            full[2] = bytes(4)
        assert one.value.hint == other.value.hint is not None


@pytest.mark.parametrize("number", [1 << 31, -2, 1 << 70])
def test_a_number_that_no_fd_has(number: int) -> None:
    with pyskl.SockMap.create(1) as sockets:
        for do in (
            lambda: sockets.put(0, number),
            lambda: sockets.update({0: number}),
            lambda: pyskl.Map.from_fd(number),
        ):
            with pytest.raises(ValueError, match="file descriptor"):
                do()


def test_a_prefix_longer_than_the_trie() -> None:
    with pyskl.LpmTrie.create(8, 4, 4) as trie:
        for do in (lambda key: trie.put(key, bytes(4)), trie.pop, trie.__getitem__):
            with pytest.raises(ValueError, match="32 bits"):
                do((33).to_bytes(4, sys.byteorder) + bytes(4))


def test_a_queue_has_one_key_which_is_empty() -> None:
    with pyskl.Map.create(pyskl.MapType.QUEUE, 0, 4, 2) as queue:
        queue[b""] = b"one."
        queue[b""] = b"two."
        assert queue[b""] == b"one."
        with pytest.raises(pyskl.BpfError, match="full"):
            queue[b""] = b"more"


def test_an_address_as_getsockname_gives_it() -> None:
    with pyskl.Program.load(pyskl.REDIRECT) as program:
        run = program.test_run("tcp", (support.V6, 80, 0, 0), (support.V6_B, 1, 0, 0))
    assert run.verdict == pyskl.Verdict.PASS


def test_a_number_that_no_name_has_is_one_object() -> None:
    assert pyskl.MapType(12345) is pyskl.MapType(12345)
    assert pyskl.MapType(12345).name == "UNKNOWN_12345"


def test_the_maps_of_a_program_that_another_process_loaded() -> None:
    with pyskl.Program.load(pyskl.REDIRECT) as program, pyskl.Program.from_id(program.info.id) as again:
        assert set(again.maps) == set(program.maps) == {".rodata", "sockets"}
        assert {each.info.id for each in again.maps.values()} == set(program.info.map_ids)
        assert again.maps["sockets"] is again.maps["sockets"] is not program.maps["sockets"]


def test_a_program_whose_maps_can_not_all_be_opened_holds_none() -> None:
    """At the limit of fds: what was opened before is closed, and the next time is as the first."""
    with pyskl.Program.load(pyskl.REDIRECT) as program, pyskl.Program.from_id(program.info.id) as again:
        spare = [os.dup(0)]
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare[0] + 1, limit[1]))
            os.close(spare.pop())  # room for one
            with pytest.raises(OSError, match="EMFILE"):
                again.maps  # noqa: B018
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            for fd in spare:
                os.close(fd)
        assert set(again.maps) == {".rodata", "sockets"}


def in_another_mount_namespace(prepare: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python where the shell has changed what is mounted."""
    command = f'{prepare} && exec {sys.executable} -I -W error -c "$@"'
    words = ["unshare", "--mount", "sh", "-c", command, "sh", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


PERCPU = """
import pyskl
try:
    pyskl.PerCpuArrayMap.create(4, 8, 1)
except pyskl.BpfError as error:
    print(error.call)
"""


def test_what_fails_while_it_is_made_is_closed_once() -> None:
    """Without /sys the number of CPUs can't be told; the fd of the new map must not be closed twice."""
    ran = in_another_mount_namespace("mount -t tmpfs none /sys", PERCPU)
    assert (ran.stdout, ran.stderr) == ("libbpf_num_possible_cpus\n", "")


LEFT = """
import os, sys, pyskl
before = os.listdir("/proc/self/fd")
try:
    pyskl.BpfObject.load(sys.argv[1])
except pyskl.BpfError as error:
    print(error.call, len(os.listdir("/proc/self/fd")) - len(before))
"""


def test_a_load_that_fails_at_its_last_map_closes_all() -> None:
    """Without /sys nobody can tell how large a value of a per-CPU map is."""
    ran = in_another_mount_namespace("mount -t tmpfs none /sys", LEFT, support.bpf_object("obj_maps"))
    assert ran.stdout.split()[1:] == ["0"], ran
    assert not ran.stderr


NO_PROC = """
import sys, pyskl
with pyskl.ArrayMap.create() as one:
    for attempt in (lambda: pyskl.Map.from_fd(one), lambda: pyskl.Map.from_pin(sys.argv[1])):
        try:
            attempt()
        except pyskl.BpfError as error:
            print(type(error).__name__, error.call, error.hint)
"""
DENIED = """
import pyskl
try:
    pyskl.SockMap.create(1)
except pyskl.BpfError as error:
    print(type(error).__name__, error.errno)
"""


def test_without_proc_nothing_is_taken_for_absent(bpffs: Path) -> None:
    with pyskl.ArrayMap.create() as pinned:
        pinned.pin(bpffs / "map")
        ran = in_another_mount_namespace("mount -t tmpfs none /proc", NO_PROC, bpffs / "map")
    assert ran.stdout == "BpfError open mount -t proc proc /proc\n" * 2, ran
    command = f'mount -t tmpfs none /proc && exec setpriv --bounding-set -all {sys.executable} -I -c "$1"'
    ran = subprocess.run(["unshare", "--mount", "sh", "-c", command, "sh", DENIED], capture_output=True, text=True)
    assert ran.stdout == "BpfError 1\n", ran


UNMOUNTED = """
import pyskl
with pyskl.ArrayMap.create() as one:
    for attempt in (lambda: one.pin("/sys/fs/bpf/x"), lambda: pyskl.Map.from_pin("/sys/fs/bpf/x")):
        try:
            attempt()
        except pyskl.BpfError as error:
            print(error.call, "mount -t bpf bpf /sys/fs/bpf" in error.hint)
print(pyskl.features()["bpffs"].reason)
"""


def test_bpffs_that_is_not_mounted_is_named_with_the_command() -> None:
    ran = in_another_mount_namespace("umount /sys/fs/bpf", UNMOUNTED)
    expected = [
        "BPF_OBJ_PIN True",
        "BPF_OBJ_GET True",
        "no BPF file system is at /sys/fs/bpf (mount -t bpf bpf /sys/fs/bpf)",
    ]
    assert ran.stdout.splitlines() == expected, ran
