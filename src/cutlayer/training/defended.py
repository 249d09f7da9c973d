"""A client's defences at work: what they add to its loss, to what it sends, and what they see in what comes back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from cutlayer.data.batches import Batch
from cutlayer.errors import HijackedError
from cutlayer.models.cut import is_frozen
from cutlayer.privacy.attacker_aware import Adversary
from cutlayer.privacy.noise import Noise
from cutlayer.privacy.scores import distance_correlation
from cutlayer.privacy.splitguard import SplitGuard
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Store
from cutlayer.seeds import derive, generator
from cutlayer.training.client_frames import microbatch_name
from cutlayer.training.job import ClientJob
from cutlayer.wire.messages import Evaluate, Step


class Defended:
    """What `Method.defence` has a client do. Without defences all of it does nothing.

    Args:
        image: shape of one of the client's inputs.
    """

    def __init__(self, job: ClientJob, image: tuple[int, ...], cut: tuple[int, ...], ledger: Ledger) -> None:
        defence, seed, self.number = job.method.defence, job.training.seed, job.number
        self.seed, self.ledger, self.nopeek = derive(seed, "secret", job.secret), ledger, defence.nopeek
        self._noise = Noise.of(defence)
        self._adversary: Adversary | None = None
        if defence.adversary:
            weight, floor = defence.adversary, defence.adversary_floor
            self._adversary = Adversary(cut, image, weight, floor, seed, job.number)
            self._adversary.decoder.to(torch.device(job.training.device))  # before its optimizer has a state
        self._watch: SplitGuard | None = None
        if defence.watch:
            self._watch = SplitGuard(self.seed, job.number, defence.watch, defence.watch_score, defence.watch_after)

    def stores(self) -> dict[str, Store]:
        """What a checkpoint holds of it."""
        return {} if self._adversary is None else {"adversary": self._adversary}

    @property
    def scores(self) -> list[float]:
        """The last scores of the watch, from 0 to 1; empty without a watch, and until it has seen enough."""
        return [] if self._watch is None else list(self._watch.scores)

    def flops(self, batch: int) -> int:
        """FLOPs of the penalties of so many samples, beside those of the half."""
        return 0 if self._adversary is None else self._adversary.flops(batch)

    def penalties(self, message: Step, batch: Batch, activations: Tensor) -> list[Tensor]:
        """What is added to the loss of a step, or of its microbatch, beside the gradients that the server sends."""
        found, inputs = [], batch.inputs.to(activations.device)
        if self.nopeek and len(inputs) > 1:
            found.append(self.nopeek * distance_correlation(inputs, activations))
        if self._adversary is not None:
            with self.ledger.phase("client defence"):
                found.append(self._adversary.penalty(inputs, activations))
            self.ledger.flops("client", "backward", self.flops(len(inputs)))
        share = len(inputs) / message.samples if message.microbatches > 1 else 1.0
        return [penalty * share for penalty in found]

    def noisy(self, message: Step | Evaluate, activations: Tensor) -> Tensor:
        """The activations as they are sent; gradients flow through."""
        if not self._noise.changes:
            return activations
        kind = "evaluation" if isinstance(message, Evaluate) else "training"
        name = (kind, self.number, message.epoch, message.step, *microbatch_name(message))
        return self._noise(activations, generator(self.seed, "noise", *name))

    def shown(self, message: Step, batch: Batch, gradients_come: bool) -> Batch:
        """The batch as it is sent: now and then with false labels, to see whether the server minds."""
        if self._watch is None or not gradients_come or not self._watch.is_false(message.epoch, message.step):
            return batch
        labels = self._watch.false_labels(batch.labels, message.epoch, message.step, message.microbatch)
        return dataclasses.replace(batch, labels=labels)

    def accepts(self, message: Step, half: nn.Module) -> bool:
        """Whether the half, whose gradients of a step are there, is to be updated with them.

        Raises HijackedError if what came back says that the server does not train on the labels.
        """
        if self._watch is None or is_frozen(half):
            return True
        first = next(p for p in half.parameters() if p.grad is not None)
        self._watch.add(first.grad if first.grad is not None else torch.zeros(()), message.epoch, message.step)
        if self._watch.suspicious:
            mean = sum(self._watch.scores) / len(self._watch.scores)
            where = f"client {self.number}, epoch {message.epoch}, step {message.step}"
            raise HijackedError(
                f"{where}: the server's gradients are the same for false labels as for true ones (score {mean:.2f}, "
                f"expected at least {self._watch.threshold}): it does not train on the task, and may be making the "
                "half invertible. Nothing more is sent"
            )
        return not self._watch.is_false(message.epoch, message.step)
