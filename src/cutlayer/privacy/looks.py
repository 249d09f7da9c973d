"""Several looks at one image: a server is sent a sample in several epochs, each time cropped and mirrored anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def aligned(reference: Tensor, images: Tensor, shift: int = 4) -> Tensor:
    """Images [N, C, H, W] shifted and mirrored as they are most like the reference [N, C, H, W], each by itself.

    Args:
        shift: pixels up, down, left and right that are tried, with and without a mirror; what a shift leaves open is
            filled with the reference's pixels.
    """
    best, found = images.new_full((len(images),), torch.inf), images.clone()
    height, width = images.shape[-2:]
    known = pad(torch.ones_like(images[:, :1]), (shift,) * 4)
    for mirrored in (images, images.flip(-1)):
        padded = pad(mirrored, (shift,) * 4)
        for top in range(2 * shift + 1):
            for left in range(2 * shift + 1):
                window = (..., slice(top, top + height), slice(left, left + width))
                moved = torch.where(known[window] > 0, padded[window], reference)
                overlap = known[window].flatten(1).mean(1)
                distance = (moved - reference).square().flatten(1).mean(1) / overlap
                better = distance < best
                best = torch.where(better, distance, best)
                found[better] = moved[better]
    return found


def combined(reconstructions: Sequence[Tensor], shift: int = 4) -> Tensor:
    """The mean of reconstructions [N, C, H, W] of several looks, each aligned to the first."""
    first, *others = reconstructions
    return torch.stack([first, *(aligned(first, images, shift) for images in others)]).mean(0)
