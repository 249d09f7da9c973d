"""A config's choices side by side under short names: those of the command line, and of `with_choices`.

What they say is in the config; here are only the names, what each is for, and where it belongs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cutlayer.data.augment import Augment, CropFlip
from cutlayer.data.datasets import DATASETS
from cutlayer.errors import ConfigError, unknown
from cutlayer.memory.store import StoreOptions
from cutlayer.method import NormInB
from cutlayer.models.networks import MODELS
from cutlayer.models.optim import Optimizer
from cutlayer.privacy.defence import Defence
from cutlayer.regularize import Regularize
from cutlayer.runs.config import RunConfig
from cutlayer.runs.config_paths import (
    SCHEDULE_VALUES,
    at,
    codecs_of,
    name_of,
    pair_of,
    replaced,
    schedule_of,
    strategy_of,
)
from cutlayer.schedule import SCHEDULES
from cutlayer.schedule.settle import Spread
from cutlayer.stopping import Best, EarlyStopping
from cutlayer.strategies import STRATEGIES

# The names in each registry: the command line lists them and takes no others. To a type checker they are any text.
if TYPE_CHECKING:
    DataName = ModelName = ScheduleName = StrategyName = str
else:
    DataName, ModelName = Literal[*DATASETS], Literal[*MODELS]
    ScheduleName, StrategyName = Literal[*SCHEDULES], Literal[*STRATEGIES]

# Where a choice is in a config. Those that are missing here make up a schedule, a strategy, the codecs or augmentation.
CONFIG_PATHS = {
    "data": "data.name",
    "data_dir": "data.folder",
    "train_samples": "data.train_samples",
    "test_samples": "data.test_samples",
    "model": "model.name",
    "width": "model.width",
    "client_width": "model.client_width",
    "cut": "model.cut",
    "narrow": "model.narrow",
    "padding": "model.padding",
    "bind": "model.bind",
    "pretrained": "model.pretrained",
    "norm_in_b": "method.norm_in_b",
    "store": "method.store",
    "views": "method.views",
    "views_from": "method.views_from",
    "defence": "method.defence",
    "state": "method.fleet.state",
    "fraction": "method.fleet.fraction",
    "dropout": "method.fleet.dropout",
    "replay_absent": "method.fleet.replay_absent",
    "live_clients": "method.fleet.live",
    **{name: name for name in ("clients", "partition", "threads")},
    **{
        name: f"training.{name}"
        for name in (
            *(
                "epochs",
                "batch_size",
                "client",
                "server",
                "regularize",
                "precision",
                "channels_last",
                "microbatches",
                "seed",
            ),
            "device",
            *("evaluate_every", "checkpoint_every", "keep_checkpoints", "keep_best", "early_stopping"),
        )
    },
}
SEVERAL = ("strategy", "average_every", "state", "fraction", "dropout", "replay_absent", "live_clients")
"""Choices for several clients."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A config's choices. None of them has a default of its own: `of` takes them from a config."""

    data: DataName
    """Data set."""
    data_dir: str | None
    """Folder with the data set's files; by default the environment variable CUTLAYER_DATA, or ./data."""
    train_samples: int | None
    """Train on the first so many samples only."""
    test_samples: int | None
    """Evaluate on the first so many samples only."""

    model: ModelName
    """Network."""
    width: float
    """What the network's channels are multiplied with."""
    client_width: float | None
    """Of a VGG, the same of the layers up to the cut; by default the width of all."""
    cut: str
    """Name of the layer to cut after; a wrong name lists the possible ones."""

    narrow: int
    """By how much fewer channels cross the cut than the network has there: 1x1 convolutions on both sides of it."""
    padding: int
    """Pixels that the client pads its images with, for the server to crop their features; with --augment for flips."""
    bind: int
    """Samples whose activations cross the cut as one, by circular convolution; for the schedule always."""
    pretrained: bool
    """Whether the network begins with weights from ImageNet; efficientnet_lite0 alone has some."""

    schedule: ScheduleName
    """When to communicate: "always" is plain split learning; see docs/schedules.md."""
    threshold: float | None
    """For drift, drop, plateau and budget: the change of the training loss that counts."""
    warmup: int
    """Epochs at the start that exchange both ways, whatever the schedule says (the first always does)."""
    period: int | None
    """For periodic: epochs in a cycle of A, B, C, C, ..."""
    fixed_exchanges: str | None
    """For fixed: a letter for each epoch, such as AAABCCB; C after the last."""
    both_epochs: int | None
    """For settle: A epochs at the start, in which the client's rate falls to zero; see docs/few-exchanges.md."""
    activation_epochs: int | None
    """For settle: B epochs after them."""
    last_exchange: float | None
    """For settle and budget: the last B epoch, as a fraction of the run."""
    spread: Spread | None
    """For settle: B epochs at even distances, or the denser the higher the server's learning rate is."""
    averaged_updates: float | None
    """For settle: the part of the A epochs' updates, the last ones, whose mean of weights is the client half then."""
    megabytes: float | None
    """For budget: 10^6 bytes that may cross in training, in both directions."""
    client_gflops: float | None
    """For budget: 10^9 FLOPs that the clients may spend on training."""
    both_share: float | None
    """For budget: share of it that is for A epochs."""
    codec: str
    """Number format in both directions, such as "fp8" (E4M3 up, E5M2 down), "mxfp4+zstd", or UP/DOWN such as
    "delta0.3>mxfp4+zstd/mxfp4:stochastic"; see docs/formats.md."""
    activations: str | None
    """Codec of the activations, in place of that of the pair."""
    gradients: str | None
    """Codec of the gradients, in place of that of the pair."""
    norm_in_b: NormInB
    """How the client's batch norm behaves in B epochs; see docs/batch-norm.md."""

    defence: Defence
    """What clients do so that less can be made of what they send; see docs/privacy.md."""

    clients: int
    """Clients that the training data are divided among; see docs/many-clients.md. Client 0 holds the test data."""
    partition: str
    """Who has what: "iid", "dirichlet:ALPHA", "shards:N", "quantity:ALPHA" or a file; see docs/partitions.md."""
    strategy: StrategyName
    """How several clients work together."""
    average_every: int | None
    """Steps after which client halves are averaged, beside the end of an epoch; by default none (parallel: 1)."""
    state: Literal["shared", "own"]
    """Whether clients share one state of the schedule, or each has its own."""
    fraction: float
    """Share of the clients that takes part in an epoch."""
    replay_absent: bool
    """Whether the server trains on what it stores of clients that are absent in an A or a B epoch."""
    dropout: float
    """Chance that a client is lost in the middle of an epoch, in a simulation."""
    live_clients: int
    """Client halves in memory in a simulation; the others lie on the disk."""

    epochs: int
    """Length of the run."""
    batch_size: int
    """Samples in a batch."""
    augment: bool
    """Random crop with padding 4 and horizontal flip, on the client."""
    client: Optimizer
    """Optimizer of the client half."""
    server: Optimizer
    """Optimizer of the server half."""
    regularize: Regularize
    """Against learning stored activations by heart, on the server; see docs/few-exchanges.md."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic of both halves: "bf16" runs them under autocast."""
    channels_last: bool
    """Whether images lie in memory with their channels last, which is faster on most hardware."""

    store: StoreOptions
    """The server's store of activations."""
    views: int
    """Views of a sample that the server stores, the last ones that came; C epochs draw among them."""
    views_from: int | None
    """Epoch, from 0, from which A epochs fill the store as B epochs do; by default none."""
    evaluate_every: int
    """Epochs between evaluations."""
    checkpoint_every: int
    """Epochs between checkpoints."""
    keep_checkpoints: int
    """How many checkpoints stay, the newest; older ones are the way back from a damaged one."""
    keep_best: str | None
    """Test metric, such as "accuracy", or "loss": the checkpoint of its best epoch stays, too."""
    early_stopping: EarlyStopping
    """When the run ends before its full length."""
    microbatches: int
    """Microbatches that an A epoch's batches are sent in, to hide latency; see docs/two-machines.md."""
    seed: int
    """Seed of everything random."""
    device: str
    """Device of both halves: cpu, cuda, cuda:1, ..."""
    threads: int | None
    """PyTorch's threads on the CPU; part of what fixes a result to the bit. None leaves them alone."""

    @staticmethod
    def of(config: RunConfig) -> Choices:
        """The choices that this config has made."""
        method, training = config.method, config.training
        schedule, strategy, best = method.schedule, method.fleet.strategy, training.keep_best
        every = getattr(strategy, "average_every", None)
        made: dict[str, Any] = {
            **{name: at(config, place) for name, place in CONFIG_PATHS.items()},
            **{name: getattr(schedule, field, None) for name, field in SCHEDULE_VALUES.items()},
            "schedule": name_of(schedule, SCHEDULES),
            "strategy": name_of(strategy, STRATEGIES),
            "average_every": every if every != getattr(type(strategy)(), "average_every", None) else None,
            "codec": pair_of(method),
            "activations": None,
            "gradients": None,
            "augment": training.augment is not None,
            "keep_best": best.metric if isinstance(best, Best) else best,
        }
        return Choices(**made)

    def differing(self, other: Choices) -> dict[str, Any]:
        """Those that are not as in the other, by name."""
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in mine.items() if value != getattr(other, name)}

    def applied_to(self, config: RunConfig) -> RunConfig:
        """This config with whatever these choices change in it."""
        return with_choices(config, **self.differing(Choices.of(config)))


def with_choices(config: RunConfig, **choices: Any) -> RunConfig:
    """This config with other choices, by the names of the command line; values that are not used are ignored.

    A new schedule takes over what the one before it said of warm-up, threshold and period, if nothing else is given.

    Raises:
        ConfigError: an unknown name, or a value that is not possible.
    """
    known = [field.name for field in dataclasses.fields(Choices)]
    if strange := [name for name in choices if name not in known]:
        raise ConfigError(unknown("choice", strange[0], known))
    given = {name: value for name, value in choices.items() if name in CONFIG_PATHS or value is not None}
    method = config.method
    values: dict[str, Any] = {
        **{CONFIG_PATHS[name]: value for name, value in given.items() if name in CONFIG_PATHS},
        "method.schedule": schedule_of(method.schedule, given),
        "method.fleet.strategy": strategy_of(method.fleet.strategy, given),
        **{f"method.{name}": spec for name, spec in codecs_of(method, given).items()},
    }
    if "augment" in given or "padding" in given:
        wanted = given.get("augment", config.training.augment is not None)
        padding = given.get("padding", config.model.padding)
        values["training.augment"] = _augment(config, padding) if wanted else None
    return replaced(config, values)


def _augment(before: RunConfig, padding: int) -> Augment:
    """How a client augments: as before, but for the crop, which is the server's if the client pads for it."""
    augment = before.training.augment or CropFlip()
    if not isinstance(augment, CropFlip) or not (padding or before.model.padding):
        return augment
    return dataclasses.replace(augment, padding=0 if padding else CropFlip().padding)
