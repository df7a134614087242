# SPDX-License-Identifier: BSD-2-Clause
"""pyskl.TakeOver, step by step; under load it is in test_restarts.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket

import pytest
from support import V4, ask_tcp, ask_udp, child, cookie, kill, tcp_listener, udp_socket

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


def test_more_sockets_of_a_kind_take_over_the_next_slots(netns, bpffs):
    with pinned(netns, bpffs) as dispatcher, contextlib.ExitStack() as stack:
        old = [stack.enter_context(tcp_listener(netns)) for _ in range(3)]
        new = [stack.enter_context(tcp_listener(netns)) for _ in range(3)]
        udp = stack.enter_context(udp_socket(netns))
        dispatcher.register_all("web", *old, slot=61)
        with pyskl.TakeOver(dispatcher, "web", new[0], udp, *new[1:], new[0], predecessor=None, slot=61) as place:
            assert [(each.slot, each.cookie) for each in place.registrations] == [
                (61, cookie(new[0])),
                (61, cookie(udp)),
                (62, cookie(new[1])),
                (63, cookie(new[2])),
            ]
            assert place.registrations[:1] + place.registrations[2:] + place.registrations[1:2] == dispatcher.sockets()
            assert len(dispatcher.maps["sockets"].items()) == 4


@contextlib.contextmanager
def refusing(ns, dispatcher, how):
    """A socket that can't be registered, and the error."""
    with tcp_listener(ns, reuseport=True) as sock, contextlib.ExitStack() as stack:
        if how == "it is shut down":
            sock.shutdown(socket.SHUT_RDWR)
            yield sock, pyskl.BadSocket
        elif how == "no room":  # but for one
            while len(dispatcher.sockets()) < dispatcher.status().max_sockets - 1:
                other = stack.enter_context(tcp_listener(ns))
                dispatcher.register("other", other, slot=len(dispatcher.sockets("other")))
            yield sock, pyskl.LimitReached
        else:  # by the kernel, which has it in a map that bears no other
            taken = stack.enter_context(pyskl.ReuseportSockArray.create(1))
            taken[0] = sock
            yield sock, pyskl.BpfError


@pytest.mark.parametrize("how", ["it is shut down", "no room", "by the kernel"])
def test_one_that_is_refused_keeps_all_from_taking_over(netns, bpffs, tmp_path, how):
    """In whatever order they are given, and so whether another is in its slot, or none."""
    path = tmp_path / "pid"
    with (
        pyskl.Dispatcher.create(netns, path=bpffs / "dispatcher", max_sockets=4) as dispatcher,
        tcp_listener(netns) as old,
        udp_socket(netns) as old_udp,
        tcp_listener(netns) as new,
        udp_socket(netns) as new_udp,
        tcp_listener(netns, "::1") as another,
        process(_OBEDIENT) as predecessor,
    ):
        for protocol in ("tcp", "udp"):
            dispatcher.bind("web", protocol, "192.0.2.0/24", ports=80)
        dispatcher.register_all("web", old, old_udp)
        path.write_text(f"{predecessor.pid}")
        with refusing(netns, dispatcher, how) as (bad, error):
            before = dispatcher.sockets()
            for socks in itertools.permutations([new, new_udp, another, bad]):
                with pytest.raises(error):
                    pyskl.TakeOver(dispatcher, "web", *socks, predecessor=path).__enter__()
                assert dispatcher.sockets() == before
                assert sorted(dispatcher.maps["sockets"].values()) == sorted(each.cookie for each in before)
            assert ask_tcp(netns, V4, 80, old, new) is old
            assert ask_udp(netns, V4, 80, old_udp, new_udp) is old_udp
            assert path.read_text() == f"{predecessor.pid}"
            assert predecessor.poll() is None
        dispatcher.unload()


def test_more_sockets_than_there_are_slots(netns, bpffs):
    with pinned(netns, bpffs) as dispatcher, tcp_listener(netns) as one, tcp_listener(netns) as other:
        with pytest.raises(ValueError, match="more slots"):
            dispatcher.register_all("web", one, other, slot=63)
        with pytest.raises(ValueError, match="no socket"):
            dispatcher.register_all("web")
        assert dispatcher.sockets() == ()


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
