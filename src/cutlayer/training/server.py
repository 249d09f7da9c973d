"""The server as its clients see it: plans, frames taken and checked, gradients at the cut. Never sees the data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.codecs import get_transfer, isfinite
from cutlayer.errors import ClientUnavailableError, ConfigError, DivergedError, RefusedError
from cutlayer.memory.error_feedback import ErrorFeedback
from cutlayer.models.flops import FlopTable
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Stateful
from cutlayer.schedule import NOTHING, Exchange
from cutlayer.seeds import derive
from cutlayer.strategies.protocols import StepBatch
from cutlayer.training.averaging import SharedHalf, packed_weights
from cutlayer.training.checks import ClientSummary, FrameChecks, decoded
from cutlayer.training.divergence import out_of_line, require_finite
from cutlayer.training.evaluation import Evaluation
from cutlayer.training.job import Job
from cutlayer.training.learner import Learner
from cutlayer.training.plain_epoch import PlainEpoch
from cutlayer.training.run_costs import RunCosts
from cutlayer.training.states import States
from cutlayer.wire.frames import Frame, PackedFrame, Received, packed
from cutlayer.wire.messages import Plan, Step, Update, Weights


class Server:
    """The server of a run: what it tells its clients, what it takes from them, and the schedule's states.

    Args:
        clients: what is known of each client, by number.
        learner: trains the half and stores activations; by default in this process.

    Attributes:
        shared: the client half that clients share, if there are several.
        states: of the schedule: which epoch it is, and what it exchanges.
        evaluation: the test activations.
        absent: clients that did not do what was planned for them in this epoch.
        stale: whether client halves were trained since their statistics of batch norm were last measured.
    """

    def __init__(self, job: Job, clients: list[ClientSummary], ledger: Ledger, learner: Learner | None = None) -> None:
        method, several = job.method, len(clients) > 1
        self.job, self.clients, self.ledger, self.method = job, clients, ledger, method
        self.seed, self.device = job.training.seed, torch.device(job.training.device)
        self.strategy, self.cut_shape = method.fleet.strategy, job.cut_shape
        self.share = self.strategy.share if several else None
        self.joint = several and self.strategy.joint
        if self.joint and job.training.microbatches > 1:
            raise ConfigError(
                f"{type(self.strategy).__name__} makes one batch of the clients' batches; leave microbatches at 1"
            )
        up, down = get_transfer(method.activations), get_transfer(method.gradients)
        self.codec, self.gradient_codec, self.delta = up.codec, down.codec, up.delta is not None
        self.learner = Learner(job, clients, ledger) if learner is None else learner
        self.replayed = self.learner.replayed
        self.feedback = None
        if down.feedback:
            capacity = self.replayed.views.samples
            self.feedback = ErrorFeedback(self.gradient_codec, capacity, job.cut_shape, method.store)
        self.checks = FrameChecks(job, clients, self.learner.output_shape)
        self.evaluation = Evaluation(job, self.checks, ledger)
        owners = len(clients) if several and method.fleet.state == "own" else 0
        self.states = States(method.schedule, owners, frozen=all(info.frozen for info in clients))
        self.shared, self.stale, self._calibrated = SharedHalf(), False, False
        self._costs: RunCosts | None = None
        self._statistics: dict[str, Tensor] = {}
        self._pooled_version = -1
        self._last: dict[int, Step] = {}
        self._magnitudes: dict[int, float] = {}
        self.absent: set[int] = set()

    @property
    def half(self) -> nn.Module:
        """The server half; with one for each client, their average."""
        return self.learner.halves.half

    @property
    def flops(self) -> FlopTable:
        """FLOPs of the server half."""
        return self.learner.step.flops

    @property
    def samples(self) -> int:
        """Samples trained on in this epoch."""
        return self.learner.counts.samples

    def look_ahead(self, plain: Sequence[PlainEpoch], weights_bytes: int) -> None:
        """Begin with the schedule as it is in this run. Raises ConfigError if it cannot be followed.

        Args:
            plain: each client's share of an epoch of plain split learning.
            weights_bytes: of a frame with the weights of the client half.
        """
        self._costs = RunCosts(plain, weights_bytes, self.cut_shape, self.share, self.states.frozen)
        self.states.fit_to(self._costs.outlook(self.method, self.job.training))

    # --- an epoch -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the epoch that the schedule's state names."""
        self.learner.begin(self.states.epoch, self.states.exchange)
        self._last, self.absent, self._magnitudes = {}, set(), {}
        self._calibrated = self.calibrates()
        self.shared.forget()

    def replays_alone(self) -> bool:
        """Whether in this epoch the server trains by itself on all that is stored, in one order over all clients."""
        return self.states.exchange is Exchange.NONE and self.learner.halves.pool is None and not self.states.own

    def plan(self, client: int) -> PackedFrame:
        """The frame that tells a client what this epoch exchanges."""
        exchange = self.states.of(client)
        state = self.states.state_of(client)
        both = (self.share, state.settling, state.averaging) if exchange is Exchange.BOTH else (None, None, None)
        share, settling, averaging = both
        digest = self.replayed.digest(client) if self.delta else None
        return packed(Frame(Plan(client, self.states.epoch, exchange.value, share, digest, settling, averaging)))

    def calibrates(self) -> bool:
        """Whether clients of this epoch are to measure the statistics of batch norm before they send activations."""
        # Not for one that was admitted: what it alone measures would take the place of what all did.
        return self.stale and self.method.norm_in_b == "calibrated" and self.states.scheduled is not Exchange.NONE

    def calibrating(self) -> list[int]:
        """The clients that send what they measured before they send activations."""
        several = self.calibrates() and bool(self.shared.tensors)
        return [n for n in range(len(self.clients)) if several and self.states.of(n) is Exchange.ACTIVATIONS]

    def measures(self, planned: Sequence[Exchange]) -> bool:
        """Whether clients are to measure the statistics of the half that was averaged in an epoch, to evaluate it."""
        return Exchange.BOTH in planned and self.method.norm_in_b == "calibrated" and bool(self.shared.tensors)

    def take_statistics(self, received: Received, expected: Weights) -> None:
        """A client's statistics of batch norm, to be pooled. Raises RefusedError for another message than expected."""
        if received.message != expected:
            raise RefusedError(f"client {expected.client}: expected {expected}, got {received.message}")
        samples = self.clients[expected.client].samples
        self.shared.add_statistics(expected.client, received, samples)
        self.ledger.frame("up", received)

    def pool_statistics(self, measured: bool) -> None:
        """Pool what clients measured, if any did, into the shared half."""
        self._statistics = self.shared.pool_statistics()
        self._pooled_version = self.shared.version
        self.stale = not measured

    def beginning(self, client: int, calibrated: bool) -> list[PackedFrame]:
        """The newest shared half, if there is one; for a client that has it, what was pooled since."""
        epoch = self.states.epoch
        if not calibrated or self.shared.version != self._pooled_version:
            return self.shared.frames(Weights(client, epoch))
        message = Weights(client, epoch, statistics=True)
        return [packed_weights(message, self._statistics)] if self._statistics else []

    def take(self, received: Received, client: int | None = None) -> StepBatch:
        """A client's batch of a step, from its frame.

        Raises RefusedError, with nothing applied, for a frame that does not fit the protocol or the epoch's plan, or
        comes from another than this client.
        """
        message, epoch = received.message, self.states.epoch
        if not isinstance(message, Step):
            raise RefusedError(f"server: expected a step, got {message}")
        self.checks.check_client(message.client)
        if client not in (None, message.client):
            raise RefusedError(f"client: expected {client}, got {message.client}")
        if self.joint and message.microbatches != 1:
            raise RefusedError(
                f"client {message.client}: microbatches: expected 1, as clients' batches make one, got {message}"
            )
        exchange = self.states.of(message.client)
        if exchange is Exchange.NONE or message.epoch != epoch:
            raise RefusedError(f"client {message.client}: epoch: expected epoch {epoch} ({exchange}), got {message}")
        self.checks.check_order(self._last.get(message.client), message, exchange)
        encoded, ids, labels, sent = self.checks.batch(received, message.client)
        if not self.checks.knows_labels():
            self.replayed.check_room(labels)
        ids = ids + self.replayed.offsets[message.client]
        with self.ledger.phase("decode"):
            activations, magnitude = decoded(self.codec, encoded, self.device, message)
            if sent is not None:
                encoded = self.replayed.changed(ids, sent, activations, message)
                activations = self.replayed.codec.decode(encoded)
        self._magnitudes[message.client] = max(magnitude, self._magnitudes.get(message.client, 0.0))
        gradients = exchange is Exchange.BOTH
        return StepBatch(message.client, activations, labels.to(self.device), message, ids, encoded, gradients)

    def train(self, batches: Sequence[StepBatch]) -> list[PackedFrame | None]:
        """Train on the batches as one; return the reply to each, None if the client waits for none."""
        self.learner.train(batches)
        for batch in batches:
            if batch.client is not None and batch.message is not None:
                self._last[batch.client] = batch.message
                self.checks.remember_label_kind(batch.labels)
        samples = sum(len(batch) for batch in batches)
        return [self._reply(batch, samples) for batch in batches]

    def average(self) -> None:
        """Average what clients sent of their halves, and the server's own halves if there are several."""
        self.shared.average()
        self.learner.halves.average()

    def finish(self) -> float:
        """End the epoch: its mean training loss; the schedule moves on to the next one."""
        self.learner.finish()
        self.average()
        counts = self.learner.counts
        if counts.samples == 0 and self.absent:
            raise ClientUnavailableError(f"epoch {self.states.epoch}: no client finished a step")
        if counts.samples == 0:
            raise ConfigError(f"epoch {self.states.epoch} trained on no sample; expected at least one batch")
        main = self.learner.halves.main
        require_finite("the server half", main.half, main.optimizer.optimizer, self.states.epoch)
        loss = counts.loss()
        losses = counts.client_losses() if self.states.own else {}  # reading one waits for the device
        self.stale = self.stale or self.states.exchange is Exchange.BOTH
        spent = NOTHING
        if self._costs is not None:
            took_part = [(client, self.states.of(client)) for client in self._last]
            spent = self._costs.spent(self.ledger.training_bytes(), took_part, self._calibrated)
        self.states.owing = {client for client in self.states.owing if not self.replayed.has(client)}
        self.states.finish(loss, losses, self.absent, spent)
        return loss

    def suspect(self, among: Collection[int]) -> int | None:
        """Of these clients the one that has made the epoch under way diverge, by its activations; None for no one."""
        exchanged = self.states.exchange is not Exchange.NONE
        magnitudes = self._magnitudes if exchanged else self.replayed.magnitudes(among)
        return out_of_line(magnitudes, among)

    def may_have_grown(self) -> None:
        """A checkpoint may be of fewer clients; the others were admitted after them."""
        stores = [self.replayed.store, self.evaluation.store]
        for store in [*stores, self.feedback.store] if self.feedback is not None else stores:
            store.grows = True

    def forget(self, client: int) -> None:
        """Drop all that is stored of a client, which takes part no more."""
        self.states.rest(client)
        self.replayed.forget(client)
        if self.feedback is not None:
            self.feedback.store.clear(*self.replayed.samples_of(client))
        self.evaluation.forget(client)

    def evaluate(self) -> dict[str, float]:
        """Mean loss and metrics over the stored test activations; clients send theirs when they change."""
        return self.evaluation.scores(self.half, self.flops)

    def _reply(self, batch: StepBatch, samples: int) -> PackedFrame | None:
        """The gradients that a client waits for, of its own batch's mean loss."""
        message = batch.message
        if message is None or batch.ids is None or not batch.needs_gradients:
            return None
        with self.ledger.phase("encode"):
            gradients = batch.activations.grad
            if gradients is None or not isfinite(gradients):
                raise DivergedError(f"{message}: gradients at the cut are not finite; lower the learning rate")
            if samples != len(batch):
                gradients = gradients * (samples / len(batch))
            microbatch = (message.microbatch,) if message.microbatches > 1 else ()
            seed = derive(self.seed, "encode", "down", message.client, message.epoch, message.step, *microbatch)
            if self.feedback is not None:
                encoded = self.feedback.encode(batch.ids, gradients, seed)
            else:
                encoded = self.gradient_codec.encode(gradients, seed)
            update = Update(message.client, message.epoch, message.step, message.microbatch)
            return packed(Frame(update, {"gradients": encoded}))

    # --- checkpoints --------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds of the server in files, by name: its half and optimizer, and its stores."""
        parts: dict[str, Stateful] = {"test_store": self.evaluation.store, **self.learner.parts()}
        if len(self.clients) > 1:
            parts["shared"] = self.shared
        if self.feedback is not None:
            parts["residuals"] = self.feedback.store
        return parts

    def state_dict(self) -> dict[str, Any]:
        """What there is beside the parts: facts."""
        return {**self.states.state_dict(), "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, once the parts are loaded."""
        self.states.load_state_dict(state)
        self.stale = state.get("stale", False)
        self.learner.parts_loaded()
