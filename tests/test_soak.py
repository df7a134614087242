"""Ten thousand lives of a link and a million updates of a map: no fd and no memory more than at first."""

from __future__ import annotations

import logging
import socket
import struct
from pathlib import Path

import pytest
import support
from support import bpf_object

import pyskl
from pyskl import BpfObject, HashMap, SockMap

pytestmark = pytest.mark.slow

LINKS, UPDATES = 10_000, 1_000_000
SLACK = 1 << 18  # bytes: less than 30 for each life of a link


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(work: object, rounds: int) -> int:
    """The bytes that a piece of work adds after a first part of it has warmed everything up."""
    work(rounds // 10)
    before, fds = resident(), support.fds()
    work(rounds - rounds // 10)
    assert support.fds() == fds
    return resident() - before


def test_attaching_updating_and_detaching(netns: pyskl.NetNS) -> None:
    """One link stays throughout: the first and the last one switch the hook on and off in the kernel's code."""
    with BpfObject.load(bpf_object("obj_pair")) as obj, obj.programs["yes"].attach(netns) as stays:

        def work(rounds: int) -> None:
            for number in range(rounds):
                with obj.programs["yes"].attach(netns) as link:
                    link.update(obj.programs["no"])
                    if number & 1:
                        link.detach()

        assert growth(work, LINKS) < SLACK
        assert pyskl.links(netns) == (stays.info,)


def test_updating_maps() -> None:
    key, value = struct.Struct("=I").pack, struct.Struct("=Q").pack
    with (
        HashMap.create(key_size=4, value_size=8, max_entries=1024) as numbers,
        SockMap.create(16) as sockets,
        socket.create_server(("127.0.0.1", 0)) as sock,
    ):

        def work(rounds: int) -> None:
            for number in range(rounds // 2):
                numbers[key(number & 1023)] = value(number)
                sockets[number & 15] = sock

        assert growth(work, UPDATES) < SLACK
        assert len(numbers) == 1024
        assert set(sockets.values()) == {support.cookie(sock)}


def test_loading_reading_and_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails leaves nothing either: errors, logs and messages are freed as objects are."""
    monkeypatch.setattr(logging.getLogger("pyskl"), "propagate", False)  # pytest would keep every message
    content = bpf_object("obj_rejected").read_bytes()
    with HashMap.create(key_size=4, value_size=8, max_entries=256) as m:
        m.update({struct.pack("=I", n): bytes(8) for n in range(256)})

        def work(rounds: int) -> None:
            for _ in range(rounds):
                BpfObject.load(content, programs=["fine"]).close()
                try:
                    BpfObject.load(content, programs=["bad_verdict"])
                except pyskl.VerifierError as error:
                    assert error.log
                assert len(dict(m.items())) == 256
                assert b"none" not in m
                assert "absent" not in m.info.name

        assert growth(work, 300) < SLACK
