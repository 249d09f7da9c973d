"""What a server measures, in the format of Prometheus, on a port of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cutlayer.backends.grpc.clients import GrpcClients
from cutlayer.errors import ConfigError
from cutlayer.records.history import EpochRecord


class Metrics:
    """Of a run that is served: totals over its epochs, and what is so at the moment.

    Args:
        clients: of the run.
        records: returns those of its epochs so far; may be changed once there are others.
    """

    def __init__(self, clients: GrpcClients, records: Callable[[], list[EpochRecord]]) -> None:
        self.clients, self.records = clients, records

    def collect(self) -> Iterator[Any]:
        """The metrics, as prometheus_client asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        records, clients = list(self.records()), self.clients
        epochs = CounterMetricFamily("cutlayer_epochs", "Epochs done, by what they exchanged.", labels=["exchange"])
        for exchange in "ABC":
            epochs.add_metric([exchange], sum(record.exchange == exchange for record in records))
        yield epochs
        if records:
            yield GaugeMetricFamily("cutlayer_loss", "Mean training loss of the last epoch.", records[-1].loss)
        sizes = CounterMetricFamily("cutlayer_bytes", "Bytes of epochs done.", labels=["direction", "kind"])
        totals: dict[tuple[str, str], int] = {}
        for record in records:
            for way, kinds in record.bytes.items():
                for kind, count in kinds.items():
                    totals[way, kind] = totals.get((way, kind), 0) + count
        for labels, count in totals.items():
            sizes.add_metric(list(labels), count)
        yield sizes
        by_client = CounterMetricFamily("cutlayer_client_bytes", "Bytes of frames.", labels=["client", "direction"])
        for labels, count in dict(clients.traffic).items():
            by_client.add_metric(list(labels), count)
        yield by_client
        refusals = CounterMetricFamily("cutlayer_refusals", "What was refused.", labels=["client", "reason"])
        for labels, count in clients.refusals.reasons.copy().items():
            refusals.add_metric(list(labels), count)
        yield refusals
        present = GaugeMetricFamily("cutlayer_client_present", "Whether a client is connected.", labels=["client"])
        there, awaited = clients.admission.present(), clients.waiting.awaited()
        waiting = GaugeMetricFamily("cutlayer_client_awaited", "Whether the run waits for a client.", labels=["client"])
        for name in clients.names:
            present.add_metric([name], name in there)
            waiting.add_metric([name], name in awaited)
        yield present
        yield waiting
        if (stored := clients.stored_bytes()) is not None:
            yield GaugeMetricFamily("cutlayer_store_bytes", "Bytes of the replay store.", stored)


@contextmanager
def shown(metrics: Metrics, address: str | None) -> Iterator[None]:
    """Inside the block the metrics are shown at HOST:PORT, if one is given."""
    if address is None:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ModuleNotFoundError:
        raise ConfigError("metrics need prometheus_client: pip install 'cutlayer[metrics]'") from None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"metrics: expected HOST:PORT, got {address!r}")
    registry = CollectorRegistry()
    registry.register(metrics)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise ConfigError(f"metrics: cannot listen on {address}: {error}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)
