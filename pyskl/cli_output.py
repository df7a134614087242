# SPDX-License-Identifier: BSD-2-Clause
"""What the command prints: tables for a person, JSON documents for a program."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TextIO

from rich.cells import cell_len as cell_len_of_any

from pyskl.binding import Binding, Bindings
from pyskl.bindings_file import json_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from socket import AddressFamily

    from pyskl.address import Address

FAMILIES: Final = {2: "ipv4", 10: "ipv6"}
_WIDE: Final = 1 << 16  # of what is no terminal: whoever reads it wants lines whole
_GAP: Final = "  "
_MIN_WIDTH: Final = 12  # of a column that is folded
_BATCH: Final = 1000  # rows whose columns are aligned together


def out() -> TextIO:
    """Give standard output.

    Raises:
        OSError: it was closed before this process began.
    """
    if sys.stdout is None:
        raise OSError("standard output is closed")
    return sys.stdout


# --- for a program ----------------------------------------------------------------------------------------------------


def document(value: Any) -> Any:
    """Give a value as JSON has it: named tuples as objects, enumerations by their names."""
    if isinstance(value, Binding):
        label, protocol, prefix, *ports = value._words()
        return {"label": label, "protocol": protocol, "prefix": prefix, "ports": _ports(*ports)}
    if isinstance(value, enum.IntEnum):
        return FAMILIES.get(value, value.name.lower()) if value.name.startswith("AF_") else value.name.lower()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: document(part) for name, part in value._asdict().items()}  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return {str(key): document(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [document(part) for part in value]
    return value


def _ports(ports: str = "") -> int | str | None:
    return ports if "-" in ports else int(ports) if ports else None


_text: Final = json.JSONEncoder(ensure_ascii=False).encode


def write_json(members: Mapping[str, Any]) -> None:
    """Write one JSON object, with a line for each element of a list in it."""
    file, start = out(), "{\n"
    for key, value in members.items():
        file.write(f"{start}{_text(key)}: ")
        if isinstance(value, (list, tuple)) or (isinstance(value, Iterable) and not isinstance(value, (str, Mapping))):
            parts = json_lines(value) if isinstance(value, Bindings) else (_text(document(part)) for part in value)
            first = True
            for part in parts:
                file.write(("[\n" if first else ",\n") + part)
                first = False
            file.write("[]" if first else "\n]")
        else:
            file.write(_text(document(value)))
        start = ",\n"
    file.write("\n}\n" if members else "{}\n")


def write_json_line(value: Any) -> None:
    """Write one JSON document in one line, and let it go."""
    out().write(f"{_text(document(value))}\n")
    out().flush()


# --- for a person -----------------------------------------------------------------------------------------------------


def address(value: Address) -> str:
    """Write an address and port."""
    host, port, *_ = value
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def family(value: AddressFamily) -> str:
    """Write an address family."""
    return FAMILIES[value]


def ports(binding: Binding) -> str:
    """Write the ports of a binding."""
    return (*binding._words(), "all")[3]


def binding_row(binding: Binding) -> tuple[str, ...]:
    """Give the cells of a binding."""
    return (*binding._words(), "all")[:4]


def cell_len(text: str) -> int:
    """Tell how many columns a text takes."""
    return len(text) if text.isascii() and text.isprintable() else cell_len_of_any(text)


def width() -> int:
    """Tell how wide standard output is, in columns."""
    from shutil import get_terminal_size  # noqa: PLC0415 - it is slow to import

    return get_terminal_size().columns if out().isatty() else _WIDE


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], columns: int | None = None) -> Iterator[str]:
    """Make the lines of a table: numbers to the right, texts to the left, folded where it would be too wide.

    Args:
        headers: of the columns.
        rows: a cell for each column.
        columns: how wide it may be; as wide as standard output where None.
    """
    limit = width() if columns is None else columns
    unread = iter(rows)
    head = True
    while batch := [tuple(row) for row in islice(unread, _BATCH)]:
        texts = [tuple(map(str, row)) for row in batch]
        right = [all(isinstance(row[place], int) for row in batch) for place in range(len(headers))]
        widths = _fit([max(map(cell_len, column)) for column in zip(headers, *texts, strict=True)], headers, limit)
        for cells in [tuple(headers), *texts] if head else texts:
            yield from _lines(cells, widths, right)
        head = False


def _fit(widths: list[int], headers: Sequence[str], limit: int) -> list[int]:
    """Make the widest columns narrower until all of them fit."""
    spare = limit - len(_GAP) * (len(widths) - 1)
    least = [min(width, max(cell_len(header), _MIN_WIDTH)) for width, header in zip(widths, headers, strict=True)]
    while sum(widths) > spare:
        place = max(range(len(widths)), key=lambda at: widths[at] - least[at])
        if widths[place] <= least[place]:
            break
        widths[place] -= 1
    return widths


def _lines(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> Iterator[str]:
    """Write a row: more than one line where a cell is folded."""
    if all(cell_len(cell) <= width for cell, width in zip(cells, widths, strict=True)):
        folded = [cells]
    else:
        parts = [_fold(cell, width) for cell, width in zip(cells, widths, strict=True)]
        height = max(map(len, parts))
        folded = list(zip(*(part + [""] * (height - len(part)) for part in parts), strict=True))
    for line in folded:
        padded = (
            " " * (width - cell_len(cell)) + cell if to_right else cell + " " * (width - cell_len(cell))
            for cell, width, to_right in zip(line, widths, right, strict=True)
        )
        yield _GAP.join(padded).rstrip()


def _fold(text: str, width: int) -> list[str]:
    """Cut a text into pieces that are not wider than this."""
    pieces, piece, size = [], "", 0
    for character in text:
        more = cell_len(character)
        if piece and size + more > width:
            pieces.append(piece)
            piece, size = "", 0
        piece, size = piece + character, size + more
    return [*pieces, piece]
