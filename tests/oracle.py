"""Which binding a look-up finds: the written rule, on a plain list; random tables, and the look-ups that probe them.

Nothing here goes through pyskl. A table is sorted by the rule and searched from its beginning: an answer is right if
the rule is. Tables nest deeply, and look-ups ask for the first and the last address and port of each binding, and for
the one before and the one after.
"""

from __future__ import annotations

import ipaddress
import random
from typing import NamedTuple

DOCUMENTATION = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
ANYWHERE = ("0.0.0.0/0", "::/0")
BITS = {4: 32, 6: 128}
LAST_PORT = 65535


class Rule(NamedTuple):
    """One binding. `prefix` is the number of its first address."""

    label: str
    protocol: str
    version: int
    prefix: int
    length: int
    first: int
    last: int

    @property
    def last_address(self) -> int:
        return self.prefix + (1 << BITS[self.version] - self.length) - 1

    @property
    def network(self) -> str:
        return f"{address(self.version, self.prefix)}/{self.length}"

    @property
    def ports(self) -> str | None:
        return None if (self.first, self.last) == (0, LAST_PORT) else f"{self.first}-{self.last}"

    def contradicts(self, other: Rule) -> bool:
        """The same protocol, prefix and range, or ranges that overlap in part."""
        if (self.protocol, self.version, self.prefix, self.length) != (
            other.protocol,
            other.version,
            other.prefix,
            other.length,
        ):
            return False
        if (self.first, self.last) == (other.first, other.last):
            return self.label != other.label
        apart = self.last < other.first or other.last < self.first
        inside = other.first <= self.first and self.last <= other.last
        around = self.first <= other.first and other.last <= self.last
        return not (apart or inside or around)


class Question(NamedTuple):
    """One look-up."""

    protocol: str
    version: int
    address: int
    port: int

    @property
    def destination(self) -> tuple[str, int]:
        return address(self.version, self.address), self.port


def address(version: int, number: int) -> str:
    return str(ipaddress.IPv4Address(number) if version == 4 else ipaddress.IPv6Address(number))


def is_within(question: Question, network: str) -> bool:
    return ipaddress.ip_address(question.destination[0]) in ipaddress.ip_network(network)


def by_precedence(rules: list[Rule]) -> list[Rule]:
    """The longest prefix first; for equal prefixes the narrowest range of ports."""
    return sorted(rules, key=lambda rule: (-rule.length, rule.last - rule.first))


def find(rules: list[Rule], question: Question) -> Rule | None:
    """The first of sorted rules that the look-up matches."""
    for rule in rules:
        if (
            rule.prefix <= question.address <= rule.last_address
            and rule.first <= question.port <= rule.last
            and rule.version == question.version
            and rule.protocol == question.protocol
        ):
            return rule
    return None


# -- random tables ---------------------------------------------------------------------------------


def table(choose: random.Random, within: tuple[str, ...], labels: list[str], size: int) -> list[Rule]:
    """Rules in no order, of which no two contradict each other; `size` is aimed at."""
    roots = [ipaddress.ip_network(network) for network in within]
    roots = choose.sample(roots, choose.randint(1, len(roots)))  # one family, or both
    places = [_inside(choose, choose.choice(roots)) for _ in range(choose.choice([1, 2, 5, size]))]
    protocols = choose.choice([["tcp"], ["udp"], ["tcp", "udp"]])
    lengths = choose.choice([1, 3, 129])  # how many prefixes stand around a place
    ranges = choose.choice([1, 3, 40])  # how many ranges there are on a prefix
    rules: list[Rule] = []
    by_prefix: dict[tuple[str, int, int, int], list[Rule]] = {}
    for _ in range(size * 3):
        if len(rules) >= size:
            break
        root, place = choose.choice(places)
        bits = BITS[root.version]
        spread = range(root.prefixlen, bits + 1)
        length = choose.choice(
            [root.prefixlen, bits, choose.choice(spread[:lengths]), choose.choice(spread[-lengths:])]
        )
        prefix = place >> bits - length << bits - length
        if choose.random() < 0.2:  # the one beside it
            prefix ^= 1 << bits - length if length > root.prefixlen else 0
        key = choose.choice(protocols), root.version, prefix, length
        there = by_prefix.setdefault(key, [])
        if len(there) >= ranges:
            continue
        first, last = _range(choose, there)
        label = choose.choice(labels)
        if there and choose.random() < 0.1:
            label = there[-1].label  # neighbours and nested ones of one label
        rule = Rule(label, *key, first, last)
        if not any(rule.contradicts(other) or rule == other for other in there):
            there.append(rule)
            rules.append(rule)
    choose.shuffle(rules)
    return rules


def _inside(choose: random.Random, root: ipaddress.IPv4Network | ipaddress.IPv6Network) -> tuple[object, int]:
    """A place in a network: often its first or last address, or one of few bits."""
    size = root.num_addresses
    offset = choose.choice([0, size - 1, size // 2, choose.randrange(size), choose.randrange(min(size, 300))])
    return root, int(root.network_address) + offset


def _range(choose: random.Random, there: list[Rule]) -> tuple[int, int]:
    """A range of ports: of any kind, or inside, around or beside one that is there."""
    kind = choose.randrange(6)
    if kind == 0:
        return 0, LAST_PORT
    if kind == 1:
        port = choose.choice([1, 53, 80, 443, 8080, LAST_PORT - 1, LAST_PORT, choose.randint(1, LAST_PORT)])
        return port, port
    if kind == 2 or not there:
        first = choose.choice([0, 1, 1024, choose.randint(0, LAST_PORT - 1)])
        return first, choose.choice([first + 1, LAST_PORT, choose.randint(first + 1, LAST_PORT)])
    _, _, _, _, _, first, last = choose.choice(there)
    if kind == 3:  # inside, or the same
        low = choose.randint(first, last)
        high = choose.choice([low, last, choose.randint(low, last)])
        return (low, high) if high else (0, 1)
    if kind == 4:  # around
        return choose.randint(0, first), choose.choice([last or 1, choose.randint(last or 1, LAST_PORT)])
    if last < LAST_PORT:  # the next ones
        return last + 1, choose.choice([last + 1, choose.randint(last + 1, LAST_PORT)])
    return (0, first - 1) if first > 1 else (1, LAST_PORT)


def questions(choose: random.Random, rules: list[Rule], within: tuple[str, ...], count: int) -> list[Question]:
    """Look-ups at the edges of rules, inside them, and anywhere in the networks."""
    roots = [ipaddress.ip_network(network) for network in within]
    asked = []
    for _ in range(count):
        if not rules or choose.random() < 0.05:
            root, place = _inside(choose, choose.choice(roots))
            asked.append(Question(choose.choice(["tcp", "udp"]), root.version, place, choose.randint(1, LAST_PORT)))
            continue
        rule, other = choose.choice(rules), choose.choice(rules)
        edges = (rule.prefix - 1, rule.prefix, rule.last_address, rule.last_address + 1)
        number = choose.choice([*edges, choose.randint(rule.prefix, rule.last_address)])
        if choose.random() < 0.2:  # a rule's ports at another's address
            rule = other
        edges = (rule.first - 1, rule.first, rule.last, rule.last + 1)
        port = choose.choice([*edges, choose.randint(rule.first, rule.last)])
        version = choose.choice([4, 6]) if number < 1 << 32 and choose.random() < 0.02 else rule.version
        number = min(max(number, 0), (1 << BITS[version]) - 1)
        protocol = rule.protocol if choose.random() < 0.9 else choose.choice(["tcp", "udp"])
        asked.append(Question(protocol, version, number, min(max(port, 1), LAST_PORT)))
    return asked
