"""What can be said of a client before it trains: to the server, and to whoever resumes the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cutlayer.describe import describe, fingerprint
from cutlayer.models.cut import is_frozen
from cutlayer.training.checks import ClientSummary
from cutlayer.training.client import Client
from cutlayer.training.plain_epoch import PlainEpoch


def client_summary(client: Client) -> ClientSummary:
    """What the server is told of a client's data, and of its half."""
    train, test = client.train, client.test
    test_samples, test_batch_size = (len(test), test.batch_size) if test is not None else (0, 0)
    return ClientSummary(
        len(train),
        test_samples,
        train.batch_size,
        train.drop_last,
        test_batch_size,
        epoch_samples=sum(train.batch_sizes()),
        frozen=is_frozen(client.half),
        bfloat16=_bfloat16(client),
    )


def _bfloat16(client: Client) -> bool:
    training = client.training
    if training.precision == "fp32":
        return False
    return client.flops.output_type(training.autocast(), client.device) is torch.bfloat16


@dataclass(frozen=True)
class ClientDescription:
    """What can be said of a client before it trains.

    Attributes:
        summary: what the server is told.
        cut_shape: shape of one sample's activations.
        inputs: type and shape of one sample.
        sizes: samples in each batch of an epoch.
        plain: its share of an epoch of plain split learning.
        stores: names of what a checkpoint holds of it beside its half and optimizer.
        first: a digest of its first samples, so that a run is not resumed with other data by mistake.
    """

    summary: ClientSummary
    cut_shape: tuple[int, ...]
    inputs: str
    sizes: list[int]
    plain: PlainEpoch
    stores: list[str]
    first: str

    @staticmethod
    def of(client: Client) -> ClientDescription:
        """Those of this client."""
        first, sizes = client.train.first(), client.train.batch_sizes()
        return ClientDescription(
            client_summary(client),
            client.cut_shape,
            f"{client.flops.dtype} {list(client.flops.sample_shape)}",
            sizes,
            PlainEpoch.of(client),
            [*client.stores()],
            fingerprint(first.inputs, first.labels),
        )

    def as_dict(self, whose: str) -> dict[str, Any]:
        """As config.json names them."""
        return {
            f"training samples{whose}": self.summary.samples,
            f"batches{whose}": describe(self.sizes[:1] + self.sizes[-1:]),
            f"first samples{whose}": self.first,
            f"test samples{whose}": self.summary.test_samples,
        }
