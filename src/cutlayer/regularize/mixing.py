"""Mixing the activations of two samples at the cut, and their losses by the same shares.

Sources: Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States" (ICML 2019, arXiv
1806.05236), here at one layer, the cut; Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
Localizable Features" (ICCV 2019, arXiv 1905.04899), here on feature maps, whose places are those of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.regularize.base import Regularize
from cutlayer.seeds import derive, generator

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Activations [B, ...], each of two samples.

    Attributes:
        others: int64 [B], for each sample the number in the batch of the one that is mixed in; None if none is.
        share: of the sample itself.
    """

    activations: Tensor
    others: Tensor | None = None
    share: float = 1.0

    def loss(self, own: Tensor, function: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the mixture, by the shares of both samples' labels, from the loss with their own."""
        if self.others is None:
            return own
        return self.share * own + (1 - self.share) * function(outputs, labels[self.others])


def mixed(chosen: Regularize, activations: Tensor, seed: int, *name: int | str) -> Mixture:
    """A batch [B, ...] with each sample mixed with another, by the draw of this name."""
    draw = np.random.default_rng(derive(seed, "mix", *name))
    others = torch.randperm(len(activations), generator=generator(seed, "mix", *name)).to(activations.device)
    if chosen.cutmix and (not chosen.mixup or draw.random() < 0.5):
        return _boxed(activations, others, draw, chosen.cutmix)
    share = float(draw.beta(chosen.mixup, chosen.mixup))
    return Mixture(share * activations + (1 - share) * activations[others], others, share)


def _boxed(activations: Tensor, others: Tensor, draw: np.random.Generator, alpha: float) -> Mixture:
    check_maps(tuple(activations.shape[1:]))
    height, width = activations.shape[-2:]
    side = float(np.sqrt(1 - draw.beta(alpha, alpha)))
    edges = []
    for length in (height, width):
        middle, half = int(draw.integers(length)), round(side * length) / 2
        edges.append((max(0, round(middle - half)), min(length, round(middle + half))))
    (top, bottom), (left, right) = edges
    inside = torch.zeros(height, width, dtype=torch.bool, device=activations.device)
    inside[top:bottom, left:right] = True
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixture(torch.where(inside, activations[others], activations), others, share)


def check_maps(shape: tuple[int, ...]) -> None:
    """Raise ConfigError if samples of this shape are no feature maps."""
    if len(shape) != 3:
        raise ConfigError(f"cutmix: expected feature maps [channels, height, width] at the cut, got {list(shape)}")
