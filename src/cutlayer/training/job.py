"""What a server, or a client, is given to do: each one value, handed on whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cutlayer.data.batches import Batches
from cutlayer.method import Method, Task, Training


@dataclass(frozen=True, eq=False)
class Job:
    """What the server of a run is given.

    Attributes:
        half: from the activations at the cut to the outputs; trained in place.
        cut_shape: shape of one sample's activations.
    """

    half: nn.Module
    cut_shape: tuple[int, ...]
    method: Method
    training: Training
    task: Task


@dataclass(frozen=True, eq=False)
class ClientJob:
    """What a client of a run is given, beside its half.

    Attributes:
        number: the client's number, from 0.
        train, test: its batches for training and, if it has any, for evaluation.
    """

    number: int
    train: Batches
    test: Batches | None
    method: Method
    training: Training
