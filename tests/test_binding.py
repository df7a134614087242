"""Bindings: what makes one, what refuses to, how it is written and packed, and which goes first."""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import ipaddress
import itertools
import pickle
import re
import struct
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import pyskl
from pyskl import Binding, Bindings, Policy, Protocol, binding
from pyskl.binding import check_label, check_policy, conflict, port_ranges

pytestmark = pytest.mark.portable

COMMON = settings(deadline=None)
ABI = Path(__file__).parent.parent / "bpf" / "abi.h"

LABELS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60)
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
PROTOCOLS = st.sampled_from(["tcp", "udp", Protocol.TCP, Protocol.UDP, 6, 17, "TCP"])
PORTS = st.one_of(
    st.none(),
    st.integers(1, 65535),
    st.tuples(st.integers(0, 65535), st.integers(1, 65535))
    .filter(lambda pair: pair[0] <= pair[1])
    .map(lambda pair: range(pair[0], pair[1] + 1)),
)


@st.composite
def networks(draw: st.DrawFn) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    address = draw(ADDRESSES)
    return ipaddress.ip_network(f"{address}/{draw(st.integers(0, address.max_prefixlen))}", strict=False)


BINDINGS = st.builds(Binding, LABELS, PROTOCOLS, networks(), PORTS)


def first_and_last(ports: int | range | None) -> tuple[int, int]:
    """What *ports* of a binding mean, as a person would say it."""
    if ports is None:
        return 0, 65535
    return (ports, ports) if isinstance(ports, int) else (ports[0], ports[-1])


# -- what goes in comes out ------------------------------------------------------------------------


@given(LABELS, PROTOCOLS, networks(), PORTS)
@COMMON
def test_attributes_are_what_was_given(label, protocol, network, ports) -> None:
    made = Binding(label, protocol, network, ports)
    first, last = first_and_last(ports)
    assert (made.label, made.prefix) == (label, network)
    assert type(made.prefix) is type(network)
    assert made.protocol is (Protocol.TCP if protocol in ("tcp", "TCP", 6) else Protocol.UDP)
    assert made.ports == (None if (first, last) == (0, 65535) else first if first == last else range(first, last + 1))
    assert type(made.ports) in (int, range, type(None))


@given(BINDINGS)
@COMMON
def test_every_form_gives_the_same_binding_back(made: Binding) -> None:
    namespace = {"Binding": Binding}
    spelled = made.prefix.with_netmask if made.prefix.version == 4 else made.prefix.exploded
    again = [
        eval(repr(made), namespace),
        pickle.loads(pickle.dumps(made)),
        copy.copy(made),
        copy.deepcopy(made),
        Binding(made.label, made.protocol, str(made.prefix), made.ports),
        Binding(made.label, made.protocol, spelled, made.ports),
        Binding._unpack(made._packed, made.label),
    ]
    if made.label.split() == [made.label]:
        again.append(Binding.parse(str(made)))
    for other in again:
        assert other == made
        assert hash(other) == hash(made)
        assert not other != made
        assert (other.label, other.protocol, other.prefix, other.ports) == (
            made.label,
            made.protocol,
            made.prefix,
            made.ports,
        )


@given(BINDINGS)
@COMMON
@example(Binding("web", "tcp", "::192.0.2.1"))
@example(Binding("web", "tcp", "::ffff:192.0.2.1"))
def test_its_text_is_its_words(made: Binding) -> None:
    words = [made.label, made.protocol.name.lower(), str(made.prefix)]
    if made.ports is not None:
        words.append("-".join(map(str, sorted(set(first_and_last(made.ports))))))
    assert str(made) == " ".join(words)


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "web tcp 192.0.2.0/24 80": ("web", Protocol.TCP, "192.0.2.0/24", 80),
        "  web\tUDP 192.0.2.1\n": ("web", Protocol.UDP, "192.0.2.1/32", None),
        "é tcp 2001:DB8::/32 1024-65535": ("é", Protocol.TCP, "2001:db8::/32", range(1024, 65536)),
        "web tcp ::ffff:192.0.2.1 0-65535": ("web", Protocol.TCP, str(ipaddress.ip_network("::ffff:c000:201")), None),
        "web tcp 0.0.0.0/0 0-0080": ("web", Protocol.TCP, "0.0.0.0/0", range(81)),
        "web tcp 192.0.2.0/255.255.255.0 80-80": ("web", Protocol.TCP, "192.0.2.0/24", 80),
    }.items(),
)
def test_parse(text: str, expected: tuple) -> None:
    made = Binding.parse(text)
    label, protocol, prefix, ports = expected
    assert (made.label, made.protocol, made.prefix, made.ports) == (
        label,
        protocol,
        ipaddress.ip_network(prefix),
        ports,
    )


@pytest.mark.parametrize(
    "text",
    ["", "web", "web tcp", "web tcp 192.0.2.0/24 80 81", "web site tcp 192.0.2.0/24 80"],
)
def test_parse_quotes_what_it_does_not_take(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Binding.parse(text)


def test_parse_takes_text_alone() -> None:
    with pytest.raises(TypeError, match="not 5"):
        Binding.parse(5)


# -- ports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        (None, [(0, 65535)]),
        (80, [(80, 80)]),
        (65535, [(65535, 65535)]),
        ("80", [(80, 80)]),
        ("80-80", [(80, 80)]),
        ("1024-65535", [(1024, 65535)]),
        ("0-65535", [(0, 65535)]),
        ("0-1", [(0, 1)]),
        (range(80, 81), [(80, 80)]),
        (range(65536), [(0, 65535)]),
        (range(1, 65536), [(1, 65535)]),
        ([443, 80], [(80, 80), (443, 443)]),
        ({"80", 80, range(80, 81)}, [(80, 80)]),
        (["8000-8999", 80, range(8000, 9000)], [(80, 80), (8000, 8999)]),
        ([None, 80], [(0, 65535), (80, 80)]),
        ((port for port in (3, 2, 1)), [(1, 1), (2, 2), (3, 3)]),
        (["1-10", "5-20"], [(1, 10), (5, 20)]),
        ([Protocol.TCP], [(6, 6)]),
    ],
)
def test_port_ranges(ports: object, expected: list[tuple[int, int]]) -> None:
    assert port_ranges(ports) == tuple(expected)


BAD_PORTS = [
    (0, ValueError),
    ("0", ValueError),
    ("0-0", ValueError),
    (range(1), ValueError),
    (-1, ValueError),
    (65536, ValueError),
    (1 << 80, ValueError),
    ("65536", ValueError),
    ("1-65536", ValueError),
    ("99999-99999", ValueError),
    ("2-1", ValueError),
    ("", ValueError),
    ("-", ValueError),
    ("1-", ValueError),
    ("-1", ValueError),
    ("1-2-3", ValueError),
    (" 80", ValueError),
    ("80 ", ValueError),
    ("80\n", ValueError),
    ("+80", ValueError),
    ("8_0", ValueError),
    ("\u0668\u0660", ValueError),
    ("80,443", ValueError),
    ("http", ValueError),
    ("0x50", ValueError),
    (range(1, 10, 2), ValueError),
    (range(10, 1, -1), ValueError),
    (range(10, 10), ValueError),
    (range(-1, 10), ValueError),
    (range(1, 65537), ValueError),
    (True, TypeError),
    (False, TypeError),
    (80.0, TypeError),
    (b"80", TypeError),
    (bytearray(b"80"), TypeError),
    (object, TypeError),
]


@pytest.mark.parametrize(("ports", "error"), BAD_PORTS, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize("among", [False, True])
def test_bad_ports_are_quoted(ports: object, error: type[Exception], among: bool) -> None:
    for make in (port_ranges, lambda given: Binding("web", "tcp", "192.0.2.0/24", given)):
        with pytest.raises(error, match=re.escape(repr(ports))):
            make([443, ports] if among else ports)


@pytest.mark.parametrize("ports", [[], (), {}, iter(())])
def test_no_ports_are_not_all_ports(ports: object) -> None:
    with pytest.raises(ValueError, match="leave them out"):
        port_ranges(ports)


def test_lists_in_lists_are_no_ports() -> None:
    with pytest.raises(TypeError, match=re.escape("[81]")):
        port_ranges([80, [81]])


def test_a_binding_has_one_range() -> None:
    assert Binding("web", "tcp", "192.0.2.0/24", [80]).ports == 80
    assert Binding("web", "tcp", "192.0.2.0/24", ["80", 80]).ports == 80
    with pytest.raises(ValueError, match=re.escape("[80, 443]")):
        Binding("web", "tcp", "192.0.2.0/24", [80, 443])


# -- prefixes --------------------------------------------------------------------------------------

ALPHABET = st.text("0123456789abcdefABCDEF.:/%gx- ", max_size=24)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """The text of a prefix, in one of its spellings, with a character or two changed, added or taken away."""
    address = draw(ADDRESSES)
    spellings = [str(address), address.exploded, address.exploded.upper()]
    if address.version == 6:
        low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        spellings += [f"::{low}", f"::ffff:{low}", f"{':'.join(address.exploded.split(':')[:6])}:{low}"]
    text = draw(st.sampled_from(spellings))
    text += draw(st.sampled_from(["", "/0", "/8", "/24", "/024", "/32", "/33", "/64", "/128", "/129", "/255.255.0.0"]))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text("0123456789abcdef.:/%x ", max_size=2)) + text[at + draw(st.integers(0, 1)) :]
    return text


@given(st.one_of(damaged(), ALPHABET, st.text(max_size=12), networks().map(str)))
@settings(deadline=None, max_examples=2000)
@example("192.0.2.01")
@example("192.0.2.1/")
@example("/24")
@example("192.0.2")
@example("192.0.2.0/+24")
@example("192.0.2.0/2_4")
@example("192.0.2.0/ 24")
@example("192.0.2.0/24/24")
@example("192.0.2.0/\u0662\u0664")
@example("192.0.2.0/0.0.0.255")
@example("192.0.2.0/255.0.255.0")
@example("::")
@example(":::")
@example("1::2::3")
@example("00001::")
@example("1:2:3:4:5:6:7::")
@example("::2:3:4:5:6:7:8")
@example("1::2:3:4:5:6:7:8")
@example("1:2:3:4:5:6:7:8:9")
@example("::1.2.3")
@example("::1.2.3.04")
@example("1.2.3.4::")
@example("::%eth0")
@example("fe80::1%1/128")
@example("192.0.2.1\0")
@example("192.0.2.1\n")
@example("\ud800::")
def test_prefixes_are_what_ipaddress_takes_less_scopes(text: str) -> None:
    try:
        expected = None if "%" in text else ipaddress.ip_network(text)
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            Binding("web", "tcp", text)
    else:
        made = Binding("web", "tcp", text)
        assert made.prefix == expected
        assert type(made.prefix) is type(expected)


@pytest.mark.parametrize(
    "prefix",
    ["192.0.2.1", "192.0.2.0/24", "2001:db8::1", "2001:db8::/32", "0.0.0.0/0", "::/0", "::ffff:192.0.2.1"],
)
def test_objects_of_ipaddress_are_prefixes(prefix: str) -> None:
    network = ipaddress.ip_network(prefix)
    assert Binding("web", "tcp", network).prefix == network
    if "/" not in prefix:
        assert Binding("web", "tcp", ipaddress.ip_address(prefix)).prefix == network


@pytest.mark.parametrize(
    "prefix",
    [
        ipaddress.ip_interface("192.0.2.1/24"),
        ipaddress.ip_interface("2001:db8::1/64"),
        ipaddress.ip_address("fe80::1%eth0"),
        ipaddress.ip_address("fe80::1%1"),
    ],
    ids=str,
)
def test_host_bits_and_scopes_are_refused_in_objects_too(prefix: object) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(str(prefix)))):
        Binding("web", "tcp", prefix)


def test_host_bits_are_told_with_the_network() -> None:
    with pytest.raises(ValueError, match=r"'192\.0\.2\.1/24' has host bits set: its network is 192\.0\.2\.0/24"):
        Binding("web", "tcp", "192.0.2.1/24")


@pytest.mark.parametrize("prefix", [None, 3221225985, b"192.0.2.1", ("192.0.2.0", 24), 1.5, True, []], ids=repr)
def test_other_types_are_no_prefixes(prefix: object) -> None:
    with pytest.raises(TypeError, match=re.escape(repr(prefix))):
        Binding("web", "tcp", prefix)


@pytest.mark.parametrize("protocol", ["sctp", "", "tcp ", 132, None, [], 1, b"tcp", "tcp6"], ids=repr)
def test_other_protocols_are_refused(protocol: object) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(protocol))):
        Binding("web", protocol, "192.0.2.1")


# -- labels ----------------------------------------------------------------------------------------


@given(
    st.one_of(st.text(max_size=20), LABELS, st.text(max_size=300), st.sampled_from(["é" * 127, "é" * 128, "x" * 255]))
)
@COMMON
@example("x" * 255)
@example("x" * 256)
@example("é" * 127)
@example("é" * 128)
@example("é" * 127 + "x")
@example("\u2028")
@example("\xa0")
@example("\ud800")
@example("a\tb")
@example("\x7f")
@example("\x85")
@example("\u202e")
def test_labels(label: str) -> None:
    try:
        size = len(label.encode())
    except UnicodeEncodeError:
        size = 0
    good = 1 <= size <= 255 and all(unicodedata.category(character) != "Cc" for character in label)
    for check in (check_label, lambda given: Binding(given, "tcp", "192.0.2.1").label):
        if good:
            assert check(label) == label
        else:
            with pytest.raises(ValueError, match=re.escape(repr(label))):
                check(label)


@pytest.mark.parametrize("label", [None, b"web", 5, ["web"]], ids=repr)
def test_labels_are_text(label: object) -> None:
    with pytest.raises(TypeError, match=re.escape(repr(label))):
        Binding(label, "tcp", "192.0.2.1")


def test_a_label_is_the_text_alone() -> None:
    class Name(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "another"

    made = Binding(Name("web"), "tcp", "192.0.2.1")
    assert type(made.label) is str
    assert str(made) == "web tcp 192.0.2.1/32"


# -- order and equality ----------------------------------------------------------------------------


def compare(one: Binding, other: Binding) -> int:
    """The written rule, one sentence after the other: negative where `one` goes first."""
    if one.prefix.prefixlen != other.prefix.prefixlen:
        return other.prefix.prefixlen - one.prefix.prefixlen
    (first, last), (other_first, other_last) = first_and_last(one.ports), first_and_last(other.ports)
    if last - first != other_last - other_first:
        return (last - first) - (other_last - other_first)
    if one.prefix.version != other.prefix.version:
        return one.prefix.version - other.prefix.version
    if one.prefix.network_address != other.prefix.network_address:
        return -1 if one.prefix.network_address < other.prefix.network_address else 1
    if one.protocol != other.protocol:
        return -1 if one.protocol == Protocol.TCP else 1
    if first != other_first:
        return first - other_first
    return (one.label > other.label) - (one.label < other.label)


NEAR = st.builds(
    Binding,
    st.sampled_from(["a", "b", "é"]),
    st.sampled_from(["tcp", "udp"]),
    st.sampled_from(["0.0.0.0/0", "::/0", "192.0.2.0/24", "192.0.3.0/24", "2001:d00::/24", "255.0.0.0/32", "::/32"]),
    st.sampled_from([None, 1, 2, "1-2", "2-3", "1-65535", "0-65534", 256, 255]),
)


# Each differs from the one before it in one thing, and would go the other way by all that counts less.
SORTED = """\
b udp ffff::/128 2-4
a tcp 10.0.0.0/31 1
b udp 10.0.0.0/30 9
b udp 10.0.0.4/30 8-9
b udp ffff::/30 7-8
b udp 10.0.0.0/30
b udp 10.0.0.0/29 9
b udp f000::/29 8
b tcp ff00::/29 7
a udp ff00::/29 6
b udp ff00::/29 6
a udp ff00::/29 7
"""


def test_what_counts_more_goes_first() -> None:
    made = [Binding.parse(line) for line in SORTED.splitlines()]
    assert sorted(made[::-1]) == made


@given(st.lists(st.one_of(NEAR, BINDINGS), max_size=30))
@COMMON
def test_they_are_sorted_by_precedence(made: list[Binding]) -> None:
    expected = sorted(made, key=functools.cmp_to_key(compare))
    assert sorted(made) == expected
    assert sorted(made, reverse=True) == expected[::-1]
    for one, other in itertools.pairwise(expected):
        order = compare(one, other)
        assert (one < other, one <= other, one > other, one >= other) == (order < 0, True, False, order == 0)
        assert (one == other) == (order == 0)


@given(NEAR, NEAR)
@COMMON
def test_they_are_equal_where_all_four_attributes_are(one: Binding, other: Binding) -> None:
    attributes = [(it.label, it.protocol, it.prefix, it.ports) for it in (one, other)]
    assert (one == other) == (attributes[0] == attributes[1])
    assert (one != other) == (attributes[0] != attributes[1])
    assert len({one, other}) == len(set(attributes))
    assert {one: 1}.get(other) == (1 if one == other else None)


def test_other_things_are_neither_equal_nor_ordered() -> None:
    made = Binding("web", "tcp", "192.0.2.1", 80)
    assert made != str(made)
    assert made != ("web", "tcp", "192.0.2.1", 80)
    for operator in ("__lt__", "__le__", "__gt__", "__ge__"):
        assert getattr(made, operator)("web") is NotImplemented
    with pytest.raises(TypeError):
        sorted([made, "web"])


def test_a_binding_never_changes() -> None:
    made = Binding("web", "tcp", "192.0.2.1", 80)
    for name in ("label", "protocol", "prefix", "ports", "more"):
        with pytest.raises(AttributeError):
            setattr(made, name, "x")
        with pytest.raises(AttributeError):
            delattr(made, name)
    assert not hasattr(made, "__dict__")
    assert Binding.__match_args__ == tuple(inspect.signature(Binding).parameters)


def test_matching() -> None:
    names = Binding.__match_args__
    made = Binding("web", "tcp", "192.0.2.1", 80)
    assert [getattr(made, name) for name in names] == ["web", Protocol.TCP, ipaddress.ip_network("192.0.2.1"), 80]


# -- the packed form -------------------------------------------------------------------------------


def c_struct(header: str, name: str) -> type[ctypes.Structure]:
    """A struct of plain declarations, laid out as C does it."""
    body = re.search(rf"struct {name} \{{(.*?)\}};", header, re.DOTALL)[1]
    fields = []
    for bits, names in re.findall(r"__u(\d+) ([^;]+);", re.sub(r"/\*.*?\*/", "", body)):
        fields += [(field.strip(), getattr(ctypes, f"c_uint{bits}")) for field in names.split(",")]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


RECORD = c_struct(ABI.read_text(), "pyskl_binding")


@given(BINDINGS, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@COMMON
def test_the_packed_form_is_the_struct_of_the_header(made: Binding, label: int, mark: int) -> None:
    assert len(made._packed) == ctypes.sizeof(RECORD) == binding.RECORD_SIZE
    record = RECORD.from_buffer_copy(made._packed)
    address = int(made.prefix.network_address)
    v6 = made.prefix.version == 6
    assert (record.hi, record.lo) == ((address >> 64, address % 2**64) if v6 else (address << 32, 0))
    assert (record.first, record.last) == first_and_last(made.ports)
    assert (record.length, record.family) == (made.prefix.prefixlen, v6)
    assert record.protocol == (made.protocol == Protocol.UDP)
    assert (record.label, record.unused, record.mark) == (0, 0, 0)
    record.label, record.mark = label, mark
    assert Binding._unpack(bytes(record), made.label) == made


def of(made: list[Binding]) -> Bindings:
    """These, each label under a number of its own."""
    numbers = {label: number for number, label in enumerate(sorted({each.label for each in made}), 7)}
    records = b"".join(
        each._packed[:16] + struct.pack("=I", numbers[each.label]) + each._packed[20:28] + struct.pack("=I", 5)
        for each in made
    )
    return Bindings(records, {number: label for label, number in numbers.items()})


@given(st.lists(st.one_of(NEAR, BINDINGS), max_size=8), st.slices(8), st.integers(-10, 10))
@COMMON
def test_bindings_are_a_sequence(made: list[Binding], places: slice, place: int) -> None:
    lazy = of(made)
    assert len(lazy) == len(made)
    assert lazy == made == list(lazy)
    assert made == lazy
    assert tuple(made) == lazy
    assert lazy == of(made)
    assert lazy[:] == made
    assert lazy[places] == made[places]
    assert isinstance(lazy[places], Bindings)
    assert list(reversed(lazy)) == made[::-1]
    assert bool(lazy) == bool(made)
    assert lazy != [*made, Binding("more", "tcp", "192.0.2.1")]
    if -len(made) <= place < len(made):
        assert lazy[place] == made[place]
        assert lazy.index(made[place]) == made.index(made[place])
        assert lazy.count(made[place]) == made.count(made[place])
    else:
        with pytest.raises(IndexError):
            lazy[place]
    for each in made:
        assert each in lazy
    assert Binding("more", "tcp", "192.0.2.1") not in lazy


@given(st.lists(BINDINGS, min_size=1, max_size=4), st.lists(BINDINGS, min_size=1, max_size=4))
@COMMON
def test_bindings_are_equal_by_their_elements(made: list[Binding], others: list[Binding]) -> None:
    assume(made != others)
    assert of(made) != of(others)
    assert of(made) != others
    numbered = Bindings(b"".join(each._packed for each in made[:1]), {0: made[0].label})
    assert numbered == of(made[:1])
    assert (of(made) == "text") is (of(made) == 5) is False
    with pytest.raises(TypeError):
        hash(of(made))


def test_bindings_say_what_they_are_in_one_line() -> None:
    made = [Binding("web", "tcp", f"192.0.2.{number}", 80) for number in range(100)]
    assert repr(of([])) == "<0 bindings>"
    assert repr(of(made[:1])) == "<1 bindings: web tcp 192.0.2.0/32 80>"
    text = repr(of(made))
    assert text.startswith("<100 bindings: web tcp 192.0.2.0/32 80, ")
    assert text.endswith(", …>")
    assert len(text) < 120


# -- conflicts and policies ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (
            "web tcp 192.0.2.0/24 1-100",
            "api tcp 192.0.2.0/24 50-150",
            "web tcp 192.0.2.0/24 1-100 and api tcp 192.0.2.0/24 50-150 overlap in part",
        ),
        (
            "web tcp 192.0.2.0/24 80",
            "api tcp 192.0.2.0/24 80",
            "web tcp 192.0.2.0/24 80 and api tcp 192.0.2.0/24 80 are the same for two labels",
        ),
    ],
)
def test_a_conflict_names_both(first: str, second: str, text: str) -> None:
    pair = Binding.parse(first), Binding.parse(second)
    error = conflict(*pair)
    assert type(error) is pyskl.BindingConflict
    assert error.bindings == pair
    assert str(error) == text


@pytest.mark.parametrize("on_missing", ["reset", "hold", "fallthrough"])
@pytest.mark.parametrize("udp_sticky", [0, 1, 2**32 - 1])
def test_policies(on_missing: str, udp_sticky: int) -> None:
    assert check_policy(on_missing, udp_sticky) == Policy(on_missing, udp_sticky)
    assert f"#define PYSKL_{on_missing.upper()} {binding.ON_MISSING.index(on_missing)}\n" in ABI.read_text()


def test_a_policy_by_itself_is_the_default() -> None:
    assert Policy() == ("reset", 0)


@pytest.mark.parametrize(
    ("on_missing", "udp_sticky", "error", "quoted"),
    [
        ("drop", 0, ValueError, "'drop'"),
        ("", 0, ValueError, "''"),
        ("Reset", 0, ValueError, "'Reset'"),
        (None, 0, TypeError, "None"),
        (1, 0, TypeError, "1"),
        ("hold", -1, ValueError, "-1"),
        ("hold", 2**32, ValueError, str(2**32)),
        ("hold", 1.5, TypeError, "1.5"),
        ("hold", True, TypeError, "True"),
        ("hold", "30", TypeError, "'30'"),
        ("hold", None, TypeError, "None"),
    ],
)
def test_bad_policies_are_quoted(on_missing: object, udp_sticky: object, error: type[Exception], quoted: str) -> None:
    with pytest.raises(error, match=re.escape(quoted)):
        check_policy(on_missing, udp_sticky)
