"""The networks of attackers: from the cut to images, from images to the cut, and critics of either.

They fit any cut: maps [C, H, W], and whatever else is flattened. Images are [C, H, W] with values from 0 to 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from torch import Tensor, nn

from cutlayer.seeds import seeded


def decoder(cut: Sequence[int], image: Sequence[int], width: int = 64, blocks: int = 4, extra: int = 0) -> nn.Module:
    """From activations at the cut to images.

    `blocks` convolutions with batch norm on the scale of the cut, transposed convolutions up to the size of the image,
    and a sigmoid: the decoder that ResSFL (Li et al. 2022, arXiv 2205.04007) attacks with, for 32x32 images of 4 blocks
    and 64 channels.

    Args:
        extra: channels that are added to the activations, such as a map of the label.
    """
    layers, channels, (height, width_) = _to_map(cut, image, width)
    channels += extra
    for _ in range(max(1, blocks)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    while height * 2 <= image[1] and width_ * 2 <= image[2]:
        up = nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1)
        layers += [up, nn.BatchNorm2d(width), nn.ReLU()]
        height, width_ = height * 2, width_ * 2
    if (height, width_) != tuple(image[1:]):
        layers.append(nn.Upsample(size=tuple(image[1:]), mode="bilinear"))
    return nn.Sequential(*layers, nn.Conv2d(width, image[0], 3, padding=1), nn.Sigmoid())


def encoder(image: Sequence[int], cut: Sequence[int], width: int = 64, *, nonnegative: bool = False) -> nn.Module:
    """From images to activations of the shape at the cut; `nonnegative` if the client's are."""
    last: list[nn.Module] = [nn.ReLU()] if nonnegative else []
    layers: list[nn.Module] = [nn.Conv2d(image[0], width, 3, padding=1), nn.ReLU()]
    if len(cut) != 3:
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
        side = math.prod((edge + 1) // 2 for edge in image[1:])
        return nn.Sequential(*layers, nn.Linear(width * side, math.prod(cut)), *last, nn.Unflatten(1, tuple(cut)))
    height = image[1]
    while height >= 2 * cut[1]:
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()]
        height = (height + 1) // 2
    if tuple(image[1:]) != tuple(cut[1:]):
        layers.append(nn.AdaptiveAvgPool2d(tuple(cut[1:])))
    return nn.Sequential(*layers, nn.Conv2d(width, cut[0], 3, padding=1), *last)


def critic(shape: Sequence[int], width: int = 64, extra: int = 0) -> nn.Module:
    """From activations or images to one number each. No batch norm: gradient penalties are of single samples."""
    if len(shape) != 3:
        size = math.prod(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(size, 2 * width), nn.LeakyReLU(0.2), nn.Linear(2 * width, 1))
    layers: list[nn.Module] = [nn.Conv2d(shape[0] + extra, width, 3, padding=1), nn.LeakyReLU(0.2)]
    height, width_ = shape[1:]
    while min(height, width_) > 2:
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        height, width_ = (height + 1) // 2, (width_ + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * width_, 1))


def fresh(network: nn.Module, seed: int, *name: str | int) -> nn.Module:
    """A network of the same architecture with weights of its own: what is known to who knows the architecture alone."""
    made = copy.deepcopy(network)
    with seeded(seed, *name):
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made


def label_map(classes: int, cut: Sequence[int]) -> nn.Module:
    """From labels [N] to a channel [N, 1, H, W] beside activations or images [N, C, H, W]."""
    area = math.prod(cut[1:])
    return nn.Sequential(nn.Embedding(classes, 50), nn.Linear(50, area), nn.Unflatten(1, (1, *cut[1:])))


def _to_map(cut: Sequence[int], image: Sequence[int], width: int) -> tuple[list[nn.Module], int, tuple[int, int]]:
    """Layers that make maps of activations, their channels, and their height and width."""
    if len(cut) == 3 and cut[1] * cut[2] > 1:
        return [], cut[0], (cut[1], cut[2])
    height, width_ = max(1, image[1] // 4), max(1, image[2] // 4)
    size = math.prod(cut)
    linear = nn.Linear(size, width * height * width_)
    return [nn.Flatten(), linear, nn.ReLU(), nn.Unflatten(1, (width, height, width_))], width, (height, width_)


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, a scalar: small for natural images."""
    down, right = images.diff(dim=-2).square().mean(), images.diff(dim=-1).square().mean()
    return down + right
