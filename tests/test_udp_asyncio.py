# SPDX-License-Identifier: BSD-2-Clause
"""pyskl.udp.create_datagram_endpoint: asyncio's interface, with replies from where the question was sent to."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import gc
import pickle
import random
import socket

import pytest
from support import (
    IPV6_FREEBIND,
    TIMEOUT,
    UDP_GRO,
    V4,
    certificate,
    family_of,
    ip,
    needs_coalescing,
    new_socket,
    send_together,
    steered,
    udp_socket,
)

import pyskl
from pyskl.udp import create_datagram_endpoint

pytestmark = pytest.mark.needs("sk_lookup", "sockmap", "netns_link")


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def runner(request):
    if request.param == "asyncio":
        return asyncio.run
    uvloop = pytest.importorskip("uvloop", exc_type=ImportError)
    uvloop.run(asyncio.sleep(0))  # what its first loop opens, it keeps for good
    return uvloop.run


@pytest.fixture
def run(runner, netns):
    """Run a coroutine on an event loop, inside the namespace."""

    def bounded(coroutine):
        with netns.entered():
            return runner(asyncio.wait_for(coroutine, 60))

    return bounded


class Echo(asyncio.DatagramProtocol):
    """Answers with what came, and keeps what happens."""

    def __init__(self):
        self.events = []
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        self.events.append("made")

    def datagram_received(self, data, addr):
        self.events.append((data, addr))
        self.transport.sendto(data, addr)

    def error_received(self, error):
        self.events.append(error)

    def pause_writing(self):
        self.events.append("pause")

    def resume_writing(self):
        self.events.append("resume")

    def connection_lost(self, error):
        self.events.append("lost")
        self.lost.set_result(error)


@contextlib.asynccontextmanager
async def serving(ns, bound="127.0.0.1", port=0, factory=Echo, **how):
    with contextlib.ExitStack() as stack:
        sock = udp_socket(ns, bound, port, v6only=False)
        transport, protocol = await create_datagram_endpoint(factory, sock, **how)
        try:
            stack.enter_context(steered(ns, sock))
            yield transport, protocol
        finally:
            transport.close()
            await protocol.lost


@contextlib.contextmanager
def asker(ns, host="198.51.100.1"):
    with new_socket(ns, family_of(host), socket.SOCK_DGRAM) as sock:
        if ":" in host:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        sock.bind((host, 0))
        sock.setblocking(False)
        yield sock


async def received(sock):
    """loop.sock_recvfrom(), which 3.10 has not."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.add_reader(sock, lambda: future.done() or future.set_result(sock.recvfrom(70000)))
    try:
        return await asyncio.wait_for(future, TIMEOUT)
    finally:
        loop.remove_reader(sock)


async def until(condition):
    """For what tells nobody when it comes."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


CASES = pytest.mark.parametrize(
    ("prefix", "client", "bound"),
    [
        ("192.0.2.", "198.51.100.1", "127.0.0.1"),
        ("2001:db8::", "2001:db8:ffff::1", "::1"),
        ("192.0.2.", "198.51.100.1", "::"),
        ("2001:db8::", "2001:db8:ffff::1", "::"),
    ],
    ids=["v4", "v6", "v4 over dual-stack", "v6 over dual-stack"],
)


@CASES
def test_a_protocol_that_knows_nothing_of_it_answers_from_where_it_was_asked(run, netns, prefix, client, bound):
    async def main():
        chosen = random.Random(3)
        async with serving(netns, bound, 5353, max_reply_sockets=50) as (_, protocol):
            with asker(netns, client) as sock:
                for _ in range(200):
                    asked = f"{prefix}{chosen.randrange(1, 99)}", chosen.choice([5353, chosen.randrange(1, 65536)])
                    sock.sendto(b"?", asked)
                    data, source = await received(sock)
                    assert (data, source[:2]) == (b"?", asked)
                    assert protocol.events[-1][1].destination == asked

    run(main())


def test_the_address_is_a_tuple_as_asyncios_that_carries_the_destination(run, netns):
    async def main():
        async with serving(netns, "::") as (transport, protocol):
            with asker(netns) as sock:
                sock.sendto(b"?", (V4, 80))
                await received(sock)
                made, (data, addr) = protocol.events
                plain = ("::ffff:198.51.100.1", sock.getsockname()[1], 0, 0)
                assert (made, data, addr, hash(addr)) == ("made", b"?", plain, hash(plain))
                assert isinstance(addr, tuple)
                assert addr.destination == (V4, 80)
                for same in (copy.copy(addr), copy.deepcopy(addr), pickle.loads(pickle.dumps(addr))):
                    assert (same, same.destination) == (addr, addr.destination)
                    transport.sendto(b"!", same)
                    assert await received(sock) == (b"!", (V4, 80))
                transport.sendto(b"from the socket itself", plain)
                _, source = await received(sock)
                assert source[1] == transport.get_extra_info("sockname")[1]

    run(main())


def test_what_a_transport_tells(run, netns):
    async def main():
        sock = udp_socket(netns)
        name = sock.getsockname()
        transport, protocol = await create_datagram_endpoint(Echo, sock)
        assert isinstance(transport, asyncio.DatagramTransport)
        assert protocol.events == ["made"]
        assert transport.get_extra_info("sockname") == name
        assert transport.get_extra_info("socket").fileno() == sock.fileno()
        assert transport.get_extra_info("peername") is None
        assert transport.get_extra_info("other", "default") == "default"
        assert transport.get_protocol() is protocol
        assert transport.get_write_buffer_size() == 0
        assert transport.get_write_buffer_limits() == (16384, 65536)
        transport.set_write_buffer_limits(low=100)
        assert transport.get_write_buffer_limits() == (100, 400)
        with pytest.raises(ValueError, match="high"):
            transport.set_write_buffer_limits(high=1, low=2)
        assert not transport.is_closing()
        assert "open" in repr(transport)
        other = Echo()
        transport.set_protocol(other)
        transport.close()
        assert transport.is_closing()
        assert "closing" in repr(transport)
        assert await other.lost is None
        assert sock.fileno() == -1
        assert "closed" in repr(transport)
        transport.close()
        transport.abort()
        transport.sendto(b"dropped", name)
        assert other.events == ["lost"]

    run(main())


def test_what_sendto_takes(run, netns):
    async def main():
        async with serving(netns) as (transport, _):
            with asker(netns) as sock:
                to = sock.getsockname()
                for data in (b"x", bytearray(b"x"), memoryview(b"x"), b""):
                    transport.sendto(data, to)
                    assert (await received(sock))[0] == bytes(data)
                for data in ("x", 5, None):
                    with pytest.raises(TypeError):
                        transport.sendto(data, to)
                for wrong in (None, ("nowhere.example", 1), (V4, 99999)):
                    with pytest.raises(ValueError, match=r"address|port"):
                        transport.sendto(b"x", wrong)

    run(main())


def test_all_of_what_came_coalesced_is_handed_on(run, netns):
    """UDP_GRO: more than are received at once, by one event."""

    async def main():
        async with serving(netns) as (transport, protocol):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
            with asker(netns) as sock:
                parts = [b"%02d" % number for number in range(60)]
                send_together(sock, (V4, 80), b"".join(parts), 2)
                for part in parts:
                    assert await received(sock) == (part, (V4, 80))
            assert [event[0] for event in protocol.events[1:]] == parts

    needs_coalescing(netns)
    run(main())


def test_errors_go_to_the_protocol(run, netns):
    """Of the socket's queue, of sending, and of a place that nothing can be sent from."""

    async def main():
        with udp_socket(netns) as gone:
            nobody = gone.getsockname()
        async with serving(netns) as (transport, protocol):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
            transport.sendto(b"?", nobody)
            await until(lambda: len(protocol.events) == 2)
            transport.sendto(bytes(70000), nobody)
            with asker(netns) as sock:
                sock.sendto(b"?", (V4, 80))
                _, addr = (await received(sock)), protocol.events[-1][1]
                addr.destination = "192.0.3.1", 80
                transport.sendto(b"!", addr)
            errors = [event for event in protocol.events if isinstance(event, OSError)]
        assert [error.errno for error in errors] == [errno.ECONNREFUSED, errno.EMSGSIZE, errno.EADDRNOTAVAIL]

    run(main())


def test_a_protocol_that_fails_is_reported_and_what_else_came_is_not_lost(run, netns):
    class Fails(Echo):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            if data == b"1":
                raise LookupError(data)

    async def main():
        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        async with serving(netns, factory=Fails) as (transport, protocol):
            with asker(netns) as sock:
                for number in range(3):
                    sock.sendto(b"%d" % number, (V4, 80))
                for number in range(3):
                    assert (await received(sock))[0] == b"%d" % number
        assert [type(context["exception"]) for context in reported] == [LookupError]
        assert reported[0]["transport"] is transport
        assert reported[0]["protocol"] is protocol

    run(main())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_after_closing_nothing_more_is_received(run, netns, how):
    class Once(Echo):
        def datagram_received(self, data, addr):
            super().datagram_received(data, addr)
            getattr(self.transport, how)()

    async def main():
        async with serving(netns, factory=Once) as (_, protocol):
            with asker(netns) as sock:
                for number in range(3):
                    sock.sendto(b"%d" % number, (V4, 80))
                assert (await received(sock))[0] == b"0"
                await protocol.lost
        assert [event[0] for event in protocol.events if isinstance(event, tuple)] == [b"0"]

    run(main())


def test_a_protocol_may_close_at_once(run, netns):
    class Shy(Echo):
        def connection_made(self, transport):
            super().connection_made(transport)
            transport.close()

    async def main():
        sock = udp_socket(netns)
        transport, protocol = await create_datagram_endpoint(Shy, sock)
        await protocol.lost
        assert transport.is_closing()
        assert sock.fileno() == -1

    run(main())


def test_one_that_is_cancelled_leaves_nothing(run, netns):
    async def main():
        sock = udp_socket(netns)
        task = asyncio.ensure_future(create_datagram_endpoint(Echo, sock))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sock.fileno() == -1

    run(main())


def test_a_socket_that_can_be_none_is_refused_and_left_alone(run, netns):
    async def main():
        with new_socket(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            with pytest.raises(pyskl.BadSocket):
                await create_datagram_endpoint(Echo, sock)
            assert sock.fileno() >= 0

    run(main())


def test_one_that_is_forgotten_warns(run, netns):
    async def main():
        with pytest.warns(ResourceWarning):
            transport, _ = await create_datagram_endpoint(Echo, udp_socket(netns))
            loop = asyncio.get_running_loop()
            loop.remove_reader(transport.get_extra_info("socket").fileno())  # which the loop holds it by
            del transport, _
            await asyncio.sleep(0)
            gc.collect()

    run(main())


# -- flow control --------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(netns):
    """A way out on which nothing leaves, until it is called: a neighbour that does not say where it is."""
    ip(
        netns,
        "link add wide type veth peer name far",
        "link set wide up",
        "link set far up",
        "address add 203.0.113.1/24 dev wide",
        "route del local 203.0.113.0/24 dev lo",
    )
    return lambda: ip(netns, "neighbour replace 203.0.113.9 lladdr 02:00:00:00:00:01 nud permanent dev wide")


class Destination(tuple):  # noqa: SLOT001
    destination = None


@contextlib.asynccontextmanager
async def blocked(netns, port):
    """A transport that can't send any more, to an address that is replied to from this port."""
    sock = udp_socket(netns, "203.0.113.1", 5353)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    transport, protocol = await create_datagram_endpoint(Echo, sock)
    to = Destination(("203.0.113.9", 9))
    to.destination = "203.0.113.1", port
    transport.set_write_buffer_limits(high=5000, low=2000)
    while "pause" not in protocol.events:
        transport.sendto(bytes(1000), to)
    assert transport.get_write_buffer_size() == 5 * 1008
    try:
        yield transport, protocol, to
    finally:
        transport.abort()
        await protocol.lost


PORTS = pytest.mark.parametrize("port", [5353, 80], ids=["own port", "another port"])


@PORTS
def test_writing_is_paused_and_resumed(run, netns, narrow, port):
    async def main():
        async with blocked(netns, port) as (transport, protocol, to):
            for _ in range(10):
                transport.sendto(bytes(1000), to)
            assert protocol.events == ["made", "pause"]
            narrow()
            await until(lambda: "resume" in protocol.events)
            assert transport.get_write_buffer_size() <= 2000
            await until(lambda: not transport.get_write_buffer_size())
            transport.sendto(b"at once", to)
            assert transport.get_write_buffer_size() == 0
            assert protocol.events == ["made", "pause", "resume"]

    run(main())


@PORTS
def test_close_sends_what_is_kept_first(run, netns, narrow, port):
    async def main():
        async with blocked(netns, port) as (transport, protocol, _):
            transport.close()
            assert transport.is_closing()
            for _ in range(10):
                await asyncio.sleep(0)
            assert "lost" not in protocol.events
            narrow()
            assert await protocol.lost is None
            assert transport.get_write_buffer_size() == 0

    run(main())


@PORTS
def test_abort_drops_what_is_kept(run, netns, narrow, port):
    async def main():
        async with blocked(netns, port) as (transport, protocol, _):
            transport.abort()
            assert transport.get_write_buffer_size() == 0
            assert await protocol.lost is None

    run(main())


# -- QUIC ----------------------------------------------------------------------------------------------------------


@pytest.mark.portable
@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "::"])
def test_aioquics_own_server_and_client_over_a_prefix_and_a_range_of_ports(run, netns, tmp_path, bound):
    """Both as they are. A client ignores what does not come from where it sent to."""
    pytest.importorskip("aioquic")
    from aioquic.asyncio.client import connect
    from aioquic.asyncio.protocol import QuicConnectionProtocol
    from aioquic.asyncio.server import QuicServer
    from aioquic.quic.configuration import QuicConfiguration

    cert, key = certificate(tmp_path)
    serves = QuicConfiguration(is_client=False, alpn_protocols=["echo"])
    serves.load_cert_chain(cert, key)
    payload = random.Random(5).randbytes(100_000)
    hosts = {"127.0.0.1": ["192.0.2.7"], "::1": ["2001:db8::7"], "::": ["192.0.2.8", "2001:db8::8"]}[bound]

    def echo(reader, writer):
        async def copy_all():
            writer.write(await reader.read())
            writer.write_eof()

        tasks.add(asyncio.ensure_future(copy_all()))

    class Client(QuicConnectionProtocol):
        def datagram_received(self, data, addr):
            heard.add((addr[0].removeprefix("::ffff:"), addr[1]))
            super().datagram_received(data, addr)

    tasks, heard = set(), set()

    async def ask(host, port):
        configuration = QuicConfiguration(is_client=True, alpn_protocols=["echo"], server_name="localhost")
        configuration.load_verify_locations(cert)
        async with connect(host, port, configuration=configuration, create_protocol=Client) as client:
            reader, writer = await client.create_stream()
            writer.write(payload)
            writer.write_eof()
            assert await reader.read() == payload

    async def main():
        sock = udp_socket(netns, bound, 4433, v6only=False)
        transport, server = await create_datagram_endpoint(
            lambda: QuicServer(configuration=serves, stream_handler=echo), sock
        )
        with steered(netns, sock, port_min=4000, port_max=5000):
            asked = {(host, port) for host in hosts for port in (4000, 4433, 4999)}
            await asyncio.gather(*(ask(*each) for each in asked))
            assert heard == asked
            server.close()
            await until(transport.is_closing)
            await asyncio.gather(*tasks)

    run(main())
