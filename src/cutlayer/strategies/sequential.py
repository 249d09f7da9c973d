"""Sequential split learning: one client after the other.

Source: Gupta and Raskar, "Distributed learning of deep neural network over multiple agents" (Journal of Network and
Computer Applications 116, 2018, arXiv 1810.06060). The weights go through the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cutlayer.strategies.base import Strategy, train_step
from cutlayer.strategies.protocols import Participant, Trainer


@dataclass(frozen=True, kw_only=True)
class Sequential(Strategy):
    """One client after the other; each begins with the client half that the one before it ended with."""

    def train(self, server: Trainer, participants: Sequence[Participant]) -> None:
        """All batches of a client, then all of the next."""
        for participant in participants:
            participant.begin()
            while train_step(server, participant):
                pass
            server.average()
