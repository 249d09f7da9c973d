"""What the client does to its training batches: the usual augmentation of small images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class CropFlip:
    """Random crop after zero padding, and horizontal flip: the usual augmentation for CIFAR-10, on a whole batch.

    Attributes:
        padding: pixels added on each side before the crop.
        flip: whether half of the images are mirrored.
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, inputs: Tensor, draw: torch.Generator) -> Tensor:
        """Augment a batch [B, C, H, W] of any dtype."""
        batch, _, height, width = inputs.shape
        span = 2 * self.padding + 1
        top = torch.randint(span, (batch, 1), generator=draw)
        left = torch.randint(span, (batch, 1), generator=draw)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        if self.flip:
            mirrored = torch.rand(batch, 1, generator=draw) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = pad(inputs, (self.padding,) * 4)
        sample = torch.arange(batch)[:, None, None]
        crop = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        return crop.permute(0, 3, 1, 2).contiguous()
