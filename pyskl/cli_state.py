# SPDX-License-Identifier: BSD-2-Clause
"""The verbs of the dispatcher itself: load, unload, upgrade, status."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

import click

from pyskl.cli_output import document, table
from pyskl.cli_request import (
    GROUP,
    Request,
    count,
    label_filter,
    verb,
)
from pyskl.dispatcher import Dispatcher
from pyskl.paths import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyskl.report import Status


@verb("load")
@click.option("--max-labels", type=click.IntRange(1), help="How many labels there can be.  [4096]")
@click.option("--max-sockets", type=click.IntRange(1), help="How many sockets can be registered.  [4096]")
@click.option("--group", metavar="NAME|GID", type=GROUP, help="A group whose members may read it.")
@click.option("--group-sockets", is_flag=True, help="Let these register sockets, too.")
def load(
    request: Request,
    max_labels: int | None,
    max_sockets: int | None,
    group: int | None,
    group_sockets: bool,
) -> None:
    """Make a dispatcher, and attach it to the network namespace."""
    if group_sockets and group is None:
        raise click.UsageError("--group-sockets needs --group")
    sizes = {"max_labels": max_labels, "max_sockets": max_sockets}
    chosen: Any = {name: value for name, value in sizes.items() if value is not None}
    chosen.update(group=group, group_sockets=group_sockets)
    path = request.path
    with request.netns() as netns, Dispatcher.create(netns, path=path, **chosen) as dispatcher:
        status = dispatcher.status()
    request.confirm(document(status), [f"loaded {status.path}"])


@verb("unload")
def unload(request: Request) -> None:
    """Detach the dispatcher, and remove all that is its."""
    path = request.path
    Dispatcher.remove(path)
    if not request.has_path:
        with contextlib.suppress(OSError):  # other namespaces have theirs in it
            os.rmdir(FOLDER)
    request.confirm({"path": path}, [f"unloaded {path}"])


@verb("upgrade")
def upgrade(request: Request) -> None:
    """Put the program of this version in the place of the running one, under traffic."""
    with request.write() as dispatcher:
        dispatcher.upgrade()
        status = dispatcher.status()
    request.confirm(document(status), [f"upgraded {status.path}: program {status.program_id}"])


@verb("status")
@label_filter
def status(request: Request, label: str | None) -> None:
    """Show the dispatcher, its labels, and what they lack."""
    with request.read() as dispatcher:
        status = dispatcher.status()
        counters = {} if request.json else dispatcher.counters()
    if label is not None:
        status = status._replace(
            labels=tuple(each for each in status.labels if each.label == label),
            unserved=tuple(each for each in status.unserved if each == label),
        )
    rows = [
        (*each, counters[each.label].selected, counters[each.label].missed)
        for each in status.labels
        if each.label in counters
    ]
    request.answer(document(status), [*_status_lines(status), *_unless_empty(_STATUS_HEADERS, rows)])


_STATUS_HEADERS: Final = (
    "LABEL", "BINDINGS", "SOCKETS", "DEAD", "ON_MISSING", "STICKY", "SELECTED", "MISSED",
)  # fmt: skip


def _status_lines(status: Status) -> Iterator[str]:
    yield f"path       {status.path}"
    yield f"namespace  {status.netns_inode}"
    if status.attached is None:
        yield "attached   not known: this user may not open the link"
    elif status.attached:
        yield f"attached   program {status.program_id}, link {status.link_id}"
    else:
        yield "attached   NO: nothing is steered ('pyskl doctor' says what to do)"
    yield f"speed      {'full' if status.full_speed else 'reduced: it was loaded without CAP_PERFMON'}"
    yield f"bindings   {status.bindings}"
    dead = f", and {status.dead} dead" if status.dead else ""
    yield f"sockets    {status.sockets} alive{dead} (at most {status.max_sockets})"
    yield f"labels     {len(status.labels)} (at most {status.max_labels})"
    if any(each.on_missing == "hold" for each in status.labels):
        if status.keepers:
            yield f"hold       in force: {count(status.keepers, 'process keeps', 'processes keep')} parking sockets"
        else:
            yield "hold       NOT in force: it is 'reset' until a process keeps parking sockets ('pyskl hold')"
    if status.unserved:
        yield f"unserved   {len(status.unserved)} with bindings and no live socket: {', '.join(status.unserved)}"


def _unless_empty(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    if rows:
        yield ""
        yield from table(headers, rows)
