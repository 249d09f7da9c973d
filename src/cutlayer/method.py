"""The choices that make a run: what is exchanged, how it is trained, what is to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cutlayer.codecs import get_pair, get_transfer
from cutlayer.data.augment import Augment
from cutlayer.errors import ConfigError, require_kinds, unknown
from cutlayer.fleet import Fleet
from cutlayer.memory.store import StoreOptions
from cutlayer.memory.views import check_views
from cutlayer.metric import Metric, check_task
from cutlayer.models.optim import Optimizer, OptimizerSpec
from cutlayer.privacy.defence import Defence
from cutlayer.regularize import Regularize
from cutlayer.schedule import Always, Fixed, Schedule, Settle
from cutlayer.stopping import Best, EarlyStopping, Ending

NormInB = Literal["calibrated", "eval", "train"]


@dataclass(frozen=True)
class Method:
    """When to communicate and in what form. The default is plain split learning in 32 bits.

    Attributes:
        schedule: which epochs exchange activations and gradients, activations only, or nothing.
        activations, gradients: specs of the two directions; see docs/formats.md.
        norm_in_b: how the client's batch norm behaves in B epochs: "calibrated" measures its running statistics anew
            after the last A epoch, over all clients, and normalizes by them, as in evaluation; "eval" normalizes by
            the running statistics that A epochs left; "train" normalizes by the batch and updates the running
            statistics, as in A, which is not safe with several clients; see docs/batch-norm.md.
        store: where the server stores activations.
        fleet: how several clients work together.
        views: how many views of a sample the server stores, the last ones that came. C epochs draw among them.
        views_from: the epoch, from 0, from which A epochs fill the store, too, so that B epochs are not the only ones
            to bring views; None for B epochs alone.
        defence: what clients do so that less can be made of what they send; see docs/privacy.md.
    """

    schedule: Schedule = field(default_factory=Always)
    activations: str = "fp32"
    gradients: str = "fp32"
    norm_in_b: NormInB = "calibrated"
    store: StoreOptions = field(default_factory=StoreOptions)
    fleet: Fleet = field(default_factory=Fleet)
    views: int = 1
    views_from: int | None = None
    defence: Defence = field(default_factory=Defence)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(f"expected a schedule, such as Drop(threshold=0.05), got {self.schedule!r}")
        require_kinds(
            self,
            activations=(str, 'a spec, such as "fp8_e4m3"'),
            gradients=(str, 'a spec, such as "fp8_e5m2"'),
            store=(StoreOptions, "StoreOptions"),
            fleet=(Fleet, "a Fleet"),
            defence=(Defence, "a Defence"),
        )
        check_views(self.views, self.views_from, self.activations)
        # With delta what an A epoch sent is stored, labels and all, until a B epoch sends true ones.
        delta = get_transfer(self.activations).delta is not None
        given = self.schedule.exchanges if delta and isinstance(self.schedule, Fixed) else None
        self.defence.check_stored(self.views_from, given)
        if get_transfer(self.activations).feedback:
            raise ConfigError(
                f"activations {self.activations!r}: 'ef>' is for gradients alone; give two specs, UP/DOWN"
            )
        if get_transfer(self.gradients).delta is not None:
            raise ConfigError(
                f"gradients {self.gradients!r}: 'delta>' is for activations alone; give two specs, UP/DOWN"
            )
        if self.norm_in_b not in get_args(NormInB):
            raise ConfigError(unknown("norm_in_b", self.norm_in_b, get_args(NormInB)))
        averaged = self.schedule.averaged if isinstance(self.schedule, Settle | Fixed) else 0.0
        if averaged and self.norm_in_b != "calibrated":
            raise ConfigError(
                f"averaged {averaged:g}: expected norm_in_b 'calibrated', got {self.norm_in_b!r}: the statistics of "
                "batch norm are those of the single weights, and must be measured anew for their mean"
            )

    def __repr__(self) -> str:
        """Short: what differs from the defaults."""
        usual, names = type(self)(), [each.name for each in fields(self) if each.name != "schedule"]
        differing = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(usual, name)}
        return f"Method({', '.join([repr(self.schedule), *(f'{k}={v!r}' for k, v in differing.items())])})"

    @staticmethod
    def of(schedule: Schedule, codec: str = "fp32", **more: Any) -> Method:
        """A method from a schedule and one name for both directions: a codec, or the pair "fp8" or "hfp8".

        Args:
            more: the other attributes, by name, such as `fleet`.
        """
        if not isinstance(schedule, Schedule) or not isinstance(codec, str):
            raise ConfigError(
                f'expected a schedule and then a codec, such as Method.of(Drop(threshold=0.05), "fp8"), got '
                f"{schedule!r} and {codec!r}"
            )
        activations, gradients = get_pair(codec)
        return Method(schedule, activations.name, gradients.name, **more)


@dataclass(frozen=True)
class Training:
    """How the two halves are trained.

    Attributes:
        epochs: length of the run.
        batch_size: samples in a batch (of a `Dataset`; a `DataLoader` brings its own).
        client, server: optimizer of each half.
        augment: applied by the client to each training batch; see `CropFlip`.
        shuffle, drop_last: as in `DataLoader`, for a `Dataset`.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every: epochs between checkpoints, if there is a run folder; the last epoch always has one.
        keep_best: a test metric, or a `Best`: the checkpoint of the epoch with its best value stays, beside the newest,
            and `Run(folder).model(best=True)` gives its weights.
        early_stopping: when the run ends before `epochs`, to which learning rates go on to refer.
        keep_checkpoints: how many checkpoints stay, the newest; older ones are the way back from a damaged one.
        regularize: what the server half does against learning stored activations by heart; see docs/few-exchanges.md.
        microbatches: how many an A epoch's batches are sent in, so that both halves and both directions of the link
            work at once. 1 is the plain order. More give the same updates up to the order of float additions, but
            batch norm, in both halves, then normalizes each by its own statistics.
        seed: of everything random; on the CPU, the same seed gives the same bits on the same machine and threads.
        device: of both halves, such as "cpu" or "cuda".
        precision: "fp32", or "bf16" to run both halves under autocast (Micikevicius et al., arXiv 1710.03740): matrix
            products and convolutions in bfloat16, weights and updates in 32 bits.
        channels_last: whether the weights of convolutions, and images on their way through them, lie in memory with
            the channels last. The same numbers, and faster on most hardware; floats are added in another order.
    """

    epochs: int = 100
    batch_size: int = 128
    client: OptimizerSpec = field(default_factory=Optimizer)
    server: OptimizerSpec = field(default_factory=Optimizer)
    augment: Augment | None = None
    shuffle: bool = True
    drop_last: bool = False
    evaluate_every: int = 1
    checkpoint_every: int = 1
    keep_checkpoints: int = 2
    keep_best: str | Best | None = None
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    regularize: Regularize = field(default_factory=Regularize)
    microbatches: int = 1
    seed: int = 0
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every", "checkpoint_every", "keep_checkpoints", "microbatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        require_kinds(
            self,
            seed=(int, "a whole number"),
            shuffle=(bool, "True or False"),
            drop_last=(bool, "True or False"),
            augment=(Callable | None, "a function of a batch of inputs and a generator, or None"),
            keep_best=(str | Best | None, "the name of a test metric, a Best, or None"),
            early_stopping=(EarlyStopping, "EarlyStopping(...)"),
            regularize=(Regularize, "Regularize(...)"),
            device=(str | torch.device, 'a name, such as "cpu"'),
        )
        for name in ("client", "server"):
            if not hasattr(getattr(self, name), "build"):
                raise ConfigError(
                    f"{name}: expected an Optimizer or CustomOptimizer, which make one for the half's parameters, got "
                    f"{type(getattr(self, name)).__name__}"
                )
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(unknown("precision", self.precision, ("fp32", "bf16")))
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ConfigError(f"unknown device {self.device!r}; expected such as cpu, cuda or cuda:1") from None
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {self.device!r} cannot be used here; use cpu ({error})") from None

    def autocast(self) -> torch.autocast:
        """The context in which a half runs forward, in bfloat16 if `precision` says so."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A tensor as it is to lie in memory: the same, or a copy of images [B, C, H, W] with their channels last."""
        images = self.channels_last and tensor.dim() == 4
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    @property
    def server_rates(self) -> tuple[float, ...]:
        """The server's learning rate in each epoch, relative to its initial one."""
        return tuple(self.server.factor(epoch, self.epochs) for epoch in range(self.epochs))

    @property
    def ending(self) -> Ending:
        """When the run ends, and which checkpoints stay."""
        best = Best(self.keep_best) if isinstance(self.keep_best, str) else self.keep_best
        return Ending(self.epochs, self.early_stopping, best)

    def evaluates(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, ends in an evaluation."""
        return self._due(epoch, self.evaluate_every)

    def saves(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, ends in a checkpoint."""
        return self._due(epoch, self.checkpoint_every)

    def _due(self, epoch: int, every: int) -> bool:
        return epoch + 1 == self.epochs or (epoch + 1) % every == 0


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Share of the labels whose largest output is theirs, as a scalar. outputs [N, classes, ...], labels [N, ...].

    Labels may be probabilities [N, classes, ...], of which the largest is the label. Those below 0, such as the -100
    that cross-entropy leaves out, do not count.
    """
    if labels.is_floating_point() and labels.shape == outputs.shape:
        if outputs.shape[1] == 1:
            raise ConfigError(
                "accuracy: expected outputs for two classes or more, got one output; for regression give "
                "Task(loss=..., metrics=...), with metrics of your own or {}"
            )
        labels = labels.argmax(1)
    right, counts = outputs.argmax(1) == labels, labels >= 0
    return right[counts].double().mean()


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        loss: from outputs and labels of a batch to their mean loss.
        metrics: by name ("loss" is taken), each a function of all outputs and all labels of the test data, gathered in
            memory, or a `Metric`, which is given them batch by batch. Outputs are on the CPU, in 32 bits.
        classes: if given, labels are whole numbers from 0 to classes - 1, and the server refuses others before they
            reach the loss (float labels must then be probabilities [B, classes]). With cross-entropy on outputs
            [B, classes] it is taken from the outputs, and `ignore_index` is allowed.
    """

    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any] | Metric] = field(
        default_factory=lambda: {"accuracy": accuracy}
    )
    classes: int | None = None

    def __post_init__(self) -> None:
        check_task(self.loss, self.metrics)
        require_kinds(self, classes=(int | None, "the number of classes, or None"))


def require_choices(method: object, training: object, task: object = None) -> None:
    """Raise ConfigError for a choice that is of another kind than expected, such as a schedule in place of a method."""
    if isinstance(method, Schedule):
        raise ConfigError(f'method: expected a Method, got a schedule; give Method.of({method!r}, "fp8")')
    for name, value, kind in (("method", method, Method), ("training", training, Training), ("task", task, Task)):
        if not isinstance(value, kind) and not (name == "task" and value is None):
            hint = "; give Task(loss=...)" if name == "task" and callable(value) else ""
            raise ConfigError(f"{name}: expected a {kind.__name__}, got {value!r}{hint}")
