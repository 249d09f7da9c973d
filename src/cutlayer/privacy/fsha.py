"""Feature-space hijacking: a malicious server that trains the client half to be undone.

Pasquini, Ateniese and Bernaschi, "Unleashing the Tiger: Inference Attacks on Split Learning" (CCS 2021, arXiv
2012.02670). In place of the task's gradients the server sends those of a critic, which has the client's activations
become like those of a pilot network of its own, whose decoder it has. WGAN with gradient penalty, as published. A
client that gets no gradients, as in B and C epochs, cannot be hijacked.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from cutlayer.privacy.decoder import decode
from cutlayer.privacy.networks import critic, decoder, encoder
from cutlayer.privacy.target import Target
from cutlayer.seeds import generator, seeded


@dataclass(frozen=True)
class FSHA:
    """Feature-space hijacking of a simulated client, whose half begins as the target's.

    Attributes:
        steps, batch_size: batches of the client that the server answers, and their size (10,000 and 64 as published).
        pilot_lr, critic_lr: of Adam on pilot and decoder, and on the critic (1e-5 and 1e-4 as published).
        penalty: weight of the gradient penalty (500 as published).
        client_lr: of the simulated client's Adam (1e-5 as published); 0 for a client that is not trained.
        width: of the attacker's networks.
    """

    steps: int = 1000
    batch_size: int = 64
    pilot_lr: float = 3e-3
    critic_lr: float = 1e-3
    penalty: float = 10.0
    client_lr: float = 3e-3
    width: int = 32
    knows: ClassVar[str] = "images of its own; it sends gradients of its choice"

    def __call__(self, target: Target) -> Tensor:
        """Reconstructions of the private images, once the client has been hijacked."""
        half = copy.deepcopy(target.half).requires_grad_(True)
        optimizer = torch.optim.Adam(half.parameters(), self.client_lr)
        hijacker = Hijacker(self, target.send(target.private[:1]), target.public, target.seed)
        for step in range(self.steps):
            rows = torch.randint(
                len(target.private), (self.batch_size,), generator=generator(target.seed, "fsha", "client", step)
            )
            activations = half.train()(target.inputs(target.private[rows]))
            gradients = hijacker.gradients(activations.detach())
            if self.client_lr:
                optimizer.zero_grad()
                activations.backward(gradients)
                optimizer.step()
        half.eval()
        with torch.no_grad():
            activations = torch.cat([half(target.inputs(part)) for part in target.private.split(256)])
        return hijacker.reconstruct(activations)


class Hijacker:
    """The malicious server: it answers activations with gradients of its choice, and learns to undo them.

    Args:
        options: see `FSHA`.
        example: some activations of the client, [N, *cut], for their shape and whether they can be negative.
        public: images of the attacker's own, [M, C, H, W] from 0 to 1.
    """

    def __init__(self, options: FSHA, example: Tensor, public: Tensor, seed: int = 0) -> None:
        self.options, self.public, self.seed, self.step = options, public, seed, 0
        cut, image, width = example.shape[1:], public.shape[1:], options.width
        with seeded(seed, "fsha"):
            self.pilot = encoder(image, cut, width, nonnegative=bool((example >= 0).all()))
            self.decoder = decoder(cut, image, width, blocks=2)
            self.critic = critic(cut, width)
        for network in (self.pilot, self.decoder, self.critic):
            network.to(example.device).train()
        pair = [*self.pilot.parameters(), *self.decoder.parameters()]
        self._of_pair = torch.optim.Adam(pair, options.pilot_lr)
        self._of_critic = torch.optim.Adam(self.critic.parameters(), options.critic_lr, betas=(0.5, 0.9))

    def gradients(self, activations: Tensor) -> Tensor:
        """What the client is sent back for a batch [B, *cut] in place of the task's gradients; the attacker learns."""
        self.step += 1
        draw = generator(self.seed, "fsha", "public", self.step)
        public = self.public[torch.randint(len(self.public), (len(activations),), generator=draw)]
        activations = activations.detach().requires_grad_(True)
        (gradients,) = torch.autograd.grad(self.critic(activations).mean(), activations)

        pilot = self.pilot(public)
        self._of_pair.zero_grad()
        mse_loss(self.decoder(pilot), public).backward()
        self._of_pair.step()

        # Low for the pilot's activations, high for the client's: the client, which descends, comes to the pilot.
        pilot, sent = pilot.detach(), activations.detach()
        self._of_critic.zero_grad()
        loss = self.critic(pilot).mean() - self.critic(sent).mean() + self._penalty(sent, pilot, draw)
        loss.backward()
        self._of_critic.step()
        return gradients

    def reconstruct(self, activations: Tensor) -> Tensor:
        """What the attacker sees in activations [N, *cut]."""
        return decode(self.decoder, activations)

    def _penalty(self, sent: Tensor, pilot: Tensor, draw: torch.Generator) -> Tensor:
        share = torch.rand(len(sent), *(1,) * (sent.ndim - 1), generator=draw).to(sent)
        between = (share * sent + (1 - share) * pilot).requires_grad_(True)
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return self.options.penalty * (slope.flatten(1).norm(dim=1) - 1).square().mean()
