"""Padded views: the client sends the features of a padded image once, the server cuts all crops out of them.

The usual augmentation of small images is a crop of the padded image. A crop of its feature map, moved by whole
features, is what the client half makes of the crop of the image, but for the borders. So one exchange brings as many
views as there are places: with 4 pixels of padding and a stride of 4, nine.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cutlayer.errors import ConfigError
from cutlayer.models.cut import Halves


class Pad(nn.Module):
    """Images [B, C, H, W] with this many pixels of 0 on each side."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        """Pad a batch."""
        return pad(images, (self.pixels,) * 4)


class Crop(nn.Module):
    """A window [B, C, height, width] of feature maps: in training drawn for each sample, otherwise the middle."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, maps: Tensor) -> Tensor:
        """Crop a batch, by PyTorch's generator."""
        free = maps.shape[-2] - self.height, maps.shape[-1] - self.width
        if not self.training:
            top, left = free[0] // 2, free[1] // 2
            return maps[..., top : top + self.height, left : left + self.width]
        count, device = len(maps), maps.device
        tops, lefts = (torch.randint(most + 1, (count, 1)).to(device) for most in free)
        rows = tops + torch.arange(self.height, device=device)
        columns = lefts + torch.arange(self.width, device=device)
        sample = torch.arange(count, device=device)[:, None, None]
        crop = maps.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        return crop.permute(0, 3, 1, 2).contiguous()


def padded(halves: Halves, sample: Tensor, pixels: int) -> Halves:
    """Halves of which the client pads its images, and the server crops what comes.

    Training and evaluation alike send features of padded images; in evaluation the server takes the middle.

    Args:
        halves: whose cut crosses feature maps.
        sample: images [B, C, H, W] as the client half takes them.
        pixels: of padding on each side, a multiple of the client half's stride.
    """
    usual, larger = (_shape(halves.client, images) for images in (sample, pad(sample, (pixels,) * 4)))
    growth = [more - less for less, more in zip(usual[1:], larger[1:], strict=True)]
    if len(usual) != 3 or min(growth) < 2 or any(more % 2 for more in growth):
        raise ConfigError(
            f"padding: expected pixels that make the feature maps larger on each side alike, a multiple of the client "
            f"half's stride; with {pixels} they grow from {list(usual)} to {list(larger)}"
        )
    client = nn.Sequential(OrderedDict(pad=Pad(pixels), layers=halves.client))
    return Halves(client, nn.Sequential(OrderedDict(crop=Crop(*usual[1:]), layers=halves.server)))


def _shape(half: nn.Module, inputs: Tensor) -> tuple[int, ...]:
    training = half.training
    with torch.no_grad():
        shape = tuple(half.eval()(inputs).shape[1:])
    half.train(training)
    return shape
