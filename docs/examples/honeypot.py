# SPDX-License-Identifier: BSD-2-Clause
"""A honeypot on all 65,535 ports of its prefixes, TCP and UDP: it logs who sent what to where, and answers nothing.

python honeypot.py 192.0.2.0/24 2001:db8::/64
"""

import asyncio
import json
import socket
import sys
from typing import Any

import pyskl


def log(protocol: str, source: Any, destination: Any, data: bytes) -> None:
    event = {"protocol": protocol, "source": source[:2], "destination": destination[:2], "data": data.hex()}
    print(json.dumps(event), flush=True)


async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        data = await asyncio.wait_for(reader.read(4096), 60)
    except (OSError, asyncio.TimeoutError):
        data = b""
    log("tcp", writer.get_extra_info("peername"), writer.get_extra_info("sockname"), data)
    writer.close()


class Udp(asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, addr: pyskl.udp.DatagramAddress) -> None:
        log("udp", addr, addr.destination, data)


async def main(*prefixes: str) -> None:
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.bind(("::", 0))
    with pyskl.steer(listener, *prefixes), pyskl.steer(datagrams, *prefixes):
        await pyskl.udp.create_datagram_endpoint(Udp, datagrams)
        server = await asyncio.start_server(tcp, sock=listener)
        print("serving", *prefixes, flush=True)
        await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
