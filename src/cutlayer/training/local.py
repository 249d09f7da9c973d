"""A client that trains its half by itself while it sends: every h-th batch of activations, and no gradients come back.

Source: Mu and Shen, "Federated Split Learning with Improved Communication and Storage Efficiency" (CSE-FSL, arXiv
2507.15816).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import cross_entropy

from cutlayer.data.batches import Batch
from cutlayer.models.auxiliary import SelfTraining
from cutlayer.models.flops import FlopTable
from cutlayer.records.ledger import Ledger
from cutlayer.seeds import seeded
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import ClientJob


class LocalTraining:
    """The client's own training in a B epoch.

    Args:
        trained: the half, a `SelfTraining`, and the optimizer of both its parts; asked for at every step.
        flops: of the half without the head.
    """

    def __init__(self, job: ClientJob, trained: Callable[[], TrainedHalf], ledger: Ledger, flops: FlopTable) -> None:
        self.number, self.training, self.ledger = job.number, job.training, ledger
        self._trained, self._flops, self._head_flops = trained, flops, FlopTable(_half(trained()).head, *_of(flops))

    def epoch(self, epoch: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Train on all batches of an epoch; give those that are to be sent, with activations in place of inputs.

        The activations are those of the step itself, before its update.
        """
        device = torch.device(self.training.device)
        for step, batch in enumerate(batches):
            trained = self._trained()
            half, name = _half(trained).train(), ("client", self.number, epoch, step)
            with seeded(self.training.seed, *name, device=device):
                with self.ledger.phase("client forward"), self.training.autocast():
                    activations = half(self.training.laid_out(batch.inputs.to(device, non_blocking=True)))
                    outputs = half.head(activations).float()
                with self.ledger.phase("client backward"):
                    trained.optimizer.zero_grad()
                    cross_entropy(outputs, batch.labels.to(device)).backward()
                    trained.optimizer.step()
            forward, backward = self._flops(len(batch.ids))
            head_forward, head_backward = self._head_flops(len(batch.ids), input_gradient=True)
            self.ledger.flops("client", "forward", forward + head_forward)
            self.ledger.flops("client", "backward", backward + head_backward)
            if step % half.every == 0:
                yield Batch(batch.ids, activations.detach(), batch.labels)


def _half(trained: TrainedHalf) -> SelfTraining:
    assert isinstance(trained.half, SelfTraining)
    return trained.half


def _of(flops: FlopTable) -> tuple[tuple[int, ...], torch.dtype]:
    """What the head takes."""
    return flops.output_shape, torch.float32
