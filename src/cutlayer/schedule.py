"""When to communicate: from the loss of the epoch that ended to the exchange of the next one.

A schedule is a frozen value without I/O or tensors: `start()` gives the state for the first epoch, `next(state, loss)`
the one that follows. The three loss-based rules are three readings of Chen, Li and Chakrabarti, "Communication and
Computation Reduction for Split Learning using Asynchronous Training" (SiPS 2021, arXiv 2107.09786), whose abstract
leaves the rule open; see docs/schedules.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cutlayer.errors import ConfigError, DivergedError, unknown


class Exchange(StrEnum):
    """What crosses the wire in an epoch."""

    BOTH = "A"
    """Activations and labels up, gradients down: client and server train."""
    ACTIVATIONS = "B"
    """Activations and labels up: the client runs forward only, the server trains and keeps the activations."""
    NONE = "C"
    """Nothing: the client is idle, the server trains on the activations it keeps."""


@dataclass(frozen=True)
class State:
    """What a schedule remembers between epochs.

    Attributes:
        exchange: the exchange of the coming epoch (or the one under way).
        epoch: its number, from 0.
        reference: the loss that the rule compares with; infinite until there is one.
    """

    exchange: Exchange = Exchange.BOTH
    epoch: int = 0
    reference: float = math.inf

    def as_dict(self) -> dict[str, Any]:
        """It as JSON values."""
        return dict(vars(self))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> State:
        """Inverse of `as_dict`; other names are left alone."""
        return State(Exchange(values["exchange"]), values["epoch"], values["reference"])


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Base of the schedules. Warm-up epochs, of which the first epoch is always one, exchange both ways.

    Attributes:
        warmup: number of epochs at the start that are `Exchange.BOTH` whatever the rule says (at least 1).
    """

    warmup: int = 1

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ConfigError(f"warmup must be at least 1 (the first epoch is always A), got {self.warmup}")

    def start(self) -> State:
        """The state of the first epoch."""
        return State()

    def next(self, state: State, loss: float) -> State:
        """The state of the epoch after `state`, whose mean training loss was `loss`. Raises if that is not finite."""
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss of epoch {state.epoch} is {loss}: training has diverged; lower the learning rate"
            )
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


@dataclass(frozen=True, kw_only=True)
class Always(Schedule):
    """Plain split learning: both ways in every epoch (Gupta and Raskar 2018; Vepakomma et al. 2018)."""

    def rule(self, state: State, loss: float) -> Exchange:
        """Both, always."""
        return Exchange.BOTH


@dataclass(frozen=True, kw_only=True)
class Once(Schedule):
    """Independent of the loss: after the warm-up one B epoch, then C to the end.

    With a frozen client half, which has no A epochs, the first epoch is the only one that sends anything.
    """

    def rule(self, state: State, loss: float) -> Exchange:
        """A -> B; B and C -> C."""
        return Exchange.ACTIVATIONS if state.exchange is Exchange.BOTH else Exchange.NONE


@dataclass(frozen=True, kw_only=True)
class LossBased(Schedule):
    """A rule that compares the change of the loss with a threshold, in units of the loss.

    Attributes:
        threshold: the change that counts; at least 0.
    """

    threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threshold, (int, float)) or not self.threshold >= 0:
            raise ConfigError(f"threshold must be a number of at least 0, got {self.threshold!r}")

    @staticmethod
    def settle(exchange: Exchange) -> Exchange:
        """What follows when client and server need not talk: A -> B, B -> C, C -> C."""
        return Exchange.ACTIVATIONS if exchange is Exchange.BOTH else Exchange.NONE


@dataclass(frozen=True, kw_only=True)
class Drift(LossBased):
    """Both when the loss has drifted by the threshold or more, either way, from where it was when A was last chosen."""

    def rule(self, state: State, loss: float) -> Exchange:
        """|loss - reference| >= threshold -> A; otherwise A -> B, B and C -> C."""
        return Exchange.BOTH if abs(loss - state.reference) >= self.threshold else self.settle(state.exchange)

    def reference(self, state: State, loss: float, chosen: Exchange) -> float:
        """The loss at which A was last chosen."""
        return loss if chosen is Exchange.BOTH else state.reference


@dataclass(frozen=True, kw_only=True)
class Drop(LossBased):
    """Both while the loss still falls by the threshold or more from one epoch to the next."""

    def rule(self, state: State, loss: float) -> Exchange:
        """max(previous - loss, 0) >= threshold -> A; otherwise A -> B, B and C -> C."""
        fall = max(state.reference - loss, 0.0)
        return Exchange.BOTH if fall >= self.threshold else self.settle(state.exchange)


@dataclass(frozen=True, kw_only=True)
class Plateau(LossBased):
    """The opposite reading: learn from stored activations while that pays, and refresh when the loss stalls."""

    def rule(self, state: State, loss: float) -> Exchange:
        """A -> B; B and C -> C while previous - loss >= threshold, otherwise A."""
        if state.exchange is Exchange.BOTH:
            return Exchange.ACTIVATIONS
        return Exchange.NONE if state.reference - loss >= self.threshold else Exchange.BOTH


@dataclass(frozen=True, kw_only=True)
class Periodic(Schedule):
    """Independent of the loss: after the warm-up, cycles of A, B and then C.

    Attributes:
        period: epochs in a cycle, at least 1; 1 is plain split learning, 2 alternates A and B.
    """

    period: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1:
            raise ConfigError(f"period must be at least 1, got {self.period}")

    def rule(self, state: State, loss: float) -> Exchange:
        """The place of the next epoch in its cycle decides; the last warm-up epoch is the first cycle's A."""
        place = (state.epoch + 1 - (self.warmup - 1)) % self.period
        return (Exchange.BOTH, Exchange.ACTIVATIONS)[place] if place < 2 else Exchange.NONE


SCHEDULES: dict[str, type[Schedule]] = {
    "always": Always,
    "drift": Drift,
    "drop": Drop,
    "plateau": Plateau,
    "periodic": Periodic,
    "once": Once,
}


def make_schedule(name: str, *, warmup: int = 1, threshold: float = 0.01, period: int = 10) -> Schedule:
    """The schedule of this name; values that it does not use are ignored. Raises ConfigError with the known names."""
    if name not in SCHEDULES:
        raise ConfigError(unknown("schedule", name, SCHEDULES))
    kind = SCHEDULES[name]
    if issubclass(kind, LossBased):
        return kind(warmup=warmup, threshold=threshold)
    return Periodic(warmup=warmup, period=period) if kind is Periodic else kind(warmup=warmup)
