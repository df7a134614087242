# SPDX-License-Identifier: BSD-2-Clause
"""pyskl.TakeOver, step by step; under load it is in test_restarts.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
from support import V4, ask_tcp, ask_udp, child, kill, tcp_listener, udp_socket

import pyskl

pytestmark = [pytest.mark.needs("sk_lookup", "sockmap", "netns_link"), pytest.mark.slow]


@contextlib.contextmanager
def pinned(ns, bpffs, protocol="tcp"):
    with pyskl.Dispatcher.create(ns, path=bpffs / "dispatcher") as dispatcher:
        dispatcher.bind("web", protocol, "192.0.2.0/24", ports=80)
        yield dispatcher
        dispatcher.unload()


_OBEDIENT = """
import signal
print(flush=True)
signal.sigwait({signal.SIGTERM, signal.SIGUSR1})
"""
_STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
signal.pause()
"""


@contextlib.contextmanager
def process(code):
    started = child("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15, 10})\n" + code)
    try:
        assert started.stdout.readline()
        yield started
    finally:
        kill(started)


def test_new_clients_are_the_successors_from_the_first_line_on(netns, bpffs, tmp_path):
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as old, tcp_listener(netns) as new:
        dispatcher.register("web", old)
        with process(_OBEDIENT) as predecessor:
            (tmp_path / "pid").write_text(f"{predecessor.pid}\n")  # as other programs write it
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=tmp_path / "pid") as place:
                assert place.pid == predecessor.pid
                assert [each.label for each in place.registrations] == ["web"]
                assert ask_tcp(netns, V4, 80, old, new) is new
                assert (tmp_path / "pid").read_text().split()[0] == str(os.getpid())
            assert predecessor.poll() == 0
        with pytest.raises(ValueError, match="this very process"):
            pyskl.TakeOver(dispatcher, "web", new, predecessor=tmp_path / "pid").__enter__()


def test_by_pid_by_another_signal_and_several_sockets(netns, bpffs):
    with (
        pinned(netns, bpffs) as dispatcher,
        tcp_listener(netns) as tcp,
        udp_socket(netns) as udp,
        process(_OBEDIENT) as predecessor,
    ):
        dispatcher.bind("web", "udp", "192.0.2.0/24", ports=80)
        how = {"predecessor": predecessor.pid, "signal": signal.SIGUSR1, "slot": 3}
        with pyskl.TakeOver(dispatcher, "web", tcp, udp, **how) as place:
            assert [each.slot for each in place.registrations] == [3, 3]
            assert ask_tcp(netns, V4, 80, tcp) is tcp
            assert ask_udp(netns, V4, 80, udp) is udp
        assert predecessor.poll() == 0


@pytest.mark.parametrize("content", [None, "", "gone", "reused"])
def test_where_there_is_no_predecessor(netns, bpffs, tmp_path, content):
    path = tmp_path / "pid"
    with process(_OBEDIENT) as other:
        pid = other.pid
        if content == "reused":  # the number is another process's by now
            path.write_text(f"{pid}\n1\n")
        elif content == "gone":
            other.kill()
            other.wait()
            path.write_text(f"{pid}\n")
        elif content is not None:
            path.write_text(content)
        with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new:
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=path) as place:
                assert place.pid is None
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=None) as place:
                assert place.pid is None
        assert path.read_text().split()[0] == str(os.getpid())
        assert content != "reused" or other.poll() is None


def test_one_that_does_not_go_in_time(netns, bpffs):
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new, process(_STUBBORN) as predecessor:
        with pytest.raises(TimeoutError, match=str(predecessor.pid)):
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=predecessor.pid, timeout=0.05):
                pass

        async def main():
            async with pyskl.TakeOver(dispatcher, "web", new, predecessor=predecessor.pid, timeout=0.05):
                pass

        with pytest.raises(TimeoutError, match=str(predecessor.pid)):
            asyncio.run(main())
        assert ask_tcp(netns, V4, 80, new) is new


def test_what_fails_is_not_held_up_by_the_predecessor_and_leaves_it_alone(netns, bpffs, tmp_path):
    path = tmp_path / "pid"
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new, process(_STUBBORN) as predecessor:
        with pytest.raises(LookupError):
            with pyskl.TakeOver(dispatcher, "web", new, predecessor=predecessor.pid, timeout=None):
                raise LookupError
        path.write_text("not a pid")
        with pytest.raises(ValueError, match="no pid"):
            pyskl.TakeOver(dispatcher, "web", new, predecessor=path).__enter__()
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as new, process(_OBEDIENT) as predecessor:
        path.write_text(f"{predecessor.pid}")
        new.close()
        with pytest.raises(ValueError):
            pyskl.TakeOver(dispatcher, "web", new, predecessor=path).__enter__()
        assert path.read_text() == f"{predecessor.pid}"
        assert predecessor.poll() is None
        with pytest.raises(ValueError, match="no socket"):
            pyskl.TakeOver(dispatcher, "web", predecessor=path)
        with pytest.raises(ValueError, match="negative"):
            pyskl.TakeOver(dispatcher, "web", 3, predecessor=path, timeout=-1)


def test_two_that_want_the_same_place_at_once(netns, bpffs, tmp_path):
    path = tmp_path / "pid"
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as one, tcp_listener(netns) as other:
        with pyskl.TakeOver(dispatcher, "web", one, predecessor=path):
            with pytest.raises(pyskl.Busy) as error:
                pyskl.TakeOver(dispatcher, "web", other, predecessor=path, timeout=0.05).__enter__()
            assert error.value.pid == os.getpid()
            assert ask_tcp(netns, V4, 80, one, other) is one
