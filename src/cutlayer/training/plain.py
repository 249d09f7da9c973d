"""What an epoch of plain split learning in 32 bits costs: what the savings of a run are measured against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.codecs.base import numel
from cutlayer.models.cut import is_frozen
from cutlayer.records.history import Baseline
from cutlayer.strategies import Sequential
from cutlayer.training.client import Client
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, pack
from cutlayer.wire.messages import Done, Plan, Step, Update


@dataclass(frozen=True)
class PlainEpoch:
    """A client's share of an epoch of plain split learning.

    Attributes:
        samples, steps: samples trained on, in so many batches.
        flops: of the client half, forward and backward.
        bytes: of all frames in both directions, but for those of weights.
    """

    samples: int
    steps: int
    flops: int
    bytes: int

    @staticmethod
    def of(client: Client) -> PlainEpoch:
        """That of this client: frames as they would be, of zeros."""
        sizes, number = Counter(client.train.batch_sizes()), client.number
        label, last = client.first_labels[:1].clone(), len(client.train) - 1
        if not label.is_floating_point():
            label[:] = client.first_labels.max()
        frozen = is_frozen(client.half)  # which no gradients would be sent to
        around = [Plan(number, 1, "B" if frozen else "A"), Done(number, 1, 1, {})]
        total = sum(len(pack(Frame(message))) for message in around)
        for size, count in sizes.items():
            values = get_codec("fp32").encode(torch.zeros(size, *client.cut_shape))
            labels = encode_exactly(label.expand(size, *label.shape[1:]).contiguous())
            tensors = {"ids": encode_exactly(torch.full((size,), last)), "labels": labels, "activations": values}
            up = pack(Frame(Step(number, 1, 1), tensors))
            down = pack(Frame(Update(number, 1, 1), {"gradients": values}))
            total += count * (len(up) + (0 if frozen else len(down)))
        steps, samples = sum(sizes.values()), sum(size * count for size, count in sizes.items())
        flops = sum(count * sum(client.flops(size)) for size, count in sizes.items())
        return PlainEpoch(samples, steps, flops, total)


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
