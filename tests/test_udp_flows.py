# SPDX-License-Identifier: BSD-2-Clause
"""The policy udp_sticky: a UDP flow goes on reaching the socket that it reached, in the kernel's own look-ups."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import time

import pytest
from support import IPV6_FREEBIND, LOAD, eventually, family_of, new_socket, readable, silence, udp_socket

import pyskl

pytestmark = [pytest.mark.needs("sk_lookup", "sockmap", "netns_link"), pytest.mark.slow]
HOSTS = {"v4": "192.0.2.1", "v6": "2001:db8::1"}
PREFIXES = {"v4": "192.0.2.0/24", "v6": "2001:db8::/64"}
CLIENTS = {"v4": "198.51.100.1", "v6": "2001:db8:ffff::1"}
REMEMBERED = 65_536  # at least


@pytest.fixture
def keep():
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def d(netns, keep):
    dispatcher = keep(pyskl.Dispatcher.create(netns))
    for prefix in PREFIXES.values():
        dispatcher.bind("a", "udp", prefix)
    dispatcher.set_policy("a", udp_sticky=3600)
    return dispatcher


class Flow:
    """A client that goes on sending to one address and port."""

    def __init__(self, ns, keep, family="v4", port=80):
        self._sock = keep(new_socket(ns, family_of(HOSTS[family]), socket.SOCK_DGRAM))
        if family == "v6":
            self._sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        self._sock.bind((CLIENTS[family], 0))
        self._to = HOSTS[family], port
        self.asks = "udp", self._to, self._sock.getsockname()[:2]

    def send(self):
        self._sock.sendto(b"?", self._to)

    def reaches(self, *socks):
        """The socket that a datagram reaches."""
        self.send()
        (found,) = readable(*socks)
        assert found.recv(9) == b"?"
        return found


# -- where a flow goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bound"), [("v4", "127.0.0.1"), ("v6", "::1"), ("v4", "::"), ("v6", "::")],
    ids=["v4", "v6", "v4 to dual-stack", "v6 to dual-stack"],
)  # fmt: skip
def test_whatever_is_registered_since_one_datagram_makes_a_flow(netns, d, keep, family, bound):
    old, new, beside = (keep(udp_socket(netns, bound, v6only=False)) for _ in range(3))
    d.register("a", old)
    flow = Flow(netns, keep, family)
    assert flow.reaches(old) is old
    d.register("a", new)
    assert flow.reaches(old, new) is old
    assert Flow(netns, keep, family).reaches(old, new) is new
    assert Flow(netns, keep, family, port=81).reaches(old, new) is new  # the port is of the flow
    for slot in range(1, 20):
        d.register("a", beside, slot=slot)
    assert {flow.reaches(old, new, beside) for _ in range(20)} == {old}
    d.unregister("a")
    assert flow.reaches(old, new, beside) is old
    assert d.explain(*Flow(netns, keep, family).asks).reason == "reset"  # new ones meet what is done then
    old.close()
    assert d.explain(*flow.asks).reason == "reset"
    d.register("a", new)
    assert flow.reaches(new, beside) is new


def test_a_socket_that_is_registered_again_and_one_that_takes_a_flow_over(netns, d, keep):
    old, new = (keep(udp_socket(netns)) for _ in range(2))
    flow = Flow(netns, keep)
    for sock in (old, new, old, new):
        d.register("a", sock)
        assert flow.reaches(old, new) is old
    old.close()
    assert flow.reaches(new) is new
    d.register("a", keep(udp_socket(netns)))
    assert flow.reaches(new) is new  # it is that one's by now


def test_a_flow_stays_in_its_slot_whatever_slots_come(netns, d, keep):
    """A new flow is spread over the slots; the known ones are not spread again."""
    socks = [keep(udp_socket(netns)) for _ in range(8)]
    flows = [Flow(netns, keep, port=port) for port in range(1, 65)]
    for slot in range(4):
        d.register("a", socks[slot], slot=slot)
    before = [flow.reaches(*socks) for flow in flows]
    assert set(before) == set(socks[:4])
    for slot in range(4, 8):
        d.register("a", socks[slot], slot=slot)
    assert [flow.reaches(*socks) for flow in flows] == before
    assert {Flow(netns, keep, port=port).reaches(*socks) for port in range(1, 65)} == set(socks)


def test_another_label_has_other_flows(netns, d, keep):
    """A flow is not carried along when its address is bound to another label, nor back."""
    ours, theirs, new = (keep(udp_socket(netns)) for _ in range(3))
    d.register("a", ours)
    d.register("b", theirs)
    d.set_policy("b", udp_sticky=3600)
    flow = Flow(netns, keep)
    assert flow.reaches(ours, theirs) is ours
    d.bind("b", "udp", PREFIXES["v4"], replace=True)
    assert flow.reaches(ours, theirs) is theirs
    d.bind("a", "udp", PREFIXES["v4"], replace=True)
    d.register("a", new)
    assert flow.reaches(ours, theirs, new) is new


def test_without_the_policy_flows_go_with_what_is_registered(netns, d, keep):
    old, new = (keep(udp_socket(netns)) for _ in range(2))
    d.bind("plain", "udp", "192.0.2.1/32")
    d.register("plain", old)
    flow = Flow(netns, keep)
    assert flow.reaches(old, new) is old
    d.register("plain", new)
    assert flow.reaches(old, new) is new  # another label lets its flows stay


# -- for how long --------------------------------------------------------------------------------------------------


def test_zero_lets_all_go_at_once_and_for_good(netns, d, keep):
    old, new = (keep(udp_socket(netns)) for _ in range(2))
    d.register("a", old)
    once, often = Flow(netns, keep), Flow(netns, keep)
    for flow in (once, often, often, often):
        assert flow.reaches(old) is old
    d.register("a", new)
    d.set_policy("a", on_missing="hold", udp_sticky=60)  # another time, another policy: they stay
    assert d.explain(*once.asks).reason == d.explain(*often.asks).reason == "sticky"
    d.set_policy("a")
    assert [flow.reaches(old, new) for flow in (once, often)] == [new, new]
    d.set_policy("a", udp_sticky=3600)
    d.register("a", old)
    assert [flow.reaches(old, new) for flow in (once, often)] == [old, old]  # from anew


def test_a_flow_that_was_silent_for_too_long_is_new_again(netns, d, keep):
    old, new = (keep(udp_socket(netns)) for _ in range(2))
    d.set_policy("a", udp_sticky=1)
    d.register("a", old)
    once, often, goes_on = (Flow(netns, keep, port=port) for port in (1, 2, 3))
    for flow in (once, often, often, goes_on):
        assert flow.reaches(old) is old
    began = time.monotonic()
    d.register("a", new)

    def silent():
        assert goes_on.reaches(old, new) is old  # each time
        return {d.explain(*flow.asks).reason for flow in (once, often)} == {"selected"}

    assert eventually(silent)
    assert 0.9 < time.monotonic() - began
    assert goes_on.reaches(old, new) is old
    assert [flow.reaches(old, new) for flow in (once, often)] == [new, new]


# -- how many ------------------------------------------------------------------------------------------------------


class Many:
    """Flows of one client to ever other addresses and ports."""

    def __init__(self, ns, keep):
        self._sock = keep(udp_socket(ns, CLIENTS["v4"]))
        self._new = ((f"192.0.2.{host}", port) for port in itertools.count(1024) for host in range(1, 255))

    def made(self, count):
        flows = list(itertools.islice(self._new, count))
        self.go_on(flows)
        return flows

    def go_on(self, flows):
        for flow in flows:
            self._sock.sendto(b"", flow)

    def reasons(self, dispatcher, flows):
        source = self._sock.getsockname()
        return [dispatcher.explain("udp", flow, source).reason for flow in flows]


@pytest.mark.skipif(LOAD < 40_000, reason="emulated")
@pytest.mark.parametrize("datagrams", [1, 2])
def test_so_many_flows_are_remembered(netns, d, keep, datagrams):
    d.register("a", silence(keep(udp_socket(netns))))
    many = Many(netns, keep)
    flows = many.made(REMEMBERED)
    for _ in range(datagrams - 1):
        many.go_on(flows)
    assert set(many.reasons(d, random.Random(1).sample(flows, 5000) + flows[:100] + flows[-100:])) == {"sticky"}


@pytest.mark.skipif(LOAD < 40_000, reason="emulated")
def test_a_flood_of_new_flows_does_not_push_out_those_that_were_seen_again(netns, d, keep):
    """400,000 that are seen once; and of those that are seen again, which go on among them."""
    d.register("a", silence(keep(udp_socket(netns))))
    many = Many(netns, keep)
    known = many.made(1000)
    many.go_on(known)
    many.made(400_000)
    assert set(many.reasons(d, known)) == {"sticky"}
    for _ in range(10):  # those who send twice do not push out who goes on
        flood = many.made(40_000)
        many.go_on(flood)
        many.go_on(known)
    assert set(many.reasons(d, known)) == {"sticky"}


# -- against a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_against_a_model(netns, d, keep, seed):
    """Sockets come and go, policies change, and each datagram reaches the socket that the documentation says."""
    chosen = random.Random(f"{seed} {random.random()}")
    socks, slots, stays, sticky = [], {}, {}, True
    flows = [Flow(netns, keep, port=port) for port in range(1, 30)]
    for step in range(300):
        what = chosen.choice(["register", "send", "send", "send", "send", "close", "unregister", "policy"])
        slot = chosen.randrange(3)
        if what == "register" and len(socks) < 20:
            socks.append(keep(udp_socket(netns)))
            d.register("a", socks[-1], slot=slot)
            slots[slot] = socks[-1]
        elif what == "close" and socks and chosen.random() < 0.5:
            gone = socks.pop(chosen.randrange(len(socks)))
            gone.close()
            slots = {number: sock for number, sock in slots.items() if sock is not gone}
            stays = {flow: sock for flow, sock in stays.items() if sock is not gone}
        elif what == "unregister" and slot in slots and chosen.random() < 0.3:
            d.unregister("a", slot=slot)
            del slots[slot]
        elif what == "policy" and chosen.random() < 0.2:
            sticky = not sticky
            d.set_policy("a", udp_sticky=3600 if sticky else 0)
            stays.clear()
        elif what == "send" and socks:
            flow = chosen.choice(flows)
            if flow in stays:
                assert flow.reaches(*socks) is stays[flow], step
            elif slots:
                reached = flow.reaches(*socks)
                assert reached in slots.values(), step
                if sticky:
                    stays[flow] = reached
            else:
                assert d.explain(*flow.asks).reason == "reset"
