"""What every strategy is, and what those that average client halves have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cutlayer.errors import ConfigError, RefusedError
from cutlayer.strategies.protocols import Participant, Trainer


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """How several clients train one network together."""

    joint: ClassVar[bool] = False
    """Whether the clients' batches of a step make one batch."""
    own_server_halves: ClassVar[bool] = False
    """Whether the server has a half for each client, to be averaged."""

    @property
    def share(self) -> int:
        """Steps after which clients share their weights, beside the end of the epoch; 0 for the end alone."""
        return 0

    @abstractmethod
    def train(self, server: Trainer, participants: Sequence[Participant]) -> None:
        """Train for an epoch with these participants, which are in the order of their clients' numbers."""


@dataclass(frozen=True, kw_only=True)
class Averaging(Strategy):
    """Base of the strategies that average client halves.

    Attributes:
        average_every: steps of a client after which halves are averaged, beside the end of the epoch; None for the end
            alone.
    """

    average_every: int | None = None

    def __post_init__(self) -> None:
        if self.average_every is not None and self.average_every < 1:
            raise ConfigError(f"average_every: expected at least 1 step, or None, got {self.average_every}")

    @property
    def share(self) -> int:
        """As `average_every`."""
        return self.average_every or 0

    def rounds(
        self,
        server: Trainer,
        participants: Sequence[Participant],
        step: Callable[[Sequence[Participant]], list[Participant]],
    ) -> None:
        """Rounds in which `step` has each participant that still has data train once; it returns those that had any."""
        for participant in participants:
            participant.begin()
        active, done = list(participants), 0
        while active:
            active = step(active)
            done += 1
            if active and server.share and done % server.share == 0:
                for participant in active:
                    participant.collect_weights()
                server.average()
                active = [participant for participant in active if not participant.finished]
                for participant in active:
                    participant.deliver_weights()
        server.average()


def train_step(server: Trainer, participant: Participant) -> bool:
    """A participant's next step, with all its microbatches; whether it had one."""
    while (batch := participant.next_batch()) is not None:
        try:
            (reply,) = server.train([batch])
        except RefusedError as error:  # labels that the loss does not take
            participant.refuse(error)
            continue
        participant.answer(reply)
        if batch.ends_step:
            return True
    return False
