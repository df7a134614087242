# SPDX-License-Identifier: BSD-2-Clause
"""The verbs of sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from pyskl import cli_output
from pyskl.address import parse_endpoint
from pyskl.cli_errors import Refused
from pyskl.cli_output import table
from pyskl.cli_request import (
    FAMILY,
    PORT,
    PROTOCOL,
    SLOT,
    Request,
    label_argument,
    label_filter,
    verb,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyskl.report import Registration


_SOCKET_HEADERS: Final = ("LABEL", "PROTOCOL", "FAMILY", "SLOT", "ADDRESS", "COOKIE", "STATE")


@verb("sockets")
@label_filter
def sockets(request: Request, label: str | None) -> None:
    """List the registered sockets."""
    with request.read() as dispatcher:
        found = dispatcher.sockets(label)
    rows = (
        (
            each.label,
            each.protocol.name.lower(),
            cli_output.family(each.family),
            each.slot,
            cli_output.address(each.address),
            each.cookie,
            "alive" if each.alive else "dead",
        )
        for each in found
    )
    request.answer({"sockets": found}, table(_SOCKET_HEADERS, rows))


def _registered(request: Request, done: str, registrations: Sequence[Registration]) -> None:
    lines = [
        f"{done} {each.label} {each.protocol.name.lower()} {cli_output.family(each.family)} slot {each.slot}: "
        f"{cli_output.address(each.address)}"
        for each in registrations
    ]
    request.confirm({"sockets": registrations}, lines)


@verb("register")
@label_argument
@click.option("--slot", type=SLOT, default=0, help="The first slot; more sockets of a kind take the next ones.")
def register(request: Request, label: str, slot: int) -> None:
    """Register the sockets that this process inherited (LISTEN_FDS, as systemd sets it): all of them, or none."""
    from pyskl.register import register_inherited  # noqa: PLC0415 - for this verb alone
    from pyskl.systemd import inherited  # noqa: PLC0415

    found = inherited()
    if not found:
        raise Refused(
            "no socket was inherited",
            "LISTEN_FDS and LISTEN_PID are set by systemd for a service that has a socket unit, "
            "and by systemd-socket-activate",
        )
    with request.write() as dispatcher:
        made = register_inherited(dispatcher, label, found, slot)
    _registered(request, "registered", made)


@verb("register-pid")
@click.argument("pid", type=click.IntRange(1))
@label_argument
@click.argument("protocol", type=PROTOCOL)
@click.argument("address")
@click.argument("port", type=PORT)
@click.option("--slot", type=SLOT, default=0, help="The slot.")
def register_pid(request: Request, pid: int, label: str, protocol: Any, address: str, port: int, slot: int) -> None:
    """Register a socket that another process holds, by the address and port that it is bound to."""
    parse_endpoint((address, port))
    with request.write() as dispatcher:
        made = dispatcher.register_pid(label, pid, protocol, address, port, slot=slot)
    _registered(request, "registered", [made])


@verb("unregister")
@label_argument
@click.argument("protocol", type=PROTOCOL, required=False)
@click.option("--family", type=FAMILY, help="Those of this family.")
@click.option("--slot", type=SLOT, help="Those of this slot.")
def unregister(request: Request, label: str, protocol: Any, family: str | None, slot: int | None) -> None:
    """Take sockets from a label; they stay open."""
    with request.write() as dispatcher:
        gone = dispatcher.unregister(label, protocol=protocol, family=family, slot=slot)
    _registered(request, "unregistered", gone)
