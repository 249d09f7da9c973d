"""Which epoch of a run is the best, when a run ends early, and which checkpoints that asks for.

All of it follows from the records of the epochs that are done, so it is the same after an interruption and wherever the
clients are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cutlayer.errors import ConfigError, unknown


class Epoch(Protocol):
    """What this module asks of the record of an epoch."""

    @property
    def epoch(self) -> int:
        """Its number, from 0."""
        ...

    @property
    def test(self) -> Mapping[str, float]:
        """Loss and metrics on the test data; empty if it was not evaluated."""
        ...


@dataclass(frozen=True)
class Best:
    """The epoch with the best value of a test metric, the first of equals."""

    metric: str = "accuracy"
    """Test metric, or "loss" for the test loss."""
    goal: Literal["auto", "highest", "lowest"] = "auto"
    """Which value is the best; "auto" is the lowest for "loss" and the highest for any other."""

    def __post_init__(self) -> None:
        if self.goal not in ("auto", "highest", "lowest"):
            raise ConfigError(unknown("goal", self.goal, ("auto", "highest", "lowest")))

    def epoch(self, records: Sequence[Epoch]) -> int | None:
        """The best epoch, from 0; None if none was evaluated, or to NaN only."""
        lowest = self.goal == "lowest" or (self.goal == "auto" and self.metric == "loss")
        best, found = 0.0, None
        for record in records:
            value = record.test.get(self.metric, float("nan")) * (-1 if lowest else 1)
            if value == value and (found is None or value > best):
                best, found = value, record.epoch
        return found


@dataclass(frozen=True)
class EarlyStopping(Best):
    """End a run when a test metric is no better for some epochs. Learning rates follow `epochs` all the same."""

    patience: int | None = None
    """Epochs without a better value after which the run ends; by default it never ends early."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"early_stopping: expected a patience of at least 1 epoch, or None, got {self.patience}")

    def stops(self, records: Sequence[Epoch]) -> bool:
        """Whether the run ends after these epochs."""
        if self.patience is None or not records or not records[-1].test:
            return False
        since = self.epoch(records)
        return records[-1].epoch - (-1 if since is None else since) >= self.patience


class Ending:
    """What a run's choices say of its end and its checkpoints.

    Args:
        epochs: its full length.
        early: when it ends before that.
        best: the epoch whose checkpoint is to stay, if any is.
    """

    def __init__(self, epochs: int, early: EarlyStopping, best: Best | None) -> None:
        self.epochs, self.early, self.best = epochs, early, best

    def check(self, metrics: Collection[str], tested: bool) -> None:
        """Raise ConfigError if a metric is asked for that there will not be."""
        for name, choice in (("keep_best", self.best), ("early_stopping", self.early)):
            if choice is None or (choice is self.early and self.early.patience is None):
                continue
            if not tested:
                raise ConfigError(f"{name} needs test data to evaluate on")
            if choice.metric not in metrics:
                raise ConfigError(f"{name}: {unknown('metric', choice.metric, sorted(metrics))}")

    def reached(self, records: Sequence[Epoch]) -> bool:
        """Whether the run is at its end after these epochs."""
        return len(records) >= self.epochs or self.early.stops(records)

    def saves(self, records: Sequence[Epoch]) -> bool:
        """Whether the last of these epochs has a checkpoint, whatever `checkpoint_every` says."""
        return self.reached(records) or records[-1].epoch + 1 in self.kept(records)

    def kept(self, records: Sequence[Epoch]) -> set[int]:
        """After how many epochs the checkpoints are that stay, beside the newest."""
        epoch = self.best.epoch(records) if self.best is not None else None
        return set() if epoch is None else {epoch + 1}
