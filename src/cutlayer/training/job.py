"""What a server, or a client, is given to do: each one value, handed on whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutlayer.data.batches import Batches
from cutlayer.method import Method, Task, Training


@dataclass(frozen=True, eq=False)
class Job:
    """What the server of a run is given.

    Attributes:
        half: from the activations at the cut to the outputs; trained in place.
        cut_shape: shape of one sample's activations.
        bfloat16: whether activations are bfloat16 where they leave the client half, and so where they enter this one.
    """

    half: nn.Module
    cut_shape: tuple[int, ...]
    method: Method
    training: Training
    task: Task
    bfloat16: bool = False

    def at_cut(self, activations: Tensor) -> Tensor:
        """Decoded activations as the uncut network would hand them on: of the same type and order in memory."""
        return self.training.laid_out(activations.to(torch.bfloat16) if self.bfloat16 else activations)


@dataclass(frozen=True, eq=False)
class ClientJob:
    """What a client of a run is given, beside its half.

    Attributes:
        number: the client's number, from 0.
        train, test: its batches for training and, if it has any, for evaluation.
        secret: part of the name of draws that the server must not be able to repeat, such as noise at the cut. A
            client on a machine of its own has one that it alone knows.
    """

    number: int
    train: Batches
    test: Batches | None
    method: Method
    training: Training
    secret: int = 0
