"""Cuts that are made narrow, and images that are padded for the server to crop their features."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cutlayer import ConfigError, Fixed, Halves, ModelConfig, Run, run_experiment, with_choices
from cutlayer.data.augment import CropFlip
from cutlayer.models.narrow import narrowed
from cutlayer.models.padded import Crop, padded
from cutlayer.runs.recipes import RECIPES, digits

SAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def halves() -> Halves:
    torch.manual_seed(0)
    client = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return Halves(client, nn.Sequential(nn.Flatten(), nn.Linear(512, 4)))


def test_a_crop_of_the_features_is_what_the_client_makes_of_the_crop() -> None:
    """But for the border, where a crop of the image has zeros outside and the features have seen beyond it."""
    plain = halves()
    features = padded(plain, SAMPLE, 4).client(SAMPLE)
    assert features.shape == (2, 8, 12, 12)
    around, inner = nn.functional.pad(SAMPLE, (4,) * 4), (..., slice(1, -1), slice(1, -1))
    for row in range(5):
        for column in range(5):
            window = features[..., row : row + 8, column : column + 8]
            crop = around[..., 2 * row : 2 * row + 16, 2 * column : 2 * column + 16]
            torch.testing.assert_close(window[inner], plain.client(crop)[inner])


def test_crops_are_drawn_for_each_sample_in_training_and_the_middle_is_taken_otherwise() -> None:
    maps = torch.arange(144.0).reshape(1, 1, 12, 12).repeat(400, 1, 1, 1).requires_grad_()
    crop = Crop(8, 8)
    torch.manual_seed(0)
    windows = crop.train()(maps)
    first = windows[:, 0, 0, 0].detach().long()
    tops, lefts = first // 12, first % 12
    for sample in range(0, 400, 40):
        top, left = tops[sample], lefts[sample]
        assert torch.equal(windows[sample], maps[sample, :, top : top + 8, left : left + 8])
    assert len({*zip(tops.tolist(), lefts.tolist(), strict=True)}) == 25
    (gradient,) = torch.autograd.grad(windows[:1].sum(), maps)
    assert gradient[0].sum() == 64
    assert gradient[1:].sum() == 0
    assert torch.equal(crop.eval()(maps)[0], maps[0, :, 2:10, 2:10])


def test_padding_that_is_no_multiple_of_the_stride() -> None:
    with pytest.raises(ConfigError, match=r"a multiple of the client half's stride; with 1 they grow from"):
        padded(halves(), SAMPLE, 1)


def test_a_client_half_of_another_width() -> None:
    config = with_choices(RECIPES["cifar10_small"](), width=0.125, client_width=0.5, cut="layer4")
    halves = config.halves(config.data.outline())
    client, server = halves.client, halves.server
    wide = with_choices(config, width=0.5, client_width=None).halves(config.data.outline())
    assert [weight.shape for weight in client.parameters()] == [weight.shape for weight in wide.client.parameters()]
    assert server.eval()(client.eval()(torch.zeros(2, 3, 32, 32))).shape == (2, 10)
    assert [w.shape[0] for w in server.parameters() if w.dim() == 4] == [32, 32, 64, 64, 64, 64]


@pytest.mark.parametrize("wrong", [{"name": "cnn"}, {"name": "resnet18"}, {"name": "vgg11", "cut": "flatten"}], ids=str)
def test_other_networks_have_one_width(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="client_width: expected a VGG that is cut after a layer"):
        ModelConfig(**wrong, client_width=0.5)


def test_a_narrow_cut_begins_as_a_projection() -> None:
    plain = halves()
    cut = narrowed(plain, SAMPLE, 4)
    few = cut.client(SAMPLE)
    assert few.shape == (2, 2, 8, 8)
    back, features = cut.server[0](few), plain.client(SAMPLE)
    # Of what it has projected it changes nothing more, and it makes nothing longer.
    torch.testing.assert_close(cut.server[0](cut.client.squeeze(back)), back)
    assert back.norm() < features.norm()
    with pytest.raises(ConfigError, match=r"a divisor of their channels, got \[8, 8, 8\] and 3"):
        narrowed(plain, SAMPLE, 3)


def test_with_padding_flips_alone_are_left_to_the_client_in_whatever_order_it_is_asked_for() -> None:
    plain, flips = digits(), CropFlip(padding=0)
    augmented = with_choices(plain, augment=True)
    assert with_choices(augmented, padding=2).training.augment == flips
    assert with_choices(with_choices(plain, padding=2), augment=True).training.augment == flips
    assert with_choices(plain, padding=2).training.augment is None
    assert with_choices(augmented, padding=2, augment=False).training.augment is None
    assert with_choices(with_choices(augmented, padding=2), padding=0).training.augment == CropFlip()
    assert with_choices(augmented, padding=0).training.augment == CropFlip()


def test_a_run_with_both_is_trained_resumed_and_read_again(tmp_path: Path) -> None:
    config = with_choices(digits(), narrow=2, padding=2, epochs=4, train_samples=200, test_samples=60, augment=True)
    assert config.training.augment == CropFlip(padding=0)  # flips alone: the server crops
    config = with_choices(config, schedule="fixed", fixed_exchanges="ABCC", codec="fp32")
    assert config.method.schedule == Fixed(exchanges="ABCC")
    whole = run_experiment(config, tmp_path / "whole")
    sizes = whole.history.epochs[0].bytes["up"]["activations"]
    assert sizes == 200 * 4 * 8 * 6 * 6  # half of 16 channels, and 6 x 6 in place of 4 x 4

    class Interrupted(Exception):  # noqa: N818
        pass

    def interrupt(record) -> None:
        if record.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_experiment(config, tmp_path / "again", on_epoch=interrupt)
    run_experiment(config, tmp_path / "again", resume=True)
    model = Run(tmp_path / "again").model()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert whole.history.merged["accuracy"] == pytest.approx(whole.history.test(), abs=1e-6)
