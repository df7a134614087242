"""Random tables and look-ups: the kernel's answers are those of a plain list that is searched by the written rule.

A sample of them is asked in each run. All, 1,200 tables with 1,200,000 look-ups and 1,000 with 50,000 connections:

    PYSKL_TEST_WHOLE=1 ./ci/test tests/test_dispatcher_oracle.py

Each run has other tables; a failure says which, and PYSKL_TEST_SEED=… asks that one again.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Iterator

import oracle
import pytest
import support
from oracle import ANYWHERE, DOCUMENTATION, Question, Rule

import pyskl
from pyskl import Binding, Dispatcher, Verdict

WHOLE = "PYSKL_TEST_WHOLE" in os.environ
TABLES, LOOKUPS = (1000, 1000) if WHOLE else (100, 200)
CONNECTED, CONNECTIONS = (1000, 50) if WHOLE else (20, 40)

SIZES = [0, 1, 2, *[5, 20, 60] * 4, 200, 1000]  # of tables
LABELS = ["web", "api", "dns", "é", "x" * 255, "empty", "empty too", "a b"]
SERVED = LABELS[:4]  # these have sockets

# So many that the program searches no list of bindings and no index, as it does where they are fewer; on addresses of
# which nothing else is asked.
CROWD = [
    Binding("crowd", protocol, host, port)
    for protocol in ("tcp", "udp")
    for host in ("192.88.99.99", "2002::9999")
    for port in range(1, 8400)
]

pytestmark = [support.needs("sk_lookup"), pytest.mark.slow]


def seeds(count: int) -> Iterator[int]:
    """One for each table; a failure shows what was printed, and so the one that it is of."""
    given = os.environ.get("PYSKL_TEST_SEED")
    for seed in [int(given)] if given else random.sample(range(1 << 48), count):
        print(f"PYSKL_TEST_SEED={seed}")
        yield seed


def bound(rule: Rule) -> Binding:
    return Binding(rule.label, rule.protocol, rule.network, rule.ports)


def put_in_force(choose: random.Random, dispatcher: Dispatcher, rules: list[Rule], crowd: list[Binding]) -> None:
    """Let just these be bound: by one step, by many, or by both."""
    way = choose.randrange(3)
    if way == 0 or not rules:
        dispatcher.replace([*map(bound, rules), *crowd])
        return
    if way == 1:  # in no order
        dispatcher.replace(crowd)
        for rule in rules:
            dispatcher.bind(rule.label, rule.protocol, rule.network, rule.ports)
        return
    # From what has some of them, and those that another label has.
    some = choose.sample(rules, choose.randint(0, len(rules)))
    others = [rule._replace(label=choose.choice(LABELS)) for rule in choose.sample(rules, len(rules) // 2)]
    before = some + [rule for rule in others if rule[1:] not in {each[1:] for each in some}]
    dispatcher.replace([*map(bound, before), *crowd])
    for rule in set(before) - set(rules):
        if choose.random() < 0.5:
            dispatcher.unbind(rule.label, rule.protocol, rule.network, rule.ports)
    for rule in rules:
        dispatcher.bind(rule.label, rule.protocol, rule.network, rule.ports, replace=True)


@contextlib.contextmanager
def served(ns: pyskl.NetNS, dispatcher: Dispatcher) -> Iterator[dict[tuple[str, str, int], socket.socket]]:
    """A socket for each protocol and version of some labels."""
    with contextlib.ExitStack() as stack:
        socks = {}
        for label in SERVED:
            for protocol in ("tcp", "udp"):
                for version, host in ((4, "127.0.0.1"), (6, "::1")):
                    sock = stack.enter_context(support.server(ns, protocol, host))
                    dispatcher.register(label, sock)
                    socks[label, protocol, version] = sock
        yield socks


@pytest.mark.parametrize(("tables", "crowd"), [(TABLES, []), (TABLES // 5, CROWD)])
def test_explain_agrees_with_the_rule(netns: pyskl.NetNS, tables: int, crowd: list[Binding]) -> None:
    with Dispatcher.create(netns) as dispatcher, served(netns, dispatcher) as socks:
        cookies = {key: support.cookie(sock) for key, sock in socks.items()}
        found = 0
        for seed in seeds(tables):
            choose = random.Random(seed)
            within = choose.choice([DOCUMENTATION, ANYWHERE, ANYWHERE + DOCUMENTATION])
            rules = oracle.table(choose, within, LABELS, choose.choice(SIZES))
            put_in_force(choose, dispatcher, rules, crowd)
            sorted_rules = oracle.by_precedence(rules)
            assert [each for each in dispatcher.bindings() if each.label != "crowd"] == sorted(map(bound, rules))
            for question in oracle.questions(choose, rules, within, LOOKUPS):
                found += agrees(dispatcher, cookies, oracle.find(sorted_rules, question), question)
        assert found > tables * LOOKUPS // 4 or "PYSKL_TEST_SEED" in os.environ  # or it shows little


def agrees(
    dispatcher: Dispatcher,
    cookies: dict[tuple[str, str, int], int],
    rule: Rule | None,
    question: Question,
) -> bool:
    """Whether a rule was found, which the kernel found too."""
    decision = dispatcher.explain(question.protocol, question.destination)
    about = f"{question.protocol} {question.destination}: {rule}, not {decision}"
    if rule is None:
        assert decision == (Verdict.PASS, None, None, None, 0, "unbound"), about
        return False
    cookie = cookies.get((rule.label, question.protocol, question.version))
    expected = (Verdict.PASS, 0, cookie, "selected") if cookie else (Verdict.DROP, None, 0, "reset")
    assert (decision.binding, decision.label) == (bound(rule), rule.label), about
    assert (decision.verdict, decision.slot, decision.cookie, decision.reason) == expected, about
    return True


def test_connections_agree_with_the_rule(netns: pyskl.NetNS) -> None:
    """Where a label has no socket, and where nothing is bound, the client is refused."""
    with Dispatcher.create(netns) as dispatcher, served(netns, dispatcher) as socks:
        reached = 0
        for seed in seeds(CONNECTED):
            choose = random.Random(seed)
            rules = oracle.table(choose, DOCUMENTATION, LABELS, choose.choice([1, 5, 20, 60]))
            put_in_force(choose, dispatcher, rules, [])
            sorted_rules = oracle.by_precedence(rules)
            for question in oracle.questions(choose, rules, DOCUMENTATION, CONNECTIONS):
                if not any(oracle.is_within(question, network) for network in DOCUMENTATION):
                    continue  # an address that is not local: nobody is asked
                rule = oracle.find(sorted_rules, question)
                expected = socks.get((rule.label, question.protocol, question.version)) if rule else None
                try:
                    got = support.ask(question.protocol, netns, *question.destination, *socks.values())
                except ConnectionRefusedError:
                    got = None
                assert got is expected, f"{question.protocol} {question.destination}: {rule}"
                reached += got is not None
        assert reached > CONNECTED * CONNECTIONS // 10 or "PYSKL_TEST_SEED" in os.environ
