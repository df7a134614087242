# SPDX-License-Identifier: BSD-2-Clause
"""For pytest: a network namespace for each test, and skips by what the kernel lacks.

A project that imports pyskl turns it on in its conftest.py::

    pytest_plugins = ["pyskl.pytest_plugin"]

``@pytest.mark.needs("bpf_loop")`` skips a test, by name and with the reason, where `pyskl.features` says that the
kernel or the process lacks the feature; it fails instead where the environment variable PYSKL_REQUIRED_FEATURES (names,
separated by commas) says that this machine is known to have it.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

import pyskl

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIXES = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
"""The prefixes that are kept for documentation (RFC 5737, RFC 3849)."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "needs(*features): skip where pyskl.features() lacks one of them")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test that needs what is not there."""
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            feature = pyskl.features()[name]
            if not feature:
                unavailable(name, feature.reason)


def unavailable(name: str, reason: str | None) -> None:
    """Skip by name; where PYSKL_REQUIRED_FEATURES says that this machine has it, fail instead."""
    if name in os.environ.get("PYSKL_REQUIRED_FEATURES", "").split(","):
        pytest.fail(f"{name} is required of this machine, but: {reason}", pytrace=False)
    pytest.skip(f"needs {name}: {reason}")


@contextlib.contextmanager
def namespace() -> Iterator[pyskl.NetNS]:
    """Make a network namespace, where every address of `PREFIXES` is local, for the length of a ``with``."""
    with pyskl.NetNS.create() as ns:
        with ns.entered(), socket.socket() as sock:
            fcntl.ioctl(sock, 0x8914, struct.pack("=16sh14x", b"lo", 1))  # SIOCSIFFLAGS: IFF_UP (netdevice(7))
        with ns.entered(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
            for prefix in PREFIXES:
                sock.send(_local_route(prefix))
                (error,) = struct.unpack_from("=i", sock.recv(4096), 16)
                if error:
                    raise OSError(-error, f"{prefix}: {os.strerror(-error)}")
        yield ns


def _local_route(prefix: str) -> bytes:
    """Give the message of ``ip route add local PREFIX dev lo`` (netlink(7), rtnetlink(7))."""
    network = ipaddress.ip_network(prefix)
    to, family = network.network_address.packed, {4: socket.AF_INET, 6: socket.AF_INET6}[network.version]
    # struct rtmsg: of RT_TABLE_LOCAL, RTPROT_BOOT, RT_SCOPE_HOST, RTN_LOCAL; then RTA_DST, and RTA_OIF with lo's index
    body = struct.pack("=8BI", family, network.prefixlen, 0, 0, 255, 3, 254, 2, 0)
    body += struct.pack("=HH", 4 + len(to), 1) + to + struct.pack("=HHI", 8, 4, 1)
    return struct.pack("=IHHII", 16 + len(body), 24, 0x605, 0, 0) + body  # RTM_NEWROUTE; REQUEST, ACK, CREATE, EXCL


@pytest.fixture
def netns() -> Iterator[pyskl.NetNS]:
    """Give a network namespace of the test's own, where every address of `PREFIXES` is local; it goes with the test."""
    with namespace() as ns:
        yield ns
