"""6, 7. The server half: loss, backward, update, gradients at the cut. Never sees the data or the client half."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cutlayer.delta import REFERENCE, moved, references
from cutlayer.errors import ConfigError, DivergedError, RefusedError
from cutlayer.feedback import ErrorFeedback
from cutlayer.flops import FlopTable
from cutlayer.formats import Codec, Encoded, evaluation_codec, get_transfer, isfinite
from cutlayer.intake import ClientInfo, Intake, classes_of
from cutlayer.ledger import Ledger
from cutlayer.method import Method, Task, Training
from cutlayer.optim import ScheduledOptimizer
from cutlayer.replay import ReplayStore
from cutlayer.schedule import Always, Exchange, State
from cutlayer.seeds import derive, generator, seeded
from cutlayer.wire.frames import Evaluate, Frame, Plan, Step, Update, pack, unpack


class Server:
    """The server: its half, its optimizer, the schedule's state and the activations it keeps.

    Args:
        half: from the activations at the cut to the outputs.
        clients: what is known of each client, by number.
        cut_shape: shape of one sample's activations.
    """

    def __init__(
        self,
        half: nn.Module,
        clients: list[ClientInfo],
        cut_shape: tuple[int, ...],
        method: Method,
        training: Training,
        task: Task,
        ledger: Ledger,
    ) -> None:
        self.device = torch.device(training.device)
        # The table copies the half, so it comes before the half's first pass.
        self.flops = FlopTable(half, cut_shape, torch.float32)
        self.half = half.to(self.device)
        self.optimizer = ScheduledOptimizer(training.server, self.half.parameters(), training.epochs)
        self.clients, self.cut_shape, self.ledger, self.task = clients, cut_shape, ledger, task
        self.method, self.seed, self.precision = method, training.seed, training.precision
        up, down = get_transfer(method.activations), get_transfer(method.gradients)
        self.codec, self.gradient_codec, self.test_codec = up.codec, down.codec, evaluation_codec(up)
        self.delta = up.delta is not None
        self.store_codec = REFERENCE if self.delta else self.codec
        classes = classes_of(task, self.flops.output_shape)
        self.intake = Intake(clients, cut_shape, self.codec.name, self.test_codec.name, classes, self.delta)
        self.state: State = method.schedule.start()
        # Clients' samples lie one after the other: sample i of client c is row offsets[c] + i.
        self.offsets = [sum(info.samples for info in clients[:c]) for c in range(len(clients))]
        self.test_offsets = [sum(info.test_samples for info in clients[:c]) for c in range(len(clients))]
        self.store = ReplayStore(sum(info.samples for info in clients), method.store)
        self.test_store = ReplayStore(sum(info.test_samples for info in clients), method.store)
        self.stores = {"store": self.store, "test_store": self.test_store}
        if self.delta or not isinstance(method.schedule, Always):  # better an error now than in the first B epoch
            sample_bytes = sum(self.store_codec.layout(cut_shape)) + 8
            self.store.check_budget(self.store_codec.name, cut_shape, sample_bytes)
        self.feedback = None
        if down.feedback:
            self.feedback = ErrorFeedback(self.gradient_codec, self.store.capacity, cut_shape, method.store)
            self.stores["residuals"] = self.feedback.store
        self._last: dict[int, tuple[Step, bytes | None]] = {}
        self._begin_sums()

    # --- an epoch -----------------------------------------------------------------------------------------------

    @property
    def exchange(self) -> Exchange:
        """What the epoch under way exchanges."""
        return self.state.exchange

    def begin(self) -> None:
        """Begin the epoch that the schedule's state names."""
        self.half.train()
        self.optimizer.begin(self.state.epoch)
        self._begin_sums()

    def go_back(self, state: State) -> None:
        """Go on from this state of the schedule; what was answered after it is forgotten."""
        self.state = state
        self._last.clear()

    def plan(self, client: int) -> bytes:
        """The frame that tells a client what this epoch exchanges."""
        start = self.offsets[client]
        digest = self.store.digest(start, start + self.clients[client].samples) if self.delta else None
        return pack(Frame(Plan(client, self.state.epoch, self.exchange.value, digest)))

    def receive(self, data: bytes) -> bytes | None:
        """Take one frame from a client; return the reply, if there is one.

        Raises RefusedError, with nothing applied, for a frame that does not fit the protocol or the epoch's plan. A
        step that comes a second time gets the reply of the first.
        """
        frame = unpack(data)
        message = frame.message
        if isinstance(message, Evaluate):
            self._keep(frame, message)
            return None
        if not isinstance(message, Step):
            raise RefusedError(f"server: expected a step or an evaluation, got {message}")
        client, epoch = message.client, self.state.epoch
        self.intake.check_client(client)
        last, reply = self._last.get(client, (None, None))
        if message == last:
            return reply  # asked for again, perhaps after the epoch has ended
        if self.exchange is Exchange.NONE or message.epoch != epoch:
            raise RefusedError(f"client {client}: epoch: expected epoch {epoch} ({self.exchange}), got {message}")
        self.intake.check_order(last if last is not None and last.epoch == epoch else None, message, self.exchange)
        reply = self._step(frame, message)
        self._last[client] = (message, reply)
        return reply

    def replay(self) -> None:
        """Train on the activations that are kept, freshly shuffled, for one epoch."""
        if len(self.store) == 0:
            raise ConfigError("a C epoch needs kept activations, but no B epoch came before it")
        drop_last = any(info.drop_last for info in self.clients)
        batch_size = max(info.batch_size for info in self.clients)
        shuffle = generator(self.seed, "replay", self.state.epoch)
        for encoded, labels in self.store.batches(batch_size, shuffle, drop_last=drop_last):
            with self.ledger.phase("decode"):
                activations = self.store_codec.decode(encoded.to(self.device))
            self._train(activations, labels.to(self.device))

    def finish(self) -> float:
        """End the epoch: its mean training loss; the schedule moves on to the next one."""
        if self.samples == 0:
            raise ConfigError(f"epoch {self.state.epoch} trained on no sample; expected at least one batch")
        loss = self._loss_sum.item() / self.samples
        self.state = self.method.schedule.next(self.state, loss)
        return loss

    def evaluate(self) -> dict[str, float]:
        """Mean loss and metrics over the test activations that are kept; clients send theirs when they change."""
        self.half.eval()
        sums: dict[str, float] = dict.fromkeys(["loss", *self.task.metrics], 0.0)
        batch_size = max(info.batch_size for info in self.clients)
        with self.ledger.phase("evaluation"), torch.no_grad():
            for encoded, labels in self.test_store.batches(batch_size):
                labels = labels.to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    outputs = self.half(self.test_codec.decode(encoded.to(self.device)))
                outputs = outputs.float()
                scores = {"loss": self.task.loss, **self.task.metrics}
                for name, score in scores.items():
                    sums[name] += float(score(outputs, labels)) * len(labels)
                self.ledger.flops("server", "evaluation", self.flops(len(labels), training=False)[0])
        return {name: value / len(self.test_store) for name, value in sums.items()} if len(self.test_store) else {}

    # --- a step -------------------------------------------------------------------------------------------------

    def _step(self, frame: Frame, message: Step) -> bytes | None:
        encoded, ids, labels, sent = self.intake.batch(frame, message.client)
        ids = ids + self.offsets[message.client]
        with self.ledger.phase("decode"):
            activations = self._decoded(self.codec, encoded, message)
            if sent is not None:
                encoded = self._moved(ids, sent, activations, message)
                activations = self.store_codec.decode(encoded)
        if self.exchange is Exchange.BOTH:
            activations.requires_grad_()
        self._train(activations, labels.to(self.device), message)
        if self.exchange is Exchange.ACTIVATIONS or self.delta:
            with self.ledger.phase("store"):
                self.store.put(ids, encoded, labels)
        if self.exchange is Exchange.ACTIVATIONS:
            return None
        with self.ledger.phase("encode"):
            gradients = activations.grad
            if gradients is None or not isfinite(gradients):
                raise DivergedError(f"{message}: gradients at the cut are not finite; lower the learning rate")
            part = (message.part,) if message.parts > 1 else ()
            name = ("encode", "down", message.client, message.epoch, message.step, *part)
            seed = derive(self.seed, *name)
            if self.feedback is not None:
                encoded = self.feedback.encode(ids, gradients, seed)
            else:
                encoded = self.gradient_codec.encode(gradients, seed)
            update = Update(message.client, message.epoch, message.step, message.part)
            return pack(Frame(update, {"gradients": encoded}))

    def _train(self, activations: Tensor, labels: Tensor, message: Step | None = None) -> None:
        """Forward, loss, backward and update for a batch; gradients at the cut only if the activations want them.

        For a part of a step the loss is weighted by its share of the samples, and the update follows the last part.
        """
        part, parts = (message.part, message.parts) if message is not None else (0, 1)
        with (
            self.ledger.phase("server"),
            seeded(self.seed, "server", self.state.epoch, self._steps, device=self.device),
        ):
            # The half may begin with an operation that works in place, which PyTorch forbids on a leaf with gradients.
            inputs = activations.clone() if activations.requires_grad else activations
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                outputs = self.half(inputs)
            try:
                loss = self.task.loss(outputs.float(), labels)
            except Exception as error:
                shapes = f"outputs {list(outputs.shape)} and labels {labels.dtype} {list(labels.shape)}"
                raise RefusedError(f"the loss failed on {shapes}: {error}") from error
            if loss.dim() != 0:
                raise ConfigError(
                    f"expected the loss to be a mean over the batch, a scalar; got shape {list(loss.shape)}"
                )
            # A C epoch trains on what was checked before, and `finish` checks its mean; there the host does not wait.
            if self.exchange is not Exchange.NONE and not isfinite(loss):
                raise DivergedError(
                    f"epoch {self.state.epoch}, step {self._steps}: the loss is {loss.item()}; lower the learning "
                    "rate, or look for labels that are not finite"
                )
            if part == 0:
                self.optimizer.zero_grad()
            weighted = loss if message is None or parts == 1 else loss * (len(labels) / message.samples)
            weighted.backward()
            if part + 1 == parts:
                self.optimizer.step()
            self._loss_sum += loss.detach().double() * len(labels)
        self.samples += len(labels)
        self._steps += 1
        forward, backward = self.flops(len(labels), input_gradient=activations.requires_grad)
        self.ledger.flops("server", "forward", forward)
        self.ledger.flops("server", "backward", backward)

    def _begin_sums(self) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.samples = self._steps = 0

    # --- what comes in ------------------------------------------------------------------------------------------

    def _keep(self, frame: Frame, message: Evaluate) -> None:
        if message.epoch != self.state.epoch - 1 or message.step < 0:
            raise RefusedError(
                f"client {message.client}: expected an evaluation after epoch {self.state.epoch - 1}, got {message}"
            )
        encoded, ids, labels, _ = self.intake.batch(frame, message.client, test=True)
        self._decoded(self.test_codec, encoded, message)
        self.test_store.put(ids + self.test_offsets[message.client], encoded, labels)

    def _moved(self, ids: Tensor, sent: Tensor, changes: Tensor, message: Step) -> Encoded:
        """The references of these samples after their changes; see `delta`."""
        client, anew = message.client, message.anew and message.part == 0
        known = self.store.present(ids) & (not anew)
        if not bool((sent | known).all()):
            lacking = (ids - self.offsets[client])[~(sent | known)].tolist()
            raise RefusedError(f"client {client}: sent: expected changes of samples {lacking}, which have no reference")
        if anew:
            self.store.clear(self.offsets[client], self.offsets[client] + self.clients[client].samples)
        return moved(references(self.store, ids, changes), sent.to(changes.device), changes)

    def _decoded(self, codec: Codec, encoded: Encoded, message: object) -> Tensor:
        activations = codec.decode(encoded.to(self.device))
        if not isfinite(activations):
            raise RefusedError(f"{message}: activations: expected finite values, got infinities or NaN")
        return activations
