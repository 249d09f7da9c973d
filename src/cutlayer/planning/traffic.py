"""The bytes of a run, frame by frame, without its tensors: what the ledger will count.

Epoch by epoch this follows what the loop sends (`runs.loop`, `training.participants`, `training.end_of_epoch`), with
the messages themselves, and sizes in place of the tensors. Sizes of codecs with a lossless stage, or that leave samples
out (`delta`), depend on the values: there a rate is assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from cutlayer.codecs import Codec, encode_exactly, evaluation_codec, get_codec, get_transfer
from cutlayer.codecs.lossless import Lossless
from cutlayer.models.auxiliary import SelfTraining
from cutlayer.models.cut import is_frozen
from cutlayer.planning.epoch import EpochTraffic, Pass
from cutlayer.planning.load import Load
from cutlayer.planning.weights import ClientCounter, HalfSizes, SharedCounter
from cutlayer.schedule import Budget, Exchange, Schedule, Settle
from cutlayer.strategies import Sequential
from cutlayer.training.calibration import CALIBRATION_BATCHES
from cutlayer.training.states import States
from cutlayer.wire.frames import Field, frame_length, kinds
from cutlayer.wire.messages import (
    Calibrate,
    Done,
    Evaluate,
    EvaluationRequest,
    Message,
    Plan,
    Step,
    Update,
    Weights,
)

DIGEST = 1 << 31
"""A digest of references, as most are: of 32 bits."""


@dataclass(frozen=True)
class Rates:
    """Bytes sent for each byte of a codec's layout, if they depend on the values; 1 for all others."""

    up: float = 1.0
    down: float = 1.0
    evaluation: float = 1.0


def depends_on_values(spec: str) -> bool:
    """Whether how much a transfer sends depends on what it sends."""
    transfer = get_transfer(spec)
    return isinstance(transfer.codec, Lossless) or transfer.delta is not None


class Traffic:
    """The traffic of a run, with one cut.

    Args:
        half: the client half, as it begins.
        cut_shape: of one sample's activations.
        schedule: whose exchanges are known beforehand.
        rates: for codecs whose sizes depend on the values.
    """

    def __init__(
        self, load: Load, half: nn.Module, cut_shape: tuple[int, ...], schedule: Schedule, rates: Rates = Rates()
    ) -> None:
        method, self.load, self.shape = load.method, load, cut_shape
        self.codec, self.down = get_transfer(method.activations), get_transfer(method.gradients).codec
        self.rates, self.sizes = rates, HalfSizes(half)
        self.several, strategy = load.clients > 1, method.fleet.strategy
        self.sequential, self.every = isinstance(strategy, Sequential), strategy.share
        self.share = self.every if self.several else None
        owners = load.clients if self.several and method.fleet.state == "own" else 0
        self.frozen = is_frozen(half)
        self.local = half if isinstance(half, SelfTraining) else None
        self.states = States(schedule, owners, frozen=self.frozen)
        self.clients, self.shared = [ClientCounter() for _ in load.feeds], SharedCounter()
        self.stale = False
        self.stored: set[int] = set()  # clients of whom activations are stored
        self._bytes: dict[str, Counter[str]] = {}
        self._passes: Counter[Pass] = Counter()
        self._measured = 0
        labels = load.first[1]
        self._label = encode_exactly(labels).codec, tuple(labels.shape[1:])
        # Frames of equal length come again and again.
        self._activations_of = lru_cache(maxsize=1 << 14)(self._activations_fields)

    def epochs(self) -> Iterator[EpochTraffic]:
        """Epoch by epoch, to the end of the run."""
        for epoch in range(self.load.training.epochs):
            self._bytes, self._passes, self._measured = {way: Counter() for way in ("up", "down")}, Counter(), 0
            exchange = self.states.exchange
            self._epoch(epoch)
            sizes = {way: dict(sorted(sizes.items())) for way, sizes in self._bytes.items()}
            yield EpochTraffic(exchange.value, sizes, self._passes, self._measured)

    def _send(self, way: str, message: Message, fields: tuple[Field, ...] = (), times: int = 1) -> None:
        for kind, size in kinds(message, fields, frame_length(message, fields)):
            self._bytes[way][kind] += times * size

    # --- an epoch, in the order of the loop ---

    def _epoch(self, epoch: int) -> None:
        training, fleet, count = self.load.training, self.load.method.fleet, self.load.clients
        trained = self.states.each(count)
        active = [client for client in range(count) if trained[client] is not Exchange.NONE]
        drawn = [client for client in fleet.draw(training.seed, epoch, count) if client in active] if active else []
        tests = any(self.load.evaluation)
        due = tests and training.evaluates(epoch)
        calibrated = self._calibrate(epoch, drawn, trained) if active else []
        for turn in [[client] for client in drawn] if self.sequential else [drawn]:
            for client in turn:
                self._begin(epoch, client, trained[client], client in calibrated)
                self._train(epoch, client, trained[client])
            if self.several:
                self._share(epoch, [client for client in turn if trained[client] is Exchange.BOTH])
            self.shared.average()
        self.stale = self.stale or self.states.exchange is Exchange.BOTH
        self.stored |= {client for client in drawn if trained[client] is Exchange.ACTIVATIONS}
        self.states.finish(1.0, dict.fromkeys({*drawn, *self.stored}, 1.0), set(active) - set(drawn))
        if not active:
            return
        measures = Exchange.BOTH in trained and self.load.method.norm_in_b == "calibrated"
        if measures and self.shared.counter is not None and (due or epoch + 1 == training.epochs):
            self._measure(epoch, drawn)
        for client in active:
            if self.load.evaluation[client] and (due or self.states.of(client) is Exchange.NONE):
                self._evaluate(epoch, client)

    def _calibrate(self, epoch: int, drawn: list[int], trained: list[Exchange]) -> list[int]:
        """Batch norm's statistics are measured anew, and pooled; who has sent some."""
        if not (self.stale and self.load.method.norm_in_b == "calibrated"):
            return []
        pooling, measured = [], False
        for client in drawn:
            if trained[client] is Exchange.BOTH:
                continue
            if shares := self.shared.counter is not None:
                self._give(client, Weights(client, epoch))
                pooling.append(client)
                self._send("up", Weights(client, epoch, statistics=True), self.sizes.statistics)
            self._send("down", Calibrate(client, epoch, share=shares))
            self._measure_passes(client, "forward")
            measured = True
        self.shared.statistics = bool(pooling and self.sizes.statistics)
        self.shared.pool(self.shared.statistics)
        self.shared.pooled = self.shared.version
        self.stale = not measured
        return pooling

    def _measure_passes(self, client: int, what: str) -> None:
        if self.sizes.statistics:
            sizes = self.load.feeds[client][0].batch_sizes()[:CALIBRATION_BATCHES]
            self._passes.update((what, size, True) for size in sizes)
            self._measured = max(self._measured, len(sizes))

    def _give(self, client: int, message: Weights) -> None:
        """Send a client the shared half."""
        if self.shared.counter is not None:
            self._send("down", message, self.sizes.weights(self.shared.counter))
            self.clients[client].counter = self.shared.counter

    def _begin(self, epoch: int, client: int, exchange: Exchange, calibrated: bool) -> None:
        if not calibrated or self.shared.version != self.shared.pooled:
            self._give(client, Weights(client, epoch))
        elif self.shared.statistics:
            self._send("down", Weights(client, epoch, statistics=True), self.sizes.statistics)
        both, schedule = exchange is Exchange.BOTH, self.load.method.schedule
        references = DIGEST if self.codec.delta is not None else None
        settling = (0.0, 1.0) if both and isinstance(schedule, Settle | Budget) else None  # any numbers are as long
        averaging = 0.0 if both and isinstance(schedule, Settle) and schedule.averaged else None
        share = self.share if both else None
        self._send("down", Plan(client, epoch, exchange.value, share, references, settling, averaging))

    def _train(self, epoch: int, client: int, exchange: Exchange) -> None:
        both, every = exchange is Exchange.BOTH, self.local.every if self.local is not None else 1
        steps = self.load.steps(client, epoch, self.load.training.microbatches if both else 1, every)
        if self.local is not None:  # it trains on all batches, whatever it sends
            self._passes.update({("local", size, True): n for size, n in self.load.sizes[client].items()})
        for group, times in steps.items():
            fields = self._activations_of(group.samples, group.ids, False)
            step = Step(client, epoch, group.number, group.microbatch, group.microbatches, group.whole)
            self._send("up", step, fields, times)
            if self.local is None:
                self._passes["forward", group.samples, True] += times
            if both:
                self._passes["backward", group.samples, True] += times
                update = Update(client, epoch, group.number, group.microbatch)
                self._send("down", update, self._gradients(group.samples), times)
        microbatches = self._microbatches(client) if both else [1] * steps.total()
        if (both and not self.several) or (not both and self.load.method.norm_in_b == "train"):
            self.clients[client].counter += sum(microbatches)
        self._send("up", Done(client, epoch, len(microbatches), {}))

    def _microbatches(self, client: int) -> list[int]:
        """Into how many microbatches each batch of an A epoch is sent."""
        microbatches = self.load.training.microbatches
        return [-(-size // -(-size // microbatches)) for size in self.load.feeds[client][0].batch_sizes()]

    def _share(self, epoch: int, clients: list[int]) -> None:
        """The weights that clients send in an A epoch, round by round, and those that they wait for."""
        left = {client: self._microbatches(client) for client in clients}
        done = 0
        while left:
            done += 1
            boundary = self.every > 0 and done % self.every == 0
            for client, microbatches in left.items():
                own = self.clients[client]
                own.counter += microbatches[done - 1]
                if (last := done == len(microbatches)) or boundary:
                    self._send("up", Weights(client, epoch, done, last), self.sizes.weights(own.counter))
                    self.shared.uploads.append(own.counter)
            if boundary:
                self.shared.average()
            left = {client: microbatches for client, microbatches in left.items() if done < len(microbatches)}
            for client in left if boundary else ():
                self._give(client, Weights(client, epoch, done))

    # --- its end ---

    def _measure(self, epoch: int, drawn: list[int]) -> None:
        for client in drawn:
            self._give(client, Weights(client, epoch, evaluation=True))
            self._send("down", Calibrate(client, epoch, share=True, evaluation=True))
            self._send("up", Weights(client, epoch, statistics=True, evaluation=True), self.sizes.statistics)
            self._send("up", Done(client, epoch, 0, {}, evaluation=True))
            self._measure_passes(client, "evaluation")
        self.shared.pool(bool(drawn and self.sizes.statistics))

    def _evaluate(self, epoch: int, client: int) -> None:
        self._give(client, Weights(client, epoch, evaluation=True))
        self._send("down", EvaluationRequest(client, epoch))
        steps = self.load.evaluation[client]
        for group, times in steps.items():
            fields = self._activations_of(group.samples, group.ids, True)
            self._send("up", Evaluate(client, epoch, group.number), fields, times)
            self._passes["evaluation", group.samples, False] += times
        self._send("up", Done(client, epoch, sum(steps.values()), {}, evaluation=True))

    # --- tensors ---

    def _activations_fields(self, samples: int, ids: str, test: bool) -> tuple[Field, ...]:
        codec, rate = self.codec.codec, self.rates.up
        if test:
            codec, rate = evaluation_codec(self.codec), self.rates.evaluation
        label, shape = self._label
        layout = get_codec(label).layout(shape)
        fields = (
            Field("ids", ids, samples, (), samples * get_codec(ids).layout(()).row_bytes),
            Field("labels", label, samples, shape, samples * layout.row_bytes + layout.shared_bytes),
            _tensor("activations", codec, samples, self.shape, rate),
        )
        changes = self.codec.delta is not None and not test
        return (*fields, Field("sent", "u8", samples, (), samples)) if changes else fields

    def _gradients(self, samples: int) -> tuple[Field, ...]:
        return (_tensor("gradients", self.down, samples, self.shape, self.rates.down),)


def _tensor(name: str, codec: Codec, samples: int, shape: tuple[int, ...], rate: float) -> Field:
    layout = codec.layout(shape)
    size = samples * layout.row_bytes + layout.shared_bytes
    return Field(name, codec.name, samples, shape, size if rate == 1.0 else round(rate * size))
