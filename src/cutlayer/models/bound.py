"""A bound cut: the activations of several samples cross it as one, and the server takes them apart again.

Each of R samples is bound to a key of its own by circular convolution, and the R results are added up; circular
correlation with a key gives back its sample, and noise from the others. Gradients of what crosses are those of the sum,
so both directions carry R times less. Each sample of a group carries an R-th of the group's sum.

Source: Hsieh, Chuang and Wu, "C3-SL: Circular Convolution-Based Batch-Wise Compression for Communication-Efficient
Split Learning" (arXiv 2207.12397): fixed keys, drawn from a normal distribution and of norm 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft
from torch.nn.functional import normalize, pad

from cutlayer.errors import ConfigError
from cutlayer.models.cut import Halves


class Bind(nn.Module):
    """Activations [B, *shape] of n values to [B, 1, n / R]: of each R samples one sum, cut in R parts.

    The r samples that are left over at the end of a batch make a sum of their own, of which the first r parts cross.

    Args:
        keys: float [R, n].
    """

    keys: Tensor

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", keys)

    def forward(self, activations: Tensor) -> Tensor:
        """Bind a batch, in 32 bits."""
        (group, values), count = self.keys.shape, len(activations)
        missing = -count % group
        rows = pad(activations.reshape(count, values).float(), (0, 0, 0, missing)).reshape(-1, group, values)
        sums = irfft((rfft(rows) * rfft(self.keys)).sum(1), values)
        return sums.reshape(-1, 1, values // group)[:count]


class Unbind(nn.Module):
    """Inverse of `Bind`, but for the noise: [B, 1, n / R] to [B, *shape].

    Args:
        keys: the same.
        shape: of one sample.
    """

    keys: Tensor

    def __init__(self, keys: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("keys", keys)
        self.shape = shape

    def forward(self, parts: Tensor) -> Tensor:
        """Take a batch apart. A sum of which a part is missing is scaled up by as much."""
        (group, values), count = self.keys.shape, len(parts)
        missing = -count % group
        sums = pad(parts.reshape(count, values // group), (0, 0, 0, missing)).reshape(-1, 1, values)
        rows = irfft(rfft(sums) * rfft(self.keys).conj(), values).reshape(-1, *self.shape)[:count]
        if not missing:
            return rows
        whole = count - count % group
        return torch.cat([rows[:whole], rows[whole:] * (group / (count - whole))])


def bound(halves: Halves, sample: Tensor, group: int) -> Halves:
    """Halves at whose cut so many samples cross as one. Keys are drawn by PyTorch's generator.

    Both halves must see a batch whole and in one order, so this is for A epochs and evaluation alone: what is stored
    and drawn singly cannot be taken apart. FFTs are not among the FLOPs that are counted.

    Args:
        sample: images [B, C, H, W] as the client half takes them.

    Raises:
        ConfigError: the values at the cut cannot be divided by the group.
    """
    training = halves.client.training
    with torch.no_grad():
        shape = tuple(halves.client.eval()(sample).shape[1:])
    halves.client.train(training)
    values = math.prod(shape)
    if group < 2 or values % group:
        raise ConfigError(f"bind: expected a divisor of the {values} values at the cut, from 2 on, got {group}")
    keys = normalize(torch.randn(group, values))
    client = nn.Sequential(OrderedDict(layers=halves.client, bind=Bind(keys)))
    return Halves(client, nn.Sequential(OrderedDict(unbind=Unbind(keys.clone(), shape), layers=halves.server)))
