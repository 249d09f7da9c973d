"""Recipes: functions that return the config of a run, for the command line to pick and override."""

from __future__ import annotations

from collections.abc import Callable

from cutlayer.models.optim import Optimizer
from cutlayer.runs.config import Config


def digits() -> Config:
    """Small CNN on scikit-learn's digits, which need no download: a run of seconds, for a first look."""
    return Config(threshold=0.05)


def fashion_mnist() -> Config:
    """The small CNN, twice as wide, on Fashion-MNIST."""
    return Config(data="fashion_mnist", width=2.0, batch_size=128, epochs=30)


def cifar10_small() -> Config:
    """A quarter-width VGG11 on 10,000 images of CIFAR-10: a quarter of an hour on one core."""
    return Config(
        data="cifar10",
        train_samples=10_000,
        model="vgg11",
        width=0.25,
        cut="layer4",
        batch_size=128,
        epochs=60,
        augment=True,
    )


def sips2021_vgg11() -> Config:
    """VGG11 on CIFAR-10 in the usual set-up of the authors' lab: 200 epochs, batch 128, cut at layer 4."""
    return Config(data="cifar10", model="vgg11", cut="layer4", batch_size=128, epochs=200, augment=True)


def sips2021_vgg13() -> Config:
    """VGG13 on CIFAR-10, as `sips2021_vgg11`, cut after the second max-pool."""
    return Config(data="cifar10", model="vgg13", cut="layer6", batch_size=128, epochs=200, augment=True)


def sips2021_resnet18() -> Config:
    """ResNet18 on CIFAR-10, as `sips2021_vgg11`, cut after the first group of blocks."""
    return Config(
        data="cifar10",
        model="resnet18",
        cut="layer1",
        batch_size=128,
        epochs=200,
        augment=True,
        client=Optimizer(lr=0.1),
        server=Optimizer(lr=0.1),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (digits, fashion_mnist, cifar10_small, sips2021_vgg11, sips2021_vgg13, sips2021_resnet18)
}
