"""Batch norm's running statistics, measured anew before a B epoch, and pooled over clients.

In an A epoch the running statistics lag behind the weights, and with several clients their weights are averaged. In a B
epoch the weights stand still, so the statistics can be what they are meant to be: those of the data under these
weights. A few batches are enough to measure them.

Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3, "PreciseBN": about a thousand
samples are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cutlayer.errors import RefusedError

CALIBRATION_BATCHES = 16
"""Batches of an epoch that the statistics are measured on, at most."""

MEAN, VARIANCE = "running_mean", "running_var"
LARGEST_MEAN, LARGEST_VARIANCE = 1e18, 1e36
"""Beyond these the variance of all clients together might be infinite in float32."""


def set_mode(half: nn.Module, steady: bool) -> None:
    """Put a half into training mode; if it is to be steady, with its batch norm in eval mode."""
    half.train()
    for layer in norm_layers(half).values() if steady else ():
        layer.eval()


def norm_layers(half: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norm layers that have running statistics, by the prefix of their tensors' names."""
    return {
        f"{name}." if name else "": module
        for name, module in half.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def calibrate(half: nn.Module, forward_passes: Callable[[], None]) -> None:
    """Replace the running statistics of a half by those of some batches, each batch with the same weight.

    Args:
        half: in the mode in which it trains.
        forward_passes: puts the batches through the half.
    """
    layers = list(norm_layers(half).values())
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum = None  # a cumulative average
        layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=layer.running_mean.device)  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            forward_passes()
    finally:
        for layer, (momentum, batches) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches


def statistics(half: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of a half, by name."""
    state = half.state_dict()
    return {f"{prefix}{what}": state[f"{prefix}{what}"] for prefix in norm_layers(half) for what in (MEAN, VARIANCE)}


def pairs(names: Mapping[str, object], whose: str) -> Iterator[tuple[str, str]]:
    """The names of each layer's mean and variance. Raises RefusedError for anything else among them."""
    strange = [name for name in names if name.rpartition(".")[2] not in (MEAN, VARIANCE)]
    for name in names:
        prefix, dot, what = name.rpartition(".")
        if (partner := f"{prefix}{dot}{VARIANCE if what == MEAN else MEAN}") not in names:
            strange.append(name)
        elif what == MEAN:
            yield name, partner
    if strange:
        raise RefusedError(f"{whose}: statistics: expected a mean and a variance of each layer, got {sorted(strange)}")


def check_statistics(tensors: Mapping[str, Tensor], whose: str) -> None:
    """Raise RefusedError for statistics without their partner, of another shape than it, or out of range."""
    for mean, variance in pairs(tensors, whose):
        low, high = tensors[variance].min(), tensors[variance].max()
        if tensors[mean].shape != tensors[variance].shape or not 0 <= low <= high <= LARGEST_VARIANCE:
            raise RefusedError(
                f"{whose}: statistics: expected variances from 0 to {LARGEST_VARIANCE:g} in {variance}, like {mean}"
            )
        if not tensors[mean].abs().max() <= LARGEST_MEAN:
            raise RefusedError(f"{whose}: statistics: expected {mean} of at most {LARGEST_MEAN:g} in size")


def pooled(parts: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The statistics of all samples together, from those of parts of them, layer by layer.

    The variance of the whole is the mean of the parts' variances and the variance of their means.

    Args:
        parts: samples of each part, and its statistics by name; a part may leave out layers.
    """
    result: dict[str, Tensor] = {}
    layers = {name: value for _, part in parts for name, value in part.items()}
    for mean, variance in pairs(layers, "pooled"):
        measured = [(samples, part) for samples, part in parts if mean in part]
        total = sum(samples for samples, _ in measured)
        means = [(samples / total, part[mean].double(), part[variance].double()) for samples, part in measured]
        middle = sum((share * own for share, own, _ in means), torch.zeros_like(means[0][1]))
        spread = sum((share * (own - middle) ** 2 for share, own, _ in means), torch.zeros_like(middle))
        within = sum((share * own for share, _, own in means), torch.zeros_like(middle))
        result |= {
            mean: middle.to(layers[mean].dtype),
            variance: (within + spread).to(layers[variance].dtype),
        }
    return result
