"""What is measured of a network's outputs: metrics, and the checks of them and of a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cutlayer.errors import ConfigError


@runtime_checkable
class Metric(Protocol):
    """A metric that gathers what it needs batch by batch, such as those of torchmetrics."""

    def update(self, outputs: Tensor, labels: Tensor, /) -> Any:
        """Take in a batch."""
        ...

    def compute(self) -> Any:
        """The metric of all batches since the last reset, one number."""
        ...

    def reset(self) -> Any:
        """Begin anew."""
        ...


def check_task(loss: Callable[..., Tensor], metrics: Any) -> None:
    """Raise ConfigError for a loss that is no mean over samples, and for metrics that are none; see `Task`."""
    for name, value in {"loss": loss, **(metrics if isinstance(metrics, Mapping) else {})}.items():
        if isinstance(value, type):
            raise ConfigError(f"{name}: expected a function or an object, got a class; give {value.__name__}()")
        if not callable(value) and not isinstance(value, Metric):
            raise ConfigError(f"{name}: expected a function of outputs and labels, got {value!r}")
    if not isinstance(metrics, Mapping):
        raise ConfigError(f'metrics: expected them by name, such as {{"accuracy": accuracy}}, got {metrics!r}')
    if "loss" in metrics:
        raise ConfigError('the metric name "loss" is taken by the loss itself; choose another')
    of = loss.keywords if isinstance(loss, functools.partial) else getattr(loss, "__dict__", {})
    # nn.KLDivLoss has "batchmean", the mean over samples.
    if (reduction := of.get("reduction", "mean")) not in ("mean", "batchmean"):
        raise ConfigError(
            f"loss: expected the mean over the samples of a batch, got reduction={reduction!r}; give it "
            "reduction='mean', and scale the learning rate in its place"
        )
