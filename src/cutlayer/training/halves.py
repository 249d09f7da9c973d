"""A half and its optimizer, for each of many owners, of which only a few are in memory at a time.

The others lie encoded in a file each, so a thousand simulated clients take the memory of those that are at work.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError
from cutlayer.files import TensorFile, save_tensors
from cutlayer.method import Training
from cutlayer.models.cut import copied
from cutlayer.models.optim import OptimizerSpec, ScheduledOptimizer, fallen
from cutlayer.records.state_dicts import split
from cutlayer.temporary import TemporaryFolder
from cutlayer.training.weight_average import WeightAverage
from cutlayer.wire.messages import Plan


class TrainedHalf:
    """A half and its optimizer.

    Attributes:
        average: of the weights after the last updates, while it is made.
        pinned: set while it must stay in memory: a graph of its parameters waits for gradients.
    """

    def __init__(self, half: nn.Module, spec: OptimizerSpec, training: Training) -> None:
        if next(half.parameters(), None) is None:
            raise ConfigError(
                f"{type(half).__name__} has no parameters: as a client half it would send raw data, as a server half "
                "it could not learn. Parameters of a client half may be frozen"
            )
        self.half = half.to(torch.device(training.device))
        for parameter in self.half.parameters():
            parameter.data = training.laid_out(parameter.data)
        self.optimizer = ScheduledOptimizer(spec, self.half.parameters(), training.epochs)
        self.average, self.pinned = WeightAverage(), False

    def update(self, plan: Plan, done: float) -> None:
        """Update the weights in an A epoch.

        Args:
            plan: of the epoch.
            done: the part of it that was done before.
        """
        rate_fallen = fallen(plan.settling, done)
        self.optimizer.step(rate_fallen)
        if plan.averaging is not None and rate_fallen is not None and rate_fallen >= plan.averaging:
            self.average.add(self.half)

    def end(self, plan: Plan) -> None:
        """An A epoch is at its end: once the rate has fallen to zero, the mean of weights takes their place."""
        if plan.settling is not None and plan.settling[1] >= 1:
            self.average.take(self.half)

    def state_dict(self) -> dict[str, Any]:
        """The half's tensors, as "model.NAME", what the optimizer has, and the average under way."""
        return {
            **self.average.state_dict(),
            **self.optimizer.state_dict(),
            **{f"model.{name}": value for name, value in self.half.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.average.load_state_dict(state)
        self.optimizer.load_state_dict(state)
        self.half.load_state_dict(model_tensors(state))


def model_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the half alone, by its own names for them, out of the state of a `TrainedHalf`."""
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


class HalfPool:
    """Halves and their optimizers by owner. All begin as the one that is given.

    Args:
        half: the initial half; it becomes that of the first owner that asks.
        spec, training: the optimizer, and the rest of what `TrainedHalf` needs.
        owners: how many there are.
        live: halves in memory; there are more only while more are pinned.
        folder: where the folder for the others is made; by default the system's temporary folder.
    """

    def __init__(
        self,
        half: nn.Module,
        spec: OptimizerSpec,
        training: Training,
        *,
        owners: int = 1,
        live: int = 16,
        folder: str | Path | None = None,
    ) -> None:
        # Before any has run: a module that stores what it computed cannot be copied later.
        blank = copied(half) if owners > 1 else half
        self._make = lambda: TrainedHalf(copied(blank), spec, training)
        self._first: TrainedHalf | None = TrainedHalf(half, spec, training)
        self._initial: Mapping[str, Any] = {}
        if owners > 1:
            tensors, facts = split(self._first.state_dict())
            self._initial = {**facts, **{name: value.clone() for name, value in tensors.items()}}
        self._live, self._in_memory = live, OrderedDict[int, TrainedHalf]()
        self._parent: str | Path | None = folder
        self._own: TemporaryFolder | None = None
        self.version = 0
        """Counts the uses, so that a checkpoint knows whether it must be written again."""

    def take(self, owner: int) -> TrainedHalf:
        """The half of this owner, in memory until others push it out."""
        self.version += 1
        if owner in self._in_memory:
            self._in_memory.move_to_end(owner)
            return self._in_memory[owner]
        trained = self._room()
        file = self._file(owner) if self._own is not None else None
        if file is not None and file.exists():
            trained.load_state_dict(_read(TensorFile(file)))
        elif trained is not self._first:
            trained.load_state_dict(self._initial)
        self._first = None
        self._in_memory[owner] = trained
        return trained

    def _room(self) -> TrainedHalf:
        """A half that is no one's."""
        if self._first is not None:
            return self._first
        free: list[TrainedHalf] = []
        for owner in list(self._in_memory):
            if len(self._in_memory) < self._live:
                break
            if not self._in_memory[owner].pinned:
                free.append(self._in_memory.pop(owner))
                self._write(owner, free[-1])
        return free[0] if free else self._make()

    @property
    def in_memory(self) -> int:
        """Halves that are in memory."""
        return len(self._in_memory)

    def close(self) -> None:
        """Remove the files. No half is to be asked for afterwards."""
        if self._own is not None:
            self._own.close()
            self._own = None

    # --- files ---

    @property
    def _folder(self) -> Path:
        if self._own is None:
            self._own = TemporaryFolder("halves", self._parent)
        return self._own.path

    def _file(self, owner: int) -> Path:
        return self._folder / f"{owner}.safetensors"

    def _write(self, owner: int, trained: TrainedHalf) -> None:
        tensors, facts = split(trained.state_dict())
        try:
            written = json.dumps(facts)
        except TypeError as error:
            raise ConfigError(
                f"an optimizer's state cannot be written as tensors and JSON values ({error}); "
                "use one with a plain state"
            ) from error
        # A new file each time: a checkpoint may share the old one.
        save_tensors(tensors, self._file(owner), {"about": written}, flush=False)

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Every owner's half and optimizer, a file each, by number; those at the beginning have none."""
        for owner, trained in self._in_memory.items():
            self._write(owner, trained)
        return {
            "version": self.version,
            **{file.stem: TensorFile(file) for file in self._folder.glob("*.safetensors")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` of another pool returned; owners without a file begin anew."""
        for file in self._folder.glob("*.safetensors"):
            file.unlink()
        for name, value in state.items():
            if isinstance(value, TensorFile):
                value.link(self._folder / f"{name}.safetensors")
        for owner, trained in self._in_memory.items():
            trained.pinned = False
            file = self._file(owner)
            trained.load_state_dict(_read(TensorFile(file)) if file.exists() else self._initial)
        self.version = state["version"]


def _read(file: TensorFile) -> dict[str, Any]:
    tensors, about = file.read()
    return {**tensors, **json.loads(about["about"])}
