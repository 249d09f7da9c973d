"""Small networks and data, and what holds two of them against each other."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Halves, Optimizer, Training
from cutlayer.data.images import Images

SGD = Optimizer(lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="constant")
SIZES = (24, 16, 8)


def halves(norm: bool = False) -> Halves:
    torch.manual_seed(0)
    client = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh())
    return Halves(client, nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))


def data(sizes: tuple[int, ...] = SIZES) -> list[TensorDataset]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(sizes), 6, generator=draw)
    labels = (inputs[:, :3] + 0.1 * torch.randn(sum(sizes), 3, generator=draw)).argmax(1)
    return [TensorDataset(*part) for part in zip(inputs.split(sizes), labels.split(sizes), strict=True)]


def training(epochs: int = 2, batch_size: int = 8, **more: object) -> Training:
    return Training(epochs=epochs, batch_size=batch_size, client=SGD, server=SGD, shuffle=False, **more)


def close(got: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    for name, value in got.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-6)


def equal(got: nn.Module, expected: nn.Module) -> bool:
    state = expected.state_dict()
    return all(torch.equal(value, state[name]) for name, value in got.state_dict().items())


def noise_images(count: int = 96, size: int = 32, channels: int = 3, seed: int = 0) -> Images:
    """Random images of random classes: enough to compare two computations."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 256, (count, channels, size, size), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=draw)
    return Images(inputs, labels, (0.5,) * channels, (0.25,) * channels)
