"""The optimizer of a half and its learning rate, as values that can be written to a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError, require_kinds


class OptimizerSpec(Protocol):
    """What `fit` needs to know of a half's optimizer: how to make it, and its learning rate by epoch."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer for these parameters."""
        ...

    def factor(self, epoch: int, epochs: int) -> float:
        """What the initial learning rate is multiplied with in this epoch (from 0) of `epochs`."""
        ...


@dataclass(frozen=True)
class Optimizer:
    """SGD, Adam or AdamW with a constant, stepped or cosine learning rate.

    The rate follows the epoch's number, whatever the epoch exchanges, so both halves stay on the same curve.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Algorithm."""
    lr: float = 0.05
    """Initial learning rate."""
    momentum: float = 0.9
    """Momentum, for SGD."""
    nesterov: bool = False
    """Nesterov momentum, for SGD."""
    weight_decay: float = 5e-4
    """Weight decay (L2 for SGD and Adam, decoupled for AdamW)."""
    schedule: Literal["constant", "step", "cosine"] = "step"
    """How the learning rate falls."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """For "step": the fractions of the run at which the rate falls (0.3, 0.6, 0.8 is 60, 120, 160 of 200 epochs)."""
    decay: float = 0.2
    """For "step": what the rate is multiplied with at each milestone."""

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam", "adamw"):
            raise ConfigError(f"unknown optimizer {self.name!r}; known: sgd, adam, adamw")
        if self.schedule not in ("constant", "step", "cosine"):
            raise ConfigError(f"unknown learning-rate schedule {self.schedule!r}; known: constant, step, cosine")
        number = int | float, "a number"
        require_kinds(self, lr=number, momentum=number, weight_decay=number, decay=number)
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer for these parameters."""
        if self.name == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def factor(self, epoch: int, epochs: int) -> float:
        """What the initial learning rate is multiplied with in this epoch (from 0) of `epochs`."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        return self.decay ** sum(epoch >= round(milestone * epochs) for milestone in self.milestones)


@dataclass(frozen=True)
class CustomOptimizer:
    """An optimizer of the user's own.

    Attributes:
        make: from parameters to a `torch.optim.Optimizer`.
        rate: what its initial learning rates are multiplied with, from the epoch (from 0) and the number of epochs.
    """

    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rate: Callable[[int, int], float] = lambda epoch, epochs: 1.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer for these parameters."""
        return self.make(parameters)

    def factor(self, epoch: int, epochs: int) -> float:
        """What the initial learning rate is multiplied with in this epoch (from 0) of `epochs`."""
        return self.rate(epoch, epochs)


class ScheduledOptimizer:
    """A half's optimizer together with its learning rate: `begin(epoch)`, then `zero_grad` and `step` as usual."""

    def __init__(self, spec: OptimizerSpec, parameters: Iterable[nn.Parameter], epochs: int) -> None:
        self.spec, self.epochs = spec, epochs
        self.optimizer = spec.build(parameters)
        if any(isinstance(group["lr"], torch.Tensor) for group in self.optimizer.param_groups):
            raise ConfigError("expected an optimizer whose learning rate is a float, got a tensor")
        self.initial = [group["lr"] for group in self.optimizer.param_groups]

    def begin(self, epoch: int) -> None:
        """Set the learning rate of this epoch."""
        factor = self.spec.factor(epoch, self.epochs)
        for group, initial in zip(self.optimizer.param_groups, self.initial, strict=True):
            group["lr"] = initial * factor

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, fallen: float | None = None) -> None:
        """Update the weights; with a rate that is on its fall to zero, as half a cosine: 0 is its begin, 1 its end.

        Source: Loshchilov and Hutter, "SGDR" (ICLR 2017, arXiv 1608.03983), without restarts.
        """
        if fallen is not None:
            for group, initial in zip(self.optimizer.param_groups, self.initial, strict=True):
                group["lr"] = initial * 0.5 * (1 + math.cos(math.pi * fallen))
        self.optimizer.step()

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's tensors, as "optimizer.PARAMETER.NAME", and the rest as JSON values."""
        state = self.optimizer.state_dict()
        tensors, rest = {}, {}
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    rest.setdefault(str(index), {})[key] = value
        return {**tensors, "groups": state["param_groups"], "rest": rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; other names are left alone."""
        own: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in state["rest"].items()}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                own.setdefault(int(index), {})[key] = value.clone()  # which PyTorch would not copy
        self.optimizer.load_state_dict({"state": own, "param_groups": state["groups"]})
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():  # in the order in memory that they had: files have but one
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def fallen(settling: tuple[float, float] | None, done: float) -> float | None:
    """How far a learning rate has fallen after a part of an epoch that begins and ends so far; see `schedule.State`."""
    return None if settling is None else settling[0] + (settling[1] - settling[0]) * min(1.0, done)
