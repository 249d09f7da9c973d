"""Halves and digits to attack."""

import functools

import torch
from torch import nn

from cutlayer import run_experiment, with_choices
from cutlayer.data.datasets import digits
from cutlayer.privacy import Target
from cutlayer.runs.recipes import digits as recipe

SHALLOW, DEEP = "layer1", "pool"


@functools.cache
def trained(cut: str, epochs: int = 3, images: int = 48) -> Target:
    """The small CNN, trained on the digits for a moment; the attacker has the test images."""
    config = with_choices(recipe(), cut=cut, epochs=epochs, schedule="always", codec="fp32", threads=1)
    halves = run_experiment(config, progress=False).halves
    train, test = config.datasets()
    private, public = train.inputs[:images].float() / 255, test.inputs.float() / 255
    return Target(halves.client, halves.server, private, train.labels[:images], public, test.labels)


def untrained(half: nn.Module, images: int = 48) -> Target:
    """A half as it is, on digits with pixels from 0 to 1."""
    train, test = digits()
    with torch.no_grad():
        size = half.eval()(torch.zeros(1, 1, 8, 8)).numel()
    server = nn.Sequential(nn.Flatten(), nn.Linear(size, 10))
    private, public = train.inputs[:images].float() / 255, test.inputs.float() / 255
    return Target(half, server, private, train.labels[:images], public, test.labels, scale=(0.0, 1.0))


def convolutions(count: int) -> nn.Module:
    """So many layers of 3x3 convolution and ReLU, and after two or more a max-pool."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for number in range(count):
        layers += [nn.Conv2d(16 if number else 1, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if count > 1 else []))
