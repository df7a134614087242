# SPDX-License-Identifier: BSD-2-Clause
from __future__ import annotations

import contextlib
import socket

import pytest
from echo import Echo

import pyskl


@pytest.mark.needs("sk_lookup", "sockmap", "netns_link")
def test_an_address_that_nothing_is_bound_to(netns: pyskl.NetNS) -> None:
    with contextlib.closing(Echo(netns)) as echo, netns.entered(), socket.socket(type=socket.SOCK_DGRAM) as client:
        client.sendto(b"hello", ("192.0.2.200", 7))
        echo.answer()
        assert client.recv(100) == b"HELLO"


@pytest.mark.needs("perfmon")
def test_at_full_speed() -> None:
    pass


@pytest.mark.needs("time_travel")
def test_what_no_kernel_has() -> None:
    raise AssertionError
