"""What a strategy sees: batches of a step, the clients that take part, and who trains the server half."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cutlayer.codecs import Encoded
from cutlayer.errors import RefusedError
from cutlayer.wire.frames import PackedFrame
from cutlayer.wire.messages import Step


@dataclass(frozen=True, eq=False)
class StepBatch:
    """A client's batch of a step, or a microbatch of it, decoded: what the server half is trained on.

    Attributes:
        client: its number; None if samples of several clients are mixed.
        activations: float32 [B, *cut].
        labels: [B, ...].
        message, encoded: as they came, or with delta the references that follow; None for what comes from the store.
        ids: int64 [B], over the samples of all clients.
        needs_gradients: whether the client waits for gradients.
    """

    client: int | None
    activations: Tensor
    labels: Tensor
    message: Step | None = None
    ids: Tensor | None = None
    encoded: Encoded | None = None
    needs_gradients: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def step_samples(self) -> int:
        """Samples of its client's whole step."""
        return self.message.samples if self.message is not None and self.message.microbatches > 1 else len(self)

    @property
    def starts_step(self) -> bool:
        """Whether it is the only or first microbatch of its client's step."""
        return self.message is None or self.message.starts

    @property
    def ends_step(self) -> bool:
        """Whether it is the only or last microbatch of its client's step."""
        return self.message is None or self.message.ends


class Participant(Protocol):
    """A client in an epoch: live, or replayed from the store.

    Attributes:
        finished: whether nothing more comes from it in this epoch.
    """

    finished: bool

    @abstractmethod
    def begin(self) -> None:
        """Begin the epoch."""

    @abstractmethod
    def next_batch(self) -> StepBatch | None:
        """Its next batch of a step; None if it has no more."""

    @abstractmethod
    def answer(self, reply: PackedFrame | None) -> None:
        """Take the answer to the last batch, which was trained on."""

    @abstractmethod
    def refuse(self, error: RefusedError) -> None:
        """Hear that the last batch could not be trained on."""

    @abstractmethod
    def collect_weights(self) -> None:
        """Have its half added to the average, if it trains one."""

    @abstractmethod
    def deliver_weights(self) -> None:
        """Give it the new average."""


class Trainer(Protocol):
    """What trains the server half and averages the halves."""

    @property
    def share(self) -> int | None:
        """Steps after which clients share their weights, beside the end of the epoch; None if they never do."""
        ...

    def train(self, batches: Sequence[StepBatch], /) -> list[PackedFrame | None]:
        """Train on these batches as one; return the reply to each, None if the client waits for none."""
        ...

    def average(self) -> None:
        """Average the client halves that were collected, and the server's own halves if there are several."""
        ...
