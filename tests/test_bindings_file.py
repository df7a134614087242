"""The bindings file: what it may say, what is refused and how, and that it is read back as it was written."""

from __future__ import annotations

import ipaddress
import json
import random
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyskl import Binding, BindingsFileError, Policy, _sys
from pyskl.binding import RECORD, RECORD_SIZE
from pyskl.bindings_file import dump, load

try:
    import tomllib
except ModuleNotFoundError:
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        tomllib = None

pytestmark = pytest.mark.portable

COMMON = settings(deadline=None)
FORMATS = ["json", "toml"]

needs_toml = pytest.mark.skipif(tomllib is None, reason="TOML needs Python 3.11, or tomli")


# -- what it says ----------------------------------------------------------------------------------

LABELS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
PORT = st.one_of(st.integers(1, 65535), st.integers(1, 65535).map(str))
RANGE = st.tuples(st.integers(0, 65535), st.integers(1, 65535)).map(sorted).map(lambda pair: f"{pair[0]}-{pair[1]}")
PORTS = st.one_of(PORT, RANGE.filter(lambda text: text != "0-0"), st.just("0-65535"))
POLICIES = st.builds(Policy, st.sampled_from(["reset", "hold", "fallthrough"]), st.integers(0, 2**32 - 1))


@st.composite
def prefixes(draw: st.DrawFn) -> str:
    address = draw(st.ip_addresses())
    length = draw(st.integers(0, address.max_prefixlen))
    network = ipaddress.ip_network(f"{address}/{length}", strict=False)
    if length == address.max_prefixlen and draw(st.booleans()):
        return str(address)
    return draw(st.sampled_from([str(network), network.exploded, network.exploded.upper()]))


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    entry = {"label": draw(st.one_of(st.sampled_from(["web", "api"]), LABELS)), "prefix": draw(prefixes())}
    if draw(st.booleans()):
        entry["protocol"] = draw(st.sampled_from(["tcp", "udp"]))
    which = draw(st.integers(0, 3))
    if which == 1:
        entry["port"] = draw(st.integers(0, 65535))
    elif which == 2:
        entry["ports"] = draw(PORTS)
    elif which == 3:
        entry["ports"] = draw(st.lists(PORTS, min_size=1, max_size=4))
    return dict(draw(st.permutations(list(entry.items()))))


def meant(entry: dict[str, Any]) -> set[Binding]:
    """The bindings of an entry, as a person would read it."""
    protocols = [entry["protocol"]] if "protocol" in entry else ["tcp", "udp"]
    ports = entry.get("ports", entry.get("port") or None)
    return {
        Binding(entry["label"], protocol, entry["prefix"], part)
        for protocol in protocols
        for part in (ports if isinstance(ports, list) else [ports])
    }


def toml(document: dict[str, Any]) -> str:
    """A document in TOML, in tables of one line."""
    tables = [
        ", ".join(f"{key} = {json.dumps(value)}" for key, value in entry.items()) for entry in document["bindings"]
    ]
    text = f"bindings = [{', '.join(f'{{{table}}}' for table in tables)}]\n".replace("\x7f", "\\u007f")
    if "labels" in document:
        text += "[labels]\n"
    for label, policy in document.get("labels", {}).items():
        text += f"[labels.{json.dumps(label)}]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in policy.items())
    return re.sub(r"\\ud([89ab]..)\\ud([c-f]..)", lambda pair: json.loads(f'"{pair[0]}"'), text)  # TOML has no pairs


@given(
    st.lists(entries(), max_size=6),
    st.none() | st.dictionaries(LABELS, POLICIES, max_size=3),
    st.sampled_from(FORMATS),
    st.data(),
)
@COMMON
def test_every_entry_is_read(given_entries, policies, form, data) -> None:
    document: dict[str, Any] = {"bindings": given_entries}
    if policies is not None:
        document["labels"] = {
            label: data.draw(st.sampled_from([policy._asdict(), {"on_missing": policy.on_missing}, {}]))
            for label, policy in policies.items()
        }
        policies = {label: Policy(**policy) for label, policy in document["labels"].items()}
    if form == "toml" and tomllib is None:
        return
    text = json.dumps(document) if form == "json" else toml(document)
    for content in (text, text.encode(), b"\xef\xbb\xbf" + text.encode()):
        for name in ("", f"a.{form}"):
            found = load(content, name=name)
            assert found.policies == policies
            bindings = list(found.bindings)
            at = 0
            for entry in given_entries:
                expected = meant(entry)
                assert set(bindings[at : at + len(expected)]) == expected
                at += len(expected)
            assert at == len(bindings) == len(found.records) // RECORD_SIZE
            assert found.labels == list(dict.fromkeys(entry["label"] for entry in given_entries))


@given(
    st.lists(entries(), max_size=6),
    st.none() | st.dictionaries(LABELS | st.text("az-_09", min_size=1), POLICIES, max_size=3),
    st.sampled_from(FORMATS),
)
@COMMON
def test_what_is_written_is_read_back(given_entries, policies, form) -> None:
    if form == "toml" and tomllib is None:
        return
    first = load(json.dumps({"bindings": given_entries}))
    text = dump(first.bindings, policies, form)
    assert load(text) == load(text, name=f"a.{form}") == (first.labels, first.records, policies)
    assert dump(list(first.bindings), policies, form) == text
    assert text.endswith("\n")


BINDINGS = [Binding("web", "tcp", "192.0.2.0/24", 80), Binding('a "b" \\ é', "udp", "2001:db8::/32", "1024-65535")]
BINDINGS += [Binding("web", "udp", "::/0")]
POLICY = {"web": Policy("hold", 30), "a b": Policy()}

JSON_TEXT = """\
{
"bindings": [
{"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "ports": 80},
{"label": "a \\"b\\" \\\\ é", "protocol": "udp", "prefix": "2001:db8::/32", "ports": "1024-65535"},
{"label": "web", "protocol": "udp", "prefix": "::/0", "ports": null}
],
"labels": {
"web": {"on_missing": "hold", "udp_sticky": 30},
"a b": {"on_missing": "reset", "udp_sticky": 0}
}
}
"""

TOML_TEXT = """\
[[bindings]]
label = "web"
protocol = "tcp"
prefix = "192.0.2.0/24"
ports = 80

[[bindings]]
label = "a \\"b\\" \\\\ é"
protocol = "udp"
prefix = "2001:db8::/32"
ports = "1024-65535"

[[bindings]]
label = "web"
protocol = "udp"
prefix = "::/0"

[labels.web]
on_missing = "hold"
udp_sticky = 30

[labels."a b"]
on_missing = "reset"
udp_sticky = 0
"""


@pytest.mark.parametrize(("form", "text"), [("json", JSON_TEXT), ("toml", TOML_TEXT)])
def test_how_it_is_written(form: str, text: str) -> None:
    assert dump(BINDINGS, POLICY, form) == text


@pytest.mark.parametrize(
    ("policies", "form", "text"),
    [
        (None, "json", '{\n"bindings": []\n}\n'),
        ({}, "json", '{\n"bindings": [],\n"labels": {}\n}\n'),
        (None, "toml", "bindings = []\n"),
        ({}, "toml", "bindings = []\n\n[labels]\n"),
    ],
)
def test_how_nothing_is_written(policies: dict[str, Policy] | None, form: str, text: str) -> None:
    assert dump([], policies, form) == text
    if form == "json" or tomllib is not None:
        assert load(text) == ([], b"", policies)


def test_other_formats_are_not_written() -> None:
    with pytest.raises(ValueError, match="'yaml'"):
        dump([], None, "yaml")


def test_a_file_of_tubular() -> None:
    text = """{"bindings": [
        {"label": "web", "prefix": "192.0.2.0/24", "port": 80},
        {"label": "all", "prefix": "2001:db8::1", "port": 0}
    ]}"""
    expected = [
        Binding("web", "tcp", "192.0.2.0/24", 80),
        Binding("web", "udp", "192.0.2.0/24", 80),
        Binding("all", "tcp", "2001:db8::1"),
        Binding("all", "udp", "2001:db8::1"),
    ]
    assert load(text).bindings == expected
    assert load(text).policies is None


@needs_toml
def test_the_example_of_the_documentation() -> None:
    text = """
[[bindings]]
label = "web"
protocol = "tcp"
prefix = "192.0.2.0/24"
ports = [80, 443, "8000-8999"]

[labels.web]
on_missing = "hold"
udp_sticky = 30
"""
    found = load(text)
    assert found.bindings == [Binding("web", "tcp", "192.0.2.0/24", ports) for ports in (80, 443, "8000-8999")]
    assert found.policies == {"web": Policy("hold", 30)}


def test_the_name_tells_the_format() -> None:
    with pytest.raises(BindingsFileError, match=r"^a\.json: not JSON"):
        load("bindings = []", name="a.json")
    if tomllib is not None:
        with pytest.raises(BindingsFileError, match=r"^a\.toml: not TOML"):
            load('{"bindings": []}', name="a.toml")


def test_without_toml_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(BindingsFileError, match=r"pip install 'pyskl\[cli\]'"):
        load("bindings = []")
    assert load('{"bindings": []}').bindings == []


# -- what it may not say ---------------------------------------------------------------------------

GOOD = {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24"}

BAD_ENTRIES = {
    "unknown key": (GOOD | {"prot": 1}, "'prot'"),
    "prefix misspelt": ({"label": "web", "prefx": "192.0.2.0/24"}, "'prefx'"),
    "prefix missing": ({"label": "web"}, "the prefix is missing"),
    "prefix null": (GOOD | {"prefix": None}, "the prefix is missing"),
    "prefix number": (GOOD | {"prefix": 5}, "5"),
    "prefix list": (GOOD | {"prefix": ["192.0.2.1"]}, "['192.0.2.1']"),
    "prefix empty": (GOOD | {"prefix": ""}, "''"),
    "host bits": (GOOD | {"prefix": "192.0.2.1/24"}, "'192.0.2.1/24' has host bits set: its network is 192.0.2.0/24"),
    "octet": (GOOD | {"prefix": "192.0.2.256"}, "'192.0.2.256'"),
    "length": (GOOD | {"prefix": "2001:db8::/129"}, "'2001:db8::/129'"),
    "scope": (GOOD | {"prefix": "fe80::%eth0/64"}, "'fe80::%eth0/64'"),
    "two prefixes": (GOOD | {"prefix": "192.0.2.1\n192.0.2.2"}, r"'192.0.2.1\n192.0.2.2'"),
    "a line more": (GOOD | {"prefix": "192.0.2.1\n"}, r"'192.0.2.1\n'"),
    "surrogate": (GOOD | {"prefix": "\ud800"}, r"'\ud800'"),
    "label missing": ({"prefix": "192.0.2.0/24"}, "the label is missing"),
    "label null": (GOOD | {"label": None}, "None"),
    "label number": (GOOD | {"label": 5}, "5"),
    "label empty": (GOOD | {"label": ""}, "''"),
    "label long": (GOOD | {"label": "x" * 256}, "x" * 256),
    "label tab": (GOOD | {"label": "a\tb"}, r"'a\tb'"),
    "protocol": (GOOD | {"protocol": "sctp"}, "'sctp'"),
    "protocol null": (GOOD | {"protocol": None}, "None"),
    "protocol number": (GOOD | {"protocol": 6}, "6"),
    "port beside ports": (GOOD | {"port": 80, "ports": [81]}, "port 80 beside ports [81]"),
    "port null beside ports": (GOOD | {"port": 0, "ports": None}, "port 0 beside ports None"),
    "port true": (GOOD | {"port": True}, "True"),
    "port false": (GOOD | {"port": False}, "False"),
    "port fraction": (GOOD | {"port": 80.0}, "80.0"),
    "port text": (GOOD | {"port": "80"}, "'80'"),
    "port null": (GOOD | {"port": None}, "None"),
    "port list": (GOOD | {"port": [80]}, "[80]"),
    "port large": (GOOD | {"port": 65536}, "65536"),
    "port negative": (GOOD | {"port": -1}, "-1"),
    "ports empty": (GOOD | {"ports": []}, "[]"),
    "ports zero": (GOOD | {"ports": 0}, "0"),
    "ports zero in list": (GOOD | {"ports": [80, 0]}, "0"),
    "ports null in list": (GOOD | {"ports": [80, None]}, "None"),
    "ports true": (GOOD | {"ports": True}, "True"),
    "ports true in list": (GOOD | {"ports": [1, True]}, "True"),
    "ports fraction": (GOOD | {"ports": [80.0]}, "80.0"),
    "ports list in list": (GOOD | {"ports": [[80]]}, "[80]"),
    "ports table": (GOOD | {"ports": {"80": 1}}, "{'80': 1}"),
    "ports backwards": (GOOD | {"ports": "443-80"}, "'443-80'"),
    "ports words": (GOOD | {"ports": ["http"]}, "'http'"),
    "null": (None, "None"),
    "list": (["web", "tcp"], "['web', 'tcp']"),
    "text": ("web tcp 192.0.2.0/24", "'web tcp 192.0.2.0/24'"),
    "number": (5, "5"),
    "huge": (["x"] * 1000, "…"),
}

# Good ones that have all but one thing in common with a bad one: what was found of these says nothing about it.
BEFORE = [
    GOOD,
    GOOD | {"port": 1},
    GOOD | {"port": 80},
    GOOD | {"ports": [1, 80]},
    GOOD | {"ports": 1},
    GOOD | {"port": 0},
]


IN_TOML = [
    name
    for name, (entry, _) in BAD_ENTRIES.items()
    if tomllib and isinstance(entry, dict) and not re.search(r"null|\\ud8", json.dumps(entry))
]


@pytest.mark.parametrize(
    ("form", "name"), [("json", name) for name in BAD_ENTRIES] + [("toml", name) for name in IN_TOML]
)
def test_a_bad_entry_is_named_and_quoted(form: str, name: str) -> None:
    entry, quoted = BAD_ENTRIES[name]
    document = {"bindings": [*BEFORE, entry, GOOD, {"label": 5, "prefix": "also bad"}]}
    text = json.dumps(document) if form == "json" else toml(document).replace('{"80": 1}', '{"80" = 1}')
    with pytest.raises(BindingsFileError) as caught:
        load(text, name="f")
    message = str(caught.value)
    number = len(BEFORE) + 1
    assert message.startswith(f"f: entry {number} (bindings[{number - 1}]): ")
    assert quoted in message
    assert "\n" not in message
    assert len(message) < 500


BAD_DOCUMENTS = {
    "null": ("null", ""),
    "number": ("5", ""),
    "list": ('[{"label": "web", "prefix": "192.0.2.1"}]', ""),
    "text": ('"web"', ""),
    "unknown key": ('{"bindings": [], "bindngs": []}', "'bindngs'"),
    "nothing": ("{}", "bindings are missing"),
    "labels alone": ('{"labels": {}}', "bindings are missing"),
    "bindings null": ('{"bindings": null}', "None"),
    "bindings table": ('{"bindings": {"label": "web"}}', "{'label': 'web'}"),
    "trailing garbage": ('{"bindings": []} x', "Extra data"),
    "two documents": ('{"bindings": []}\n{"bindings": []}', "Extra data"),
    "cut off": ('{"bindings": [', "not JSON"),
    "bindings twice": ('{"bindings": [], "bindings": []}', "'bindings' is given twice"),
    "port twice": ('{"bindings": [{"label": "a", "prefix": "::", "port": 1, "port": 1}]}', "'port' is given twice"),
    "label twice": ('{"bindings": [], "labels": {"web": {}, "web": {}}}', "'web' is given twice"),
    "deep": ('{"bindings": ' + "[" * 100_000, ""),
    "long number": ('{"bindings": [{"port": ' + "9" * 5000 + "}]}", ""),
    "labels null": ('{"bindings": [], "labels": null}', "None"),
    "labels list": ('{"bindings": [], "labels": []}', "[]"),
    "policy null": ('{"bindings": [], "labels": {"web": null}}', "'web'"),
    "policy word": ('{"bindings": [], "labels": {"web": "hold"}}', "'hold'"),
    "policy key": ('{"bindings": [], "labels": {"web": {"on_mising": "hold"}}}', "'on_mising'"),
    "on_missing": ('{"bindings": [], "labels": {"web": {"on_missing": "drop"}}}', "'drop'"),
    "on_missing null": ('{"bindings": [], "labels": {"web": {"on_missing": null}}}', "None"),
    "udp_sticky text": ('{"bindings": [], "labels": {"web": {"udp_sticky": "30"}}}', "'30'"),
    "udp_sticky fraction": ('{"bindings": [], "labels": {"web": {"udp_sticky": 1.5}}}', "1.5"),
    "udp_sticky true": ('{"bindings": [], "labels": {"web": {"udp_sticky": true}}}', "True"),
    "udp_sticky negative": ('{"bindings": [], "labels": {"web": {"udp_sticky": -1}}}', "-1"),
    "label of a policy": ('{"bindings": [], "labels": {"": {}}}', "''"),
}


@pytest.mark.parametrize(("text", "quoted"), BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS)
@pytest.mark.parametrize("name", ["", "f.json"])
def test_a_bad_document_is_refused(text: str, quoted: str, name: str) -> None:
    with pytest.raises(BindingsFileError) as caught:
        load(text, name=name)
    assert quoted in str(caught.value)
    assert str(caught.value).startswith(f"{name}: " if name else "")
    assert isinstance(caught.value, ValueError)


@needs_toml
@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", "bindings are missing"),
        ("[[bindings]]\nlabel = 'a'\nlabel = 'b'\nprefix = '::'", "not TOML"),
        ("bindings = []\ngarbage", "not TOML"),
        ("[[bindings]]\nlabel = 'a'\nprefix = 1979-05-27", "entry 1 (bindings[0])"),
        ("[[bindings]]\nlabel = 'a'\nprefix = '::'\nport = 1979-05-27", "entry 1 (bindings[0])"),
        ("[[bindings]]\nlabel = 'a'\nprefix = '::'\nport = inf", "inf"),
        ("[bindings]\nlabel = 'a'\nprefix = '::'", "bindings are a list"),
    ],
)
def test_a_bad_document_of_toml_is_refused(text: str, quoted: str) -> None:
    with pytest.raises(BindingsFileError, match=re.escape(quoted)):
        load(text)


def test_what_is_no_utf_8_is_refused() -> None:
    with pytest.raises(BindingsFileError, match="utf-8"):
        load(b'{"bindings": [], "\xff": 1}')


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | prefixes(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["bindings", "labels", "label", "prefix", "port", "ports", "web"]), inner, max_size=5
            )
        ),
    ).map(json.dumps)
)
@COMMON
def test_anything_is_read_or_refused(text: str) -> None:
    try:
        found = load(text)
    except BindingsFileError:
        return
    assert len(found.bindings) == len(list(found.bindings))


def test_it_takes_text_or_bytes() -> None:
    with pytest.raises((TypeError, AttributeError)):
        load(5)


# -- prefixes by the line --------------------------------------------------------------------------


def parsed(lines: list[str], marks: list[int] | None = None) -> list[tuple] | None:
    """What the extension makes of prefixes: hi, lo, length and family of each record; None where it refuses."""
    records = bytearray()
    for mark in marks or [0] * len(lines):
        records += RECORD.pack(1, 2, 3, 4, 5, 6, 7, 8, 9, mark)
    if not _sys.parse_prefixes("\n".join(lines).encode(), records):
        return None
    found = list(RECORD.iter_unpack(records))
    assert {
        (label, first, last, protocol, unused, mark) for _, _, label, first, last, _, _, protocol, unused, mark in found
    } <= {(3, 4, 5, 8, 9, 0)}
    return [(hi, lo, length, family) for hi, lo, _, _, _, length, family, *_ in found]


def expected(line: str) -> tuple | None:
    try:
        network = ipaddress.ip_network(line)
    except ValueError:
        return None
    if "%" in line:
        return None
    address = int(network.network_address)
    if network.version == 4:
        return address << 32, 0, network.prefixlen, 0
    return address >> 64, address % 2**64, network.prefixlen, 1


EDGES = (
    """
0.0.0.0/0|0.0.0.0/1|128.0.0.0/1|0.0.0.1/31|255.255.255.255|255.255.255.255/32|255.255.255.254/31|192.0.2.0/24/24
192.0.2.1/|/|/24||192.0.2|192.0.2.0.0|192.0.2.01|192.0.2.00|00.0.0.0|192.0.2.256|192.0.2.1000|192.0.2.|.192.0.2|192..0.2
192.0.2.0/33|192.0.2.0/024|192.0.2.0/0000000000024|192.0.2.0/-1|192.0.2.0/+24|192.0.2.0/2 4
192.0.2.0/999999999999999999999|192.0.2.0/4294967320|192.0.2.0/18446744073709551640|192.0.2.0/340282366920938463463374607431768211480
192.0.2.0/255.255.255.0|192.0.2.0/0.0.0.255|192.0.2.0/255.0.255.0|0.0.0.0/0.0.0.0|0.0.0.0/255.255.255.255|1.0.0.0/0.0.0.0
192.0.2.0/0.0.0.1|192.0.2.0/255.255.255|192.0.2.0/255.255.255.0.0|::/0.0.0.0|::/255.0.0.0|0.0.0.0/127.255.255.255|128.0.0.0/0.0.0.0
::|::/0|::/128|::1/127|:::|:|1|1:|:1|1::|::1|1::1|1:::1|1::2::3|::1::|2001:db8::/32|2001:DB8::/32|2001:db8::1/64
1:2:3:4:5:6:7:8|1:2:3:4:5:6:7|1:2:3:4:5:6:7:8:9|1:2:3:4:5:6:7::|::2:3:4:5:6:7:8|1::3:4:5:6:7:8|1:2:3:4:5:6:7:8::
::1:2:3:4:5:6:7:8|1::2:3:4:5:6:7:8|1:2:3:4:5:6:7:8:|:1:2:3:4:5:6:7:8|00001::|12345::|g::|1:2:3:4:5:6:7:g|0000::|::0000
::1.2.3.4|::ffff:1.2.3.4/96|::ffff:0.0.0.0/96|1:2:3:4:5:6:1.2.3.4|1:2:3:4:5:6:7:1.2.3.4|1:2:3:4:5:1.2.3.4|1::1.2.3.4:5|1.2.3.4::
1.2.3.4:1|::1.2.3|::1.2.3.04|::1.2.3.4.5|::1.2.3.256|::12345.2.3.4|::1.2.3.4/128|::.1.2.3|1:2:3:4:5::1.2.3.4|1:2:3:4:5:6::1.2.3.4
::%1|fe80::%eth0/64|fe80::1%|::/129|::/0128|::/|::/-1|::/::|8000::/1|8000::/0|::8000:0:0:0/65|::8000:0:0:0/64|0:0:0:1::/64|0:0:0:1::/63
::1/128|0:0:0:0:8000::/65|0:0:0:0:4000::/65| ::|:: |192.0.2.1 | 192.0.2.1|192.0.2.1\t
192.0.2.1\0|\0|192.0.2.0\0/24|192.0.2.0/24\0
\u0661.2.3.4|192.0.2.0/\u0662\u0664|\uff11::|x|http://192.0.2.1|192.0.2.1:80|[::1]|::1\r|a.b.c.d|1.2.3.4/a|1e1.2.3.4|0x1.2.3.4
""".strip()
    .replace("\n", "|")
    .split("|")
)


@pytest.mark.parametrize("line", EDGES, ids=ascii)
def test_a_prefix_is_what_ipaddress_takes(line: str) -> None:
    assert (parsed([line]) or [None]) == [expected(line)]


def damaged(choose: random.Random) -> str:
    """The text of a prefix, spelled in some way, often with something changed, added or taken away."""
    version = choose.choice([4, 6, 6])
    if version == 4:
        address = ".".join(str(choose.choice([0, 1, 10, 192, 255, choose.randrange(300)])) for _ in range(4))
    else:
        groups = [
            f"{choose.choice([0, 0, 1, 0xDB8, 0xFFFF, choose.randrange(65536)]):x}"
            for _ in range(choose.choice([8, 8, 7, 3, 1]))
        ]
        if choose.random() < 0.2:
            groups[-2:] = ["192.0.2.1"]
        address = ":".join(groups)
        if choose.random() < 0.6:
            address = address.replace(choose.choice([":0:", ":0:0:", ":"]), "::", 1)
        if choose.random() < 0.1:
            address = "::" + address
        if choose.random() < 0.1:
            address += "::"
    length = choose.choice(
        ["", "", "/0", "/8", "/24", "/32", "/64", "/128", f"/{choose.randrange(140)}", "/255.255.255.0", "/0.0.0.255"]
    )
    text = address + length
    if choose.random() < 0.5:
        try:
            text = str(ipaddress.ip_network(text, strict=False))
        except ValueError:
            pass
    for _ in range(choose.choice([0, 0, 1, 2])):
        at = choose.randrange(len(text) + 1)
        text = text[:at] + choose.choice(["", *"0019afF.:/% x"]) + text[at + choose.randrange(2) :]
    return text


def compare(count: int, seed: int) -> None:
    choose = random.Random(seed)
    good, bad = [], 0
    for _ in range(count):
        line = damaged(choose)
        found = expected(line)
        assert (parsed([line]) or [None]) == [found], line
        if found is None:
            bad += 1
        else:
            good.append((line, found))
    assert min(len(good), bad) > count // 8  # or it shows little
    assert parsed([line for line, _ in good]) == [found for _, found in good]


def test_damaged_prefixes_are_what_ipaddress_takes() -> None:
    compare(20_000, random.randrange(2**64))


@pytest.mark.slow
def test_a_million_damaged_prefixes_are_what_ipaddress_takes() -> None:
    compare(1_000_000, random.randrange(2**64))


@given(st.lists(st.tuples(prefixes(), st.integers(0, 3)), max_size=5))
@COMMON
def test_records_share_a_line(groups: list[tuple[str, int]]) -> None:
    marks = [mark for _, more in groups for mark in (more, *[0] * more)]
    wanted = [expected(line) for line, more in groups for _ in range(more + 1)]
    assert parsed([line for line, _ in groups], marks) == wanted


def test_there_is_a_line_for_each() -> None:
    assert parsed(["::", "::1"], [0, 0]) is not None
    assert parsed(["::", "::1"], [0]) is None
    assert parsed(["::", "::1"], [1, 0]) is None
    assert parsed(["::"], [0, 0]) is None
    assert parsed(["::", ""], [0]) is None
    assert parsed(["::"], [1, 0]) is not None
    assert not _sys.parse_prefixes(
        b"::\n::", bytearray(RECORD.pack(0, 0, 0, 0, 0, 0, 0, 0, 0, 9))
    )  # none beyond the last
    assert parsed([]) == []
