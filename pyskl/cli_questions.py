# SPDX-License-Identifier: BSD-2-Clause
"""The verbs that ask: explain, trace, doctor."""

from __future__ import annotations

import contextlib
import shlex
import textwrap
from typing import TYPE_CHECKING, Any, Final

import click

from pyskl import cli_output
from pyskl.address import parse_protocol
from pyskl.cli_output import document, write_json_line
from pyskl.cli_request import (
    ADDRESS,
    PROTOCOL,
    Request,
    count,
    label_filter,
    print_lines,
    verb,
)
from pyskl.dispatcher import Dispatcher

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyskl.address import Address
    from pyskl.doctor import Check
    from pyskl.trace import Event


@verb("explain")
@click.argument("protocol", type=PROTOCOL)
@click.argument("destination", type=ADDRESS)
@click.argument("source", type=ADDRESS, required=False)
def explain(request: Request, protocol: Any, destination: Address, source: Address | None) -> None:
    """Ask the kernel's own program what becomes of a connection or a datagram."""
    from pyskl.explain import path_of  # noqa: PLC0415 - for this verb alone

    if source is not None and (":" in source[0]) != (":" in destination[0]):
        raise ValueError(f"the source {source[0]!r} is of another family than the destination {destination[0]!r}")
    with request.read() as dispatcher:
        decision = dispatcher.explain(protocol, destination, source)
        lines = [] if request.json else list(path_of(dispatcher, parse_protocol(protocol), decision))
    request.answer(document(decision), lines)


@verb("trace")
@label_filter
def trace(request: Request, label: str | None) -> None:
    """Show who is sent where, and why not, as it happens, until Ctrl-C."""
    with request.write() as dispatcher, contextlib.suppress(KeyboardInterrupt), dispatcher.events(label) as events:
        for event in events:
            if request.json:
                write_json_line(event)
            else:
                print_lines([_event_line(event)])
                cli_output.out().flush()


def _event_line(event: Event) -> str:
    source, destination = cli_output.address(event.source), cli_output.address(event.destination)
    slot = "" if event.slot is None else f" slot {event.slot}"
    return f"{event.protocol.name.lower()} {source} -> {destination} {event.label}: {event.reason}{slot}"


@verb("doctor")
@click.option("--repair", is_flag=True, help="Mend what can be mended, and say what was done.")
def doctor(request: Request, repair: bool) -> int:
    """Look for what is wrong, and say what mends it."""
    from pyskl.doctor import Doctor  # noqa: PLC0415 - for this verb alone

    path = request.path
    done = Dispatcher.repair(path) if repair else ()
    with request.netns() as netns:
        checks = list(Doctor(path, netns, options=" ".join(_selecting(request)), inside=request.inside).examine())
    bad = [check for check in checks if check.outcome == "problem"]
    members = {"path": path, "checks": checks, **({"repaired": done} if repair else {})}
    lines = [*(f"repaired: {sentence}" for sentence in done), *_check_lines(checks)]
    request.answer(members, lines)
    if bad:
        cli_output.out().flush()
        names = ", ".join(dict.fromkeys(check.name for check in bad))
        click.echo(f"pyskl doctor: {count(len(bad), 'problem', 'problems')}: {names}", err=True)
    return int(bool(bad))


_MARKS: Final = {"ok": "ok", "note": "note", "problem": "PROBLEM", "skipped": "skipped"}


def _check_lines(checks: Iterable[Check]) -> Iterator[str]:
    """Write checks in lines that fit, and each command in a line that can be copied."""
    for check in checks:
        head = f"{_MARKS[check.outcome]:<7}  {check.name}: "
        yield from textwrap.wrap(head + check.explanation, min(cli_output.width(), 100), subsequent_indent=" " * 9)
        if check.command is not None:
            yield f"{'':9}$ {check.command}"


def _selecting(request: Request) -> Iterator[str]:
    """Give the options that select the same dispatcher, for commands that are shown."""
    if request._path is not None:
        yield f"--path {shlex.quote(request._path)}"
    if request._netns is not None:
        yield f"--netns {shlex.quote(request._netns)}"
