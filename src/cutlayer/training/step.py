"""A step of training a server half: forward, weighted loss, backward, update; and what is counted of steps in an epoch.

Written once: the server and each of its data-parallel workers call it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from cutlayer.codecs import isfinite
from cutlayer.errors import DivergedError, RefusedBatchError
from cutlayer.models.flops import FlopTable
from cutlayer.records.ledger import Ledger
from cutlayer.regularize import Mixture, dropped, mixed, smoothed
from cutlayer.regularize.mixing import check_maps
from cutlayer.seeds import seeded
from cutlayer.strategies.protocols import StepBatch
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import Job
from cutlayer.training.loss_checks import broadcast, require_mean, shapes


class TrainingStep:
    """A step of training a server half.

    Args:
        before_update: called between backward and update, such as to sum gradients over workers.
    """

    def __init__(self, job: Job, before_update: Callable[[nn.Module], None] = lambda half: None) -> None:
        self.job, self.before_update = job, before_update
        self.device = torch.device(job.training.device)
        self.chosen = job.training.regularize
        if self.chosen.cutmix:
            check_maps(job.cut_shape)
        self._function, self._loss_tried = smoothed(job.task.loss, self.chosen.label_smoothing), False

    @cached_property
    def flops(self) -> FlopTable:
        """FLOPs of the half by batch size. It copies the half: ask for it before the half's first pass."""
        return FlopTable(self.job.half, self.job.cut_shape, torch.float32)

    def __call__(
        self,
        trained: TrainedHalf,
        batches: Sequence[StepBatch],
        name: tuple[int | str, ...],
        *,
        total: int | None = None,
        check_loss: bool = True,
    ) -> list[Tensor]:
        """Train a half on these batches as one, and update it unless more microbatches of the step follow.

        Args:
            batches: may be empty if workers elsewhere have all samples of the step.
            name: epoch and step, and whatever else tells its random draws from those of others.
            total: samples of the whole step, over whose mean loss it goes; by default those of the batches' steps.
            check_loss: whether to wait for the device to say whether the loss is finite.

        Returns:
            The mean loss of each batch.

        Raises:
            RefusedBatchError: the loss does not take a batch; nothing was changed.
            DivergedError: a loss is not finite.
        """
        if total is None:
            total = sum(batch.step_samples for batch in batches)
        with seeded(self.job.training.seed, "server", *name, device=self.device):
            losses: list[Tensor] = []
            if batches:
                mixtures = self._mixtures(batches, name)
                outputs = self._forward(trained.half, [mixture.activations for mixture in mixtures])
                together = zip(outputs, batches, mixtures, strict=True)
                losses = [self._loss(*each, name, check_loss) for each in together]
            if not batches or batches[0].starts_step:
                trained.optimizer.zero_grad()
            if batches:
                _weighted(losses, [len(batch) for batch in batches], total).backward()
            if not batches or batches[0].ends_step:
                self.before_update(trained.half)
                trained.optimizer.step()
        return losses

    def count_flops(self, ledger: Ledger, samples: int, *, input_gradient: bool) -> None:
        """Count the FLOPs of training on so many samples at once."""
        forward, backward = self.flops(samples, input_gradient=input_gradient)
        ledger.flops("server", "forward", forward)
        ledger.flops("server", "backward", backward)

    def _mixtures(self, batches: Sequence[StepBatch], name: tuple[int | str, ...]) -> list[Mixture]:
        """The activations of each batch, and what is mixed in them, if anything is."""
        for batch in batches:
            batch.activations.requires_grad_(batch.needs_gradients)
        if not self.chosen.mixes:
            return [Mixture(batch.activations) for batch in batches]
        seed = self.job.training.seed
        return [mixed(self.chosen, batch.activations, seed, *name, place) for place, batch in enumerate(batches)]

    def _forward(self, half: nn.Module, activations: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs of each batch, float32."""
        inputs = torch.cat([*activations]) if len(activations) > 1 else activations[0]
        inputs = dropped(self.chosen, self.job.at_cut(inputs))
        if inputs.is_leaf and inputs.requires_grad:  # the half may begin with an in-place operation
            inputs = inputs.clone()
        with self.job.training.autocast():
            outputs = half(inputs).float()
        return outputs.split([len(each) for each in activations]) if len(activations) > 1 else [outputs]

    def _loss(
        self, outputs: Tensor, batch: StepBatch, mixture: Mixture, name: tuple[int | str, ...], check: bool
    ) -> Tensor:
        function, labels = self._function, batch.labels
        if not self._loss_tried and (wrong := broadcast(outputs, labels)):
            raise RefusedBatchError(wrong, batch)
        try:
            loss = function(outputs, labels)
        except Exception as error:
            raise RefusedBatchError(f"the loss failed on {shapes(outputs, labels)}: {error}", batch) from error
        if not self._loss_tried:
            require_mean(function, outputs, labels, loss)
            self._loss_tried = True
        loss = mixture.loss(loss, function, outputs, labels)
        if check and not isfinite(loss):
            raise DivergedError(
                f"epoch {name[0]}, step {name[1]}: the loss is {loss.item()}, not finite, though activations and "
                "labels are; lower the learning rate"
            )
        return loss


def _weighted(losses: Sequence[Tensor], sizes: Sequence[int], total: int) -> Tensor:
    """The losses, each weighted by its share of the step's samples, added up."""
    if len(losses) > 1:
        return torch.stack([loss * (size / total) for loss, size in zip(losses, sizes, strict=True)]).sum()
    return losses[0] if sizes[0] == total else losses[0] * (sizes[0] / total)


@dataclass(eq=False)
class EpochCounts:
    """What is counted in one epoch.

    Attributes:
        loss_sum: the losses of all samples added up, a float64 scalar where the half is.
        samples: samples trained on.
        by_client: loss sum and samples of each client; what is replayed for all together is no one's.
        steps: of each owner of a server half.
    """

    loss_sum: Tensor
    samples: int = 0
    by_client: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def empty(device: torch.device) -> EpochCounts:
        """Those of an epoch that begins."""
        return EpochCounts(torch.zeros((), dtype=torch.float64, device=device))

    def add(self, client: int | None, loss: Tensor, samples: int) -> None:
        """Count samples that were trained on with this mean loss."""
        weighted = loss.detach().double() * samples
        self.loss_sum += weighted
        self.samples += samples
        if client is not None:
            before, count = self.by_client.get(client, (torch.zeros_like(weighted), 0))
            self.by_client[client] = (before + weighted, count + samples)

    def add_step(self, owner: int) -> None:
        """Count a step of this owner's half."""
        self.steps[owner] = self.steps.get(owner, 0) + 1

    def loss(self) -> float:
        """The mean loss over all samples. Waits for the device."""
        return self.loss_sum.item() / self.samples

    def client_losses(self) -> dict[int, float]:
        """The mean loss over the samples of each client. Waits for the device."""
        return {client: total.item() / samples for client, (total, samples) in self.by_client.items()}
