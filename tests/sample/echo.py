# SPDX-License-Identifier: BSD-2-Clause
"""A daemon as others write them: it answers each datagram of a whole prefix, on one port."""

from __future__ import annotations

import socket

import pyskl


class Echo:
    """One UDP socket for 192.0.2.0/24, port 7."""

    def __init__(self, netns: pyskl.NetNS) -> None:
        with netns.entered():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.socket.bind(("127.0.0.1", 0))
            constants = {"prefix4": bytes([192, 0, 2, 0]), "prefix4_len": 24, "port_min": 7, "port_max": 7}
            self.program = pyskl.Program.load(pyskl.REDIRECT, constants=constants)
            self.link = self.program.attach()
            self.program.maps["sockets"][1] = self.socket

    def answer(self) -> None:
        data, client = self.socket.recvfrom(65535)
        self.socket.sendto(data.upper(), client)

    def close(self) -> None:
        for each in (self.link, self.program, self.socket):
            each.close()
