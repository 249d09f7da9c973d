"""6, 7. The server half: loss, backward, update, gradients at the cut. Never sees the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.codecs import Encoded, get_transfer, isfinite
from cutlayer.errors import ClientUnavailableError, ConfigError, DivergedError, RefusedBatchError, RefusedError
from cutlayer.memory.delta import REFERENCE, moved, references
from cutlayer.memory.error_feedback import ErrorFeedback
from cutlayer.memory.store import ReplayStore
from cutlayer.models.cut import copied
from cutlayer.models.flops import FlopTable
from cutlayer.records.checkpoint import Store
from cutlayer.records.ledger import Ledger
from cutlayer.schedule import Always, Exchange
from cutlayer.seeds import derive, generator, seeded
from cutlayer.training.averaging import Average, SharedHalf, weights_frame
from cutlayer.training.checks import ClientSummary, FrameChecks, decoded
from cutlayer.training.evaluation import Evaluation
from cutlayer.training.halves import HalfPool, TrainedHalf
from cutlayer.training.job import Job
from cutlayer.training.losses import require_mean, shapes
from cutlayer.training.states import States
from cutlayer.wire.frames import Frame, Plan, Step, Update, Weights, pack, unpack


@dataclass(frozen=True, eq=False)
class StepBatch:
    """A client's part of a step, decoded: what the server half is trained on.

    Attributes:
        client: its number; None where samples of several clients are mixed.
        activations: float32 [B, *cut].
        labels: [B, ...].
        message, encoded: as they came, or with delta the references that follow; None for what comes from the store.
        ids: int64 [B], rows of the store.
        learns: whether the client waits for gradients.
    """

    client: int | None
    activations: Tensor
    labels: Tensor
    message: Step | None = None
    ids: Tensor | None = None
    encoded: Encoded | None = None
    learns: bool = False

    @property
    def ends_step(self) -> bool:
        """Whether it is the only or last part of its client's step."""
        return self.message is None or self.message.part + 1 == self.message.parts


class Server:
    """The server: its half, its optimizer, the schedule's states and the activations it keeps.

    Args:
        clients: what is known of each client, by number.

    Attributes:
        shared: the client half that clients share, where there are several.
        states: of the schedule: which epoch it is, and what it exchanges.
        evaluation: the test activations.
    """

    def __init__(self, job: Job, clients: list[ClientSummary], ledger: Ledger) -> None:
        half, cut_shape, method, training, task = job.half, job.cut_shape, job.method, job.training, job.task
        self.device = torch.device(training.device)
        self._loss_tried = False
        # The table copies the half, so it comes before the half's first pass.
        self.flops = FlopTable(half, cut_shape, torch.float32)
        several = len(clients) > 1
        self.mode, self.share = method.fleet.strategy, method.fleet.strategy.share if several else None
        self.joint = several and self.mode.joint
        if self.joint and training.microbatches > 1:
            raise ConfigError(
                f"{type(self.mode).__name__} makes one batch of the clients' parts; leave microbatches at 1"
            )
        self.halves: HalfPool | None = None
        if several and self.mode.own_server_halves:
            owners = {"owners": len(clients), "live": method.fleet.live, "folder": method.store.folder}
            self.halves = HalfPool(copied(half), training.server, training.epochs, training.device, **owners)
        self.body = TrainedHalf(half, training.server, training.epochs, training.device)
        self.shared = SharedHalf()
        self.stale = False
        """Whether client halves were trained since their statistics of batch norm were last measured."""
        self._statistics: dict[str, Tensor] = {}
        self.clients, self.cut_shape, self.ledger, self.task = clients, cut_shape, ledger, task
        self.method, self.training, self.seed = method, training, training.seed
        up, down = get_transfer(method.activations), get_transfer(method.gradients)
        self.codec, self.gradient_codec = up.codec, down.codec
        self.delta = up.delta is not None
        self.store_codec = REFERENCE if self.delta else self.codec
        self.checks = FrameChecks(job, clients, self.flops.output_shape)
        self.evaluation = Evaluation(job, self.checks, ledger)
        owners = len(clients) if several and method.fleet.state == "own" else 0
        self.states = States(method.schedule, owners, frozen=all(info.frozen for info in clients))
        # Clients' samples lie one after the other: sample i of client c is row offsets[c] + i.
        self.offsets = [sum(info.samples for info in clients[:c]) for c in range(len(clients) + 1)]
        self.store = ReplayStore(self.offsets[-1], method.store)
        stores = self.delta or self.states.frozen or not isinstance(method.schedule, Always)
        if stores:  # better an error now than in the first B epoch
            sample_bytes = sum(self.store_codec.layout(cut_shape)) + 8
            self.store.check_budget(self.store_codec.name, cut_shape, sample_bytes)
        self.feedback = None
        if down.feedback:
            self.feedback = ErrorFeedback(self.gradient_codec, self.store.capacity, cut_shape, method.store)
        self._clear()

    @property
    def half(self) -> nn.Module:
        """The server half; with one for each client, their average."""
        return self.body.half

    # --- an epoch -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the epoch that the schedule's state names."""
        self.half.train()
        self.body.optimizer.begin(self.states.epoch)
        self._clear()

    def plan(self, client: int) -> bytes:
        """The frame that tells a client what this epoch exchanges."""
        exchange = self.states.of(client)
        share = self.share if exchange is Exchange.BOTH else None
        digest = self.store.digest(self.offsets[client], self.offsets[client + 1]) if self.delta else None
        return pack(Frame(Plan(client, self.states.epoch, exchange.value, share, digest)))

    def calibrates(self) -> bool:
        """Whether clients of this epoch are to measure the statistics of batch norm before they send activations."""
        return self.stale and self.method.norm_in_b == "calibrated" and self.states.exchange is not Exchange.NONE

    def pool_statistics(self) -> None:
        """Pool what clients measured into the shared half."""
        self._statistics = self.shared.settle_statistics()
        self.stale = False

    def statistics_frames(self, client: int) -> list[bytes]:
        """What was pooled in this epoch, for a client that has the rest of the shared half."""
        message = Weights(client, self.states.epoch, statistics=True)
        return [weights_frame(message, self._statistics)] if self._statistics else []

    def take(self, data: bytes, client: int | None = None) -> StepBatch:
        """A client's part of a step, from its frame.

        Raises RefusedError, with nothing applied, for a frame that does not fit the protocol or the epoch's plan, or
        comes from another than this client.
        """
        frame = unpack(data)
        message, epoch = frame.message, self.states.epoch
        if not isinstance(message, Step):
            raise RefusedError(f"server: expected a step, got {message}")
        self.checks.check_client(message.client)
        if client not in (None, message.client):
            raise RefusedError(f"client: expected {client}, got {message.client}")
        if self.joint and message.parts != 1:
            raise RefusedError(
                f"client {message.client}: parts: expected 1, as clients' parts make one batch, got {message}"
            )
        exchange = self.states.of(message.client)
        if exchange is Exchange.NONE or message.epoch != epoch:
            raise RefusedError(f"client {message.client}: epoch: expected epoch {epoch} ({exchange}), got {message}")
        self.checks.check_order(self._last.get(message.client), message, exchange)
        encoded, ids, labels, sent = self.checks.batch(frame, message.client)
        ids = ids + self.offsets[message.client]
        with self.ledger.phase("decode"):
            activations = decoded(self.codec, encoded, self.device, message)
            if sent is not None:
                encoded = self._moved(ids, sent, activations, message)
                activations = self.store_codec.decode(encoded)
        learns = exchange is Exchange.BOTH
        return StepBatch(message.client, activations, labels.to(self.device), message, ids, encoded, learns)

    def train(self, parts: Sequence[StepBatch]) -> list[bytes | None]:
        """Train on the parts as one batch; return the reply to each, None where the client waits for none."""
        body = self._use(parts[0].client)
        sizes = [len(part.labels) for part in parts]
        for part in parts:
            part.activations.requires_grad_(part.learns)
        learns = any(part.learns for part in parts)
        with self.ledger.phase("server"), seeded(self.seed, *self._step_name(parts[0].client), device=self.device):
            if len(parts) > 1:
                inputs = torch.cat([part.activations for part in parts])
            else:  # the half may begin with an operation that works in place, which PyTorch forbids on a leaf
                inputs = parts[0].activations.clone() if learns else parts[0].activations
            with self.training.autocast():
                outputs = body.half(inputs).float()
            pieces = outputs.split(sizes) if len(parts) > 1 else [outputs]
            losses = [self._loss(piece, part) for piece, part in zip(pieces, parts, strict=True)]
            self._update(body, parts, losses)
        for part, loss, size in zip(parts, losses, sizes, strict=True):
            self._add_loss(part.client, loss, size)
        owner = self._owner(parts[0].client)
        self._steps[owner] = self._steps.get(owner, 0) + 1
        forward, backward = self.flops(sum(sizes), input_gradient=learns)
        self.ledger.flops("server", "forward", forward)
        self.ledger.flops("server", "backward", backward)
        return [self._conclude(part, sum(sizes)) for part in parts]

    def drawn(self, client: int | None = None) -> Iterator[Tensor]:
        """Ids, over all clients, of what is kept of a client, or of all, freshly shuffled, in batches."""
        infos = self.clients if client is None else [self.clients[client]]
        sizes = [info.batch_size for info in infos]
        drop_last = any(info.drop_last for info in infos)
        shuffle = generator(self.seed, "replay", self.states.epoch, *((client,) if client else ()))
        ids = (0, self.offsets[-1]) if client is None else (self.offsets[client], self.offsets[client + 1])
        batch_size = sum(sizes) if client is None and self.joint else max(sizes)
        return self.store.draw(batch_size, shuffle, drop_last=drop_last, ids=ids)

    def stored(self, client: int | None = None) -> Iterator[StepBatch]:
        """What is kept of a client, or of all, in the batches that `drawn` names."""
        for ids in self.drawn(client):
            encoded, labels = self.store.get(ids)
            with self.ledger.phase("decode"):
                activations = self.store_codec.decode(encoded.to(self.device))
            yield StepBatch(client, activations, labels.to(self.device))

    def keeps(self, client: int) -> bool:
        """Whether there is anything in the store of this client."""
        return self.store.holds(self.offsets[client], self.offsets[client + 1])

    def replay(self) -> None:
        """Train on the activations that are kept, freshly shuffled across clients, for one epoch."""
        if len(self.store) == 0:
            raise ConfigError("a C epoch needs kept activations, but no B epoch came before it")
        for part in self.stored():
            self.train([part])

    def settle(self) -> None:
        """Average what clients sent of their halves, and the server's own halves if there are several."""
        self.shared.settle()
        if self.halves is not None:
            average = Average()
            for client, samples in sorted(self._begun.items()):
                if samples:
                    average.add(self.halves.take(client).half.state_dict(), samples)
            if average.weight:
                self.half.load_state_dict(average.take())
            self._begun.clear()

    def finish(self) -> float:
        """End the epoch: its mean training loss; the schedule moves on to the next one."""
        self.settle()
        if self.samples == 0 and self.absent:
            raise ClientUnavailableError(f"epoch {self.states.epoch}: no client was there to the end of a step")
        if self.samples == 0:
            raise ConfigError(f"epoch {self.states.epoch} trained on no sample; expected at least one batch")
        loss = self._loss_sum.item() / self.samples
        each = self._client_losses if self.states.own else {}  # reading one waits for the device
        losses = {client: total.item() / count for client, (total, count) in each.items()}
        self.stale = self.stale or self.states.exchange is Exchange.BOTH
        self.states.finish(loss, losses, self.absent)
        return loss

    def evaluate(self) -> dict[str, float]:
        """Mean loss and metrics over the test activations that are kept; clients send theirs when they change."""
        return self.evaluation.scores(self.half, self.flops)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """What a checkpoint holds of the server: its half and optimizer."""
        return {"server": (self.half, self.body.optimizer.optimizer)}

    def stores(self) -> dict[str, Store]:
        """And what is large."""
        stores: dict[str, Store] = {"store": self.store, "test_store": self.evaluation.store}
        if len(self.clients) > 1:
            stores["shared"] = self.shared
        if self.halves is not None:
            stores["server_halves"] = self.halves
        if self.feedback is not None:
            stores["residuals"] = self.feedback.store
        return stores

    def saved(self) -> dict[str, Any]:
        """The states of the schedule as JSON values."""
        return {**self.states.saved(), "stale": self.stale}

    def go_back(self, values: Mapping[str, Any]) -> None:
        """Go on from what `saved` returned."""
        self.states.go_back(values)
        self.stale = values.get("stale", False)

    # --- a step -------------------------------------------------------------------------------------------------

    def _owner(self, client: int | None) -> int:
        """Whose server half trains on this client's samples."""
        return client if self.halves is not None and client is not None else 0

    def _step_name(self, client: int | None) -> tuple[str | int, ...]:
        owner = self._owner(client)
        return ("server", self.states.epoch, self._steps.get(owner, 0), *((owner,) if owner else ()))

    def _use(self, client: int | None) -> TrainedHalf:
        """The half and optimizer to train with: for this client, where each has its own."""
        if self.halves is None or client is None:
            return self.body
        body = self.halves.take(client)
        if client not in self._begun:
            self._begun[client] = 0
            body.half.load_state_dict(self.half.state_dict())
            body.optimizer.begin(self.states.epoch)
        body.half.train()
        return body

    def _loss(self, outputs: Tensor, part: StepBatch) -> Tensor:
        labels = part.labels
        try:
            loss = self.task.loss(outputs, labels)
        except Exception as error:
            raise RefusedBatchError(f"the loss failed on {shapes(outputs, labels)}: {error}", part) from error
        if not self._loss_tried:
            require_mean(self.task.loss, outputs, labels, loss)
            self._loss_tried = True
        # A C epoch trains on what was checked before, and `finish` checks its mean; there the host does not wait.
        if self.states.exchange is not Exchange.NONE and not isfinite(loss):
            raise DivergedError(
                f"epoch {self.states.epoch}, step {self._steps.get(0, 0)}: the loss is {loss.item()}, not finite, "
                "though activations and labels are; lower the learning rate"
            )
        return loss

    def _update(self, body: TrainedHalf, parts: Sequence[StepBatch], losses: list[Tensor]) -> None:
        """Backward, and update. The loss of parts is their mean over all samples.

        For a part of a client's step the loss is weighted by its share of the samples, and the update follows the last.
        """
        message, count = parts[0].message, sum(len(part.labels) for part in parts)
        if message is None or message.part == 0:
            body.optimizer.zero_grad()
        if len(parts) > 1:
            shares = [len(part.labels) / count for part in parts]
            total = torch.stack([loss * share for loss, share in zip(losses, shares, strict=True)]).sum()
        elif message is not None and message.parts > 1:
            total = losses[0] * (count / message.samples)
        else:
            total = losses[0]
        total.backward()
        if parts[0].ends_step:
            body.optimizer.step()

    def _add_loss(self, client: int | None, loss: Tensor, samples: int) -> None:
        weighted = loss.detach().double() * samples
        self._loss_sum += weighted
        self.samples += samples
        if client is not None:
            before, count = self._client_losses.get(client, (0.0, 0))
            self._client_losses[client] = (before + weighted, count + samples)
            if client in self._begun:
                self._begun[client] += samples

    def _conclude(self, part: StepBatch, count: int) -> bytes | None:
        """After the update: keep the activations of a B epoch; the reply in an A epoch."""
        message = part.message
        if message is None or part.client is None or part.ids is None or part.encoded is None:
            return None
        self._last[part.client] = message
        if not part.learns or self.delta:
            with self.ledger.phase("store"):
                self.store.put(part.ids, part.encoded, part.labels.cpu())
        if not part.learns:
            return None
        with self.ledger.phase("encode"):
            gradients = part.activations.grad
            if gradients is None or not isfinite(gradients):
                raise DivergedError(f"{message}: gradients at the cut are not finite; lower the learning rate")
            if count != len(part.labels):  # of its own part's mean loss
                gradients = gradients * (count / len(part.labels))
            number = (message.part,) if message.parts > 1 else ()
            name = ("encode", "down", message.client, message.epoch, message.step, *number)
            seed = derive(self.seed, *name)
            if self.feedback is not None:
                encoded = self.feedback.encode(part.ids, gradients, seed)
            else:
                encoded = self.gradient_codec.encode(gradients, seed)
            update = Update(message.client, message.epoch, message.step, message.part)
            return pack(Frame(update, {"gradients": encoded}))

    def _clear(self) -> None:
        """What is counted in one epoch only."""
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._client_losses: dict[int, tuple[Any, int]] = {}
        self._steps: dict[int, int] = {}
        self._begun: dict[int, int] = {}
        self._last: dict[int, Step] = {}
        self.samples = 0
        self.absent: set[int] = set()
        self.shared.forget()

    def _moved(self, ids: Tensor, sent: Tensor, changes: Tensor, message: Step) -> Encoded:
        """The references of these samples after their changes; see `delta`."""
        client, anew = message.client, message.anew and message.part == 0
        known = self.store.present(ids) & (not anew)
        if not bool((sent | known).all()):
            lacking = (ids - self.offsets[client])[~(sent | known)].tolist()
            raise RefusedError(f"client {client}: sent: expected changes of samples {lacking}, which have no reference")
        if anew:
            self.store.clear(self.offsets[client], self.offsets[client + 1])
        return moved(references(self.store, ids, changes), sent.to(changes.device), changes)
