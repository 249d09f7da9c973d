"""A client half that trains by itself, with an auxiliary head on top for a local loss."""

from __future__ import annotations

from torch import Tensor, nn

from cutlayer.errors import ConfigError


class SelfTraining(nn.Module):
    """A half, and the head that a client trains it with. What it computes is what the half does.

    Args:
        layers: the half.
        head: from the activations at the cut to outputs; it stays on the client.
        every: of so many batches that it trains on, the first is sent.
    """

    def __init__(self, layers: nn.Module, head: nn.Module, every: int) -> None:
        super().__init__()
        self.layers, self.head, self.every = layers, head, every

    def forward(self, inputs: Tensor) -> Tensor:
        """The activations at the cut."""
        return self.layers(inputs)


def auxiliary_head(shape: tuple[int, ...], classes: int, channels: int = 0) -> nn.Sequential:
    """Convolution, batch norm, global average pooling and a linear layer, for feature maps of this shape.

    Args:
        channels: of the convolution; 0 for as many as the feature maps have.
    """
    if len(shape) != 3:
        raise ConfigError(f"local head: expected images [C, H, W] at the cut, got {list(shape)}")
    inside = channels or shape[0]
    return nn.Sequential(
        nn.Conv2d(shape[0], inside, 3, padding=1, bias=False),
        nn.BatchNorm2d(inside),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inside, classes),
    )
