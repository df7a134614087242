# SPDX-License-Identifier: BSD-2-Clause
"""Let the kernel say where the installed pyskl steers a connection to an address of a prefix. As root."""

import socket
import sys

import pyskl

PREFIX = {"prefix4": bytes([192, 0, 2, 0]), "prefix4_len": 24}

with (
    pyskl.NetNS.create().entered(),
    socket.create_server(("", 8080)) as listener,
    pyskl.Program.load(pyskl.REDIRECT, constants=PREFIX) as program,
    program.attach(),
):
    program.maps["sockets"][0] = listener
    run = program.test_run("tcp", ("192.0.2.77", 12345), ("198.51.100.1", 40000))
    wanted = pyskl.socket_cookie(listener)
if run.cookie != wanted:
    sys.exit(f"the program selected {run}, and not the socket {wanted}")
print(f"Python {sys.version.split()[0]}: {pyskl.__file__} steers")
