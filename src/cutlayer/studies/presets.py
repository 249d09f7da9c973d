"""The sizes in which studies are carried out. Results of two presets are never in one file or one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cutlayer.data.augment import CropFlip
from cutlayer.method import Training
from cutlayer.models.optim import Optimizer
from cutlayer.runs.config import DataConfig, ModelConfig


@dataclass(frozen=True, eq=False)
class Preset:
    """A size of a study.

    Attributes:
        about: what it is, and what it costs.
        networks: by the name that rows have for them; rows of others are left out.
        training: of VGG; other networks have `optimizers` of their own, for both halves.
        images: of training.
        image_bytes: of one of them as it is.
        seeds: most runs of a row.
        jobs: runs side by side, if nothing else is asked for.
    """

    name: str
    about: str
    data: DataConfig
    networks: Mapping[str, ModelConfig]
    training: Training
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)
    images: int = 50_000
    image_bytes: int = 3 * 32 * 32
    seeds: int = 1
    jobs: int = 1

    def training_of(self, network: str, seed: int) -> Training:
        """How this network is trained."""
        training = replace(self.training, seed=seed)
        own = self.optimizers.get(network)
        return training if own is None else replace(training, client=own, server=own)


def _cut_for_cifar(width: float) -> dict[str, ModelConfig]:
    """The paper's networks, cut where the recipes of `runs.recipes` cut them."""
    cuts = {"vgg11": "layer4", "vgg13": "layer6", "resnet18": "layer1"}
    return {name: ModelConfig(name, width, cut) for name, cut in cuts.items()}


CIFAR10 = DataConfig("cifar10")
FAST = Training(epochs=200, augment=CropFlip(), precision="bf16", channels_last=True, evaluate_every=5)
RESNET = {"resnet18": Optimizer(lr=0.1)}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "smoke",
            "a small CNN on 512 of the digits, 20 epochs, one seed: seconds a run; shows that everything works",
            DataConfig("digits", train_samples=512, test_samples=256),
            {"vgg11": ModelConfig("cnn", 0.5, "layer3")},
            Training(epochs=20, batch_size=64, evaluate_every=5),
            images=512,
            image_bytes=8 * 8,
        ),
        Preset(
            "cpu60",
            "width 1/4, all of CIFAR-10, 60 epochs, bf16: half an hour or so of one core a run; for finding out",
            CIFAR10,
            _cut_for_cifar(0.25),
            replace(FAST, epochs=60),
            RESNET,
            seeds=3,
        ),
        Preset(
            "cpu",
            "width 1/4, all of CIFAR-10, 200 epochs, bf16: an hour or two of one core a run",
            CIFAR10,
            _cut_for_cifar(0.25),
            FAST,
            RESNET,
            seeds=3,
        ),
        Preset(
            "full",
            "full width, all of CIFAR-10, 200 epochs, bf16, on one CUDA device",
            CIFAR10,
            _cut_for_cifar(1.0),
            FAST,
            RESNET,
            seeds=3,
            jobs=4,
        ),
    )
}
"""By name. The runs of `full` are on the device "cuda", unless `Plan` is told otherwise."""
