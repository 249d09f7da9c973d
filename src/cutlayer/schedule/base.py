"""What a schedule is: from the loss of the epoch that ended to the exchange of the next one.

A schedule is a frozen value without I/O or tensors: `for_run(outlook)` says what it is in a run of this length and
these costs, `start()` gives the state for the first epoch, `next(state, loss)` the one that follows.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import msgspec

from cutlayer.errors import ConfigError, DivergedError, require_kinds


class Exchange(StrEnum):
    """What crosses the wire in an epoch."""

    BOTH = "A"
    """Activations and labels up, gradients down: client and server train."""
    ACTIVATIONS = "B"
    """Activations and labels up: the client runs forward only, the server trains and stores the activations."""
    NONE = "C"
    """Nothing: the client is idle, the server trains on the stored activations."""


@dataclass(frozen=True)
class Cost:
    """Bytes of training in both directions, and FLOPs of the clients' training, of some epochs together.

    Attributes:
        epochs: how many they are.
    """

    bytes: int = 0
    flops: int = 0
    epochs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.epochs + other.epochs)


NOTHING = Cost()


@dataclass(frozen=True)
class State:
    """What a schedule remembers between epochs.

    Attributes:
        exchange: the exchange of the coming epoch (or the one under way).
        epoch: its number, from 0.
        reference: the loss that the rule compares with; infinite until there is one.
        settling: in an A epoch, how far the client's learning rate has fallen when it begins and when it ends, from 0
            (not yet) to 1 (to zero); None if the rate follows the epochs, as the client's optimizer says.
        averaging: with `settling`, from where in that fall on the client half's weights are averaged; None if not.
        exchanged: the last epoch before it that exchanged anything.
        spent: what A epochs and what B epochs cost before it, if the schedule counts that.
    """

    exchange: Exchange = Exchange.BOTH
    epoch: int = 0
    reference: float = math.inf
    settling: tuple[float, float] | None = None
    averaging: float | None = None
    exchanged: int = 0
    spent: tuple[Cost, Cost] = (NOTHING, NOTHING)

    def as_dict(self) -> dict[str, Any]:
        """It as JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> State:
        """Inverse of `as_dict`; other names are left alone."""
        names = [field.name for field in dataclasses.fields(State)]
        return msgspec.convert({name: values[name] for name in names if name in values}, State)


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before it begins.

    Attributes:
        epochs: its length.
        rates: the server's learning rate in each epoch, relative to its initial one; empty if it does not change.
        most: what an A epoch and what a B epoch of all clients cost at most.
    """

    epochs: int
    rates: tuple[float, ...] = ()
    most: tuple[Cost, Cost] = (NOTHING, NOTHING)


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Base of the schedules. Warm-up epochs, of which the first epoch is always one, exchange both ways.

    Attributes:
        warmup: number of epochs at the start that are `Exchange.BOTH` whatever the rule says (at least 1).
    """

    warmup: int = 1

    def __new__(cls, *values: object, **named: object) -> Self:
        """Only to say how it is done if values are given without their names."""
        if values:
            names = [field for each in reversed(cls.__mro__) for field in getattr(each, "__annotations__", {})]
            raise ConfigError(
                f"{cls.__name__}: expected values by name, such as {cls.__name__}({names[-1]}={values[0]!r}), "
                f"got {', '.join(map(repr, values))}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        require_kinds(self, warmup=(int, "a whole number of epochs"))
        if self.warmup < 1:
            raise ConfigError(f"warmup must be at least 1 (the first epoch is always A), got {self.warmup}")

    def for_run(self, outlook: Outlook) -> Schedule:
        """The schedule in this run; itself unless it depends on the run's length or costs. Raises ConfigError."""
        return self

    def affords(self, state: State) -> bool:
        """Whether the epoch in this state is paid for with all clients of the run, or a B epoch in place of a C epoch.

        Without a budget it is.
        """
        return True

    def start(self) -> State:
        """The state of the first epoch."""
        return State()

    def next(self, state: State, loss: float, spent: Cost = NOTHING) -> State:
        """The state of the epoch after `state`.

        Args:
            state: of the epoch that ended.
            loss: its mean training loss.
            spent: what it cost.

        Raises:
            DivergedError: the loss is not finite.
        """
        check_loss(state, loss)
        exchange = self.rule(state, loss)
        if state.epoch + 1 < self.warmup:
            exchange = Exchange.BOTH
        return State(exchange, state.epoch + 1, self.reference(state, loss, exchange))

    @abstractmethod
    def rule(self, state: State, loss: float) -> Exchange:
        """The exchange that follows, warm-up aside."""

    def reference(self, state: State, loss: float, chosen: Exchange) -> float:
        """The loss to compare with next time: the last one, unless a rule says otherwise."""
        return loss


def check_loss(state: State, loss: float) -> None:
    """Raise DivergedError if the loss of an epoch is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the training loss of epoch {state.epoch} is {loss}: training has diverged; lower the learning rate"
        )
