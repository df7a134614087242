# SPDX-License-Identifier: BSD-2-Clause
"""A DNS server over UDP and TCP on a whole prefix: it answers every question with the address that was asked.

pip install dnspython
python dns_server.py 192.0.2.0/24
"""

import asyncio
import socket
import sys

import dns.message
import dns.rrset

import pyskl


def answer(wire: bytes, server: str) -> bytes:
    query = dns.message.from_wire(wire)
    response = dns.message.make_response(query)
    response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "TXT", f'"{server}"'))
    return response.to_wire()


class OverUdp(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: pyskl.udp.DatagramAddress) -> None:
        self.transport.sendto(answer(data, addr.destination[0]), addr)  # leaves from there


async def over_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    size = int.from_bytes(await reader.readexactly(2), "big")
    response = answer(await reader.readexactly(size), writer.get_extra_info("sockname")[0])
    writer.write(len(response).to_bytes(2, "big") + response)
    await writer.drain()
    writer.close()


async def main(*prefixes: str) -> None:
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    with pyskl.steer(tcp, *prefixes, ports=53), pyskl.steer(udp, *prefixes, ports=53):
        await pyskl.udp.create_datagram_endpoint(OverUdp, udp)
        server = await asyncio.start_server(over_tcp, sock=tcp)
        print("serving", *prefixes, flush=True)
        await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
