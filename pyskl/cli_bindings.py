# SPDX-License-Identifier: BSD-2-Clause
"""The verbs of bindings and policies."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from pyskl import bindings_file, cli_output
from pyskl.binding import ON_MISSING, Binding, Policy, check_policy, port_ranges
from pyskl.cli_output import table
from pyskl.cli_request import (
    PROTOCOL,
    Request,
    label_argument,
    label_filter,
    ports_of,
    print_lines,
    verb,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pyskl.binding import OnMissing, PortsLike
    from pyskl.dispatcher import Dispatcher
    from pyskl.report import Diff


_FILE_IS_LONG: Final = 1 << 20  # bytes of a bindings file that takes a while
_BINDING_HEADERS: Final = ("LABEL", "PROTOCOL", "PREFIX", "PORTS")


@verb("bindings")
@label_filter
@click.option(
    "--export", type=click.Choice(["toml", "json"]), help="Print a file for load-bindings, with the policies."
)
def bindings(request: Request, label: str | None, export: bindings_file.Format | None) -> None:
    """List the bindings, in order of precedence."""
    with request.read() as dispatcher:
        chosen: Iterable[Binding] = dispatcher.bindings()
        policies = dispatcher.policies() if export else None
    if label is not None:
        chosen = [binding for binding in chosen if binding.label == label]
        policies = {label: policies[label]} if policies and label in policies else policies and {}
    if export or request.json:
        cli_output.out().write(bindings_file.dump(chosen, policies, export or "json"))
    else:
        print_lines(table(_BINDING_HEADERS, map(cli_output.binding_row, chosen)))


_PORTS_HELP = "PORTS are 80 or 1024-65535; none, or 0, are all."


def _binding_arguments(function: Any) -> Any:
    for argument in (
        click.argument("ports", nargs=-1),
        click.argument("prefix"),
        click.argument("protocol", type=PROTOCOL),
        label_argument,
    ):
        function = argument(function)
    return function


def _check_binding(label: str, protocol: Any, prefix: str, ports: PortsLike | list[PortsLike]) -> None:
    """Refuse what can't be before anything is opened."""
    port_ranges(ports)
    Binding(label, protocol, prefix)


@verb("bind", epilog=_PORTS_HELP)
@_binding_arguments
@click.option("--replace", is_flag=True, help="Move over what another label has.")
def bind(request: Request, label: str, protocol: Any, prefix: str, ports: Sequence[str], replace: bool) -> None:
    """Let a prefix and ports lead to a label."""
    wanted = ports_of(ports)
    _check_binding(label, protocol, prefix, wanted)
    with request.write() as dispatcher:
        made = dispatcher.bind(label, protocol, prefix, wanted, replace=replace)
        served = _served(dispatcher)
    _warn_unserved(request, {label} - served)
    request.confirm({"bindings": made}, [f"bound {binding}" for binding in made])


@verb("unbind", epilog=_PORTS_HELP)
@_binding_arguments
def unbind(request: Request, label: str, protocol: Any, prefix: str, ports: Sequence[str]) -> None:
    """Take bindings away: just these, not those of wider or narrower ranges."""
    unwanted = ports_of(ports)
    _check_binding(label, protocol, prefix, unwanted)
    with request.write() as dispatcher:
        gone = dispatcher.unbind(label, protocol, prefix, unwanted)
    request.confirm({"bindings": gone}, [f"unbound {binding}" for binding in gone])


@verb("load-bindings")
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
def load_bindings(request: Request, file: str, dry_run: bool) -> None:
    """Replace all bindings by those of a FILE, TOML or JSON; - is standard input.

    The policies too, where it has a table of labels.
    """
    with _progress(request, file) as step:
        step("reading")
        wanted = bindings_file.load(_contents(file), name="" if file == "-" else file)
        step("comparing" if dry_run else "replacing")
        with request.read() if dry_run else request.write() as dispatcher:
            diff = _replace(dispatcher, wanted, dry_run)
            served = _served(dispatcher)
    _warn_unserved(request, set(wanted.labels) - served)
    request.confirm(diff._asdict(), _diff_lines(diff, dry_run))


def _replace(dispatcher: Dispatcher, wanted: bindings_file.BindingsFile, dry_run: bool) -> Diff:
    if dry_run:
        return dispatcher.diff(wanted.bindings)
    return dispatcher.replace(wanted.bindings, wanted.policies)


def _contents(file: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read()
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise click.UsageError(f"{error.strerror}: {file!r}") from None


def _diff_lines(diff: Diff, dry_run: bool) -> Iterator[str]:
    if dry_run:
        yield from (f"- {binding}" for binding in diff.removed)
        yield from (f"+ {binding}" for binding in diff.added)
    would = "would be " if dry_run else ""
    yield f"{len(diff.added)} {would}added, {len(diff.removed)} {would}removed, {diff.unchanged} unchanged"


def _served(dispatcher: Dispatcher) -> set[str]:
    return {each.label for each in dispatcher.sockets() if each.alive}


def _warn_unserved(request: Request, labels: Iterable[str]) -> None:
    for label in sorted(labels):
        request.warn(f"label {label!r} has no live socket: 'pyskl register' gives it one")


@contextlib.contextmanager
def _progress(request: Request, file: str) -> Iterator[Callable[[str], None]]:
    """Show the steps of long work, where a person looks at it."""
    long = file == "-" or (os.path.isfile(file) and os.path.getsize(file) > _FILE_IS_LONG)
    if request.quiet or not long or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress  # noqa: PLC0415 - it is slow to import
    from rich.console import Console  # noqa: PLC0415

    columns = progress.TextColumn("{task.description:>9}"), progress.BarColumn(), progress.TimeElapsedColumn()
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=2)
        done = iter(range(2))
        yield lambda text: bar.update(task, description=text, completed=next(done))


@verb("policy")
@label_argument
@click.argument("on_missing", metavar="[reset|hold|fallthrough]", type=click.Choice(ON_MISSING), required=False)
@click.option("--udp-sticky", metavar="SECONDS", type=int, help="How long a silent UDP flow keeps its socket; 0: not.")
def policy(request: Request, label: str, on_missing: OnMissing | None, udp_sticky: int | None) -> None:
    """Show or set what clients get while a label has no live socket, and how UDP flows are kept."""
    setting = on_missing is not None or udp_sticky is not None
    check_policy(on_missing or "reset", udp_sticky or 0)
    with request.write() if setting else request.read() as dispatcher:
        if setting:
            now = dispatcher.set_policy(label, on_missing=on_missing, udp_sticky=udp_sticky)
        else:
            now = dispatcher.policies().get(label, Policy())
    lines = [f"{label}: on_missing {now.on_missing}, udp_sticky {now.udp_sticky}"]
    show: Callable[..., None] = request.confirm if setting else request.answer
    show({"label": label, **now._asdict()}, lines)
