"""Images and labels in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cutlayer.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """Images and labels in memory.

    Attributes:
        inputs: uint8 [N, C, H, W].
        labels: int64 [N].
        mean, std: of each channel, in units of the pixels' full range, for a model to normalize with.
    """

    inputs: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs uint8 [B, C, H, W] and labels int64 [B] of these samples, in one gather."""
        return self.inputs[indices], self.labels[indices]

    def on(self, device: str) -> Images:
        """The same with the inputs on a device, where batches of them are then gathered and augmented."""
        if torch.device(device).type == "cpu":
            return self
        return Images(self.inputs.to(device), self.labels, self.mean, self.std, self.classes)

    def first(self, count: int | None) -> Images:
        """The first `count` samples, or all of them for None."""
        if count is None:
            return self
        if not 0 < count <= len(self):
            raise ConfigError(f"expected a number of samples from 1 to {len(self)}, got {count}")
        return Images(self.inputs[:count], self.labels[:count], self.mean, self.std, self.classes)

    def take(self, indices: Tensor) -> Images:
        """The samples at these positions, int64 [N]: a view if the positions are one run, otherwise a copy."""
        count = len(indices)
        one_run = count > 0 and torch.equal(indices, torch.arange(int(indices[0]), int(indices[0]) + count))
        chosen = slice(int(indices[0]), int(indices[0]) + count) if one_run else indices
        return Images(self.inputs[chosen], self.labels[chosen], self.mean, self.std, self.classes)
