# SPDX-License-Identifier: BSD-2-Clause
"""The verbs that go on until a signal ends them: metrics, hold, run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from pyskl import cli_output
from pyskl.binding import Binding, port_ranges
from pyskl.cli_errors import Refused
from pyskl.cli_request import (
    ADDRESS,
    Request,
    ports_of,
    verb,
)
from pyskl.dispatcher import Dispatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyskl.address import Address


@verb("metrics")
@click.option("--listen", metavar="ADDRESS:PORT", type=ADDRESS, help="Serve them over HTTP, until a signal ends it.")
def metrics(request: Request, listen: Address | None) -> None:
    """Print the figures as OpenMetrics text, or serve them to Prometheus."""
    if request.json and listen is not None:
        raise click.UsageError("what is served is OpenMetrics text: --json can't go with --listen")
    metrics = _metrics()
    if request.json:
        with request.read() as dispatcher:
            request.answer({"samples": metrics.samples(dispatcher)}, ())
        return

    def scrape() -> bytes:
        with request.read() as dispatcher:
            text: bytes = metrics.text(dispatcher)
        return text

    if listen is None:
        cli_output.out().write(scrape().decode())
        return
    with until_signal() as wait, metrics.served(listen, scrape) as address:
        if not request.quiet:
            click.echo(f"listening on http://{cli_output.address(address)}/metrics", err=True)
        ready()
        wait()


def _metrics() -> Any:
    try:
        from pyskl import metrics  # noqa: PLC0415 - of an extra of its own
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise Refused("metrics needs prometheus-client", "pip install 'pyskl[metrics]'") from None
    return metrics


def ready() -> None:
    """Tell the service manager, where there is one, that the work has begun."""
    from pyskl import systemd  # noqa: PLC0415 - where a service manager may wait

    systemd.notify("READY=1")


@contextlib.contextmanager
def until_signal() -> Iterator[Callable[[], object]]:
    """Give a function that waits for SIGTERM or SIGINT; until it is called they wait too."""
    ending = {signal.SIGTERM, signal.SIGINT}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield lambda: signal.sigwait(ending)
    finally:
        while signal.sigtimedwait(ending, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@verb("hold")
def hold(request: Request) -> None:
    """Keep the parking sockets of the policy "hold", until SIGTERM or SIGINT."""
    from pyskl import systemd  # noqa: PLC0415 - for this verb alone

    with until_signal() as wait, contextlib.ExitStack() as stored:
        before = systemd.inherited()
        for each in before:
            stored.callback(os.close, each.fd)
        with request.write() as dispatcher:
            kept = dispatcher._parking.sockets
            if not kept:
                raise Refused("this process can't keep parking sockets", "as root it can, unless 64 processes do")
            systemd.store(kept, instead_of=before)
            stored.close()  # what the process before this one had kept
            status = dispatcher.status()
            request.confirm({"path": status.path, "keepers": status.keepers}, [f"holding {status.path}"])
            if sys.stdout is not None:
                sys.stdout.flush()
            ready()
            wait()


@verb("run", context_settings={"allow_interspersed_args": False})
@click.option("--tcp", metavar="PREFIX", multiple=True, help="Steer TCP to this prefix; may be given again.")
@click.option("--udp", metavar="PREFIX", multiple=True, help="Steer UDP to this prefix; may be given again.")
@click.option("--ports", metavar="PORTS", multiple=True, help="Of the prefixes: 80 or 1024-65535; may be given again.")
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    type=ADDRESS,
    help="Bind the socket to it, for a program that must know; otherwise to a free port of the loopback address.",
)
@click.option("--stdio", is_flag=True, help="Start CMD for each connection, as its standard input and output.")
@click.option(
    "--max-connections", type=click.IntRange(1), default=64, show_default=True, help="With --stdio: at a time."
)
@click.argument("command", metavar="CMD [ARGS]...", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    request: Request,
    tcp: Sequence[str],
    udp: Sequence[str],
    ports: Sequence[str],
    listen: Address | None,
    stdio: bool,
    max_connections: int,
    command: Sequence[str],
) -> int:
    """Start a program that takes LISTEN_FDS, with sockets that get what is sent to these prefixes.

    Nothing is left when it ends, and its status is this command's.
    """
    from pyskl import run  # noqa: PLC0415 - for this verb alone

    wanted = _run_bindings(tcp, udp, ports)
    if stdio and udp:
        raise click.UsageError("--stdio is for connections, and UDP has none: --udp can't go with it")
    if request.has_path:
        raise click.UsageError("run has a dispatcher of its own, without a folder: --path means nothing to it")
    with request.netns() as netns, netns.visited(), run.listeners(wanted, listen) as listeners:
        run.check_command(command[0])
        with Dispatcher.create(netns) as dispatcher:
            for listener in listeners:
                dispatcher.register(_RUN, listener.sock)
            dispatcher.replace(wanted)
            if stdio:
                return run.serve(command, listeners[0].sock, os.environ, max_connections)
            with run.signals_blocked():
                child = run.start(command, listeners, os.environ)
                for listener in listeners:
                    listener.sock.close()  # so that nobody waits for what the program has closed
                return run.supervise(child)


_RUN: Final = "run"


def _run_bindings(tcp: Sequence[str], udp: Sequence[str], ports: Sequence[str]) -> list[Binding]:
    ranges = [range(first, last + 1) for first, last in port_ranges(ports_of(ports))]
    prefixes: list[tuple[Any, str]] = [*(("tcp", prefix) for prefix in tcp), *(("udp", prefix) for prefix in udp)]
    if not prefixes:
        raise click.UsageError("nothing is steered: --tcp PREFIX or --udp PREFIX")
    return [Binding(_RUN, protocol, prefix, ports) for protocol, prefix in prefixes for ports in ranges]
