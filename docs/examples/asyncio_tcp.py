# SPDX-License-Identifier: BSD-2-Clause
"""An asyncio server on every port of a /24, with one socket: each client is told where it went to.

python asyncio_tcp.py 192.0.2.0/24
"""

import asyncio
import socket
import sys

import pyskl


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    host, port = writer.get_extra_info("sockname")  # the original destination
    while line := await reader.readline():
        writer.write(f"{host} port {port}: ".encode() + line)
        await writer.drain()
    writer.close()


async def main(*prefixes: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    with pyskl.steer(listener, *prefixes):
        server = await asyncio.start_server(serve, sock=listener)
        print("serving", *prefixes, flush=True)
        async with server:
            await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
