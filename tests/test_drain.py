# SPDX-License-Identifier: BSD-2-Clause
"""pyskl.drain: nobody who was under way to the old listener is lost, whatever the daemon is written in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import selectors
import socket
import threading
import time

import privileges
import pytest
from support import (
    LOAD,
    V4,
    V6,
    Load,
    bpf_object,
    cookie,
    eventually,
    fds,
    new_socket,
    readable,
    steered,
    sysctl,
    tcp_client,
    tcp_listener,
    udp_socket,
    unavailable,
)

import pyskl
from pyskl.sockets import netns_cookie_of

pytestmark = pytest.mark.needs("sk_lookup", "sockmap", "netns_link")
DEFER = socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT  # a handshake that waits for data


def served(connection):
    with connection, contextlib.suppress(OSError):
        connection.sendall(b"served")


class Generations:
    """Listeners that take the slot one after the other, while clients ask; `LOAD` of them in all."""

    def __init__(self, ns, stack):
        self.ns = ns
        self._program = stack.enter_context(steered(ns))
        self.count = 0
        self.drained = 0
        self._served = asyncio.Semaphore(0)
        self.new()
        stack.callback(lambda: self.listener.close())
        self._load = stack.enter_context(Load(ns, LOAD))

    def new(self):
        listener = tcp_listener(self.ns)
        self._program.maps["sockets"][0] = listener
        self.count += 1
        self.listener = listener

    @property
    def wanted(self):
        return self._load.running

    async def serve(self, _, writer):
        """Be what asyncio.start_server() calls."""
        with contextlib.suppress(OSError):
            writer.write(b"served")
            await writer.drain()
        writer.close()
        self._served.release()

    async def some_were_served(self):
        """Wait until asyncio's server had a hundred clients, or none came any more."""
        with contextlib.suppress(asyncio.TimeoutError):
            for _ in range(100):
                await asyncio.wait_for(self._served.acquire(), 0.1)

    def verdict(self):
        self.listener.close()
        assert self._load.outcomes() == {"served": LOAD}
        assert self.count > LOAD / 4000
        assert self.drained > self.count / 8  # the queues were not empty


@pytest.fixture
def generations(netns):
    with contextlib.ExitStack() as stack:
        yield Generations(netns, stack)


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [None, 10.0], ids=["blocking", "with a time-out"])
def test_generations_of_blocking_servers_lose_nobody(generations, timeout):
    while generations.wanted:
        old = generations.listener
        old.settimeout(timeout or 10)
        for _ in range(100):
            if readable(old, timeout=0.01):
                served(old.accept()[0])
        generations.new()
        for connection, _ in pyskl.drain(old):
            served(connection)
            generations.drained += 1
        old.close()
    generations.verdict()


@pytest.mark.slow
def test_generations_of_servers_that_select_lose_nobody(generations):
    """One loop over all; the old listener is drained in it."""
    with selectors.DefaultSelector() as selector:
        while generations.wanted:
            old = generations.listener
            old.setblocking(False)
            selector.register(old, selectors.EVENT_READ)
            for _ in range(100):
                for key, _ in selector.select(0.01):
                    with contextlib.suppress(BlockingIOError):
                        served(key.fileobj.accept()[0])
            selector.unregister(old)
            generations.new()
            for connection, _ in pyskl.drain(old):
                served(connection)
                generations.drained += 1
            old.close()
    generations.verdict()


@pytest.mark.slow
def test_generations_of_asyncio_servers_lose_nobody(generations):
    async def main():
        loop = asyncio.get_running_loop()
        draining = set()

        async def retire(server):
            old = server.sockets[0]
            async for connection, _ in pyskl.drain(old):
                assert connection.gettimeout() == 0
                await loop.sock_sendall(connection, b"served")
                connection.close()
                generations.drained += 1
            server.close()

        while generations.wanted:
            generations.listener.setblocking(False)
            server = await asyncio.start_server(generations.serve, sock=generations.listener)
            await generations.some_were_served()
            generations.new()
            loop.remove_reader(server.sockets[0].fileno())  # the rest is the drain's
            task = asyncio.ensure_future(retire(server))
            draining.add(task)
        await asyncio.gather(*draining)

    asyncio.run(main())
    generations.verdict()


@pytest.mark.slow
def test_generations_of_asyncio_servers_that_go_on_accepting_lose_nobody(generations):
    """The server itself accepts what is left: the drain takes what it does not get, and tells when to close."""

    async def retire(server):
        async for connection, _ in pyskl.drain(server.sockets[0]):
            served(connection)
        server.close()

    async def main():
        draining = set()
        while generations.wanted:
            generations.listener.setblocking(False)
            server = await asyncio.start_server(generations.serve, sock=generations.listener)
            await generations.some_were_served()
            generations.new()
            draining.add(asyncio.ensure_future(retire(server)))
        await asyncio.gather(*draining)

    asyncio.run(main())
    generations.drained = generations.count + 1  # whoever of the two had them
    generations.verdict()


# -- what is handed out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "bound"), [(V4, "127.0.0.1"), (V6, "::1"), (V4, "::"), (V6, "::")])
def test_what_the_accept_queue_holds_is_handed_out_as_accept_does(netns, host, bound):
    with tcp_listener(netns, bound, v6only=False) as old, steered(netns, old), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(tcp_client(netns, host, 80)) for _ in range(5)]
        drained = list(pyskl.drain(old))
        assert len(drained) == 5
        for client, (connection, address) in zip(clients, drained, strict=True):
            with connection:
                assert type(connection) is socket.socket
                assert connection.getpeername() == address
                assert address[1] == client.getsockname()[1]
                assert connection.gettimeout() is None
                connection.sendall(b"!")
                assert client.recv(1) == b"!"


@pytest.mark.parametrize(("host", "bound"), [(V4, "127.0.0.1"), (V6, "::1"), (V4, "::")])
def test_handshakes_that_are_under_way_are_waited_for_and_later_ones_not(netns, host, bound):
    with (
        tcp_listener(netns, bound, v6only=False) as old,
        tcp_listener(netns, bound, v6only=False) as new,
        steered(netns, old) as program,
    ):
        old.setsockopt(*DEFER, 5)
        new.setsockopt(*DEFER, 5)
        with tcp_client(netns, host, 80) as first, tcp_client(netns, host, 80) as second:
            program.maps["sockets"].update(dict.fromkeys([0, 2] if ":" in bound else [0], new))
            drain = pyskl.drain(old, timeout=60)
            first.send(b"?")
            with next(drain)[0] as connection:
                assert connection.recv(1) == b"?"
            with tcp_client(netns, host, 80) as later:  # of the successor, and never finished
                threading.Timer(0.05, second.send, [b"?"]).start()
                with next(drain)[0] as connection:
                    assert connection.recv(1) == b"?"
                assert list(drain) == []
                assert list(drain) == []
                later.close()


@pytest.mark.needs("bpf_loop")
def test_a_client_that_is_in_no_queue_yet_is_waited_for(netns):
    """Its SYN has been looked up, before the overwrite: what the grace period is for."""
    with (
        tcp_listener(netns) as old,
        tcp_listener(netns) as new,
        pyskl.Program.load(bpf_object("slow")) as program,
        program.attach(netns),
    ):
        program.maps["sockets"][0] = old
        client = new_socket(netns, socket.AF_INET, socket.SOCK_STREAM)
        thread = threading.Thread(target=client.connect, args=[(V4, 80)])
        with client:
            thread.start()
            assert eventually(lambda: any(program.maps["found"][0]))
            program.maps["sockets"][0] = new
            ((connection, address),) = pyskl.drain(old)
            thread.join()
            with connection:
                assert address == client.getsockname()


def test_a_client_that_is_gone_is_waited_for_until_the_time_out(netns):
    with tcp_listener(netns) as old, steered(netns, old):
        old.setsockopt(*DEFER, 30)
        with tcp_client(netns, V4, 80):
            began = time.monotonic()
            assert list(pyskl.drain(old, timeout=0.2)) == []
            assert time.monotonic() - began >= 0.2
            with tcp_client(netns, V4, 80) as other:
                other.send(b"?")
                (accepted,) = pyskl.drain(old, timeout=0)  # what there is now
                accepted[0].close()


def test_who_is_told_of_no_handshakes_waits_until_the_time_out(netns):
    """They are of another namespace, which a process without privileges may not look into."""

    def drained():
        began = time.monotonic()
        accepted = list(pyskl.drain(old, timeout=0.2))
        for connection, _ in accepted:
            connection.close()
        return len(accepted), time.monotonic() - began >= 0.2

    with tcp_listener(netns) as old, steered(netns, old), tcp_client(netns, V4, 80):
        if not netns_cookie_of(old):  # by which it sees that it is elsewhere
            unavailable("SO_NETNS_COOKIE", "Protocol not available")
        assert privileges.run(drained) == (1, True)


def test_one_that_goes_on_getting_clients_ends_too(netns):
    """As where nobody took its place."""
    with tcp_listener(netns) as old, steered(netns, old), tcp_client(netns, V4, 80):
        old.setsockopt(*DEFER, 30)
        with tcp_client(netns, V4, 80), contextlib.ExitStack() as stack:
            count = 0
            for connection, _ in pyskl.drain(old, timeout=0.3):
                connection.close()
                client = stack.enter_context(tcp_client(netns, V4, 80))
                client.send(b"?")
                count += 1
            assert count


def test_a_connection_that_was_reset_in_the_queue_is_handed_out_as_accept_does(netns):
    with tcp_listener(netns) as old, steered(netns, old):
        with tcp_client(netns, V4, 80) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        (accepted,) = pyskl.drain(old)
        with accepted[0] as connection, pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_where_fds_run_out_the_error_is_raised_and_the_next_goes_on(netns):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with tcp_listener(netns) as old, steered(netns, old), tcp_client(netns, V4, 80), tcp_client(netns, V4, 80):
        for drain in (pyskl.drain(old, timeout=0),):
            next(drain)[0].close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(fd for fd, _ in fds()), limits[1]))
            try:
                with contextlib.ExitStack() as stack:
                    with contextlib.suppress(OSError):
                        while True:
                            stack.callback(os.close, os.dup(0))
                    for _ in range(2):
                        with pytest.raises(OSError) as error:
                            next(drain)
                        assert error.value.errno == errno.EMFILE
                next(drain)[0].close()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert list(drain) == []


# -- the listener --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 0, 1.5])
def test_the_listener_is_left_as_it_was(netns, timeout):
    with tcp_listener(netns) as old, steered(netns, old), tcp_client(netns, V4, 80):
        old.settimeout(timeout)
        for connection, _ in pyskl.drain(old):
            connection.close()
            assert old.gettimeout() == 0
        assert old.gettimeout() == timeout
        assert os.get_blocking(old.fileno()) == (timeout is None)
        drain = pyskl.drain(old)
        with tcp_client(netns, V4, 80):
            next(drain)[0].close()
        del drain  # in the middle
        assert old.gettimeout() == timeout


def test_an_fd_or_an_object_that_has_one_will_do(netns):
    class Holder:
        def fileno(self):
            return old.fileno()

    with tcp_listener(netns) as old, steered(netns, old):
        for form in (old.fileno(), Holder(), asyncio.trsock.TransportSocket(old)):
            with tcp_client(netns, V4, 80) as client:
                ((connection, address),) = pyskl.drain(form)
                with connection:
                    assert address == client.getsockname()
        assert os.get_blocking(old.fileno()) is False  # as support made it


def test_what_can_not_be_drained(netns):
    with (
        tcp_listener(netns) as listener,
        udp_socket(netns) as udp,
        tcp_client(netns, *listener.getsockname()) as connected,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        for sock in (udp, connected, unix):
            with pytest.raises(pyskl.BadSocket, match="listens"):
                pyskl.drain(sock)
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="time-out"):
                pyskl.drain(listener, timeout=wrong)
        with pytest.raises(TypeError):
            pyskl.drain("listener")
    with pytest.raises(ValueError, match="closed"):
        pyskl.drain(listener)


def test_syn_cookies_leave_no_handshake_to_wait_for(netns):
    """As the documentation warns."""
    sysctl(netns, "ipv4/tcp_syncookies", 2)
    with tcp_listener(netns) as old, steered(netns, old), tcp_client(netns, V4, 80) as client:
        assert cookie(client)
        ((connection, _),) = pyskl.drain(old)
        connection.close()
