"""A plan: what every possible cut of a network would cost, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.backends.client_data import ClientData
from cutlayer.codecs import evaluation_codec, get_transfer
from cutlayer.codecs.base import numel
from cutlayer.errors import ConfigError
from cutlayer.memory.delta import REFERENCE
from cutlayer.method import Method, Task, Training
from cutlayer.models.cut import Halves, cut_points
from cutlayer.models.flops import FlopTable
from cutlayer.planning.clock import Clock, Link
from cutlayer.planning.epoch import EpochTraffic, own_head, totals
from cutlayer.planning.leaks import Leak
from cutlayer.planning.load import Load, Outline, Stated, known_exchanges, stated
from cutlayer.planning.memory import client_memory
from cutlayer.planning.timing import TIMED_HERE, Pace, Speeds, measured, of_device, of_server
from cutlayer.planning.traffic import Rates, Traffic, depends_on_values
from cutlayer.schedule import Exchange

RESHAPING = nn.Flatten, nn.Unflatten, nn.Identity


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may cost at most; None for no limit."""

    gigabytes: float | None = None
    """GB that a run sends in both directions, training and evaluation."""
    hours: float | None = None
    """Hours that a run takes; needs a link."""
    client_mib: float | None = None
    """MiB of memory that a client's half takes in training, beside Python and PyTorch themselves."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What a client's work costs."""

    joules_per_byte: float = 0.0
    """Of sending or receiving a byte."""
    joules_per_flop: float = 0.0
    """Of a floating-point operation of its half."""


@dataclass(frozen=True)
class CutPlan:
    """What one cut costs. Bytes, FLOPs and joules of a run are of all clients together.

    Attributes:
        cut: the layer to cut after.
        shape: of one sample's activations.
        sample_bytes: of activations up and of gradients down, of one sample in a batch.
        epoch_bytes: by exchange, all frames in both directions, evaluation aside.
        run_bytes: "up", "down" and "evaluation".
        exact: whether bytes are to the byte; otherwise they depend on the values, and are an estimate.
        client_parameters: of the client half.
        client_memory: peak bytes of a client in an A and in a B epoch.
        client_flops: of the run's training, as `History.flops("client")`; `sample_flops` of one sample forward, and
            forward and backward.
        evaluation_flops: of the client in the run's evaluations, as `History.evaluation_flops`.
        store_bytes: of the server's store of activations.
        seconds: of an epoch of each kind and of an evaluation ("evaluation"); empty without a link.
        run_seconds: None without a link.
        epoch_seconds: of every epoch of the run, evaluations included.
        joules: of the clients; None if nothing is said of energy.
        leak: what an attack got back of the inputs at this cut; None if it was not measured, see `Plan.with_leaks`.
    """

    cut: str
    shape: tuple[int, ...]
    sample_bytes: tuple[float, float]
    epoch_bytes: Mapping[str, int]
    run_bytes: Mapping[str, int]
    exact: bool
    client_parameters: int
    client_memory: tuple[int, int]
    sample_flops: tuple[float, float]
    client_flops: int
    evaluation_flops: int
    store_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    run_seconds: float | None = None
    epoch_seconds: tuple[float, ...] = ()
    joules: float | None = None
    leak: Leak | None = None

    @property
    def total_bytes(self) -> int:
        """Of the run in both directions, with evaluations."""
        return sum(self.run_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan of this cut as JSON values."""
        return asdict(self)


class Planner:
    """Plans cuts of one network.

    Args:
        halves: the network in two, by the layer to cut after.
        exchanges: of the run, epoch by epoch.
        speeds: stated ones, in place of a timing here.
    """

    def __init__(
        self,
        halves: Callable[[str], Halves],
        load: Load,
        exchanges: str,
        task: Task = Task(),
        link: Link | None = None,
        energy: Energy | None = None,
        speeds: Speeds = TIMED_HERE,  # what there is to know of costs, beside what is planned
    ) -> None:
        self.halves, self.load, self.task, self.link, self.energy = cache(halves), load, task, link, energy
        self.schedule, self.exchanges, self.speeds = Stated(exchanges=exchanges), exchanges, speeds
        self._pace: dict[str, Pace] = {}
        self._memory: dict[str, tuple[int, int]] = {}

    def plan(self, cut: str, method: Method | None = None, exchanges: str | None = None) -> CutPlan:
        """The costs of a cut; with another method or other exchanges than the run's."""
        load, schedule = self.load, self.schedule
        if method is not None:
            load = Load(self.load.data, method, self.load.training)
        if exchanges is not None:
            schedule = Stated(exchanges=exchanges)
        halves, inputs = self.halves(cut), self.load.first[0]
        table = FlopTable(halves.client, inputs.shape[1:], inputs.dtype)
        shape, batch = table.output_shape, len(inputs)
        rates = _rates(halves, load)
        epochs = list(Traffic(load, halves.client, shape, schedule, rates).epochs())
        run_bytes, flops = totals(epochs), Counter[str]()
        head = own_head(halves.client, table)
        for epoch in epochs:
            flops.update(epoch.client_flops(table, head))
        up, down = get_transfer(load.method.activations), get_transfer(load.method.gradients)
        layouts = [each.codec.layout(shape) for each in (up, down)]
        sizes = [layout.row_bytes + layout.shared_bytes / batch for layout in layouts]
        forward, backward = table(batch)
        if cut not in self._memory:
            averaged = bool(getattr(load.method.schedule, "averaged", 0.0))
            self._memory[cut] = client_memory(halves.client, inputs, load.training, averaged=averaged)
        frame = 2 * batch * round(sizes[0])  # encoded, and packed
        energy = self.energy
        total = sum(run_bytes.values())
        found = CutPlan(
            cut,
            shape,
            (sizes[0] * rates.up, sizes[1] * rates.down),
            _epoch_bytes(load, halves, shape, rates),
            run_bytes,
            not any(map(depends_on_values, (load.method.activations, load.method.gradients))),
            sum(parameter.numel() for parameter in halves.client.parameters()),
            (self._memory[cut][0] + frame, self._memory[cut][1] + frame),
            (forward / batch, (forward + backward) / batch),
            flops.total() - flops["evaluation"],
            flops["evaluation"],
            _store_bytes(load, shape, {each.exchange for each in epochs}),
            joules=None if energy is None else energy.joules_per_byte * total + energy.joules_per_flop * flops.total(),
        )
        return found if self.link is None else self._timed(found, load, table, epochs, self.link)

    def _timed(
        self, plan: CutPlan, load: Load, table: FlopTable, epochs: Sequence[EpochTraffic], link: Link
    ) -> CutPlan:
        clock = Clock(load, self._pace_of(plan.cut, table, plan.shape), link)
        fills = (
            "AB"
            if get_transfer(load.method.activations).delta is not None or load.method.views_from is not None
            else "B"
        )
        every, each, evaluations = [], {}, 0.0
        for number, epoch in enumerate(epochs):
            up, down, tests = (totals([epoch])[kind] for kind in ("up", "down", "evaluation"))
            exchange = Exchange(epoch.exchange)
            seconds = clock.epoch(exchange, up, down, epoch.measured)
            if load.training.saves(number):
                seconds += clock.saved(exchange, plan.store_bytes if epoch.exchange in fills else 0)
            each[epoch.exchange] = seconds  # of the last of its kind, in which weights are handed on
            spent = clock.evaluated(tests, 0.0, load.training.evaluates(number))
            evaluations = max(evaluations, spent)
            every.append(seconds + spent)
        kinds = {**dict(sorted(each.items())), "evaluation": evaluations}
        return replace(plan, seconds=kinds, run_seconds=sum(every), epoch_seconds=tuple(every))

    def _pace_of(self, cut: str, table: FlopTable, shape: tuple[int, ...]) -> Pace:
        """How fast both halves are, timed here once, or by what is stated."""
        if cut in self._pace:
            return self._pace[cut]
        halves, batch = self.halves(cut), len(self.load.first[0])
        if self.speeds.server is None:
            pace = measured(halves, self.load, self.task)
        else:
            pace = of_server(FlopTable(halves.server, shape, torch.float32), batch, self.speeds.server)
        if self.speeds.device is not None:
            pace = of_device(pace, table, batch, numel(shape), self.speeds.device)
        self._pace[cut] = pace
        return pace


def _rates(halves: Halves, load: Load) -> Rates:
    """Of codecs whose sizes depend on the values: what a batch takes with the weights as they are."""
    up, down = get_transfer(load.method.activations), get_transfer(load.method.gradients)
    inputs = load.first[0]
    rates = []
    with torch.random.fork_rng(devices=[]), replace(load.training, device="cpu").autocast():
        activations = halves.client.train()(inputs).detach().requires_grad_()
    for spec, codec, values in (
        (up, up.codec, activations),
        (down, down.codec, activations * 1e-3),
        (up, evaluation_codec(up), activations),
    ):
        if not depends_on_values(spec.name):
            rates.append(1.0)
            continue
        layout = codec.layout(tuple(values.shape[1:]))
        packed = sum(map(len, codec.pack(codec.encode(values.detach()))))
        rates.append(packed / max(1, layout.shared_bytes + len(values) * layout.row_bytes))
    return Rates(*rates)


def _epoch_bytes(load: Load, halves: Halves, shape: tuple[int, ...], rates: Rates) -> dict[str, int]:
    """Of the second A epoch of a run, when weights are handed on, and of the second of two B epochs that follow."""
    longer = Load(load.data, load.method, replace(load.training, epochs=4))
    schedule = Stated(exchanges="AABB")
    _, both, _, alone = map(totals, ([e] for e in Traffic(longer, halves.client, shape, schedule, rates).epochs()))
    return {"A": both["up"] + both["down"], "B": alone["up"] + alone["down"], "C": 0}


def _store_bytes(load: Load, shape: tuple[int, ...], exchanges: Container[str]) -> int:
    """Of the server's store: with labels, and a byte that says whether a sample is there."""
    up = get_transfer(load.method.activations)
    if "B" not in exchanges and up.delta is None and load.method.views_from is None:
        return 0
    labels: Tensor = load.first[1]
    label = labels[0].numel() * (4 if labels.is_floating_point() else 8)
    return (
        load.method.views
        * load.samples
        * (sum((REFERENCE if up.delta is not None else up.codec).layout(shape)) + label + 1)
    )


def outermost(network: nn.Module, cuts: Sequence[str]) -> list[str]:
    """The cuts that are not inside a layer after which the network can be cut, too.

    Nor after a mere change of shape: there crosses what crosses before it.
    """
    outer = [cut for cut in cuts if not any(cut.startswith(f"{other}.") for other in cuts)]
    return [cut for cut in outer if not isinstance(network.get_submodule(cut), RESHAPING)] or outer


def exchanges_of(method: Method, training: Training, given: str | None) -> str:
    """The exchanges of a run: those that follow from the schedule, or those that are given for one that needs the loss.

    Without either all epochs are taken to be A, which is the most that a run can cost.
    """
    epochs, known = training.epochs, known_exchanges(method.schedule, training)
    if given is None:
        return known or "A" * epochs
    found = stated(given, epochs)
    if known is not None and found != known:
        raise ConfigError(f"exchanges: {method.schedule!r} has {known!r} whatever the loss; leave them out")
    return found


def planned_cuts(network: nn.Module, inputs: Tensor, cuts: Sequence[str] | None) -> list[str]:
    """The cuts to plan: those that are named, or the possible ones that are not inside another."""
    possible = cut_points(network, inputs)
    if cuts is None:
        return outermost(network, possible)
    if strange := [cut for cut in cuts if cut not in possible]:
        raise ConfigError(f"cuts: {', '.join(strange)}: not possible; possible cuts: {', '.join(possible)}")
    return list(cuts)


def data_like(inputs: Tensor, labels: Tensor, samples: Sequence[int], test_samples: int) -> list[ClientData]:
    """Data of clients that look like these samples; the first holds the test data."""
    from_samples = [ClientData(Outline(inputs, labels, count)) for count in samples]
    if test_samples:
        from_samples[0] = replace(from_samples[0], test=Outline(inputs, labels, test_samples))
    return from_samples
