"""Recipes: functions that return the config of a run, for the command line to pick and override."""

from __future__ import annotations

from collections.abc import Callable

from cutlayer.data.augment import CropFlip
from cutlayer.method import Method, Training
from cutlayer.models.optim import Optimizer
from cutlayer.runs.config import DataConfig, ModelConfig, RunConfig
from cutlayer.schedule import Drop

METHOD = Method.of(Drop(), "fp8")
SIPS2021 = Training(epochs=200, augment=CropFlip())


def digits() -> RunConfig:
    """Small CNN on scikit-learn's digits, which need no download: a run of seconds, for a first look."""
    return RunConfig(method=Method.of(Drop(threshold=0.05), "fp8"), training=Training(batch_size=64))


def fashion_mnist() -> RunConfig:
    """The small CNN, twice as wide, on Fashion-MNIST."""
    return RunConfig(DataConfig("fashion_mnist"), ModelConfig(width=2.0), METHOD, Training(epochs=30))


def cifar10_small() -> RunConfig:
    """A quarter-width VGG11 on 10,000 images of CIFAR-10: a quarter of an hour on one core."""
    return RunConfig(
        DataConfig("cifar10", train_samples=10_000),
        ModelConfig("vgg11", width=0.25, cut="layer4"),
        METHOD,
        Training(epochs=60, augment=CropFlip()),
    )


def sips2021_vgg11() -> RunConfig:
    """VGG11 on CIFAR-10 in the usual set-up of the authors' lab: 200 epochs, batch 128, cut at layer 4."""
    return RunConfig(DataConfig("cifar10"), ModelConfig("vgg11", cut="layer4"), METHOD, SIPS2021)


def sips2021_vgg13() -> RunConfig:
    """VGG13 on CIFAR-10, as `sips2021_vgg11`, cut after the second max-pool."""
    return RunConfig(DataConfig("cifar10"), ModelConfig("vgg13", cut="layer6"), METHOD, SIPS2021)


def sips2021_resnet18() -> RunConfig:
    """ResNet18 on CIFAR-10, as `sips2021_vgg11`, cut after the first group of blocks."""
    sgd = Optimizer(lr=0.1)
    training = Training(epochs=200, augment=CropFlip(), client=sgd, server=sgd)
    return RunConfig(DataConfig("cifar10"), ModelConfig("resnet18", cut="layer1"), METHOD, training)


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (digits, fashion_mnist, cifar10_small, sips2021_vgg11, sips2021_vgg13, sips2021_resnet18)
}
