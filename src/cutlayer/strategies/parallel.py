"""Parallel split learning: one batch made of the clients' batches.

Source: Jeon and Kim, "Privacy-Sensitive Parallel Split Learning" (ICOIN 2020). There mini-batches have sizes in
proportion to the clients' data; here all have the same, so those with fewer samples finish earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cutlayer.errors import RefusedBatchError
from cutlayer.strategies.base import Averaging
from cutlayer.strategies.protocols import Participant, Trainer


@dataclass(frozen=True, kw_only=True)
class ParallelSplit(Averaging):
    """The clients' batches of a step make one batch, on which the server half is updated once.

    Each client gets the gradient of its own batch's mean loss. With halves averaged after every step, and SGD, this
    equals training the uncut network on the whole batch, up to float addition (and but for the client's batch norm,
    which sees its own batch only): without momentum always, with momentum while the clients' shares of a step stay the
    same, as their momenta are not averaged.
    """

    joint: ClassVar[bool] = True
    average_every: int | None = 1

    def train(self, server: Trainer, participants: Sequence[Participant]) -> None:
        """One batch from all clients that have data left, until none has."""

        def step(active: Sequence[Participant]) -> list[Participant]:
            batches = {each: batch for each in active if (batch := each.next_batch()) is not None}
            while batches:
                try:
                    replies = server.train(list(batches.values()))
                except RefusedBatchError as error:  # of one of them: it may send another in its place
                    sender = next(each for each, batch in batches.items() if batch is error.batch)
                    sender.refuse(error)
                    if (batch := sender.next_batch()) is None:
                        del batches[sender]
                    else:
                        batches[sender] = batch
                    continue
                for each, reply in zip(batches, replies, strict=True):
                    each.answer(reply)
                break
            return list(batches)

        self.rounds(server, participants, step)
