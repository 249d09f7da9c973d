"""Labels from the gradients at the cut, for a party that is sent gradients or computes them, but no labels.

Li, Sun, Yang, Gao, Zhang, Xie, Smith and Wang, "Label Leakage and Protection in Two-party Split Learning" (ICLR 2022,
arXiv 2102.08504): the norm of a sample's gradient tells a rare class from a common one, and its direction tells classes
apart, given one example of each. Ready for the U-shaped cut, whose labels stay with the client.

Gradients are those of single samples at the cut, [N, *cut], of one step, so that the half is the same for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.errors import ConfigError


def norm_scores(gradients: Tensor) -> Tensor:
    """The Euclidean norm of each sample's gradient, [N]: higher for the rarer class, which is learned less well."""
    return gradients.flatten(1).norm(dim=1)


def direction_scores(gradients: Tensor, example: Tensor) -> Tensor:
    """The cosine of each gradient with that of one sample whose class is known, [N]: high for samples of its class.

    Args:
        example: the gradient of that sample, [*cut].
    """
    return torch.nn.functional.cosine_similarity(gradients.flatten(1), example.reshape(1, -1), dim=1)


def by_direction(gradients: Tensor, examples: Tensor, labels: Tensor) -> Tensor:
    """Labels [N] of samples: of the example whose gradient has the nearest direction.

    Args:
        examples, labels: gradients [K, *cut] of samples whose labels [K] are known.
    """
    scores = torch.stack([direction_scores(gradients, example) for example in examples], 1)
    return labels[scores.argmax(1)]


def leak_auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of scores [N] for telling positive samples (bool [N]); 0.5 is a guess, 1 a full leak.

    Raises ConfigError if all samples are of one class.
    """
    high, low = scores[positive], scores[~positive]
    if len(high) == 0 or len(low) == 0:
        raise ConfigError("leak AUC: expected samples of both classes, got those of one")
    wins = (high[:, None] > low[None]).double() + 0.5 * (high[:, None] == low[None]).double()
    return wins.mean().item()
