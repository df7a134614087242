# SPDX-License-Identifier: BSD-2-Clause
"""From an error to what the command makes of it: an exit status, and one line that says what to do."""

from __future__ import annotations

import re
from typing import Final

import click

from pyskl.errors import (
    AlreadyLoaded,
    BindingConflict,
    BindingsFileError,
    BpfError,
    Busy,
    Damaged,
    Incompatible,
    NotLoaded,
    PermissionDenied,
    PysklError,
    VerifierError,
)

REFUSED: Final = 1  # the kernel or the state said no
USAGE: Final = 2  # a bad value, or a bad file

_HINTS: Final[dict[type[BaseException], str]] = {
    AlreadyLoaded: "'pyskl unload' takes it away, 'pyskl upgrade' gives it the program of this version",
    BindingConflict: "unbind one of them, or move it over with 'pyskl bind --replace'",
    Busy: "try again when that process is done",
    Damaged: "'pyskl doctor' says what is wrong",
    Incompatible: "use the version of pyskl that made it, or 'pyskl unload' and 'pyskl load'",
    NotLoaded: "'pyskl load'",
    PermissionDenied: "run it as root, or with these capabilities: docs/command.md says how",
    PermissionError: "run it as root or as its owner; a member of its group may read, and register where granted",
    KeyError: "'pyskl bindings' and 'pyskl sockets' show what there is",
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class Refused(Exception):
    """What the command itself refuses, with status 1.

    Args:
        what: is wrong.
        hint: what to do about it.
    """

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what} ({hint})")


EXPECTED: Final = (Refused, click.ClickException, PysklError, OSError, ValueError, TypeError, KeyError)


def status_of(error: BaseException) -> int:
    """Tell the exit status for an error."""
    if isinstance(error, click.ClickException):
        return error.exit_code
    if isinstance(error, (BindingsFileError, UnicodeError)):
        return USAGE
    if isinstance(error, (Refused, PysklError, OSError, KeyError)):
        return REFUSED
    return USAGE


def line_of(error: BaseException, verb: str | None) -> str:
    """Say in one line what was wrong, and what to do."""
    command = "pyskl" if verb is None else f"pyskl {verb}"
    return f"{command}: {_one_line(_text_of(error))}{_hint_for(error, command)}"


def _text_of(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, KeyError) and error.args and not isinstance(error, BpfError):
        return str(error.args[0])
    if isinstance(error, VerifierError):
        return "; ".join([BpfError.__str__(error), *error.log.splitlines()[-1:]])
    if isinstance(error, OSError) and not isinstance(error, BpfError) and error.strerror:
        named = "" if error.filename is None else f": {error.filename!r}"
        return f"{error.strerror}{named}"
    return str(error) or type(error).__name__


def _hint_for(error: BaseException, command: str) -> str:
    if isinstance(error, click.UsageError):
        return f" (see '{command} --help')"
    for kind, hint in _HINTS.items():
        if isinstance(error, kind):
            return f" ({hint})"
    if isinstance(error, OSError) and getattr(error, "hint", None) is None:
        return " ('pyskl doctor' looks for what is wrong)"
    return ""


def _one_line(text: str) -> str:
    return _CONTROL.sub(" ", text).strip().rstrip(".")
