# SPDX-License-Identifier: BSD-2-Clause
"""An HTTP server from PyPI (uvicorn), unchanged, on port 80 of a /24: it is started with the fd of a listening socket.

pip install uvicorn
python http_server.py 192.0.2.0/24
"""

import socket
import sys
from typing import Any

import uvicorn

import pyskl


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    await receive()
    host, port = scope["server"]  # the original destination
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": f"you asked {host} port {port}\n".encode()})


with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener, pyskl.steer(listener, *sys.argv[1:], ports=80):
    print("serving", *sys.argv[1:], flush=True)
    uvicorn.run(app, fd=listener.fileno())
