"""What the loss and the metrics of a task give, checked: a loss is the mean over the samples of a batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError

Function = Callable[[Tensor, Tensor], Any]


def shapes(outputs: Tensor, labels: Tensor) -> str:
    """What a loss or metric was given, for messages."""
    return f"outputs {list(outputs.shape)} and labels {labels.dtype} {list(labels.shape)}"


def broadcast(outputs: Tensor, labels: Tensor) -> str | None:
    """What is wrong with float labels of other dimensions: a loss such as mse_loss would compare each with all."""
    if not labels.is_floating_point() or labels.shape == outputs.shape or labels.numel() != outputs.numel():
        return None
    return (
        f"expected outputs and labels of one shape, got {shapes(outputs, labels)}; give the labels the shape "
        f"{list(outputs.shape[1:])} a sample, or have the network squeeze its output"
    )


def require_mean(function: Function, outputs: Tensor, labels: Tensor, loss: Tensor) -> None:
    """Raise ConfigError if the loss of these is no scalar, or a sum over samples rather than their mean.

    A batch three times in a row has the loss of the batch if that is a mean, and three times it if it is a sum. Random
    states are left alone.
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"expected the loss to be a mean over the batch, a scalar; got {got}")
    once = loss.item()
    if not math.isfinite(once) or once == 0:  # says nothing
        return
    devices = [outputs.device] if outputs.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            apart = copy.deepcopy(function) if isinstance(function, nn.Module) else function
            thrice = float(apart(torch.cat([outputs.detach()] * 3), torch.cat([labels] * 3)))
        except Exception:  # a loss of its own that takes no other batch
            return
    if math.isclose(thrice, 3 * once, rel_tol=1e-3):
        raise ConfigError(
            f"loss: expected the mean over the samples of a batch, got a sum ({once:.4g} for {len(labels)} samples, "
            f"{thrice:.4g} for three times these); give it reduction='mean', or divide by len(outputs), and scale the "
            "learning rate in its place"
        )


@contextmanager
def blaming(metric: str, outputs: Tensor, labels: Tensor) -> Iterator[None]:
    """Whatever fails inside is raised as a ConfigError that names this metric."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"metric {metric!r} failed on {shapes(outputs, labels)}: {error}; expected one number from all of them. "
            "Give Task(metrics=...) others"
        ) from error
