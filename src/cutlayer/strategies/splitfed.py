"""SplitFed: clients compute at the same time, and their halves are averaged.

Source: Thapa et al., "SplitFed: When Federated Learning Meets Split Learning" (AAAI 2022, arXiv 2004.12088), V1 and V2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cutlayer.strategies.base import Averaging, train_step
from cutlayer.strategies.protocols import Participant, Trainer


@dataclass(frozen=True, kw_only=True)
class SplitFedV2(Averaging):
    """Clients take turns, batch by batch; the server half is updated after each, client halves are averaged.

    In the publication a client's batches follow each other in a random order of clients; turns in a fixed order, as in
    public code of the authors of loss-based exchange, let all clients compute at the same time.
    """

    def train(self, server: Trainer, participants: Sequence[Participant]) -> None:
        """A batch of each client in turn, until none has data left."""

        def step(active: Sequence[Participant]) -> list[Participant]:
            return [participant for participant in active if train_step(server, participant)]

        self.rounds(server, participants, step)


@dataclass(frozen=True, kw_only=True)
class SplitFedV1(SplitFedV2):
    """As SplitFedV2, but the server has a half for each client.

    It averages them at the end of each epoch and after every `average_every` steps, whatever the epoch exchanges. The
    server half that is evaluated is the average.
    """

    own_server_halves: ClassVar[bool] = True
