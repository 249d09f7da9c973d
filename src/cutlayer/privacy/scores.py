"""How good a reconstruction is, image by image, and what the activations say of the inputs as a whole.

Images are float [N, C, H, W] with values from 0 to 1. SSIM is that of Wang, Bovik, Sheikh and Simoncelli (2004);
distance correlation that of Szekely, Rizzo and Bakirov (2007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from cutlayer.errors import ConfigError

GAUSSIAN_WINDOW, GAUSSIAN_SIGMA, UNIFORM_WINDOW = 11, 1.5, 7


@dataclass(frozen=True)
class Spread:
    """A figure of many images: its mean, its sample standard deviation and how many there are."""

    mean: float
    std: float
    count: int

    @staticmethod
    def of(values: Tensor) -> Spread:
        """Of one value for each image, [N]."""
        values = values.double()
        std = values.std().item() if len(values) > 1 else 0.0
        return Spread(values.mean().item(), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.std:.2g}"


def mse(originals: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each image, [N]; 0 is a perfect copy."""
    _check(originals, images)
    return (originals - images).square().flatten(1).mean(1)


def psnr(originals: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, [N], for values from 0 to 1; a perfect copy has infinity."""
    return -10 * mse(originals, images).log10()


def ssim(originals: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, [N], 1 for a perfect copy.

    The window is a Gaussian of 11x11 with sigma 1.5 as published; for images smaller than that it is uniform, of 7x7 or
    the largest odd size that fits. Means are over channels and over the places where the window fits.
    """
    return _ssim_map(originals, images).flatten(1).mean(1)


def distance_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Distance correlation of two variables of the same samples, a scalar from 0 to 1; gradients flow through it.

    0 says (of many samples) that they are independent. It is the biased estimate, which is above 0 for few samples.

    Args:
        first, second: [N, ...], at least two samples.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ConfigError(
            f"distance correlation: expected two or more samples of both, got {len(first)}, {len(second)}"
        )
    a, b = _centred_distances(first), _centred_distances(second)
    covariance, variances = (a * b).mean(), (a.square().mean() * b.square().mean() + 1e-24).sqrt()
    return (covariance.clamp(min=0) / variances.clamp(min=1e-12) + 1e-12).sqrt()


def label_accuracy(labels: Tensor, guesses: Tensor) -> Tensor:
    """Which guesses are right, float [N]."""
    return (labels == guesses).float()


def recognized(network: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """Which reconstructions the task's own network gives the label of the original, float [N].

    Args:
        network: from inputs [N, ...] to outputs [N, classes], such as the uncut network.
        inputs: the reconstructions, as the network takes them.
    """
    if isinstance(network, nn.Module):
        network = network.eval()
    with torch.no_grad():
        outputs = torch.cat([network(part) for part in inputs.split(256)])
    return label_accuracy(labels, outputs.argmax(1))


def image_scores(originals: Tensor, images: Tensor) -> dict[str, Tensor]:
    """MSE, PSNR and SSIM of each image, by name."""
    return {"mse": mse(originals, images), "psnr": psnr(originals, images), "ssim": ssim(originals, images)}


def _ssim_map(originals: Tensor, images: Tensor) -> Tensor:
    _check(originals, images)
    kernel = _window(min(originals.shape[-2:])).to(originals)
    channels = originals.shape[1]
    kernel = kernel.expand(channels, 1, *kernel.shape)

    def mean(values: Tensor) -> Tensor:
        return conv2d(values, kernel, groups=channels)

    mean_x, mean_y = mean(originals), mean(images)
    # A uniform window takes the sample covariance, as scikit-image does; a Gaussian one the weighted one, as published.
    size = kernel.shape[-1]
    unbiased = 1.0 if size == GAUSSIAN_WINDOW else size**2 / (size**2 - 1)
    var_x = unbiased * (mean(originals * originals) - mean_x * mean_x)
    var_y = unbiased * (mean(images * images) - mean_y * mean_y)
    both = unbiased * (mean(originals * images) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return top / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))


def _window(side: int) -> Tensor:
    if side >= GAUSSIAN_WINDOW:
        offsets = torch.arange(GAUSSIAN_WINDOW, dtype=torch.float64) - GAUSSIAN_WINDOW // 2
        weights = torch.exp(-offsets.square() / (2 * GAUSSIAN_SIGMA**2))
        weights /= weights.sum()
        return torch.outer(weights, weights).float()
    size = min(UNIFORM_WINDOW, side - 1 + side % 2)
    if size < 3:
        raise ConfigError(f"SSIM: expected images of at least 3x3 pixels, got a side of {side}")
    return torch.full((size, size), 1 / size**2)


def _centred_distances(values: Tensor) -> Tensor:
    flat = values.flatten(1).float()
    # By differences and not by products, which are not exact if two samples are alike.
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True) + distances.mean()


def _check(originals: Tensor, images: Tensor) -> None:
    if originals.shape != images.shape or originals.ndim != 4:
        raise ConfigError(
            f"expected originals and reconstructions of one shape [N, C, H, W], got {list(originals.shape)} and "
            f"{list(images.shape)}"
        )
