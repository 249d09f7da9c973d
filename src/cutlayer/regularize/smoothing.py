"""Label smoothing.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016, arXiv 1512.00567),
section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import cross_entropy

from cutlayer.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]


def smoothed(loss: Loss, part: float) -> Loss:
    """The loss with this part of each label spread over all classes. Raises ConfigError for a loss of one's own."""
    if not part:
        return loss
    if loss is not cross_entropy:
        raise ConfigError(
            "label_smoothing: expected the task's default loss, torch.nn.functional.cross_entropy; with a loss of your "
            "own, smooth the labels in it"
        )
    return partial(cross_entropy, label_smoothing=part)
