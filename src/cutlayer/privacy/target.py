"""What an attack is given, and what an attack is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from cutlayer.codecs import get_transfer
from cutlayer.errors import ConfigError
from cutlayer.privacy.noise import Noise
from cutlayer.seeds import derive, generator

NO_NOISE = Noise(0.0)


@dataclass(frozen=True, eq=False)
class Target:
    """A client under attack, and what attackers of different kinds know of it.

    Images are float32 [N, C, H, W] with values from 0 to 1.

    Attributes:
        half, server: the client half and the server half, as they are at the time of the attack.
        private: the client's images. The scores need them; of the attacks only those that simulate the client's own
            training give them to the simulated client.
        labels: of the private images, int64 [N]. The server is sent them, unless labels stay with the client.
        public: images of the attacker's own, of a similar kind.
        public_labels: int64.
        scale: the inputs that the values 0 and 1 stand for, such as (0, 255).
        codec: spec of what activations go through on their way to the server.
        noise: what the client adds to activations before that.
        seed: of the attack's own draws.
    """

    half: nn.Module
    server: nn.Module
    private: Tensor
    labels: Tensor
    public: Tensor
    public_labels: Tensor
    scale: tuple[float, float] = (0.0, 255.0)
    codec: str = "fp32"
    noise: Noise = NO_NOISE
    seed: int = 0

    def __post_init__(self) -> None:
        for name, images in (("private", self.private), ("public", self.public)):
            if images.ndim != 4 or len(images) == 0:
                raise ConfigError(f"{name}: expected images [N, C, H, W], got {list(images.shape)}")
            if images.min() < 0 or images.max() > 1:
                raise ConfigError(f"{name}: expected values from 0 to 1, got {images.min():g} to {images.max():g}")
        if self.private.shape[1:] != self.public.shape[1:]:
            shapes = f"{list(self.private.shape[1:])} and {list(self.public.shape[1:])}"
            raise ConfigError(f"expected public images of the private ones' shape, got {shapes}")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.private.shape[1:])

    def inputs(self, images: Tensor) -> Tensor:
        """Images as the client half takes them."""
        low, high = self.scale
        return images * (high - low) + low

    def send(self, images: Tensor, name: str = "private") -> Tensor:
        """The activations [N, *cut] of images as a server has them: of the half in eval mode, through the codec."""
        half = self.half.eval()
        parts = []
        with torch.no_grad():
            for step, part in enumerate(images.split(256)):
                codec = get_transfer(self.codec).codec
                activations = self.noise(half(self.inputs(part)), generator(self.seed, "noise", name, step))
                encoded = codec.encode(activations, derive(self.seed, "attack", name, step))
                parts.append(codec.decode(encoded))
        return torch.cat(parts)


class Attack(Protocol):
    """An attack: from a target to its private images, as far as they can be had.

    Attributes:
        knows: what the attacker must have, in a few words.
    """

    knows: ClassVar[str]

    def __call__(self, target: Target) -> Tensor:
        """Reconstructions of the private images, float32 [N, C, H, W] with values from 0 to 1."""
        ...


def mean_image(target: Target) -> Tensor:
    """The yardstick: the mean of the public images for every private one, which takes no attack at all."""
    return target.public.mean(0, keepdim=True).expand_as(target.private).clone()
