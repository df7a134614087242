# SPDX-License-Identifier: BSD-2-Clause
"""A pre-fork server: each worker has a listener and a slot of its own, over which the kernel spreads the clients.

A client goes to the same slot again and again; when a worker dies, only its own clients move, until it is replaced.

python prefork.py 4 192.0.2.0/24
"""

import os
import signal
import socket
import sys

import pyskl


def work(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(f"worker {os.getpid()}\n".encode())


def start(dispatcher: pyskl.Dispatcher, slot: int) -> int:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        if not (pid := os.fork()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            work(listener)
        dispatcher.register("web", listener, slot=slot)  # the worker alone keeps it open: it goes with the worker
    return pid


count, *prefixes = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
with pyskl.Dispatcher.create() as dispatcher:
    for prefix in prefixes:
        dispatcher.bind("web", "tcp", prefix, ports=80)
    workers = {start(dispatcher, slot): slot for slot in range(int(count))}
    print("serving", *prefixes, flush=True)
    try:
        while True:
            pid, _ = os.wait()
            slot = workers.pop(pid)
            workers[start(dispatcher, slot)] = slot
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
