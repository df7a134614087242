# SPDX-License-Identifier: BSD-2-Clause
"""Bindings: which protocol, prefix and ports lead to which label, and which goes first. Pure: no input, no output.

A `Binding` is its label and a packed ``struct pyskl_binding`` (bpf/abi.h): everything else is read from these two, so
that a million of them are made, packed and compared quickly.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from struct import Struct
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, SupportsIndex, TypeAlias, final, overload

from pyskl.address import parse_protocol
from pyskl.enums import Protocol
from pyskl.errors import BindingConflict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from pyskl.address import ProtocolLike

IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
PrefixLike: TypeAlias = str | ipaddress.IPv4Address | ipaddress.IPv6Address | IPNetwork
PortsLike: TypeAlias = int | str | range | None
OnMissing: TypeAlias = Literal["reset", "hold", "fallthrough"]

# struct pyskl_binding of bpf/abi.h: hi, lo, label, first, last, length, family, protocol, unused, mark.
RECORD: Final = Struct("=QQIHHBBBBI")
RECORD_SIZE: Final = RECORD.size
_PARTS: Final = Struct("=16sI8sI")  # the same, as Binding keeps it between the label and the mark

_BITS: Final[dict[object, int]] = {"tcp": 0, "udp": 1, Protocol.TCP: 0, Protocol.UDP: 1}
_PROTOCOLS: Final = (Protocol.TCP, Protocol.UDP)
_NAMES: Final = ("tcp", "udp")
_LENGTHS: Final = {str(length): length for length in range(129)}
_ALL: Final = (0, 0xFFFF)
_LOW_64: Final = (1 << 64) - 1

_LABEL_BYTES: Final = 255
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # all of Unicode's category Cc
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")

# By the kernel side's numbers (PYSKL_RESET, PYSKL_HOLD, PYSKL_FALLTHROUGH).
ON_MISSING: Final[tuple[OnMissing, ...]] = ("reset", "hold", "fallthrough")


def check_label(label: str) -> str:
    """Give back a label: 1 to 255 bytes of UTF-8, without control characters (Unicode's category Cc).

    Raises:
        TypeError: it is no str.
        ValueError: it is empty or too long, has a control character, or has no form in UTF-8.
    """
    if not isinstance(label, str):
        raise TypeError(f"a label is a str, not {label!r}")
    if label.isascii() and label.isprintable() and 0 < len(label) <= _LABEL_BYTES:
        return str.__str__(label)  # of a subclass, the text alone
    if found := _CONTROL.search(label):
        raise ValueError(f"a label has no control characters: {label!r} has {found[0]!r}")
    try:
        size = len(label.encode())
    except UnicodeEncodeError:
        raise ValueError(f"a label has a form in UTF-8, {label!r} has none") from None
    if not 0 < size <= _LABEL_BYTES:
        raise ValueError(f"a label has 1 to {_LABEL_BYTES} bytes of UTF-8: {label!r} has {size}")
    return str.__str__(label)


class Policy(NamedTuple):
    """What is done for a label beyond its bindings.

    Attributes:
        on_missing: what a client gets while the label has no live socket: ``"reset"`` (refused at once), ``"hold"``
            (silence) or ``"fallthrough"`` (the ordinary look-up goes on).
        udp_sticky: for how many seconds of silence a UDP flow goes on reaching the socket that it reached; 0: for none.
    """

    on_missing: OnMissing = "reset"
    udp_sticky: int = 0


def check_policy(on_missing: object, udp_sticky: object) -> Policy:
    """Make a `Policy` of settings that came from outside.

    Raises:
        TypeError: `on_missing` is no str, or `udp_sticky` no int.
        ValueError: `on_missing` is no word of it, or `udp_sticky` is not between 0 and 2**32 - 1.
    """
    if not isinstance(on_missing, str):
        raise TypeError(f"on_missing is a str, not {on_missing!r}")
    for word in ON_MISSING:
        if on_missing == word:
            break
    else:
        raise ValueError(f"on_missing is {', '.join(map(repr, ON_MISSING[:-1]))} or 'fallthrough', not {on_missing!r}")
    if not isinstance(udp_sticky, int) or isinstance(udp_sticky, bool):
        raise TypeError(f"udp_sticky is an int of seconds, not {udp_sticky!r}")
    if not 0 <= udp_sticky < 1 << 32:
        raise ValueError(f"udp_sticky is between 0 and {(1 << 32) - 1} seconds, not {udp_sticky}")
    return Policy(word, udp_sticky)


# -- ports ---------------------------------------------------------------------------------------------------------


def port_ranges(ports: PortsLike | Iterable[PortsLike]) -> tuple[tuple[int, int], ...]:
    """Give the ranges of ports that an argument *ports* names, sorted: pairs of the first and the last port.

    Args:
        ports: None (all), ``80``, ``"80"``, ``"1024-65535"``, a range, or an iterable of these. Several that are equal
            are one; those that overlap are given as they are.

    Raises:
        TypeError: it is of another type.
        ValueError: a port is not between 1 and 65535, or a range is empty, backwards, or goes in steps other than 1.
    """
    if ports is None or isinstance(ports, (int, str, range, bytes, bytearray)) or not isinstance(ports, Iterable):
        return (_port_range(ports),)
    ranges = sorted({_port_range(item) for item in ports})
    if not ranges:
        raise ValueError(f"no ports in {ports!r}: leave them out for all ports")
    return tuple(ranges)


def _port_range(ports: object) -> tuple[int, int]:
    first, last = _first_and_last(ports)
    if first == last and not 0 < first <= 0xFFFF:
        hint = ": leave them out for all ports" if first == 0 else ""
        raise ValueError(f"a port is between 1 and 65535, not {ports!r}{hint}")
    if not 0 <= first <= last <= 0xFFFF:
        raise ValueError(f"a range of ports lies between 0 and 65535, and its first is not above its last: {ports!r}")
    return first, last


def _first_and_last(ports: object) -> tuple[int, int]:
    if ports is None:
        return _ALL
    if isinstance(ports, str):
        found = _PORTS.fullmatch(ports)
        if not found:
            raise ValueError(f"ports are '80' or '1024-65535', not {ports!r}")
        return int(found[1]), int(found[2] or found[1])
    if isinstance(ports, range):
        if ports.step != 1:
            raise ValueError(f"a range of ports goes in steps of 1, not {ports!r}")
        if not ports:
            raise ValueError(f"a range of ports is not empty: {ports!r}")
        return ports.start, ports.stop - 1
    if isinstance(ports, bool) or not isinstance(ports, SupportsIndex):
        raise TypeError(f"ports are None, an int, a str such as '1024-65535', or a range, not {ports!r}")
    return index(ports), index(ports)


# -- prefixes ------------------------------------------------------------------------------------------------------


def parse_prefix(prefix: PrefixLike) -> tuple[int, int, int, int]:
    """Give hi, lo, length and family of a prefix, as struct pyskl_binding has them.

    Raises:
        TypeError: it is neither a str nor one of ipaddress's objects.
        ValueError: it is no prefix, has host bits set, or a scope; the message quotes it.
    """
    if not isinstance(prefix, str):
        if not isinstance(prefix, _PREFIXES):
            raise TypeError(f"a prefix is a str, or an address or network of ipaddress, not {prefix!r}")
        prefix = str(prefix)  # so that an interface keeps its host bits, and an address its scope
    address, slash, digits = prefix.partition("/")
    try:
        if ":" in address:
            family, bits, value = 1, 128, int.from_bytes(inet_pton(AF_INET6, address), "big")
        else:
            family, bits, value = 0, 32, int.from_bytes(inet_pton(AF_INET, address), "big")
        length = _LENGTHS[digits] if slash else bits
    except (OSError, ValueError, KeyError):
        return parse_prefix(_usual_prefix(prefix))
    if length > bits or value & ((1 << bits - length) - 1):
        return parse_prefix(_usual_prefix(prefix))
    return (value >> 64, value & _LOW_64, length, 1) if family else (value << 32, 0, length, 0)


_PREFIXES: Final = (
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
)


def _usual_prefix(prefix: str) -> str:
    """Let ipaddress say what is wrong with a prefix, or how it is usually written: it takes netmasks too."""
    if "%" in prefix:
        raise ValueError(f"a prefix has no scope: {prefix!r}")
    try:
        return str(ipaddress.IPv6Network(prefix) if ":" in prefix else ipaddress.IPv4Network(prefix))
    except ValueError as error:
        try:
            network = ipaddress.ip_network(prefix, strict=False)
        except ValueError:
            raise ValueError(f"{prefix!r} is no prefix: {error}") from None
        raise ValueError(f"the prefix {prefix!r} has host bits set: its network is {network}") from None


# -- the binding ---------------------------------------------------------------------------------------------------


@final
class Binding:
    """One protocol, prefix and range of ports, and the label that they lead to.

    Bindings never change, can be keys, and are ordered by precedence: the longest prefix first, then the narrowest
    range of ports, then IPv4 before IPv6, then by address, protocol, port and label. `str()` gives what `parse` takes.

    Args:
        label: 1 to 255 bytes of UTF-8, without control characters.
        protocol: ``"tcp"``, ``"udp"`` or a `Protocol`.
        prefix: ``"192.0.2.0/24"``, a single address, or an address or network of `ipaddress`.
        ports: None (all), ``80``, ``"1024-65535"``, or a range.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one has a value that can't be: a label with control characters, a prefix with host bits set or a
            scope, a port beyond 65535, several ranges of ports; the message quotes it.
    """

    __slots__ = ("_label", "_packed")
    __match_args__ = ("label", "protocol", "prefix", "ports")

    _label: str
    _packed: bytes

    def __init__(
        self,
        label: str,
        protocol: ProtocolLike,
        prefix: PrefixLike,
        ports: PortsLike | Iterable[PortsLike] = None,
    ) -> None:
        self._label = check_label(label)
        if type(ports) is int and 0 < ports <= 0xFFFF:
            first = last = ports
        elif ports is None:
            first, last = _ALL
        else:
            (first, last), *more = port_ranges(ports)
            if more:
                raise ValueError(f"a binding has one range of ports, not several: {ports!r}")
        try:
            bit = _BITS[protocol]
        except (KeyError, TypeError):
            bit = _BITS[parse_protocol(protocol)]
        hi, lo, length, family = parse_prefix(prefix)
        self._packed = RECORD.pack(hi, lo, 0, first, last, length, family, bit, 0, 0)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Make a binding of its words: ``"LABEL PROTOCOL PREFIX [PORTS]"``, such as ``"web tcp 192.0.2.0/24 80"``.

        Without ports it is all of them. A label with white space in it can't be written so.

        Raises:
            ValueError: it does not have these words, or one of them can't be; the message quotes it.
        """
        if not isinstance(text, str):
            raise TypeError(f"the text of a binding is a str, not {text!r}")
        words = text.split()
        if not 3 <= len(words) <= 4:
            raise ValueError(f"a binding is written LABEL PROTOCOL PREFIX [PORTS], not {text!r}")
        return cls(*words)  # type: ignore[arg-type]

    @classmethod
    def _unpack(cls, record: bytes, label: str) -> Self:
        """Make a binding of a struct pyskl_binding that is known to be right, and the label that its number means."""
        address, _, rest, _ = _PARTS.unpack(record)
        return cls._join(address, rest, label)

    @classmethod
    def _join(cls, address: bytes, rest: bytes, label: str) -> Self:
        made = cls.__new__(cls)
        made._label = label
        made._packed = address + _ZERO + rest + _ZERO
        return made

    @property
    def label(self) -> str:
        """The name that sockets are registered under."""
        return self._label

    @property
    def protocol(self) -> Protocol:
        """TCP or UDP."""
        return _PROTOCOLS[self._packed[26]]

    @property
    def prefix(self) -> IPNetwork:
        """The network of the destination addresses."""
        hi, lo, _, _, _, length, family, *_ = RECORD.unpack(self._packed)
        if family:
            return ipaddress.IPv6Network((hi << 64 | lo, length))
        return ipaddress.IPv4Network((hi >> 32, length))

    @property
    def ports(self) -> int | range | None:
        """The destination ports: None for all, an int for one, else a range."""
        _, _, _, first, last, *_ = RECORD.unpack(self._packed)
        if first == last:
            return int(first)
        return None if (first, last) == _ALL else range(first, last + 1)

    def _key(self) -> tuple[int, int, int, int, int, int, int, str]:
        """Give what bindings are ordered by."""
        hi, lo, _, first, last, length, family, protocol, _, _ = RECORD.unpack(self._packed)
        return -length, last - first, family, hi, lo, protocol, first, self._label

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Binding):
            return NotImplemented
        return self._packed == other._packed and self._label == other._label

    def __hash__(self) -> int:
        return hash((self._packed, self._label))

    def __lt__(self, other: object) -> bool:
        return self._key() < other._key() if isinstance(other, Binding) else NotImplemented

    def __le__(self, other: object) -> bool:
        return self._key() <= other._key() if isinstance(other, Binding) else NotImplemented

    def __gt__(self, other: object) -> bool:
        return self._key() > other._key() if isinstance(other, Binding) else NotImplemented

    def __ge__(self, other: object) -> bool:
        return self._key() >= other._key() if isinstance(other, Binding) else NotImplemented

    def _words(self) -> tuple[str, ...]:
        """Give the label, protocol, prefix and ports as they are written; no ports: all."""
        hi, lo, _, first, last, length, family, protocol, _, _ = RECORD.unpack(self._packed)
        if family:
            address = inet_ntop(AF_INET6, (hi << 64 | lo).to_bytes(16, "big"))
            if "." in address:  # ipaddress writes these in another way
                address = str(ipaddress.IPv6Address(hi << 64 | lo))
        else:
            address = inet_ntop(AF_INET, (hi >> 32).to_bytes(4, "big"))
        prefix = f"{address}/{length}"
        if (first, last) == _ALL:
            return self._label, _NAMES[protocol], prefix
        return self._label, _NAMES[protocol], prefix, f"{first}" if first == last else f"{first}-{last}"

    def __str__(self) -> str:
        return " ".join(self._words())

    def __repr__(self) -> str:
        label, protocol, prefix, *_ = self._words()
        ports = "" if self.ports is None else f", {self.ports!r}"
        return f"Binding({label!r}, {protocol!r}, {prefix!r}{ports})"

    def __reduce__(self) -> tuple[object, ...]:
        return Binding, self._words()  # so that a pickle means the same on every machine


_ZERO: Final = bytes(4)


@final
class Bindings(Sequence[Binding]):
    """A sequence of bindings that are made when they are looked at.

    It is equal to any sequence of equal bindings in the same order.
    """

    __slots__ = ("_labels", "_records")
    __hash__: ClassVar[None]  # type: ignore[assignment] # it is as the list that it stands for

    def __init__(self, records: bytes | bytearray, labels: Mapping[int, str]) -> None:
        """Take structs pyskl_binding, one after the other, and what their labels' numbers mean."""
        self._records = records
        self._labels = labels

    def __len__(self) -> int:
        return len(self._records) // RECORD_SIZE

    @overload
    def __getitem__(self, index: int) -> Binding: ...
    @overload
    def __getitem__(self, index: slice) -> Bindings: ...
    def __getitem__(self, index: int | slice) -> Binding | Bindings:
        places = range(0, len(self._records), RECORD_SIZE)[index]  # which knows every rule, and its errors
        if isinstance(places, int):
            address, label, rest, _ = _PARTS.unpack_from(self._records, places)
            return Binding._join(address, rest, self._labels[label])
        if places.step == RECORD_SIZE:
            return Bindings(self._records[places.start : places.stop], self._labels)
        return Bindings(b"".join([self._records[at : at + RECORD_SIZE] for at in places]), self._labels)

    def __iter__(self) -> Iterator[Binding]:
        join, labels = Binding._join, self._labels
        for address, label, rest, _ in _PARTS.iter_unpack(self._records):
            yield join(address, rest, labels[label])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (str, bytes)) or not isinstance(other, Sequence):
            return NotImplemented
        if isinstance(other, Bindings) and other._labels == self._labels and other._records == self._records:
            return True
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=False))

    def __repr__(self) -> str:
        shown = [str(binding) for binding in self[:3]]
        more = len(self) - len(shown)
        return f"<{len(self)} bindings: {', '.join(shown)}{', …' if more else ''}>" if shown else "<0 bindings>"


def conflict(first: Binding, second: Binding) -> BindingConflict:
    """Make the error for two bindings of one protocol and prefix whose ranges of ports contradict each other."""
    if first.ports == second.ports:
        text = f"{first} and {second} are the same for two labels"
    else:
        text = f"{first} and {second} overlap in part"
    error = BindingConflict(text)
    error.bindings = (first, second)
    return error
