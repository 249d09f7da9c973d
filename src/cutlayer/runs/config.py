"""A run's choices as one value: what recipes return, the command line overrides and config.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from cutlayer.codecs import get_transfer
from cutlayer.data.datasets import DATASETS, load, outline
from cutlayer.data.images import Images
from cutlayer.data.partition import Partition, make_partition
from cutlayer.errors import ConfigError, unknown
from cutlayer.method import Method, Training
from cutlayer.models.auxiliary import SelfTraining, auxiliary_head
from cutlayer.models.bound import bound
from cutlayer.models.cut import Halves, split
from cutlayer.models.efficientnet_lite import load_pretrained
from cutlayer.models.flops import FlopTable
from cutlayer.models.narrow import narrowed
from cutlayer.models.networks import MODELS, make_model
from cutlayer.models.padded import padded
from cutlayer.privacy.defence import Defence
from cutlayer.regularize import Regularize
from cutlayer.runs.client_half import ClientHalf, LocalLoss
from cutlayer.runs.config_json import decode, encode
from cutlayer.schedule import Always, Budget
from cutlayer.seeds import seeded


@dataclass(frozen=True)
class DataConfig:
    """Data, by name.

    Attributes:
        name: one of `DATASETS`.
        folder: with the data set's files; by default the environment variable CUTLAYER_DATA, or ./data.
        train_samples, test_samples: train and evaluate on the first so many only; None for all.
    """

    name: str = "digits"
    folder: str | None = None
    train_samples: int | None = None
    test_samples: int | None = None

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ConfigError(unknown("data set", self.name, DATASETS))

    def load(self) -> tuple[Images, Images]:
        """Training and test data."""
        train, test = load(self.name, self.folder)
        return train.first(self.train_samples), test.first(self.test_samples)

    def outline(self) -> Images:
        """The data set without its samples, which is enough to build a network."""
        return outline(self.name)


@dataclass(frozen=True)
class ModelConfig:
    """A network, by name.

    Attributes:
        name: one of `MODELS`.
        width: what its channels are multiplied with.
        client_width: of a VGG, the same of the layers up to the cut, so that devices have a wide half in front of a
            narrow one; None for `width`.
        cut: name of the layer to cut after; a wrong name lists the possible ones.
        narrow: by how much fewer channels cross the cut than the network has there; see `models.narrow`.
        padding: pixels that the client pads its images with, for the server to crop; see `models.padded`.
        bind: samples whose activations cross the cut as one; see `models.bound`.
        pretrained: whether the network begins with weights from ImageNet, all but the head; efficientnet_lite0 alone
            has some.
    """

    name: str = "cnn"
    width: float = 1.0
    cut: str = "layer3"
    client_width: float | None = None
    narrow: int = 1
    padding: int = 0
    bind: int = 1
    pretrained: bool = False

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise ConfigError(unknown("model", self.name, MODELS))
        if self.pretrained and self.name != "efficientnet_lite0":
            raise ConfigError(f"pretrained: expected the model efficientnet_lite0, got {self.name}")
        if self.client_width is not None and not (self.name.startswith("vgg") and self.cut.startswith("layer")):
            raise ConfigError(f"client_width: expected a VGG that is cut after a layer, got {self.name}, {self.cut}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, as one value.

    Attributes:
        data: the data set.
        model: the network, and where it is cut.
        method: when to communicate and in what form, as for `fit`.
        training: how the halves are trained, as for `fit`.
        clients: clients that the training data are divided among. The first one holds the test data.
        partition: who has what: "iid", "dirichlet:ALPHA", "shards:N", "quantity:ALPHA" or a file; see
            docs/partitions.md.
        threads: PyTorch's threads on the CPU; part of what fixes a result to the bit. None leaves them alone.
        client_half: how the client half is trained if not by the server's gradients: before the run, and then frozen in
            it, such as `LocalHead()`, or all through it, `LocalLoss()`; for one client.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Method = field(default_factory=Method)
    training: Training = field(default_factory=Training)
    clients: int = 1
    partition: str = "iid"
    threads: int | None = None
    client_half: ClientHalf | None = None

    def __post_init__(self) -> None:
        for name in ("clients", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.client_half is not None and self.clients > 1:
            raise ConfigError(f"client_half {self.client_half}: expected one client, got {self.clients}")
        alone = not self.model.padding and self.model.bind == 1 and not isinstance(self.method.schedule, Budget)
        defence = self.method.defence
        trains_with_it = defence.nopeek or defence.adversary or defence.watch
        if isinstance(self.client_half, LocalLoss) and (not alone or trains_with_it):
            raise ConfigError(
                "client_half LocalLoss: expected no padding, bind, budget, nopeek, adversary or watch, got "
                f"{self.model}, {self.method}"
            )
        if self.model.bind != 1:
            self._check_bound()

    def _check_bound(self) -> None:
        """What is bound is taken apart batch by batch, as it was sent."""
        method, training = self.method, self.training
        smoothing = Regularize(label_smoothing=training.regularize.label_smoothing)
        wrong = {
            "a schedule other than always": not isinstance(method.schedule, Always),
            "several clients": self.clients > 1,
            "delta>": get_transfer(method.activations).delta is not None,
            "ef>": get_transfer(method.gradients).feedback,
            "padding": bool(self.model.padding),
            # A sample is in all rows that cross, so what is clipped or noisy there is not one sample's.
            "a defence": method.defence != Defence(),
            "regularize at the cut": training.regularize != smoothing,
            f"batch_size {training.batch_size}, which is no multiple of it": training.batch_size % self.model.bind != 0,
        }
        if found := [name for name, there in wrong.items() if there]:
            raise ConfigError(f"bind {self.model.bind} cannot be combined with {', '.join(found)}")

    def datasets(self) -> tuple[Images, Images]:
        """Training and test data."""
        return self.data.load()

    def divided(self, train: Images) -> tuple[list[Dataset], Partition | None]:
        """Each client's training data, and the partition that divides them; None for one client."""
        if self.clients == 1 and self.partition == "iid":
            return [train], None
        if self.clients == 1:
            raise ConfigError(f"partition {self.partition!r} is for several clients; give their number (clients)")
        partition = make_partition(self.partition, train.labels, self.clients, self.training.seed, self.data.name)
        return [partition.subset(train, client) for client in range(self.clients)], partition

    def network(self, train: Images) -> torch.nn.Module:
        """The uncut network with its initial weights, which follow from the seed."""
        shape, model = train.inputs.shape[1:], self.model
        with seeded(self.training.seed, "model"):
            start = None if model.client_width is None else (model.cut, model.client_width)
            network = make_model(model.name, shape, train.mean, train.std, train.classes, model.width, start)
        if model.pretrained:
            load_pretrained(network)
        return network

    def halves(self, train: Images) -> Halves:
        """The network in two."""
        return self.at_cut(split(self.network(train), self.model.cut), train)

    def at_cut(self, halves: Halves, train: Images) -> Halves:
        """Halves of the network with what the model has at its cut. Raises ConfigError if that cut does not take it."""
        model = self.model
        sample = torch.zeros((2, *train.inputs.shape[1:]), dtype=train.inputs.dtype)
        if model.narrow != 1:
            with seeded(self.training.seed, "narrow"):
                halves = narrowed(halves, sample, model.narrow)
        if model.bind != 1:
            with seeded(self.training.seed, "bind"):
                halves = bound(halves, sample, model.bind)
        if isinstance(self.client_half, LocalLoss):
            with seeded(self.training.seed, "local head"):
                halves = self._self_training(halves, sample, train.classes, self.client_half)
        return padded(halves, sample, model.padding) if model.padding else halves

    @staticmethod
    def _self_training(halves: Halves, sample: torch.Tensor, classes: int, chosen: LocalLoss) -> Halves:
        shape = FlopTable(halves.client, tuple(sample.shape[1:]), sample.dtype).output_shape
        head = auxiliary_head(shape, classes, chosen.channels)
        return Halves(SelfTraining(halves.client, head, chosen.every), halves.server)

    def as_dict(self) -> dict[str, Any]:
        """The config as JSON values. Raises ConfigError for a part of the user's own, which could not be read again."""
        return encode(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RunConfig:
        """Inverse of `as_dict`; what is left out has its default. Raises ConfigError for what is unknown or wrong."""
        return decode(dict(values), RunConfig)
