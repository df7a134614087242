"""Calls to a dispatcher in any order: it is what plain Python says, and what fails half-way changes nothing."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import support
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracle import Rule

import pyskl
from pyskl import Binding, Dispatcher, Policy, Protocol, Verdict

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]

# Few of each, so that they meet.
LABELS = st.sampled_from(["a", "é", "d" * 255])
PROTOCOLS = st.sampled_from(["tcp", "udp"])
NETWORKS = ["0.0.0.0/0", "192.0.2.0/24", "192.0.2.0/25", "192.0.2.1/32", "::/0", "2001:db8::/32", "2001:db8::1/128"]
PREFIXES = st.sampled_from(NETWORKS)
RANGES = [(0, 65535), (1, 65535), (80, 80), (81, 81), (80, 81), (1, 79), (79, 80), (1, 100), (1024, 65535)]
PORTS = st.lists(st.sampled_from(RANGES), min_size=1, max_size=3)
BAD_PORTS = st.sampled_from([0, 65536, "80-", "2-1", range(0), range(1, 9, 2), True, 80.5, b"80"])
BAD_ELEMENTS = st.sampled_from([None, "web tcp 192.0.2.0/24 80", ("web", "tcp", "192.0.2.0/24", 80), 5])
SLOTS = st.sampled_from([0, 1, 63])
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
POLICIES = st.builds(Policy, st.sampled_from(["reset", "hold", "fallthrough"]), st.sampled_from([0, 30]))

SETTINGS = settings(
    deadline=None,
    max_examples=500 if "PYSKL_TEST_WHOLE" in os.environ else 20,
    stateful_step_count=25,
    phases=set(Phase) - {Phase.explain},  # each try waits for the kernel
)

Place = tuple[str, int, int, int, int, int]  # all of a Rule but its label
Slot = tuple[str, str, int, int]  # label, protocol, version, slot


class Registered(NamedTuple):
    sock: socket.socket
    cookie: int
    address: tuple[object, ...]
    dual: bool


def rule_of(label: str, protocol: str, network: str, ports: tuple[int, int]) -> Rule:
    address, length = network.split("/")
    version = 6 if ":" in address else 4
    number = int.from_bytes(socket.inet_pton(FAMILIES[version], address), "big")
    return Rule(label, protocol, version, number, int(length), *ports)


def bound(rule: Rule) -> Binding:
    return Binding(rule.label, rule.protocol, rule.network, rule.ports)


RULES = st.builds(rule_of, LABELS, PROTOCOLS, PREFIXES, st.sampled_from(RANGES))


class Machine(RuleBasedStateMachine):
    """The model: a dict of what is bound, one of what is registered, one of policies."""

    ns: pyskl.NetNS
    dispatcher: Dispatcher  # one for all examples: to make one takes long

    def __init__(self) -> None:
        super().__init__()
        self.rules: dict[Place, str] = {}
        self.slots: dict[Slot, Registered] = {}
        self.policies: dict[str, Policy] = {}

    @initialize()
    def begin(self) -> None:
        self.dispatcher.replace([], {})
        for label in {each.label for each in self.dispatcher.sockets()}:
            self.dispatcher.unregister(label)

    def teardown(self) -> None:
        for registered in self.slots.values():
            registered.sock.close()

    # -- bindings ----------------------------------------------------------------------------------

    def model(self) -> list[Rule]:
        return [Rule(label, *place) for place, label in self.rules.items()]

    @staticmethod
    def contradicting(rules: list[Rule]) -> bool:
        return any(one.contradicts(other) for one in rules for other in rules)

    def refused(self, error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> Exception:
        """The error of a call; that it changed nothing, the invariants see."""
        with pytest.raises(error) as caught:
            call()
        return caught.value

    def conflict(self, call: Callable[[], object], after: list[Rule]) -> None:
        error = self.refused(pyskl.BindingConflict, call)
        pairs = [{bound(one), bound(other)} for one in after for other in after if one.contradicts(other)]
        assert set(error.bindings) in pairs
        assert all(str(binding) in str(error) for binding in error.bindings)

    @rule(label=LABELS, protocol=PROTOCOLS, prefix=PREFIXES, ports=PORTS, replace=st.booleans())
    def bind(self, label: str, protocol: str, prefix: str, ports: list[tuple[int, int]], replace: bool) -> None:
        wanted = [rule_of(label, protocol, prefix, each) for each in dict.fromkeys(ports)]
        places = {each[1:] for each in wanted}
        after = [each for each in self.model() if not (replace and each[1:] in places)] + wanted
        spelled: Any = [each.ports for each in wanted]

        def call() -> tuple[Binding, ...]:
            return self.dispatcher.bind(label, protocol, prefix, spelled, replace=replace)

        if self.contradicting(after):
            self.conflict(call, after)
            return
        assert call() == tuple(sorted(map(bound, wanted)))
        self.rules |= {each[1:]: label for each in wanted}

    @rule(label=LABELS, protocol=PROTOCOLS, prefix=PREFIXES, ports=PORTS, bad=BAD_PORTS, at=st.integers(0, 3))
    def bind_or_unbind_bad_ports(
        self, label: str, protocol: str, prefix: str, ports: Any, bad: object, at: int
    ) -> None:
        given = [rule_of(label, protocol, prefix, each).ports for each in ports]
        given.insert(at, bad)
        for call in (self.dispatcher.bind, self.dispatcher.unbind):
            self.refused((ValueError, TypeError), lambda call=call: call(label, protocol, prefix, given))

    @rule(label=LABELS, protocol=PROTOCOLS, prefix=PREFIXES, ports=PORTS)
    def unbind(self, label: str, protocol: str, prefix: str, ports: list[tuple[int, int]]) -> None:
        self.take_away(label, [rule_of(label, protocol, prefix, each) for each in dict.fromkeys(ports)])

    @precondition(lambda self: self.rules)
    @rule(data=st.data(), more=st.lists(st.sampled_from(RANGES), max_size=1), of_another=st.booleans())
    def unbind_what_is_there(self, data: st.DataObject, more: list[tuple[int, int]], of_another: bool) -> None:
        one = data.draw(st.sampled_from(self.model()))
        there = [each for each in self.model() if (each.label, *each[1:5]) == (one.label, *one[1:5])]
        chosen = data.draw(st.lists(st.sampled_from(there), min_size=1, unique=True))
        extra = [one._replace(first=first, last=last) for first, last in more]
        label = data.draw(LABELS) if of_another else one.label
        self.take_away(label, [each._replace(label=label) for each in dict.fromkeys(chosen + extra)])

    def take_away(self, label: str, unwanted: list[Rule]) -> None:
        def call() -> tuple[Binding, ...]:
            ports: Any = [each.ports for each in unwanted]
            return self.dispatcher.unbind(label, unwanted[0].protocol, unwanted[0].network, ports)

        if any(self.rules.get(each[1:]) != label for each in unwanted):
            others = {self.rules[each[1:]] for each in unwanted if each[1:] in self.rules} - {label}
            text = str(self.refused(KeyError, call))
            absent = any(each[1:] not in self.rules for each in unwanted)
            assert absent or any(repr(other) in text for other in others)
            return
        assert call() == tuple(sorted(map(bound, unwanted)))
        for each in unwanted:
            del self.rules[each[1:]]

    @rule(
        rules=st.lists(RULES, max_size=12),
        policies=st.none() | st.dictionaries(LABELS, POLICIES, max_size=2),
        keep=st.booleans(),
        lazy=st.booleans(),
    )
    def replace(self, rules: list[Rule], policies: dict[str, Policy] | None, keep: bool, lazy: bool) -> None:
        after = list(dict.fromkeys((self.model() if keep else []) + rules))
        given = map(bound, after * 2) if lazy else list(map(bound, after))
        if self.contradicting(after):
            self.conflict(lambda: self.dispatcher.diff(map(bound, after)), after)
            self.conflict(lambda: self.dispatcher.replace(given, policies), after)
            return
        before = set(self.model())
        expected = (
            sorted(map(bound, set(after) - before)),
            sorted(map(bound, before - set(after))),
            len(before & set(after)),
        )
        assert tuple(self.dispatcher.diff(map(bound, after))) == expected
        assert set(self.dispatcher.bindings()) == set(map(bound, before))
        assert tuple(self.dispatcher.replace(given, policies)) == expected
        self.rules = {each[1:]: each.label for each in after}
        if policies is not None:
            self.policies = dict(policies)

    @rule(rules=st.lists(RULES, max_size=6), bad=BAD_ELEMENTS, at=st.integers(0, 6))
    def replace_by_a_bad_element(self, rules: list[Rule], bad: object, at: int) -> None:
        given: list[Any] = list(map(bound, rules))
        given.insert(at, bad)
        self.refused(TypeError, lambda: self.dispatcher.replace(given))
        self.refused(TypeError, lambda: self.dispatcher.diff(iter(given)))

    @rule()
    def replace_by_what_is_there(self) -> None:
        diff = self.dispatcher.replace(self.dispatcher.bindings())
        assert (list(diff.added), list(diff.removed), diff.unchanged) == ([], [], len(self.rules))

    # -- policies ----------------------------------------------------------------------------------

    @rule(label=LABELS, policy=POLICIES)
    def set_policy(self, label: str, policy: Policy) -> None:
        self.dispatcher.set_policy(label, **policy._asdict())
        self.policies[label] = policy

    @rule(label=LABELS, rules=st.lists(RULES, max_size=2))
    def set_bad_policies(self, label: str, rules: list[Rule]) -> None:
        self.refused(ValueError, lambda: self.dispatcher.set_policy(label, on_missing="drop"))
        self.refused(ValueError, lambda: self.dispatcher.set_policy(label, udp_sticky=-1))
        self.refused(TypeError, lambda: self.dispatcher.set_policy(label, udp_sticky=True))
        bad: Any = {label: Policy("hold"), "other": Policy("drop")}
        self.refused(ValueError, lambda: self.dispatcher.replace(map(bound, rules), bad))

    # -- sockets -----------------------------------------------------------------------------------

    @rule(label=LABELS, protocol=PROTOCOLS, version=st.sampled_from([4, 6]), slot=SLOTS, dual=st.booleans())
    def register(self, label: str, protocol: str, version: int, slot: int, dual: bool) -> None:
        dual = dual and version == 6
        host = {4: "127.0.0.1", 6: "::" if dual else "::1"}[version]
        sock = support.server(self.ns, protocol, host, v6only=not dual)
        made = Registered(sock, support.cookie(sock), sock.getsockname(), dual)
        before = self.slots.pop((label, protocol, version, slot), None)
        self.slots[label, protocol, version, slot] = made
        expected = (label, Protocol[protocol.upper()], FAMILIES[version], slot, made.cookie, made.address, True)
        assert self.dispatcher.register(label, sock, slot=slot) == expected
        if before:
            before.sock.close()

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), dual=st.booleans())
    def register_in_the_place_of_another(self, data: st.DataObject, dual: bool) -> None:
        self.register(*data.draw(st.sampled_from(sorted(self.slots))), dual)

    @rule(label=LABELS, slot=SLOTS)
    def register_what_can_not_be(self, label: str, slot: int) -> None:
        with contextlib.ExitStack() as stack:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):  # it does not listen, or is not bound
                sock = stack.enter_context(support.new_socket(self.ns, socket.AF_INET, kind))
                self.refused(pyskl.BadSocket, lambda sock=sock: self.dispatcher.register(label, sock, slot=slot))
            good = stack.enter_context(support.udp_socket(self.ns))
            for number in (-1, 64):
                self.refused(ValueError, lambda number=number: self.dispatcher.register(label, good, slot=number))

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), by=st.sets(st.sampled_from(["protocol", "family", "slot"])))
    def unregister(self, data: st.DataObject, by: set[str]) -> None:
        label, protocol, version, slot = data.draw(st.sampled_from(sorted(self.slots)))
        asked: dict[str, Any] = {"protocol": protocol, "family": FAMILIES[version], "slot": slot}
        asked = {name: asked[name] for name in by}
        gone = [
            key
            for key in self.slots
            if key[0] == label
            and asked.get("protocol", key[1]) == key[1]
            and asked.get("family", FAMILIES[key[2]]) == FAMILIES[key[2]]
            and asked.get("slot", key[3]) == key[3]
        ]
        found = self.dispatcher.unregister(label, **asked)
        assert sorted(each.cookie for each in found) == sorted(self.slots[key].cookie for key in gone)
        for key in gone:
            self.slots.pop(key).sock.close()

    @rule(label=LABELS, protocol=PROTOCOLS, slot=SLOTS)
    def unregister_what_is_not_there(self, label: str, protocol: str, slot: int) -> None:
        if not any(key[:2] == (label, protocol) and key[3] == slot for key in self.slots):
            self.refused(KeyError, lambda: self.dispatcher.unregister(label, protocol=protocol, slot=slot))

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def a_socket_dies(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.slots)))
        registered = self.slots.pop(key)
        registered.sock.close()
        label, protocol, version, slot = key
        asked = {"protocol": protocol, "family": FAMILIES[version], "slot": slot}

        def dead() -> bool:
            return [each.alive for each in self.dispatcher.sockets(label) if each.cookie == registered.cookie] == [
                False
            ]

        assert support.eventually(dead)  # the kernel takes it out of the map after a grace period
        (told,) = self.dispatcher.unregister(label, **asked)
        assert (told.cookie, told.address, told.alive) == (registered.cookie, registered.address, False)

    # -- what there is -----------------------------------------------------------------------------

    @invariant()
    def is_what_the_model_is(self) -> None:
        bindings = sorted(map(bound, self.model()))
        assert list(self.dispatcher.bindings()) == bindings
        assert self.dispatcher.policies() == {key: each for key, each in self.policies.items() if each != Policy()}
        expected = {
            (label, protocol, FAMILIES[version], slot, each.cookie, each.address, True)
            for (label, protocol, version, slot), each in self.slots.items()
        }
        found = self.dispatcher.sockets()
        assert {(each.label, each.protocol.name.lower(), *each[2:]) for each in found} == expected
        assert len(found) == len(expected)

        status = self.dispatcher.status()
        served = {key[0] for key in self.slots}
        labels = {*self.rules.values(), *served, *(key for key, each in self.policies.items() if each != Policy())}
        assert status.unserved == tuple(sorted(set(self.rules.values()) - served))
        assert (status.bindings, status.sockets, status.dead) == (len(bindings), len(expected), 0)
        assert [each.label for each in status.labels] == sorted(labels)
        for each in status.labels:
            owned = sum(label == each.label for label in self.rules.values())
            socks = sum(key[0] == each.label for key in self.slots)
            policy = self.policies.get(each.label, Policy())
            assert each[1:] == (owned, socks, 0, *policy)

    @invariant()
    def answers_as_the_rule_says(self) -> None:
        rules = oracle.by_precedence(self.model())
        choose = random.Random(len(rules))
        for question in oracle.questions(choose, rules, oracle.ANYWHERE, 20):
            decision = self.dispatcher.explain(question.protocol, question.destination)
            found = oracle.find(rules, question)
            if found is None:
                assert decision == (Verdict.PASS, None, None, None, 0, "unbound")
                continue
            assert (decision.binding, decision.label) == (bound(found), found.label)
            slots = self.live(found.label, question.protocol, question.version)
            if slots:
                assert (decision.verdict, decision.reason) == (Verdict.PASS, "selected")
                assert (decision.slot, decision.cookie) in slots
            else:
                missing = self.policies.get(found.label, Policy()).on_missing
                verdict = Verdict.DROP if missing == "reset" else Verdict.PASS
                assert decision[3:] == (None, 0, missing)
                assert decision.verdict == verdict

    def live(self, label: str, protocol: str, version: int) -> set[tuple[int, int]]:
        """The slots that a look-up may reach, and their cookies: a dual-stack socket where there is none of IPv4."""
        own = {(key[3], each.cookie) for key, each in self.slots.items() if key[:3] == (label, protocol, version)}
        if version == 6 or own:
            return own
        return {
            (key[3], each.cookie) for key, each in self.slots.items() if key[:3] == (label, protocol, 6) and each.dual
        }


def test_any_order_of_calls(netns: pyskl.NetNS) -> None:
    with Dispatcher.create(netns) as dispatcher:

        class Here(Machine):
            ns = netns

        Here.dispatcher = dispatcher
        run_state_machine_as_test(Here, settings=SETTINGS)
        del Here.dispatcher
