"""Optimization of the input through a client half that the attacker holds.

The white-box inversion of He, Zhang and Lee ("Model inversion attacks against collaborative inference", ACSAC 2019):
an image is sought whose activations are those that were sent, and which is smooth. A server holds the client half in
every mode with several clients, whose weights it averages, and at first if both sides draw it from a shared seed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from cutlayer.privacy.networks import total_variation
from cutlayer.privacy.target import Target


@dataclass(frozen=True)
class KnownHalf:
    """Optimization of the input through the known client half.

    Attributes:
        steps, lr: of Adam on the pixels.
        smoothness: weight of the total variation, relative to the squared error of activations of mean square 1.
        batch_size: images that are sought at once, which only bounds the memory.
    """

    steps: int = 500
    lr: float = 0.05
    smoothness: float = 0.01
    batch_size: int = 256
    knows: ClassVar[str] = "the half's weights (a server that averages halves)"

    def __call__(self, target: Target) -> Tensor:
        """Reconstructions of the private images."""
        activations = target.send(target.private)
        return torch.cat([self.invert(target, part) for part in activations.split(self.batch_size)])

    def invert(self, target: Target, activations: Tensor) -> Tensor:
        """Images [N, C, H, W] whose activations are near these [N, *cut]. It begins with the mean public image."""
        half = copy.deepcopy(target.half).eval().requires_grad_(False)
        scale = activations.square().mean().clamp(min=1e-12)
        images = target.public.mean(0, keepdim=True).repeat(len(activations), 1, 1, 1).requires_grad_(True)
        optimizer = torch.optim.Adam([images], self.lr)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            optimizer.zero_grad()
            fit = mse_loss(half(target.inputs(images)), activations) / scale
            (fit + self.smoothness * total_variation(images)).mul(len(images)).backward()
            optimizer.step()
            rate.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return images.detach()
