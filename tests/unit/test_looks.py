"""Several looks at an image are one better look, if noise is what spoils each."""

import torch

from cutlayer.privacy import mse
from cutlayer.privacy.looks import aligned, combined


def pictures(count: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    rough = torch.rand(count, 3, 4, 4, generator=draw)
    return torch.nn.functional.interpolate(rough, size=(16, 16), mode="bilinear")


def moved(images: torch.Tensor, down: int, right: int, flip: bool) -> torch.Tensor:
    images = torch.roll(images, (down, right), (-2, -1))
    return images.flip(-1) if flip else images


def test_shifts_and_mirrors_are_undone() -> None:
    images = pictures()
    inner = (..., slice(3, 13), slice(3, 13))
    for down, right, flip in ((2, -1, False), (0, 3, True), (-3, 0, True)):
        found = aligned(images, moved(images, down, right, flip), shift=4)
        torch.testing.assert_close(found[inner], images[inner])


def test_averaging_helps_against_noise_and_not_against_what_is_always_missing() -> None:
    images = pictures()
    looks = [(images + 0.2 * torch.randn(images.shape)).clamp(0, 1) for _ in range(6)]
    single, together = (mse(images, each).mean() for each in (looks[0], combined(looks, shift=0)))
    assert together < 0.35 * single
    blurred = images.mean((-2, -1), keepdim=True).expand_as(images)
    torch.testing.assert_close(combined([blurred] * 6, shift=1), blurred)
