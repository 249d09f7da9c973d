"""UnSplit: an honest-but-curious server that knows nothing but the architecture of the client half.

Erdogan, Kupcu and Cicek, "UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label Inference Attacks Against
Split Learning" (WPES 2022, arXiv 2108.09033): in turns, an image is sought whose activations under a clone of the half
are those that were sent, and the clone is trained to give them for that image. It works for halves of few layers, and
fails for deeper ones, as they publish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from cutlayer.privacy.networks import fresh, total_variation
from cutlayer.privacy.target import Target


@dataclass(frozen=True)
class UnSplit:
    """Inversion and stealing in turns. All private images are sought at once with one clone, which has more to go by.

    Attributes:
        rounds: turns; input_steps, model_steps: steps of each in a turn (1000, 100 and 100 as published).
        lr: of both, Adam with amsgrad (0.001 as published, with so many more steps).
        smoothness, decay: weights of the total variation and of the mean square of the pixels (0.1 and 1 as published).
        stretch: whether each image is stretched to values from 0 to 1 in the end: an image that is dimmer beside a
            clone that is brighter gives the same activations, so the scale cannot be known. Not in the publication.
    """

    rounds: int = 30
    input_steps: int = 20
    model_steps: int = 20
    lr: float = 0.01
    smoothness: float = 0.1
    decay: float = 1.0
    stretch: bool = True
    knows: ClassVar[str] = "the half's architecture alone"

    def __call__(self, target: Target) -> Tensor:
        """Reconstructions of the private images."""
        activations = target.send(target.private)
        clone = fresh(target.half, target.seed, "unsplit").eval()
        scale = activations.square().mean().clamp(min=1e-12)
        shape = (len(activations), *target.image_shape)
        images = torch.full(shape, 0.5, device=activations.device, requires_grad=True)
        of_images = torch.optim.Adam([images], self.lr, amsgrad=True)
        of_clone = torch.optim.Adam(clone.parameters(), self.lr, amsgrad=True)
        for _ in range(self.rounds):
            for _ in range(self.input_steps):
                of_images.zero_grad()
                fit = mse_loss(clone(target.inputs(images)), activations) / scale
                prior = self.smoothness * total_variation(images) + self.decay * images.square().mean()
                ((fit + prior) * len(images)).backward()
                of_images.step()
                with torch.no_grad():
                    images.clamp_(0, 1)
            for _ in range(self.model_steps):
                of_clone.zero_grad()
                (mse_loss(clone(target.inputs(images.detach())), activations) / scale).backward()
                of_clone.step()
        return _stretched(images.detach()) if self.stretch else images.detach()


def _stretched(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    low, high = (ends.reshape(-1, 1, 1, 1) for ends in (flat.amin(1), flat.amax(1)))
    return (images - low) / (high - low).clamp(min=1e-6)
