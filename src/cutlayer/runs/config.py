"""A run's choices as one value: what recipes return, the command line overrides and config.json holds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import torch
from torch.utils.data import Dataset

from cutlayer.codecs import get_pair
from cutlayer.data import images as data
from cutlayer.data.augment import CropFlip
from cutlayer.data.images import Images
from cutlayer.data.partition import Partition, make_partition
from cutlayer.errors import ConfigError, unknown
from cutlayer.fleet import Fleet
from cutlayer.memory.store import StoreOptions
from cutlayer.method import Method, NormInB, Training
from cutlayer.models.cut import Halves, split
from cutlayer.models.networks import make_model
from cutlayer.models.optim import Optimizer
from cutlayer.schedule import make_schedule
from cutlayer.seeds import seeded
from cutlayer.stopping import EarlyStopping
from cutlayer.strategies import make_strategy


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result."""

    data: Literal["digits", "cifar10", "fashion_mnist"] = "digits"
    """Data set."""
    data_dir: str | None = None
    """Folder with the data set's files; by default the environment variable CUTLAYER_DATA, or ./data."""
    train_samples: int | None = None
    """Train on the first so many samples only."""
    test_samples: int | None = None
    """Evaluate on the first so many samples only."""

    model: Literal["cnn", "vgg11", "vgg13", "resnet18"] = "cnn"
    """Network."""
    width: float = 1.0
    """What the network's channels are multiplied with."""
    cut: str = "layer3"
    """Name of the layer to cut after; a wrong name lists the possible ones."""

    schedule: Literal["always", "drift", "drop", "plateau", "periodic", "once"] = "drop"
    """When to communicate: "always" is plain split learning; see docs/schedules.md."""
    threshold: float = 0.01
    """For drift, drop and plateau: the change of the training loss that counts."""
    warmup: int = 1
    """Epochs at the start that exchange both ways, whatever the schedule says (the first always does)."""
    period: int = 10
    """For periodic: epochs in a cycle of A, B, C, C, ..."""
    codec: str = "fp8"
    """Number format in both directions, such as "fp8" (E4M3 up, E5M2 down), "mxfp4+zstd", or UP/DOWN such as
    "delta0.3>mxfp4+zstd/mxfp4:stochastic"; see docs/formats.md."""
    activations: str | None = None
    """Codec of the activations, in place of that of the pair."""
    gradients: str | None = None
    """Codec of the gradients, in place of that of the pair."""
    norm_in_b: NormInB = "calibrated"
    """Mode of the client's batch norm in B epochs; see docs/batch-norm.md."""

    clients: int = 1
    """Clients that the training data are divided among; see docs/many-clients.md. Client 0 holds the test data."""
    partition: str = "iid"
    """Who has what: "iid", "dirichlet:ALPHA", "shards:N", "quantity:ALPHA" or a file; see docs/partitions.md."""
    mode: Literal["sequential", "splitfed_v1", "splitfed_v2", "parallel"] = "splitfed_v2"
    """How several clients work together."""
    average_every: int | None = None
    """Steps after which client halves are averaged, beside the end of an epoch; by default none (parallel: 1)."""
    state: Literal["shared", "own"] = "shared"
    """Whether clients share one state of the schedule, or each has its own."""
    fraction: float = 1.0
    """Part of the clients that takes part in an epoch."""
    replay_absent: bool = True
    """Whether the server trains on what it keeps of clients that are absent in an A or a B epoch."""
    dropout: float = 0.0
    """Chance that a client is lost in the middle of an epoch, in a simulation."""
    live_clients: int = 16
    """Client halves in memory in a simulation; the others lie on the disk."""

    epochs: int = 100
    """Length of the run."""
    batch_size: int = 64
    """Samples in a batch."""
    augment: bool = False
    """Random crop with padding 4 and horizontal flip, on the client."""
    client: Optimizer = field(default_factory=Optimizer)
    """Optimizer of the client half."""
    server: Optimizer = field(default_factory=Optimizer)
    """Optimizer of the server half."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the server half: "bf16" runs it under autocast."""

    store: StoreOptions = field(default_factory=StoreOptions)
    """The server's store of activations."""
    evaluate_every: int = 1
    """Epochs between evaluations."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, the newest; older ones are the way back from a damaged one."""
    keep_best: str | None = None
    """Test metric, such as "accuracy", or "loss": the checkpoint of its best epoch stays, too."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    """When the run ends before its full length."""
    microbatches: int = 1
    """Parts that an A epoch's batches are sent in, to hide latency; see docs/two-machines.md."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "cpu"
    """Device of both halves: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """PyTorch's threads on the CPU; part of what fixes a result to the bit. None leaves them alone."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")
        if self.clients < 1:
            raise ConfigError(f"clients must be at least 1, got {self.clients}")

    def method(self) -> Method:
        """When to communicate and in what form."""
        activations, gradients = get_pair(self.codec)
        return Method(
            make_schedule(self.schedule, warmup=self.warmup, threshold=self.threshold, period=self.period),
            self.activations or activations.name,
            self.gradients or gradients.name,
            self.norm_in_b,
            self.store,
            self.fleet(),
        )

    def fleet(self) -> Fleet:
        """How several clients work together."""
        return Fleet(
            strategy=make_strategy(self.mode, self.average_every),
            state=self.state,
            fraction=self.fraction,
            dropout=self.dropout,
            replay_absent=self.replay_absent,
            live=self.live_clients,
        )

    def training(self) -> Training:
        """How the halves are trained."""
        return Training(
            epochs=self.epochs,
            batch_size=self.batch_size,
            client=self.client,
            server=self.server,
            augment=CropFlip() if self.augment else None,
            evaluate_every=self.evaluate_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            keep_best=self.keep_best,
            early_stopping=self.early_stopping,
            microbatches=self.microbatches,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
        )

    def datasets(self) -> tuple[Images, Images]:
        """Training and test data."""
        train, test = data.load(self.data, self.data_dir)
        return train.first(self.train_samples), test.first(self.test_samples)

    def divided(self, train: Images) -> tuple[list[Dataset], Partition | None]:
        """Each client's training data, and the partition that divides them; None for one client."""
        if self.clients == 1 and self.partition == "iid":
            return [train], None
        if self.clients == 1:
            raise ConfigError(f"partition {self.partition!r} is for several clients; give their number (clients)")
        partition = make_partition(self.partition, train.labels, self.clients, self.seed, self.data)
        return [partition.subset(train, client) for client in range(self.clients)], partition

    def network(self, train: Images) -> torch.nn.Module:
        """The uncut network with its initial weights, which follow from the seed."""
        with seeded(self.seed, "model"):
            return make_model(self.model, train.inputs.shape[1:], train.mean, train.std, train.classes, self.width)

    def halves(self, train: Images) -> Halves:
        """The network in two."""
        return split(self.network(train), self.cut)

    def as_dict(self) -> dict[str, Any]:
        """The config as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """Inverse of `as_dict`. Raises ConfigError for a field that is unknown or of the wrong type."""
        try:
            config = msgspec.convert(values, Config)
        except msgspec.ValidationError as error:
            raise ConfigError(f"config: {error}") from None
        _require_known(values, config.as_dict(), "")
        return config


def _require_known(values: dict[str, Any], known: dict[str, Any], path: str) -> None:
    for key, value in values.items():
        if key not in known:
            raise ConfigError(unknown("config field", f"{path}{key}", [f"{path}{name}" for name in known]))
        if isinstance(value, dict):
            _require_known(value, known[key], f"{path}{key}.")
