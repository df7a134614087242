# SPDX-License-Identifier: BSD-2-Clause
"""Loading: from an ELF object, through libbpf, to fds of its programs and maps.

What was asked for is checked before the kernel is asked.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from pyskl import _sys
from pyskl.enums import MapType
from pyskl.pinning import fd_of_kind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from pyskl.maps import Map

Source: TypeAlias = str | os.PathLike[str] | bytes
"""An ELF object: the path of one, or its bytes."""
Constant: TypeAlias = int | bytes | bytearray | memoryview

_U32_MAX = 0xFFFFFFFF
_LOG_LEVEL_MAX = 7  # BPF_LOG_LEVEL1 | BPF_LOG_LEVEL2 | BPF_LOG_STATS


def open_object(source: Source) -> _sys.OpenObject:
    """Open an object from a file or from memory."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _sys.OpenObject(bytes(source), "memory")
    path = os.fsdecode(source)
    with open(path, "rb") as file:
        elf = file.read()
    return _sys.OpenObject(elf, os.path.basename(path).partition(".")[0])


def load(
    opened: _sys.OpenObject,
    programs: Collection[str] | None = None,
    constants: Mapping[str, Constant] | None = None,
    max_entries: Mapping[str, int] | None = None,
    reuse: Mapping[str, Map[Any, Any]] | None = None,
    log_level: int = 0,
) -> tuple[dict[str, int], dict[str, int]]:
    """Load an open object, or those of its programs: fds by name, which the caller owns."""
    if not 0 <= log_level <= _LOG_LEVEL_MAX:
        raise ValueError(f"log_level is between 0 and {_LOG_LEVEL_MAX}, not {log_level}")
    if isinstance(programs, str):
        raise TypeError("programs are named by a list of names, not by one str")
    kinds, maps = opened.programs, opened.maps
    opened.forget_pins()
    _check_names("program", programs or (), kinds)
    _check_names("map", max_entries or (), maps)
    _check_names("map", reuse or (), maps)
    variables = opened.variables if constants else {}
    for name, value in (constants or {}).items():
        variable = _constant(variables, name)
        opened.set_initial(variable, encode(variable, value))
    for name, entries in (max_entries or {}).items():
        if not 0 < entries <= _U32_MAX:
            raise ValueError(f"max_entries of {name!r} is a positive number of 32 bits, not {entries}")
        opened.resize(name, entries)
    for name, existing in (reuse or {}).items():
        fd = fd_of_kind(existing, "map")
        _check_fit(name, maps[name], existing)
        opened.reuse(name, fd)
    chosen = set(kinds if programs is None else programs)
    for name in kinds.keys() - chosen:
        opened.leave_out(name)
    needs = [_sys.program_needs(kinds[name]) for name in chosen]
    needs += [_sys.map_needs(kind) for name, (kind, _, _) in maps.items() if name not in (reuse or ())]
    return opened.load(log_level, tuple(dict.fromkeys(need for group in needs for need in group)))


def _check_names(what: str, wanted: Iterable[str], known: Collection[str]) -> None:
    for name in wanted:
        if name not in known:
            raise KeyError(f"no {what} {name!r} in the object: there are {', '.join(known) or 'none'}")


def _constant(variables: Mapping[str, _sys.Variable], name: str) -> _sys.Variable:
    constants = [each.name for each in variables.values() if each.section.startswith(".rodata")]
    if name not in variables:
        _check_names("constant", (name,), constants)
    if name not in constants:
        raise ValueError(f"{name!r} is in {variables[name].section}: only a const volatile variable can be set")
    return variables[name]


def encode(variable: _sys.Variable, value: Constant) -> bytes:
    """Give the bytes of a constant's new value."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        raw = bytes(value)
        if len(raw) != variable.size:
            raise ValueError(f"{variable.name!r} has {variable.size} bytes, not {len(raw)}")
        return raw
    if not isinstance(value, int):
        raise TypeError(f"{variable.name!r} is set by an int or by bytes, not {type(value).__name__}")
    if not variable.integer:
        raise TypeError(f"{variable.name!r} is no integer: give its {variable.size} bytes")
    try:
        return value.to_bytes(variable.size, sys.byteorder, signed=variable.signed)
    except OverflowError:
        kind = "signed" if variable.signed else "unsigned"
        raise ValueError(f"{variable.name!r} is {kind}, of {variable.size} bytes: {value} does not fit") from None


def _check_fit(name: str, spec: _sys.MapSpec, existing: Map[Any, Any]) -> None:
    """Compare what libbpf does not: it takes a map of another type in silence."""
    info = existing.info
    for what, wanted, found in (
        ("type", MapType(spec[0]).name, info.type.name),
        ("key_size", spec[1], info.key_size),
        ("value_size", spec[2], info.value_size),
    ):
        if wanted != found:
            raise ValueError(f"map {name!r} has {what} {wanted}, and the one to reuse has {found}")
