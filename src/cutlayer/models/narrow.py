"""A narrow cut: fewer channels cross it than the network has there.

The client ends in a 1x1 convolution to a part of the channels, the server begins with one back to all of them. At
first the second is the inverse of the first as far as there is one, so that both make a projection. Both learn.

Sources: Eshratifar et al., "BottleNet" (ISLPED 2019, arXiv 1902.01000); Shao and Zhang, "BottleNet++" (arXiv
1910.14315).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError
from cutlayer.models.cut import Halves


def narrowed(halves: Halves, sample: Tensor, factor: int) -> Halves:
    """Halves with `factor` times fewer channels at the cut.

    Args:
        halves: whose cut crosses feature maps.
        sample: images [B, C, H, W] as the client half takes them.
    """
    training = halves.client.training
    with torch.no_grad():
        shape = tuple(halves.client.eval()(sample).shape[1:])
    halves.client.train(training)
    if len(shape) != 3 or factor < 1 or shape[0] % factor:
        raise ConfigError(
            f"narrow: expected feature maps [channels, height, width] at the cut, and a divisor of their channels, got "
            f"{list(shape)} and {factor}"
        )
    channels, few = shape[0], shape[0] // factor
    squeeze, expand = nn.Conv2d(channels, few, 1), nn.Conv2d(few, channels, 1)
    with torch.no_grad():
        nn.init.orthogonal_(squeeze.weight)
        expand.weight.copy_(squeeze.weight.transpose(0, 1))
        for convolution in (squeeze, expand):
            assert convolution.bias is not None
            convolution.bias.zero_()
    client = nn.Sequential(OrderedDict(layers=halves.client, squeeze=squeeze))
    return Halves(client, nn.Sequential(OrderedDict(expand=expand, layers=halves.server)))
