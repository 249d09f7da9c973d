"""How several clients train one network together: the choices. `strategies` holds the ways of working themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from cutlayer.errors import ConfigError, unknown
from cutlayer.seeds import generator
from cutlayer.strategies import SplitFedV2, Strategy


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """How several clients work together. With one client every strategy is plain split learning with that client.

    Attributes:
        strategy: the way of working together; see `strategies` and docs/many-clients.md.
        state: "shared" for one state of the schedule, from the mean loss over all clients; "own" for a state of each
            client, from the loss over its own samples.
        fraction: share of the clients, drawn anew for each epoch that exchanges something, that take part in it.
        dropout: chance that a client that takes part is lost in the middle of the epoch, to simulate it. What it sent
            before stays learned; its weights of that epoch are lost.
        replay_absent: whether the server trains on what is stored of clients that are absent in an A or a B epoch.
        live: client halves in memory in a simulation; the others lie on the disk.
    """

    strategy: Strategy = field(default_factory=SplitFedV2)
    state: Literal["shared", "own"] = "shared"
    fraction: float = 1.0
    dropout: float = 0.0
    replay_absent: bool = True
    live: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, Strategy):
            raise ConfigError(
                f"strategy: expected Sequential(), SplitFedV1(), SplitFedV2() or ParallelSplit(), got {self.strategy!r}"
            )
        if self.state not in ("shared", "own"):
            raise ConfigError(unknown("state", self.state, ("shared", "own")))
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction of the clients: expected a number above 0 and up to 1, got {self.fraction}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of clients: expected a chance from 0 to below 1, got {self.dropout}")
        if self.live < 1:
            raise ConfigError(f"live: expected at least 1 client half in memory, got {self.live}")

    def draw(self, seed: int, epoch: int, clients: int) -> list[int]:
        """The clients that take part in an epoch, by number: `fraction` of them, rounded up."""
        count = math.ceil(self.fraction * clients - 1e-9)
        drawn = torch.randperm(clients, generator=generator(seed, "participants", epoch))[:count]
        return sorted(drawn.tolist())

    def lost_after(self, seed: int, epoch: int, client: int, steps: int) -> int | None:
        """The steps, at least one, after which a client is lost in this epoch; None if it stays to the end."""
        draw = generator(seed, "dropout", epoch, client)
        if self.dropout == 0 or torch.rand((), generator=draw).item() >= self.dropout:
            return None
        return int(torch.randint(1, steps + 1, (), generator=draw))
