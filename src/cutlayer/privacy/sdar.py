"""SDAR: a passive server that imitates the client half beside its own half, with adversarial regularization.

Zhu, Luo, Wu, Jiang, Xiao and Ooi, "Passive Inference Attacks on Split Learning via Adversarial Regularization" (NDSS
2025, arXiv 2310.10483). A simulator of the client's architecture learns to do the task with the server's own half on
public images, held to activations like the client's by a critic; a decoder learns to undo the simulator, held by
another critic to images like the public ones. Decoder and critics are told the labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from cutlayer.privacy.networks import critic, decoder, fresh, label_map
from cutlayer.privacy.target import Target
from cutlayer.seeds import generator, seeded


@dataclass(frozen=True)
class SDAR:
    """The attack on what a server holds: activations, labels and its own half.

    As published it runs beside training, a step for each batch (`Simulation.step`); called on a target it takes the
    steps afterwards, on the activations and the server half as they are then.

    Attributes:
        steps, batch_size: 20,000 and 128 as published.
        lr, critic_lr: of Adam on simulator and decoder, and on their critics.
        feature_weight, image_weight: of the two critics (0.02 and 1e-5 as published for CIFAR-10).
        width: of the attacker's networks.
    """

    steps: int = 600
    batch_size: int = 64
    lr: float = 3e-3
    critic_lr: float = 1e-3
    feature_weight: float = 0.1
    image_weight: float = 1e-5
    width: int = 32
    knows: ClassVar[str] = "the half's architecture, its own half, labelled images of its own"

    def __call__(self, target: Target) -> Tensor:
        """Reconstructions of the private images."""
        activations, simulation = target.send(target.private), Simulation(self, target)
        for step in range(self.steps):
            draw = generator(target.seed, "sdar", "private", step)
            rows = torch.randint(len(activations), (self.batch_size,), generator=draw)
            simulation.step(activations[rows], target.labels[rows], target.server)
        return simulation.reconstruct(activations, target.labels)


class Simulation:
    """The attacker's networks. Of the target it uses the architecture of the half, and what is public."""

    def __init__(self, options: SDAR, target: Target) -> None:
        self.options, self.target, self.count = options, target, 0
        half, image, width = target.half, target.image_shape, options.width
        cut = target.send(target.public[:1], "public").shape[1:]
        classes, self._maps = int(target.public_labels.max()) + 1, len(cut) == 3 and cut[1] * cut[2] > 1
        extra = 1 if self._maps else 0
        self.simulator = fresh(half, target.seed, "sdar", "simulator").train()
        with seeded(target.seed, "sdar"):
            self.decoder = decoder(cut, image, width, blocks=2, extra=extra)
            self.of_features, self.of_images = critic(cut, width, extra), critic(image, width, 1)
            shapes = (cut, cut, image) if self._maps else (image,) * 3
            self.labels = nn.ModuleList(label_map(classes, shape) for shape in shapes)
        networks = (self.decoder, self.of_features, self.of_images, self.labels)
        for network in networks:
            network.to(target.private.device)
        seen = [*self.decoder.parameters(), *self.labels[0].parameters()]
        critics = [*self.of_features.parameters(), *self.labels[1].parameters()]
        critics += [*self.of_images.parameters(), *self.labels[2].parameters()]
        self._of_simulator = torch.optim.Adam(self.simulator.parameters(), options.lr)
        self._of_decoder = torch.optim.Adam(seen, options.lr)
        self._of_critics = torch.optim.Adam(critics, options.critic_lr)

    def step(self, activations: Tensor, labels: Tensor, server: nn.Module) -> None:
        """Learn from a batch that the client sent, activations [B, *cut] and labels [B], with the server half of now.

        The half is left as it is.
        """
        target, options = self.target, self.options
        self.count += 1
        draw = generator(target.seed, "sdar", "public", self.count)
        rows = torch.randint(len(target.public), (len(activations),), generator=draw)
        images, known = target.public[rows], target.public_labels[rows]
        was_training = server.training
        server.eval()
        simulated = self.simulator(target.inputs(images))
        task = cross_entropy(server(simulated), known)
        like_client = _as_real(self._features(simulated, known))
        loss = task + options.feature_weight * like_client
        self._of_simulator.zero_grad()
        gradients = torch.autograd.grad(loss, list(self.simulator.parameters()), allow_unused=True)
        for parameter, gradient in zip(self.simulator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self._of_simulator.step()
        server.train(was_training)

        with torch.no_grad():
            simulated = self.simulator(target.inputs(images))
        decoded = self._decoded(activations, labels)
        loss = mse_loss(self._decoded(simulated, known), images)
        loss = loss + options.image_weight * _as_real(self._image(decoded, labels))
        self._of_decoder.zero_grad()
        loss.backward()
        self._of_decoder.step()

        self._of_critics.zero_grad()
        loss = _as_real(self._features(activations, labels)) + _as_made(self._features(simulated, known))
        loss = loss + _as_real(self._image(images, known)) + _as_made(self._image(decoded.detach(), labels))
        loss.backward()
        self._of_critics.step()

    def reconstruct(self, activations: Tensor, labels: Tensor) -> Tensor:
        """What the attacker sees in activations [N, *cut] of samples with these labels."""
        self.decoder.eval()
        with torch.no_grad():
            pairs = zip(activations.split(256), labels.split(256), strict=True)
            return torch.cat([self._decoded(*pair) for pair in pairs])

    def _decoded(self, activations: Tensor, labels: Tensor) -> Tensor:
        return self.decoder(self._beside(activations, labels, 0))

    def _features(self, activations: Tensor, labels: Tensor) -> Tensor:
        return self.of_features(self._beside(activations, labels, 1))

    def _image(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.of_images(torch.cat([images, self.labels[2](labels)], 1))

    def _beside(self, activations: Tensor, labels: Tensor, which: int) -> Tensor:
        """Activations with a map of the labels, if they are maps themselves."""
        return torch.cat([activations, self.labels[which](labels)], 1) if self._maps else activations


def _as_real(scores: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(scores, torch.ones_like(scores))


def _as_made(scores: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))
