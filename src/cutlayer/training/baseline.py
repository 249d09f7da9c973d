"""What savings of a run are measured against: an epoch of plain split learning in 32 bits, of all clients."""

from __future__ import annotations

from collections.abc import Sequence

from cutlayer.codecs.base import numel
from cutlayer.records.history import Baseline
from cutlayer.strategies import Sequential
from cutlayer.training.plain_epoch import PlainEpoch
from cutlayer.training.server import Server


def baseline_of(clients: Sequence[PlainEpoch], server: Server, weights: int) -> Baseline:
    """The costs of an epoch of all clients, with this server's strategy.

    Args:
        weights: bytes of a frame with the weights of the client half.
    """
    samples = sum(client.samples for client in clients)
    total = first = sum(client.bytes for client in clients)
    frozen = server.states.frozen
    if (share := server.share) is not None and not frozen:
        within = sum((client.steps - 1) // share for client in clients) if share else 0
        total += 2 * weights * (within + len(clients))
        # No one has weights to hand on before the first epoch; one after the other, all but the first client get some.
        first = total - weights * (1 if isinstance(server.strategy, Sequential) else len(clients))
    exchanged = samples * numel(server.cut_shape) * 4 * (1 if frozen else 2)
    return Baseline(exchanged, sum(client.flops for client in clients), samples, total, first)
