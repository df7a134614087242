# SPDX-License-Identifier: BSD-2-Clause
"""An HTTP/3 server (aioquic) on a prefix and a range of ports: a client behind a firewall tries them all.

pip install aioquic
python http3_server.py cert.pem key.pem 4000-4999 192.0.2.0/24 2001:db8::/64
"""

import asyncio
import socket
import sys

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent

import pyskl


class Http3(QuicConnectionProtocol):
    http: H3Connection

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic)
        for each in self.http.handle_event(event):
            if isinstance(each, HeadersReceived):
                path = dict(each.headers)[b":path"]
                self.http.send_headers(each.stream_id, [(b":status", b"200")])
                self.http.send_data(each.stream_id, b"you asked for " + path, end_stream=True)
                self.transmit()


async def main(cert: str, key: str, ports: str, *prefixes: str) -> None:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(cert, key)
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 too
    sock.bind(("::", 0))
    with pyskl.steer(sock, *prefixes, ports=ports):
        await pyskl.udp.create_datagram_endpoint(
            lambda: QuicServer(configuration=configuration, create_protocol=Http3), sock
        )
        print("serving", *prefixes, flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
