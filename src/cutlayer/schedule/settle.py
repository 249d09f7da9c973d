"""Few exchanges, fixed before the run: the client half settles, then stored activations are renewed now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from cutlayer.errors import ConfigError, unknown
from cutlayer.schedule.base import NOTHING, Cost, Exchange, Outlook, Schedule, State, check_loss

Spread = Literal["even", "rate"]


@dataclass(frozen=True, kw_only=True)
class Fixed(Schedule):
    """The exchanges that are given, whatever the loss; C after the last one.

    Attributes:
        exchanges: a letter for each epoch, such as "AAABCCB"; the first is A.
        settles: A epochs at the start during which the client's learning rate falls to zero; with 0 it follows the
            epochs.
        averaged: as in `Settle`, of those A epochs.
    """

    exchanges: str = "AB"
    settles: int = 0
    averaged: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exchanges.startswith("A") or set(self.exchanges) - set("ABC"):
            raise ConfigError(
                f"exchanges: expected the letters A, B and C, such as AAABCC, of which the first is A, got "
                f"{self.exchanges!r}"
            )
        check_averaged(self.averaged)

    def start(self) -> State:
        """The state of the first epoch."""
        return self._state(Exchange.BOTH, 0, math.inf)

    def next(self, state: State, loss: float, spent: Cost = NOTHING) -> State:
        """As in `Schedule`."""
        check_loss(state, loss)
        return self._state(self.rule(state, loss), state.epoch + 1, loss)

    def rule(self, state: State, loss: float) -> Exchange:
        """The next letter."""
        epoch = state.epoch + 1
        if epoch < self.warmup:
            return Exchange.BOTH
        return Exchange(self.exchanges[epoch]) if epoch < len(self.exchanges) else Exchange.NONE

    def _state(self, exchange: Exchange, epoch: int, loss: float) -> State:
        if epoch >= self.settles:
            return State(exchange, epoch, loss)
        fallen = epoch / self.settles, (epoch + 1) / self.settles
        return State(exchange, epoch, loss, fallen, 1.0 - self.averaged if self.averaged else None)


@dataclass(frozen=True, kw_only=True)
class Settle(Schedule):
    """A epochs until the client half has settled, then a few B epochs that renew what is stored, whatever the loss.

    In the A epochs the client half's learning rate falls to zero, update by update, as half a cosine, whatever its
    optimizer says of epochs: a half that then stands still was annealed as one that is trained to the end. The first B
    epoch follows at once, the others are spread over the run.

    Source of annealing layers one by one: Brock et al., "FreezeOut: Accelerate Training by Progressively Freezing
    Layers" (arXiv 1706.04983); of the cosine: Loshchilov and Hutter, "SGDR" (ICLR 2017, arXiv 1608.03983).

    Attributes:
        both: A epochs at the start; as many as `warmup`, if that is more.
        activations: B epochs after them, at least 1.
        last: the last B epoch, as a fraction of the run; at 0.8 the usual stepped learning rate falls a last time.
        spread: "even", or "rate" for B epochs that are the denser the higher the server's learning rate is.
        averaged: the part of the A epochs' updates, the last ones, whose weights are averaged: their mean is the half
            that stands still; see `training.weight_average`. 0 for none.
    """

    both: int = 5
    activations: int = 5
    last: float = 0.8
    spread: Spread = "even"
    averaged: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("both", "activations"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        check_last(self.last)
        check_averaged(self.averaged)
        if self.spread not in get_args(Spread):
            raise ConfigError(unknown("spread", self.spread, get_args(Spread)))

    def for_run(self, outlook: Outlook) -> Fixed:
        """The exchanges in a run of this length. Raises ConfigError if they do not fit in."""
        both = max(self.both, self.warmup)
        if both + self.activations > outlook.epochs:
            raise ConfigError(
                f"settle: expected at most the run's {outlook.epochs} epochs to exchange, got {both} A and "
                f"{self.activations} B: choose fewer"
            )
        letters = ["A"] * both + ["C"] * (outlook.epochs - both)
        for epoch in self._places(both, outlook):
            letters[epoch] = "B"
        return Fixed(exchanges="".join(letters), settles=both, averaged=self.averaged)

    def _places(self, first: int, outlook: Outlook) -> list[int]:
        """The epochs that are B, the first of which is given."""
        last = min(max(first, round(self.last * outlook.epochs)), outlook.epochs - 1)
        weights = [1.0] * (last - first)
        if self.spread == "rate" and outlook.rates:
            weights = list(outlook.rates[first:last])
        passed = [0.0, *accumulate(weights)]
        places: list[int] = []
        for number in range(self.activations):
            goal = passed[-1] * number / max(1, self.activations - 1)
            place = min(range(len(passed)), key=lambda at: abs(passed[at] - goal)) + first
            # No two in one epoch, and none so late that the others do not fit in.
            place = max(place, places[-1] + 1) if places else place
            places.append(min(place, outlook.epochs - self.activations + number))
        return places

    def rule(self, state: State, loss: float) -> Exchange:
        """Not known without the run's length."""
        raise ConfigError("Settle spreads its exchanges over a run: ask for_run(Outlook(epochs)) first")


def check_last(last: float) -> None:
    """Raise ConfigError for a last exchange beyond the run."""
    if not isinstance(last, (int, float)) or not 0 < last <= 1:
        raise ConfigError(f"last: expected the fraction of the run at which the last B epoch is, up to 1, got {last!r}")


def check_averaged(averaged: float) -> None:
    """Raise ConfigError for what is no part of the A epochs' updates."""
    if not isinstance(averaged, (int, float)) or not 0 <= averaged <= 1:
        raise ConfigError(f"averaged: expected a part of the A epochs' updates, from 0 to 1, got {averaged!r}")
