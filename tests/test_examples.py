# SPDX-License-Identifier: BSD-2-Clause
"""Every worked example of docs/examples, as it stands, asked by a client of its kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import TIMEOUT, certificate, eventually, new_socket, tcp_client

import pyskl

pytestmark = [pytest.mark.needs("sk_lookup", "sockmap", "netns_link"), pytest.mark.slow]
EXAMPLES = Path(__file__).parent.parent / "docs/examples"
V4, V6 = "192.0.2.0/24", "2001:db8::/64"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@contextlib.contextmanager
def example(ns, name, *arguments):
    """An example that serves, in a process; ended as a service is ended."""
    command = [sys.executable, "-I", "-W", "error", EXAMPLES / f"{name}.py", *arguments]
    with ns.entered():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout.readline().startswith("serving")
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def asked(ns, host, port, question=b""):
    """What a TCP server says."""
    with tcp_client(ns, host, port) as client:
        client.sendall(question)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(4096), b"")).decode()


def test_each_fits_on_one_screen():
    assert {path.name: length for path in EXAMPLES.iterdir() if (length := path.read_text().count("\n")) > 55} == {}


def test_the_examples_are_those_that_are_tested_here():
    here = Path(__file__).read_text()
    assert [path.stem for path in EXAMPLES.iterdir() if f'"{path.stem}"' not in here] == []


SNIPPETS = [
    pytest.param(snippet, id=f"{name}-{number}")
    for name in ("udp", "restarts")
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (EXAMPLES.parent / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_snippets_of_the_documents_run(netns, bpffs, tmp_path, snippet):
    snippet = snippet.replace("/sys/fs/bpf/", f"{bpffs}/")
    command = [sys.executable, "-I", "-W", "error", "-c", snippet]
    with netns.entered():
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert (ran.returncode, ran.stderr) == (0, "")
    if "client.recvfrom" in snippet:
        assert ran.stdout.endswith("(b'HELLO', ('192.0.2.7', 53))\n")


def test_asyncio_tcp(netns):
    chosen = random.Random(1)
    with example(netns, "asyncio_tcp", V4):
        for _ in range(100):
            host, port = f"192.0.2.{chosen.randrange(1, 255)}", chosen.randrange(1, 65536)
            assert asked(netns, host, port, b"hello\n") == f"{host} port {port}: hello\n"


def test_http_server(netns):
    pytest.importorskip("uvicorn")
    with example(netns, "http_server", V4), netns.entered():
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for host in ("192.0.2.1", "192.0.2.254"):
            with opener.open(f"http://{host}/", timeout=TIMEOUT) as response:
                assert response.read().decode() == f"you asked {host} port 80\n"


def test_dns_server(netns):
    """A client that takes no answer from elsewhere."""
    pytest.importorskip("dns")
    import dns.message
    import dns.query

    query = dns.message.make_query("where.example", "TXT")
    with example(netns, "dns_server", V4), netns.entered():
        for host in ("192.0.2.1", "192.0.2.53", "192.0.2.254"):
            for ask in (dns.query.udp, dns.query.tcp):
                response = ask(query, host, TIMEOUT, source="198.51.100.1")
                assert response.answer[0].to_text() == f'where.example. 60 IN TXT "{host}"'


def test_http3_server(netns, tmp_path):
    pytest.importorskip("aioquic")
    from aioquic.asyncio.client import connect
    from aioquic.asyncio.protocol import QuicConnectionProtocol
    from aioquic.h3.connection import H3_ALPN, H3Connection
    from aioquic.h3.events import DataReceived
    from aioquic.quic.configuration import QuicConfiguration

    cert, key = certificate(tmp_path)

    class Client(QuicConnectionProtocol):
        async def get(self, path):
            self.http, self.answer = H3Connection(self._quic), asyncio.get_running_loop().create_future()
            headers = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", path)]
            self.http.send_headers(self._quic.get_next_available_stream_id(), headers, end_stream=True)
            self.transmit()
            return await asyncio.wait_for(self.answer, TIMEOUT)

        def quic_event_received(self, event):
            for each in self.http.handle_event(event) if hasattr(self, "http") else ():
                if isinstance(each, DataReceived) and not self.answer.done():
                    self.answer.set_result(each.data)

    async def ask(host, port):
        configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name="localhost")
        configuration.load_verify_locations(cert)
        async with connect(host, port, configuration=configuration, create_protocol=Client) as client:
            return await client.get(b"/path")

    with example(netns, "http3_server", cert, key, "4000-4999", V4, V6), netns.entered():
        for host in ("192.0.2.7", "2001:db8::7"):
            for port in (4000, 4433, 4999):
                assert asyncio.run(ask(host, port)) == b"you asked for /path"


def test_honeypot(netns):
    chosen = random.Random(2)
    with example(netns, "honeypot", V4, V6) as pot:
        for number, family in enumerate([socket.AF_INET, socket.AF_INET6] * 20):
            host, source = {
                socket.AF_INET: (f"192.0.2.{chosen.randrange(1, 255)}", "198.51.100.1"),
                socket.AF_INET6: (f"2001:db8::{chosen.randrange(1, 9999):x}", "2001:db8:ffff::1"),
            }[family]
            port, data = chosen.choice([1, 65535, chosen.randrange(1, 65536)]), b"%d" % number
            kind = chosen.choice([socket.SOCK_STREAM, socket.SOCK_DGRAM])
            with new_socket(netns, family, kind) as client:
                if family == socket.AF_INET6:
                    client.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
                client.bind((source, 0))
                client.connect((host, port))
                client.send(data)
                event = json.loads(pot.stdout.readline())
                mapped = "::ffff:" if family == socket.AF_INET else ""
                assert event["source"] == [mapped + source, client.getsockname()[1]]
                assert bytes.fromhex(event["data"]) == data
                assert event["protocol"] == {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}[kind]
                assert [event["destination"][0].removeprefix("::ffff:"), event["destination"][1]] == [host, port]


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_nginx(netns, tmp_path):
    """As it is installed, by the command of its configuration; a reload is noticed by nobody."""
    configuration = (EXAMPLES / "nginx.conf").read_text()
    _, _, line = next(line for line in configuration.splitlines() if "pyskl run" in line).partition("pyskl run ")
    words = [{"nginx": NGINX, "/srv": tmp_path}.get(word, word) for word in shlex.split(line)]
    words[-1] = EXAMPLES / "nginx.conf"
    chosen, served = random.Random(3), set()
    with netns.entered():
        process = subprocess.Popen([sys.executable, "-I", "-m", "pyskl", "run", *words], stderr=subprocess.PIPE)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask():
        host, port = f"192.0.2.{chosen.randrange(1, 255)}", chosen.randrange(1, 65536)
        with netns.entered(), opener.open(f"http://{host}:{port}/{len(served)}", timeout=TIMEOUT) as response:
            assert response.headers["Server"].startswith("nginx/")
            assert response.read().decode() == f"you asked {host} port {port}\n"
        served.add((host, port, len(served)))

    def workers():
        (master,) = children(process.pid)
        return set(children(master))

    with process:
        try:
            assert eventually(lambda: bool(pyskl.links(netns)) and not refused(ask))
            for _ in range(100):
                ask()
            before = workers()
            assert len(before) == 2
            process.send_signal(signal.SIGHUP)
            assert eventually(lambda: ask() or (len(workers()) == 2 and not before & workers()))
            process.send_signal(signal.SIGQUIT)
            assert process.wait(TIMEOUT) == 0
        finally:
            if process.poll() is None:
                process.terminate()
    said = (tmp_path / "access.log").read_text().splitlines()
    assert {line.rpartition(": ")[0].partition(" asked ")[2] for line in said} == {
        f"{host} port {port} for /{number}" for host, port, number in served
    }


def refused(ask):
    try:
        ask()
    except urllib.error.URLError:
        return True
    return False


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_prefork(netns):
    """All workers serve; one that dies takes no client with it, and is replaced."""
    ask = lambda: asked(netns, f"192.0.2.{random.randrange(1, 255)}", 80)  # noqa: E731
    with example(netns, "prefork", "3", V4):
        workers = set()
        assert eventually(lambda: workers.add(ask()) or len(workers) == 3)
        victim = int(workers.pop().split()[1])
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: not os.path.exists(f"/proc/{victim}"))  # until then its queue takes clients
        seen = set()
        assert eventually(lambda: seen.add(ask()) or (len(seen - workers) >= 1 and workers <= seen))
        assert f"worker {victim}\n" not in seen
