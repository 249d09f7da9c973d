"""The networks: VGG11, VGG13, ResNet18 and EfficientNet-Lite0 for 32x32 input, and a small CNN for digits.

All take raw uint8 images and normalize them in their first layer. VGG layers are named `layer1`, `layer2`, ... counting
convolutions and max-pools alike, as publications on split learning count cut layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError, unknown
from cutlayer.models.efficientnet_lite import efficientnet_lite0


class Normalize(nn.Module):
    """uint8 [B, C, H, W] to float32 with the given mean and standard deviation of each channel (of values in 0..1)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).mul(255).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).mul(255).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalize a batch."""
        return (images.float() - self.mean) / self.std


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution of 3x3, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


# Simonyan and Zisserman 2015, table 1, columns A and B; a number is a convolution's channels, M a 2x2 max-pool.
VGG_LAYERS: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
}


def vgg(
    name: str,
    mean: Sequence[float],
    std: Sequence[float],
    classes: int = 10,
    width: float = 1.0,
    start: tuple[str, float] | None = None,
) -> nn.Module:
    """VGG with batch norm for 32x32 input and a single linear layer as head.

    Args:
        start: a layer's name, and the width of all layers up to it.
    """
    last, start_width = start or ("layer0", width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize(mean, std))
    channels = len(mean)
    for number, layer in enumerate(VGG_LAYERS[name], start=1):
        if isinstance(layer, str):
            layers[f"layer{number}"] = nn.MaxPool2d(2)
        else:
            outputs = _scaled(layer, start_width if number <= int(last.removeprefix("layer")) else width)
            layers[f"layer{number}"] = conv_block(channels, outputs)
            channels = outputs
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Shape [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet18(mean: Sequence[float], std: Sequence[float], classes: int = 10, width: float = 1.0) -> nn.Module:
    """ResNet18 with the 3x3 stem that is usual for 32x32 input."""
    channels = _scaled(64, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize(mean, std), stem=conv_block(len(mean), channels)
    )
    for number, base in enumerate((64, 128, 256, 512), start=1):
        outputs = _scaled(base, width)
        layers[f"layer{number}"] = nn.Sequential(
            BasicBlock(channels, outputs, 1 if number == 1 else 2), BasicBlock(outputs, outputs, 1)
        )
        channels = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


def cnn(mean: Sequence[float], std: Sequence[float], classes: int = 10, width: float = 1.0) -> nn.Module:
    """A small CNN for the 8x8 digits that takes any image size: three convolutions, one max-pool."""
    narrow, wide = _scaled(16, width), _scaled(32, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalize=Normalize(mean, std),
        layer1=conv_block(len(mean), narrow),
        layer2=conv_block(narrow, narrow),
        layer3=nn.MaxPool2d(2),
        layer4=conv_block(narrow, wide),
        layer5=conv_block(wide, wide),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(wide, classes),
    )
    return nn.Sequential(layers)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "vgg11": partial(vgg, "vgg11"),
    "vgg13": partial(vgg, "vgg13"),
    "resnet18": resnet18,
    "efficientnet_lite0": efficientnet_lite0,
}


def make_model(
    name: str,
    image: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    classes: int = 10,
    width: float = 1.0,
    start: tuple[str, float] | None = None,
) -> nn.Module:
    """The network of this name for images of shape (C, H, W). Raises ConfigError with the known names.

    Args:
        start: of a VGG, the name of a layer, and the width of all layers up to it.
    """
    if name not in MODELS:
        raise ConfigError(unknown("model", name, MODELS))
    for what, value in (("width", width), ("client_width", start[1] if start else width)):
        if not value > 0:
            raise ConfigError(f"{what} must be above 0, got {value}")
    if name.startswith("vgg") and tuple(image[1:]) != (32, 32):
        raise ConfigError(f"{name} is built for 32x32 images, these are {image[1]}x{image[2]}; use the model 'cnn'")
    more = {"start": start} if start else {}
    return MODELS[name](mean=mean, std=std, classes=classes, width=width, **more)
