# SPDX-License-Identifier: BSD-2-Clause
"""For pytest: a network namespace for each test, and skips by what the kernel lacks.

A project that imports pyskl turns it on in its conftest.py::

    pytest_plugins = ["pyskl.pytest_plugin"]

``@pytest.mark.needs("bpf_loop")`` skips a test, by name and with the reason, where `pyskl.features` says that the
kernel or the process lacks the feature; it fails instead where the environment variable PYSKL_REQUIRED_FEATURES (names,
separated by commas) says that this machine is known to have it.
"""

from __future__ import annotations

import os
import subprocess
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


@pytest.fixture
def netns() -> Iterator[pyskl.NetNS]:
    """Give a network namespace of the test's own, where every address of `PREFIXES` is local; it goes with the test."""
    commands = ["link set lo up", *(f"route add local {prefix} dev lo" for prefix in PREFIXES)]
    with pyskl.NetNS.create() as ns:
        with ns.entered():
            subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)  # noqa: S607
        yield ns
