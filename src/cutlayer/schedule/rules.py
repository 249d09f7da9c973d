"""Schedules that look at the loss, and those that look at nothing.

The three loss-based rules are three readings of Chen, Li and Chakrabarti, "Communication and Computation Reduction for
Split Learning using Asynchronous Training" (SiPS 2021, arXiv 2107.09786), whose abstract leaves the rule open; see
docs/schedules.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.errors import ConfigError, require_kinds
from cutlayer.schedule.base import Exchange, Schedule, State


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
        require_kinds(self, period=(int, "a whole number of epochs"))
        if self.period < 1:
            raise ConfigError(f"period must be at least 1, got {self.period}")

    def rule(self, state: State, loss: float) -> Exchange:
        """The place of the next epoch in its cycle decides; the last warm-up epoch is the first cycle's A."""
        place = (state.epoch + 1 - (self.warmup - 1)) % self.period
        return (Exchange.BOTH, Exchange.ACTIVATIONS)[place] if place < 2 else Exchange.NONE
