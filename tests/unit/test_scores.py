"""Scores of reconstructions, held against scikit-image and against definitions."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cutlayer import ConfigError
from cutlayer.privacy import Spread, distance_correlation, mse, psnr, ssim
from cutlayer.privacy.scores import recognized


def images(count: int, channels: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    originals = torch.rand(count, channels, side, side, generator=draw)
    noise = torch.randn(originals.shape, generator=draw)
    strength = torch.linspace(0.02, 0.5, count).reshape(-1, 1, 1, 1)
    return originals, (originals + strength * noise).clamp(0, 1)


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (1, 12)])
def test_ssim_of_large_images_is_that_of_scikit_image(channels: int, side: int) -> None:
    originals, others = images(4, channels, side)
    usual = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(a.double().numpy(), b.double().numpy(), data_range=1.0, channel_axis=0, **usual)
        for a, b in zip(originals, others, strict=True)
    ]
    np.testing.assert_allclose(ssim(originals, others).numpy(), expected, rtol=1e-4)


def test_ssim_of_small_images_is_that_of_scikit_image() -> None:
    originals, others = images(4, 1, 8)
    expected = [
        structural_similarity(a.double().numpy(), b.double().numpy(), data_range=1.0, channel_axis=0)
        for a, b in zip(originals, others, strict=True)
    ]
    np.testing.assert_allclose(ssim(originals, others).numpy(), expected, rtol=1e-4)


def test_psnr_and_mse_are_those_of_scikit_image() -> None:
    originals, others = images(4, 3, 16)
    pairs = list(zip(originals.numpy(), others.numpy(), strict=True))
    np.testing.assert_allclose(
        psnr(originals, others).numpy(), [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs], rtol=1e-5
    )
    np.testing.assert_allclose(mse(originals, others).numpy(), [((a - b) ** 2).mean() for a, b in pairs], rtol=1e-5)


def test_a_copy_is_perfect() -> None:
    originals, _ = images(3, 1, 8)
    assert torch.equal(mse(originals, originals), torch.zeros(3))
    assert torch.isinf(psnr(originals, originals)).all()
    torch.testing.assert_close(ssim(originals, originals), torch.ones(3))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"of one shape \[N, C, H, W\], got \[2, 1, 8, 8\] and \[2, 1, 4, 4\]"):
        mse(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4))


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Szekely, Rizzo and Bakirov 2007, definition 3, in loops."""
    count = len(x)

    def centred(values: np.ndarray) -> np.ndarray:
        distances = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in values] for a in values])
        return distances - distances.mean(0)[None] - distances.mean(1)[:, None] + distances.mean()

    a, b = centred(x), centred(y)
    return float(np.sqrt((a * b).sum() / count**2 / np.sqrt((a**2).sum() * (b**2).sum() / count**4)))


def test_distance_correlation_is_as_defined() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 3))
    for y in (draw.normal(size=(40, 5)), x[:, :2] ** 2, x @ draw.normal(size=(3, 4))):
        got = distance_correlation(torch.tensor(x), torch.tensor(y)).item()
        assert got == pytest.approx(by_definition(x, y), rel=1e-3)


def test_distance_correlation_of_a_line_is_one_and_falls_for_independent_samples() -> None:
    x, y = torch.randn(300, 1), torch.randn(300, 1)
    assert distance_correlation(x, 3 * x - 1).item() == pytest.approx(1, abs=1e-3)
    assert distance_correlation(x, y).item() < 0.2


def test_distance_correlation_has_finite_gradients_for_samples_that_are_equal() -> None:
    x, z = torch.ones(4, 2), torch.zeros(4, 3, requires_grad=True)
    distance_correlation(x, z).backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_recognized_is_what_the_network_says_of_the_reconstructions() -> None:
    outputs = torch.eye(3)
    right = recognized(lambda inputs: outputs[inputs.long()], torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
    assert right.tolist() == [1, 1, 0, 1]


def test_spread_is_mean_and_sample_standard_deviation() -> None:
    spread = Spread.of(torch.tensor([1.0, 2.0, 6.0]))
    assert (spread.mean, spread.count) == (3, 3)
    assert spread.std == pytest.approx(np.std([1, 2, 6], ddof=1))
