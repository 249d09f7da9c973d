"""What an epoch of a run costs at most, known before it begins, and what one did cost: for schedules with a budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cutlayer.codecs import get_transfer
from cutlayer.codecs.base import Codec, numel
from cutlayer.method import Method, Training
from cutlayer.schedule import Cost, Exchange, Outlook
from cutlayer.training.calibration import CALIBRATION_BATCHES
from cutlayer.training.plain_epoch import PlainEpoch

FRAME_BYTES = 128
"""More than the headers of a step grow with large numbers, and a lossless stage adds to what it cannot make smaller."""
CLIENT_BYTES = 4096
"""More than the plans, questions and answers of a client in an epoch."""
LABEL_BYTES = 9
"""More than a sample's label of one number grows if classes are many, and what says that the sample was sent."""


@dataclass(frozen=True)
class RunCosts:
    """The costs of one run's epochs.

    Attributes:
        plain: each client's share of an epoch of plain split learning.
        weights_bytes: of a frame with the weights of the client half.
        shape: of one sample's activations.
        share: steps after which clients share their weights, beside the end of the epoch; None if they never do.
        frozen: whether nothing of the client half is trained.
    """

    plain: Sequence[PlainEpoch]
    weights_bytes: int
    shape: tuple[int, ...]
    share: int | None = None
    frozen: bool = False

    def outlook(self, method: Method, training: Training) -> Outlook:
        """What is known of the run before it begins. Each epoch of a client is taken to be as long as its first."""
        rates = training.server_rates
        up, down = (get_transfer(spec).codec for spec in (method.activations, method.gradients))
        microbatches, several = training.microbatches, len(self.plain) > 1
        calibrated = method.norm_in_b == "calibrated"
        size = sum(
            self._tensors(up, client, microbatches) + self._around(client, microbatches) for client in self.plain
        )
        statistics = 3 * self.weights_bytes * len(self.plain) if several else 0
        flops = sum(self.flops(client, Exchange.ACTIVATIONS, calibrated) for client in range(len(self.plain)))
        activations = Cost(size + statistics, flops)
        if self.frozen:
            return Outlook(training.epochs, rates, (activations, activations))
        size += sum(self._tensors(down, client, microbatches) for client in self.plain) + self._averages()
        flops = sum(self.flops(client, Exchange.BOTH) for client in range(len(self.plain)))
        return Outlook(training.epochs, rates, (Cost(size, flops), activations))

    def flops(self, client: int, exchange: Exchange, calibrated: bool = False) -> int:
        """FLOPs of a client's epoch, and if it measured statistics of batch norm before, of that."""
        plain = self.plain[client]
        if exchange is Exchange.BOTH:
            return plain.flops + plain.defence
        batches = min(CALIBRATION_BATCHES, plain.steps) if calibrated else 0
        return plain.forward + math.ceil(plain.forward * batches / max(1, plain.steps - 1))

    def spent(self, size: int, took_part: Collection[tuple[int, Exchange]], calibrated: bool) -> Cost:
        """What an epoch cost that moved so many bytes, with these clients."""
        return Cost(size, sum(self.flops(client, exchange, calibrated) for client, exchange in took_part))

    def _tensors(self, codec: Codec, client: PlainEpoch, microbatches: int) -> int:
        layout = codec.layout(self.shape)
        return client.samples * layout.row_bytes + client.steps * microbatches * (layout.shared_bytes + FRAME_BYTES)

    def _around(self, client: PlainEpoch, microbatches: int) -> int:
        """Labels, ids, headers."""
        tensors = client.samples * numel(self.shape) * 4 * (1 if self.frozen else 2)
        labels = max(client.samples * LABEL_BYTES, client.labels + client.samples)
        return (client.bytes - tensors) * microbatches + labels + CLIENT_BYTES

    def _averages(self) -> int:
        """Weights up and down, in an A epoch of several clients."""
        if self.share is None:
            return 0
        within = sum((client.steps - 1) // self.share for client in self.plain) if self.share else 0
        return (2 * within + 3 * len(self.plain)) * (self.weights_bytes + FRAME_BYTES)
