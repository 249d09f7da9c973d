"""Noise at the cut: channels are left out, the rest is clipped to a norm, Gaussian noise is added, and an accountant
states what the noise is.

Source of leaving out whole channels: Tompson et al., "Efficient Object Localization Using Convolutional Networks" (CVPR
2015, arXiv 1411.4280), there against overfitting; to hide what the channels show: Singh et al., "DISCO" (CVPR 2021,
arXiv 2012.11025), there with channels that are learned.

What (epsilon, delta) say here: of one sample, sent a number of times through a *given* half in eval mode, whoever sees
its noisy activations cannot tell well whether it was this sample or any other one (local differential privacy, the
Gaussian mechanism; Dwork and Roth 2014). They say nothing of labels, ids or sizes, which are sent as they are; nothing
of the weights, which are trained on the samples and can tell of them if they leave the client; and they do not hold for
batch norm in training mode, through which a sample changes the activations of others. See docs/privacy.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.defence import Defence


@dataclass(frozen=True)
class Noise:
    """Gaussian noise at the cut.

    Attributes:
        std: standard deviation of the noise on each value.
        clip: the largest Euclidean norm of a sample's activations; larger ones are scaled down. None for no bound, and
            no promise.
        channel_dropout: share of the channels (of the values, if there are no channels) that are 0 in what is sent,
            drawn for each sample; the others are scaled up. Every look at a sample shows others, so many show all.
    """

    std: float
    clip: float | None = None
    channel_dropout: float = 0.0

    @staticmethod
    def of(defence: Defence) -> Noise:
        """What clients with this defence do to what they send."""
        return Noise(defence.noise, defence.clip, defence.channel_dropout)

    @property
    def changes(self) -> bool:
        """Whether anything is done to activations at all."""
        return bool(self.std or self.clip or self.channel_dropout)

    def __post_init__(self) -> None:
        if self.std < 0 or (self.clip is not None and self.clip <= 0):
            raise ConfigError(f"noise: expected a std of at least 0 and a clip above 0, got {self.std}, {self.clip}")
        if not 0 <= self.channel_dropout < 1:
            raise ConfigError(f"noise: expected a channel_dropout from 0 to below 1, got {self.channel_dropout}")

    def __call__(self, activations: Tensor, draw: torch.Generator) -> Tensor:
        """Activations [N, *cut] as they are sent. Gradients flow through it. `draw` is a generator of the CPU."""
        if self.channel_dropout:
            stays = (torch.rand(activations.shape[:2], generator=draw) >= self.channel_dropout).to(activations)
            stays = stays.reshape(*activations.shape[:2], *(1,) * (activations.ndim - 2))
            activations = activations * (stays / (1 - self.channel_dropout))
        if self.clip is not None:
            norms = activations.flatten(1).norm(dim=1).clamp(min=1e-12)
            factors = (self.clip / norms).clamp(max=1).reshape(-1, *(1,) * (activations.ndim - 1))
            activations = activations * factors
        if self.std == 0:
            return activations
        return activations + self.std * torch.randn(activations.shape, generator=draw).to(activations)

    def epsilon(self, releases: int, delta: float = 1e-5) -> float:
        """Epsilon of one sample that is sent so many times, for this delta; infinity without noise or clipping.

        Two samples' clipped activations differ by at most twice the clip, so the noise multiplier is std / (2 clip).
        The accountant is that of privacy loss distributions, of dp-accounting.

        Raises:
            ConfigError: dp-accounting is not installed.
        """
        if self.clip is None or self.std == 0:
            return float("inf")
        try:
            from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
            from dp_accounting.pld import PLDAccountant
        except ModuleNotFoundError:
            raise ConfigError("the accountant needs dp-accounting: pip install 'cutlayer[privacy]'") from None
        accountant = PLDAccountant()
        # Several Gaussian releases are one with less noise; that is exact, and quicker than to compose them.
        multiplier = self.std / (2 * self.clip * releases**0.5)
        accountant.compose(SelfComposedDpEvent(GaussianDpEvent(multiplier), 1))
        return float(accountant.get_epsilon(delta))
