"""Dropout at the cut.

Sources: Srivastava et al., "Dropout" (JMLR 15, 2014); of whole channels: Tompson et al., "Efficient Object Localization
Using Convolutional Networks" (CVPR 2015, arXiv 1411.4280).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import dropout

from cutlayer.regularize.base import Regularize


def dropped(chosen: Regularize, activations: Tensor) -> Tensor:
    """Activations [B, C, ...], some values or channels set to 0, the others scaled up, by PyTorch's generator."""
    if chosen.channel_dropout and activations.ndim > 1:
        ones = activations.new_ones(activations.shape[:2])
        mask = dropout(ones, chosen.channel_dropout)
        activations = activations * mask.reshape(*mask.shape, *(1,) * (activations.ndim - 2))
    return dropout(activations, chosen.dropout) if chosen.dropout else activations
