# SPDX-License-Identifier: BSD-2-Clause
"""The bindings file, in TOML or JSON: read, checked to the last key, and written. Pure: no input, no output.

A file of half a million entries is read into packed bindings without an object for each: entries that are alike but for
their prefix are looked at once, and all prefixes are parsed in one call.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from pyskl import _sys
from pyskl.address import parse_protocol
from pyskl.binding import RECORD, Bindings, Policy, check_label, check_policy, parse_prefix, port_ranges
from pyskl.enums import Protocol
from pyskl.errors import BindingsFileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pyskl.binding import Binding

Format = Literal["toml", "json"]

_DOCUMENT: Final = frozenset({"bindings", "labels"})
_ENTRY: Final = frozenset({"label", "protocol", "prefix", "port", "ports"})
_POLICY: Final = frozenset(Policy._fields)
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")  # a key of TOML that needs no quotes
_QUOTED: Final = 80  # characters of a value that may be long


class BindingsFile(NamedTuple):
    """What a bindings file says.

    Attributes:
        labels: the labels of its bindings, each once, in the order in which they come.
        records: its bindings as packed structs pyskl_binding, whose label n is ``labels[n - 1]``.
        policies: those that its ``labels`` table gives, by label; None where it has no such table.
    """

    labels: list[str]
    records: bytearray
    policies: dict[str, Policy] | None

    @property
    def bindings(self) -> Bindings:
        """Its bindings, in the order of the file."""
        return Bindings(self.records, dict(enumerate(self.labels, 1)))


def load(text: str | bytes, *, name: str = "") -> BindingsFile:
    """Read a bindings file.

    Args:
        text: what the file holds.
        name: what it is called: one that ends in .json or .toml tells the format, which is otherwise seen by the first
            character; messages begin with it.

    Raises:
        BindingsFileError: it is not of its format, or says something that can't be; the message has the number of the
            entry, and quotes what is wrong.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if name.endswith(".json") or (not name.endswith(".toml") and text.lstrip().startswith("{")):
            document = _parse_json(text)
        else:
            document = _parse_toml(text)
        del text  # a file of a million bindings is large, and what is made of it larger
        return _read(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise BindingsFileError(f"{name}: {error}" if name else str(error)) from error


def _parse_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a dict, in which no key was given twice."""
    made = dict(pairs)
    label = made.get("label")
    if type(label) is str:  # one text for all entries of a label
        made["label"] = sys.intern(label)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return made


def _parse_toml(text: str) -> object:
    try:
        tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise ValueError("TOML needs Python 3.11, or tomli (pip install 'pyskl[cli]'); JSON needs neither") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from error


def _read(document: object) -> BindingsFile:
    table = _check_keys(document, _DOCUMENT)
    if "bindings" not in table:
        raise ValueError("bindings are missing: an empty list of them is [], or bindings = []")
    entries = table["bindings"]
    if not isinstance(entries, list):
        raise TypeError(f"bindings are a list, not {_quote(entries)}")
    policies = _read_policies(table["labels"]) if "labels" in table else None

    numbers: dict[str, int] = {}  # of the labels
    alike: dict[str, bytes] = {}
    prefixes: list[Any] = []
    chunks = []
    for index, entry in enumerate(entries):
        try:
            prefixes.append(entry.pop("prefix", None))
            rest = repr(entry)
            chunk = alike.get(rest)
            if chunk is None:
                chunk = alike[rest] = _pack(entry, numbers)
        except (AttributeError, TypeError, ValueError) as error:
            reason = error if isinstance(entry, dict) else _no_table(entry)
            raise _bad_prefix(prefixes[:index]) or _in_entry(index, reason) from error
        chunks.append(chunk)
    records = bytearray().join(chunks)
    try:
        done = _sys.parse_prefixes("\n".join(prefixes).encode(), records)
    except (TypeError, UnicodeEncodeError):
        done = False
    if not done:
        raise _bad_prefix(prefixes) or ValueError("the prefixes do not have a line each")
    return BindingsFile(list(numbers), records, policies)


def _pack(entry: dict[str, Any], numbers: dict[str, int]) -> bytes:
    """Make the bindings of an entry whose prefix was taken out, as `_sys.parse_prefixes` completes them."""
    _check_keys(entry, _ENTRY)
    if "label" not in entry:
        raise ValueError("the label is missing")
    label = check_label(entry["label"])
    bits: tuple[int, ...] = (0, 1)
    if "protocol" in entry:
        if not isinstance(entry["protocol"], str):
            raise TypeError(f"a protocol is 'tcp' or 'udp', not {entry['protocol']!r}")
        bits = (int(parse_protocol(entry["protocol"]) == Protocol.UDP),)  # type: ignore[arg-type]
    ranges = _read_ports(entry)
    number = numbers.setdefault(label, len(numbers) + 1)
    ends = [(bit, first, last) for bit in bits for first, last in ranges]
    return b"".join(
        [
            RECORD.pack(0, 0, number, first, last, 0, 0, bit, 0, 0 if place else len(ends) - 1)
            for place, (bit, first, last) in enumerate(ends)
        ]
    )


def _read_ports(entry: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    if "port" not in entry:
        ports = entry.get("ports")
        parts = ports if isinstance(ports, list) else [0 if ports is None else ports]
        for part in parts:
            if not isinstance(part, (int, str)):
                raise TypeError(f"ports are whole numbers, and ranges such as '1024-65535', not {_quote(part)}")
        return port_ranges(ports)
    if "ports" in entry:
        raise ValueError(f"port {_quote(entry['port'])} beside ports {_quote(entry['ports'])}: give one of them")
    port = entry["port"]
    if not isinstance(port, int):
        raise TypeError(f"a port is a whole number, not {_quote(port)}")
    return port_ranges(None if port == 0 and port is not False else port)


def _read_policies(table: object) -> dict[str, Policy]:
    if not isinstance(table, dict):
        raise _no_table(table)
    policies = {}
    for label, settings in table.items():
        try:
            policies[check_label(label)] = check_policy(**{**Policy()._asdict(), **_check_keys(settings, _POLICY)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"the policy of {label!r}: {error}") from error
    return policies


def _check_keys(table: object, known: frozenset[str]) -> dict[str, Any]:
    """Give back a table that has no other keys than these."""
    if not isinstance(table, dict):
        raise _no_table(table)
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r}: known are {', '.join(sorted(known))}")
    return table


def _no_table(value: object) -> TypeError:
    return TypeError(f"a table is needed, not {_quote(value)}")


def _bad_prefix(prefixes: list[Any]) -> ValueError | None:
    """Tell the first that is none, if there is one."""
    for index, prefix in enumerate(prefixes):
        if prefix is None:
            return _in_entry(index, "the prefix is missing")
        try:
            parse_prefix(prefix)
        except (TypeError, ValueError) as error:
            return _in_entry(index, error)
    return None


def _in_entry(index: int, error: object) -> ValueError:
    return ValueError(f"entry {index + 1} (bindings[{index}]): {error}")


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


def dump(bindings: Iterable[Binding], policies: Mapping[str, Policy] | None, format: Format) -> str:  # noqa: A002
    """Write a bindings file, which `load` reads back.

    Args:
        bindings: in the order in which they are written.
        policies: by label; None for a file without a ``labels`` table.
        format: ``"toml"`` or ``"json"``.

    Raises:
        ValueError: it is another format.
    """
    if format not in ("toml", "json"):
        raise ValueError(f"the format is 'toml' or 'json', not {format!r}")
    return _dump_toml(bindings, policies) if format == "toml" else _dump_json(bindings, policies)


def _dump_json(bindings: Iterable[Binding], policies: Mapping[str, Policy] | None) -> str:
    lines = [*json_lines(bindings)]
    parts = [_block('"bindings": [', lines, "]")]
    if policies is not None:
        lines = [f"{_text(label)}: {json.dumps(policy._asdict())}" for label, policy in policies.items()]
        parts.append(_block('"labels": {', lines, "}"))
    return _block("{", parts, "}") + "\n"


def json_lines(bindings: Iterable[Binding]) -> Iterator[str]:
    """Write each binding as a JSON object."""
    texts: dict[str, str] = {}  # of labels
    for binding in bindings:
        label, protocol, prefix, *ports = binding._words()
        text = texts.get(label) or texts.setdefault(label, _text(label))
        yield (
            f'{{"label": {text}, "protocol": "{protocol}", "prefix": "{prefix}", "ports": {_ports(*ports) or "null"}}}'
        )


def _block(start: str, lines: list[str], end: str) -> str:
    return "\n".join([start, ",\n".join(lines), end]) if lines else start + end


def _dump_toml(bindings: Iterable[Binding], policies: Mapping[str, Policy] | None) -> str:
    parts = []
    for binding in bindings:
        label, protocol, prefix, *ports = binding._words()
        more = f"ports = {_ports(*ports)}\n" if ports else ""
        parts.append(f'[[bindings]]\nlabel = {_text(label)}\nprotocol = "{protocol}"\nprefix = "{prefix}"\n{more}')
    if not parts:
        parts.append("bindings = []\n")
    if policies is not None and not policies:
        parts.append("[labels]\n")
    for label, (on_missing, udp_sticky) in (policies or {}).items():
        key = label if _BARE.fullmatch(label) else _text(label)
        parts.append(f'[labels.{key}]\non_missing = "{on_missing}"\nudp_sticky = {udp_sticky}\n')
    return "\n".join(parts)


# What JSON escapes in a text without control characters, TOML escapes alike.
_text: Final = json.JSONEncoder(ensure_ascii=False).encode


def _ports(ports: str = "") -> str:
    """Write a port as a number, and a range as text."""
    return f'"{ports}"' if "-" in ports else ports
