"""SplitGuard: a client finds out whether the server trains on the labels, or hijacks the half.

Erdogan, Kupcu and Cicek, "SplitGuard: Detecting and Mitigating Training-Hijacking Attacks in Split Learning" (WPES
2022, arXiv 2108.09052). Some batches are sent with false labels. To a server that trains on labels these are wrong, so
their gradients differ from all others in size and direction; to one that hijacks, labels do not matter.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.seeds import generator

# Of the score's squashing function, as in the publication's code.
ALPHA, BETA = 5.0, 2.0
SCORES = 10
"""Scores whose mean decides, and without which nothing is decided."""
GRADIENTS = 20
"""The last so many gradients of a kind count, as those of a network that has learned nothing yet are no measure of
later ones. The publication takes all."""


class _Gradients:
    """The last gradients of a kind: their mean, and the mean of their norms."""

    def __init__(self) -> None:
        self.count, self._last = 0, deque[Tensor](maxlen=GRADIENTS)

    def add(self, gradient: Tensor) -> None:
        self.count += 1
        self._last.append(gradient)

    @property
    def mean(self) -> Tensor:
        return torch.stack(list(self._last)).mean(0)

    @property
    def norm(self) -> float:
        return torch.stack([gradient.norm() for gradient in self._last]).mean().item()


class SplitGuard:
    """The gradients of batches with true and with false labels, and what they say of the server.

    A new object begins to watch anew, as after a client was started again.

    Args:
        seed, client: of the draws.
        share: of the batches that are sent with false labels.
        threshold: the mean of the last scores below which the server is taken for a hijacker.
        after: batches with false labels before the first score.
    """

    def __init__(self, seed: int, client: int, share: float, threshold: float, after: int = 0) -> None:
        self.seed, self.client, self.share, self.threshold, self.after = seed, client, share, threshold, after
        self.false, self.first, self.second = _Gradients(), _Gradients(), _Gradients()
        self.scores: deque[float] = deque(maxlen=SCORES)

    def is_false(self, epoch: int, step: int) -> bool:
        """Whether this step's labels are to be false."""
        return self._chance("watch", epoch, step) < self.share

    def false_labels(self, labels: Tensor, epoch: int, step: int, microbatch: int = 0) -> Tensor:
        """Labels [B] that are another one for every sample, of those that the batch has."""
        if labels.is_floating_point() or labels.ndim != 1:
            raise ConfigError(
                f"defence: the watch needs labels that are one class a sample, got {labels.dtype} {list(labels.shape)}"
            )
        classes, places = labels.unique(return_inverse=True)
        if len(classes) == 1:
            return labels
        draw = generator(self.seed, "watch", "labels", self.client, epoch, step, microbatch)
        return classes[(places + torch.randint(1, len(classes), places.shape, generator=draw)) % len(classes)]

    def add(self, gradient: Tensor, epoch: int, step: int) -> None:
        """Take a step's gradient, flat: of the half's first parameter, as in the publication's code."""
        gradient = gradient.detach().flatten().cpu().double()
        if not self.is_false(epoch, step):
            (self.first if self._chance("watch", "half", epoch, step) < 0.5 else self.second).add(gradient)
            return
        self.false.add(gradient)
        if self.false.count > self.after and self.first.count and self.second.count:
            self.scores.append(self.score())

    def score(self) -> float:
        """From 0 to 1: high for a server that trains on the labels, a quarter if labels make no difference."""
        regular = (self.first.mean + self.second.mean) / 2
        apart = abs(self.false.norm - (self.first.norm + self.second.norm) / 2)
        usual = abs(self.first.norm - self.second.norm)
        whole = apart + usual + 1e-12
        value = _angle(self.false.mean, regular) * apart / whole
        value -= _angle(self.first.mean, self.second.mean) * usual / whole
        return (1 / (1 + math.exp(-ALPHA * value))) ** BETA

    @property
    def suspicious(self) -> bool:
        """Whether the last scores say that the server does not train on the labels."""
        return len(self.scores) == SCORES and sum(self.scores) / SCORES < self.threshold

    def _chance(self, *name: str | int) -> float:
        return torch.rand((), generator=generator(self.seed, self.client, *name)).item()


def _angle(first: Tensor, second: Tensor) -> float:
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=0).clamp(-1, 1)
    return math.acos(cosine.item())
