"""What the doctor finds on a dispatcher that was made ill on purpose, and the command that mends it."""

import contextlib
import os
import socket

import pytest
import support

import pyskl
from pyskl import Dispatcher
from pyskl.doctor import Doctor

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]


@pytest.fixture
def path(netns, bpffs):
    with netns.entered():
        yield str(bpffs / "edge")
        with contextlib.suppress(pyskl.NotLoaded):
            Dispatcher.remove(str(bpffs / "edge"))


def found(path, netns, **how):
    """What is not well, by the name of the check: texts, and what mends it."""
    ill = {}
    for check in Doctor(path, netns, **how).examine():
        name, outcome, text, command = check
        if outcome != "ok":
            ill.setdefault(name, []).append((outcome, text, command))
    return ill


def test_nothing_is_loaded_and_then_all_is_well(path, netns):
    ((outcome, text, command),) = found(path, netns)["dispatcher"]
    assert (outcome, command) == ("problem", "pyskl load")
    assert path in text
    with Dispatcher.create(path=path) as d, socket.create_server(("", 0)) as server:
        d.bind("web", "tcp", "192.0.2.0/24")
        d.register("web", server)
        assert found(path, netns) == {}


def test_dead_sockets_labels_without_one_hold_without_keepers(path, netns):
    with Dispatcher.create(path=path) as d, socket.create_server(("", 0)) as server:
        d.bind("web", "tcp", "192.0.2.0/24")
        d.bind("a b", "tcp", "198.51.100.0/24")
        d.set_policy("web", on_missing="hold")
        d.register("web", server)
    ill = found(path, netns, options="--path X")
    assert [command for _, _, command in ill["labels"]] == [
        "pyskl --path X register 'a b'",
        "pyskl --path X register web",
    ]
    ((_, text, command),) = ill["sockets"]
    assert "'web' in slot 0 (ipv4)" in text
    assert command == "pyskl --path X unregister web tcp --family ipv4 --slot 0"
    ((_, text, command),) = ill["hold"]
    assert "'web'" in text
    assert command == "pyskl --path X hold"


def test_what_is_around_it(path, netns):
    support.ip(netns, "address add 192.0.2.9/32 dev lo")
    support.sysctl(netns, "ipv4/conf/lo/rp_filter", 1)
    with Dispatcher.create(path=path) as d, socket.create_server(("", 0)) as server:
        d.bind("web", "tcp", "10.9.0.0/16")
        d.bind("web", "tcp", "2001:db9::/64")
        d.bind("web", "tcp", "192.0.2.0/24")
        d.bind("web", "udp", "192.0.2.0/24", "30000-40000")
        d.bind("web", "udp", "0.0.0.0/0", 53)
        d.register("web", server)
        ill = found(path, netns, inside="ip netns exec X ")
        assert {command for _, _, command in ill["routes"]} == {
            "ip netns exec X ip route add local 10.9.0.0/16 dev lo",
            "ip netns exec X ip -6 route add local 2001:db9::/64 dev lo",
        }
        assert "lo" in ill["rp_filter"][0][1]
        assert any("192.0.2.9" in text for _, text, _ in ill["own addresses"])
        assert ill["own addresses"][0][2].startswith("pyskl unbind web tcp 192.0.2.0/24")
        assert any(command.endswith("udp 192.0.2.0/24 30000-40000") for _, _, command in ill["ephemeral ports"])
        with pyskl.NetNS.create() as other:
            skipped = found(path, other)
            assert {each for each, *_ in skipped["routes"]} == {"skipped"}


def test_many_prefixes_that_are_not_local_are_counted(path, netns):
    with Dispatcher.create(path=path) as d, socket.create_server(("", 0)) as server:
        d.replace([pyskl.Binding("web", "tcp", f"10.{number}.0.0/16") for number in range(60)])
        d.register("web", server)
        told = found(path, netns)["routes"]
        assert "more prefixes" in told[-1][1]
        assert len(told) < 60


def test_the_link_and_the_folder(path, netns, bpf_object):
    with Dispatcher.create(path=path) as d:
        os.mkdir(f"{path}/foreign")
        with pyskl.Program.load(pyskl.REDIRECT) as other, other.attach():
            ill = found(path, netns)
            assert "number 1 of 2" in ill["link"][0][1]
            assert ill["folder"][0][2] == "pyskl doctor --repair"
        with pyskl.NetNS.create() as elsewhere:
            assert found(path, elsewhere)["link"][0][0] == "note"
        d.link.detach()
        ((_, _, command),) = found(path, netns)["dispatcher"]
        assert command == "pyskl doctor --repair"


def test_no_room_is_left(path, netns):
    with Dispatcher.create(path=path, max_labels=1, max_sockets=1) as d, socket.create_server(("", 0)) as server:
        d.bind("web", "tcp", "192.0.2.0/24")
        d.register("web", server)
        told = found(path, netns)["room"]
        assert [command.rpartition(" ")[2] for _, _, command in told] == ["2", "2"]
