"""Attacker-aware training: a decoder in the client learns to undo its half, and the half learns to make that hard.

Li, Rakin, Chen, He, Fan and Chakrabarti, "ResSFL: A Resistance Transfer Framework for Defending Model Inversion Attack
in Split Federated Learning" (CVPR 2022, arXiv 2205.04007). In each step the decoder first takes a step towards a higher
SSIM of its images with the inputs; then the half's loss has the SSIM that the decoder reaches, with a weight. As they
do, such a half can be trained once and be what other runs begin with (`init`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu

from cutlayer.errors import ConfigError
from cutlayer.models.flops import FlopTable
from cutlayer.models.optim import Optimizer, ScheduledOptimizer
from cutlayer.privacy.networks import decoder
from cutlayer.privacy.scores import ssim
from cutlayer.seeds import seeded

ADAM = Optimizer("adam", lr=1e-2, weight_decay=0.0, schedule="constant")
WIDTH, BLOCKS = 32, 2


class Adversary:
    """The decoder in a client. It is part of the client's checkpoints.

    Args:
        cut, image: shapes of a sample's activations and inputs, which must be images.
        weight, floor: see `Defence`.
        name: what tells its random draws from those of others.

    Attributes:
        version: counts the steps.
    """

    def __init__(
        self, cut: Sequence[int], image: Sequence[int], weight: float, floor: float, seed: int, *name: str | int
    ) -> None:
        if len(image) != 3:
            raise ConfigError(f"defence: an adversary needs images [channels, height, width], got {list(image)}")
        with seeded(seed, "adversary", *name):
            self.decoder = decoder(cut, image, WIDTH, BLOCKS)
        self.weight, self.floor, self.version = weight, floor, 0
        self._flops = FlopTable(self.decoder, cut, torch.float32)
        self._optimizer = ScheduledOptimizer(ADAM, self.decoder.parameters(), 1)

    def penalty(self, inputs: Tensor, activations: Tensor) -> Tensor:
        """What is added to the client's loss for a batch of inputs [B, C, H, W] and activations [B, *cut], with graph.

        The decoder takes a step of its own first.
        """
        images, activations = in_unit_range(inputs), activations.float()
        self.decoder.train()
        if len(images) > 1:  # batch norm has no statistics of one
            self._optimizer.zero_grad()
            (-ssim(images, self.decoder(activations.detach())).mean()).backward()
            self._optimizer.step()
            self.version += 1
        self.decoder.eval().requires_grad_(False)
        reached = ssim(images, self.decoder(activations)).mean()
        self.decoder.requires_grad_(True)
        return self.weight * relu(reached - self.floor)

    def flops(self, batch: int) -> int:
        """FLOPs of `penalty` for a batch of this size."""
        forward, backward = self._flops(batch)
        again, to_the_cut = self._flops(batch, input_gradient=True)
        return forward + backward + again + to_the_cut - backward // 2  # the second pass updates no weights

    def state_dict(self) -> dict[str, Any]:
        """The decoder and its optimizer."""
        state = self._optimizer.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in state.items() if name not in tensors}
        return {**rest, "optimizer": tensors, "decoder": self.decoder.state_dict(), "version": self.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._optimizer.load_state_dict({"groups": state["groups"], "rest": state["rest"], **state["optimizer"]})
        self.decoder.load_state_dict(dict(state["decoder"]))
        self.version = state["version"]


def in_unit_range(inputs: Tensor) -> Tensor:
    """Inputs as images from 0 to 1: bytes by their range, floats by that of the batch."""
    if not inputs.is_floating_point():
        return inputs.float() / 255
    low, high = inputs.min(), inputs.max()
    return (inputs - low) / (high - low).clamp(min=1e-12)
