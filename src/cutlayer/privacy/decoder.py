"""Decoder inversion: a network that is trained to undo the client half on images of the attacker's own.

The attack of ResSFL (Li, Rakin, Chen, He, Fan and Chakrabarti, CVPR 2022, arXiv 2205.04007), whose set-up for 32x32
images is the default here: 50 epochs, Adam 1e-3, batches of 32, mean squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cutlayer.privacy.networks import decoder
from cutlayer.privacy.target import Target
from cutlayer.seeds import generator, seeded


@dataclass(frozen=True)
class DecoderInversion:
    """An attacker that can have images of its own pass through the client half, and trains a decoder on the pairs.

    Attributes:
        epochs, lr, batch_size: of the decoder's training.
        width, blocks: of the decoder, see `networks.decoder`.
    """

    epochs: int = 50
    lr: float = 1e-3
    batch_size: int = 32
    width: int = 64
    blocks: int = 4
    knows: ClassVar[str] = "the half's answers to images of its own (such as another client)"

    def __call__(self, target: Target) -> Tensor:
        """Reconstructions of the private images."""
        trained = self.train(target.send(target.public, "public"), target.public, target.seed)
        return decode(trained, target.send(target.private))

    def train(self, activations: Tensor, images: Tensor, seed: int = 0) -> nn.Module:
        """A decoder trained on pairs of activations [M, *cut] and images [M, C, H, W] from 0 to 1."""
        with seeded(seed, "decoder"):
            network = decoder(activations.shape[1:], images.shape[1:], self.width, self.blocks)
            network.to(activations.device).train()
            optimizer = torch.optim.Adam(network.parameters(), self.lr)
            for epoch in range(self.epochs):
                order = torch.randperm(len(images), generator=generator(seed, "decoder", epoch))
                for rows in order.split(self.batch_size):
                    if len(rows) == 1:  # of which batch norm cannot take statistics
                        continue
                    optimizer.zero_grad()
                    mse_loss(network(activations[rows]), images[rows]).backward()
                    optimizer.step()
        return network


def decode(network: nn.Module, activations: Tensor) -> Tensor:
    """What a decoder makes of activations [N, *cut], in eval mode."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in activations.split(256)])
