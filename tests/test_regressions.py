# SPDX-License-Identifier: BSD-2-Clause
"""What was found wrong once, and must not come back: signals, races, closed standard streams, large values."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
            for _ in range(2000):
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
    btf = elf.index(b"\x9f\xeb\x01\x00")  # struct btf_header
    header, types, size = (int.from_bytes(elf[btf + at : btf + at + 4], "little") for at in (4, 8, 12))
    at, number, damaged = btf + header + types, 1, 0
    more = {1: 4, 3: 12, 14: 4, 17: 4}  # by kind: what follows struct btf_type; and for each member
    each = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
    while at < btf + header + types + size:
        info = int.from_bytes(elf[at + 4 : at + 8], "little")
        kind, members = info >> 24 & 0x1F, info & 0xFFFF
        if kind == 8:  # BTF_KIND_TYPEDEF
            elf[at + 8 : at + 12] = number.to_bytes(4, "little")
            damaged += 1
        at += 12 + more.get(kind, 0) + each.get(kind, 0) * members
        number += 1
    assert damaged
    path = tmp_path / "damaged.bpf.o"
    path.write_bytes(elf)
    ran = subprocess.run([sys.executable, "-I", "-c", DAMAGED, path], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout in {"BpfError\n", "TypeError\n"}
