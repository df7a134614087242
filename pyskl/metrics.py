# SPDX-License-Identifier: BSD-2-Clause
"""A dispatcher's figures for Prometheus: a collector for a registry of prometheus_client, and a server of OpenMetrics.

=============================  =======  ==================================================================
name                           type     what it is
=============================  =======  ==================================================================
pyskl_lookups_total            counter  look-ups by ``label``, ``protocol``, ``family``, and ``result``:
                                        ``selected`` a socket, or ``missed`` (the label's policy was followed)
pyskl_bindings                 gauge    bindings by ``label``
pyskl_sockets                  gauge    registered sockets by ``label`` and ``state``: ``alive`` or ``dead``
pyskl_unserved                 gauge    by ``label``: 1 where it has bindings and no live socket
pyskl_attached                 gauge    1 while the program is attached to its namespace
pyskl_keepers                  gauge    processes that keep the parking sockets of the policy ``hold``
pyskl_max_labels               gauge    how many labels there can be
pyskl_max_sockets              gauge    how many sockets can be registered
=============================  =======  ==================================================================

A look-up is counted in one sample: over TCP there is one for each SYN, over UDP one for each datagram.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector as _Collector
from prometheus_client.registry import CollectorRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from pyskl.address import Address
    from pyskl.dispatcher import Dispatcher
    from pyskl.report import Status

_FAMILIES = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}
_TIMEOUT = 10  # seconds for a client to ask


class Collector(_Collector):
    """The figures of a dispatcher, read when they are asked for: ``REGISTRY.register(Collector(dispatcher))``.

    Args:
        dispatcher: that is open as long as it is asked; one opened for reading will do.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def describe(self) -> list[Metric]:
        """Tell the names, so that they are known before the dispatcher is asked."""
        return [_lookups(), *_gauges(None)]

    def collect(self) -> Iterator[Metric]:
        """Give the figures.

        Raises:
            ValueError: the dispatcher is closed.
        """
        lookups = _lookups()
        for label, counters in self._dispatcher.counters().items():
            for (protocol, family), count in counters.by.items():
                names = [label, protocol.name.lower(), _FAMILIES[family]]
                lookups.add_metric([*names, "selected"], count.selected)
                lookups.add_metric([*names, "missed"], count.missed)
        yield lookups
        yield from _gauges(self._dispatcher.status())


def _lookups() -> CounterMetricFamily:
    text = "Look-ups that matched a binding: SYNs and datagrams"
    return CounterMetricFamily("pyskl_lookups", text, labels=["label", "protocol", "family", "result"])


def _gauges(status: Status | None) -> Iterator[GaugeMetricFamily]:
    bindings = GaugeMetricFamily("pyskl_bindings", "Bindings", labels=["label"])
    sockets = GaugeMetricFamily("pyskl_sockets", "Registered sockets", labels=["label", "state"])
    unserved = GaugeMetricFamily("pyskl_unserved", "1: bindings, and no live socket", labels=["label"])
    attached = GaugeMetricFamily("pyskl_attached", "1: the program is attached to its namespace")
    keepers = GaugeMetricFamily("pyskl_keepers", "Processes that keep the parking sockets of the policy hold")
    max_labels = GaugeMetricFamily("pyskl_max_labels", "How many labels there can be")
    max_sockets = GaugeMetricFamily("pyskl_max_sockets", "How many sockets can be registered")
    if status is not None:
        for label in status.labels:
            bindings.add_metric([label.label], label.bindings)
            sockets.add_metric([label.label, "alive"], label.sockets)
            sockets.add_metric([label.label, "dead"], label.dead)
            unserved.add_metric([label.label], int(label.label in status.unserved))
        if status.attached is not None:  # a user who may not open the link does not know
            attached.add_metric([], int(status.attached))
        keepers.add_metric([], status.keepers)
        max_labels.add_metric([], status.max_labels)
        max_sockets.add_metric([], status.max_sockets)
    yield from (bindings, sockets, unserved, attached, keepers, max_labels, max_sockets)


class Sample(NamedTuple):
    """One figure.

    Attributes:
        name: of the table above.
        labels: by their names.
        value: of it.
    """

    name: str
    labels: dict[str, str]
    value: float


def samples(dispatcher: Dispatcher) -> list[Sample]:
    """Give a dispatcher's figures one by one."""
    every = (sample for metric in Collector(dispatcher).collect() for sample in metric.samples)
    return [Sample(sample.name, dict(sample.labels), sample.value) for sample in every]


def text(dispatcher: Dispatcher) -> bytes:
    """Give a dispatcher's figures as OpenMetrics text."""
    registry = CollectorRegistry()
    registry.register(Collector(dispatcher))
    made: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return made


@contextlib.contextmanager
def served(address: Address, scrape: Callable[[], bytes]) -> Iterator[Address]:
    """Answer scrapes in threads of their own, for the length of a ``with``.

    Args:
        address: to listen on.
        scrape: gives the text; what it raises is told to the client.

    Returns:
        The address that it listens on.

    Raises:
        OSError: the address is taken, or not one of this host.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                self.send_error(404)
                return
            try:
                body = scrape()
            except Exception as error:  # noqa: BLE001 - the client is told whatever it is
                self.send_error(503, explain=str(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError, TimeoutError):  # a client that went away
                super().handle()

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in str(address[0]) else socket.AF_INET
        daemon_threads = True

        def server_bind(self) -> None:
            # That of HTTPServer asks for the host's name, which nobody needs.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()

    with Server(address[:2], Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="pyskl-metrics", daemon=True)
        thread.start()
        try:
            yield server.server_address  # type: ignore[misc]  # of an inet socket
        finally:
            server.shutdown()
            thread.join()
