"""The client half: forward, and in an A epoch backward and update. Has the data; never sees the server half."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from cutlayer.data.batches import Batch
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.models.auxiliary import SelfTraining
from cutlayer.models.cut import is_frozen
from cutlayer.models.flops import FlopTable
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Store
from cutlayer.schedule import Exchange
from cutlayer.seeds import seeded
from cutlayer.training.averaging import load_statistics, load_weights, weights_frame
from cutlayer.training.calibration import CALIBRATION_BATCHES, calibrate, norm_layers, set_mode, statistics
from cutlayer.training.client_frames import ClientFrames, microbatch_name
from cutlayer.training.defended import Defended
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import ClientJob
from cutlayer.training.local import LocalTraining
from cutlayer.wire.frames import Frame, Received, pack
from cutlayer.wire.messages import Calibrate, Done, Evaluate, EvaluationRequest, Plan, Step, Update, Weights


class Client:
    """One client: its half, its data, its optimizer. It does what the server's frames say: see `answers`.

    Args:
        job: its number, its batches and the choices of the run.
        trained: its half, from a batch of inputs to the activations at the cut, and its optimizer; asked for at every
            use.
        flops: of such a half, if another client has the table already.
        on_done: called when all of an epoch or an evaluation is done, before the server hears of it; returns the
            FLOPs to tell it of.
    """

    def __init__(
        self,
        job: ClientJob,
        trained: Callable[[], TrainedHalf],
        ledger: Ledger,
        flops: FlopTable | None = None,
        on_done: Callable[[Plan | EvaluationRequest | Calibrate], dict[str, int]] = lambda message: {},
    ) -> None:
        number, train, method = job.number, job.train, job.method
        self.number, self.train, self.test = number, train, job.test
        self.device = torch.device(job.training.device)
        self._trained, self.on_done = trained, on_done
        sample, half = train.sample(), trained().half
        self.first_labels = sample.labels
        shape, dtype = tuple(sample.inputs.shape[1:]), sample.inputs.dtype
        self.flops = flops or FlopTable(half, shape, dtype)  # which copies the half: before its first pass
        if (shape, dtype) != (self.flops.sample_shape, self.flops.dtype):
            expected, got = f"{self.flops.dtype} {list(self.flops.sample_shape)}", f"{dtype} {list(shape)}"
            raise ConfigError(f"client {number}: expected samples {expected}, as the others', got {got}")
        self.method, self.training, self.seed, self.ledger = method, job.training, job.training.seed, ledger
        self.cut_shape = self.flops.output_shape
        self.frames = ClientFrames(job, self.cut_shape, ledger)
        self.deltas = self.frames.deltas
        self._local = LocalTraining(job, trained, ledger, self.flops) if isinstance(half, SelfTraining) else None
        self.defence = Defended(job, shape, self.cut_shape, ledger)
        self.anew, self._updates = False, len(train.batch_sizes())
        self.plan = Plan(number, -1, "")
        self.pending: deque[tuple[Step, Tensor, list[Tensor]]] = deque()
        self._ahead: Batch | None = None
        self._source: Iterator[Batch] = iter(())
        self._steps = 0
        self._shares = self.has_shared = False
        self._pooling: int | None = None
        """The epoch before which pooled statistics are to come."""

    @property
    def half(self) -> nn.Module:
        """The client half."""
        return self._trained().half

    def stores(self) -> dict[str, Store]:
        """What a checkpoint of this client holds beside its half and optimizer."""
        references: dict[str, Store] = {} if self.deltas is None else {"references": self.deltas.store}
        return references | self.defence.stores()

    @property
    def exchange(self) -> Exchange:
        """What the epoch under way exchanges."""
        return Exchange(self.plan.exchange)

    @property
    def waits(self) -> bool:
        """Whether it is in the midst of an A epoch and waits for the server."""
        return bool(self.pending) or self._shares

    # --- an epoch, in the order of its frames ---

    def answers(self, received: Received) -> Iterator[Callable[[], bytes]]:
        """Take a frame from the server; what is to be sent in answer, as calls that make the frames.

        A batch goes through the half when the iterator is asked for the next call; the call encodes it. Calls are made
        in their order, but another thread may make them, while the next batch is in the half.

        A plan is answered with the batches of the epoch: all of them if no gradients come back, otherwise the first,
        and each update with the next one. New weights are taken over.

        Raises RefusedError for a frame that does not fit.
        """
        message = received.message
        if isinstance(message, Plan):
            self.begin(message)
            return self._go_on()
        if isinstance(message, Update):
            return self._after_update() if self.backward(received) else iter(())
        if isinstance(message, Calibrate):
            return self._calibrate(message)
        if isinstance(message, Weights) and message.statistics:
            self._require(message.epoch == self._pooling, "pooled statistics that it asked for", message)
            load_statistics(self.half, received, f"client {self.number}")
            self._pooling = None
            return iter(())
        if isinstance(message, Weights):
            ready = self._ahead is None and not self.pending  # between epochs
            solicited = message.step == self._steps if self._shares else message.step == 0 and ready
            self._require(solicited, "weights before or after an epoch, or those that it waits for", message)
            load_weights(self.half, received, f"client {self.number}")
            self.has_shared = True
            return self._go_on() if message.step > 0 and self._shares else iter(())
        if isinstance(message, EvaluationRequest):
            return self._evaluation(message)
        raise RefusedError(f"client {self.number}: expected a plan, an update, weights or a question, got {message}")

    def begin(self, plan: Plan) -> None:
        """Begin the epoch of the server's plan."""
        if plan.client != self.number or plan.exchange not in ("A", "B"):
            raise RefusedError(f"client {self.number}: expected its plan for an A or a B epoch, got {plan}")
        if plan.exchange == "A" and is_frozen(self.half):
            raise RefusedError(f"client {self.number}: its half is frozen: expected a plan for a B epoch, got {plan}")
        self.leave()
        self.plan, self._steps = plan, 0
        self.anew = self.deltas is not None and not self.deltas.agree(plan.references)
        self._trained().optimizer.begin(plan.epoch)
        batches = self.ledger.each("data", self.train.epoch(plan.epoch))
        self._source = batches if self._local is None else self._local.epoch(plan.epoch, batches)
        self._ahead = next(self._source, None)

    def _calibrate(self, message: Calibrate) -> Iterator[Callable[[], bytes]]:
        """Measure the statistics of batch norm on the first batches of the epoch to come; send them if asked to.

        They leave the client only if it shares its half with others, whose weights it then has from the server.
        """
        chosen = self.method.norm_in_b == "calibrated" and (self.has_shared or not message.share)
        self._require(
            chosen and message.client == self.number,
            "to measure statistics before an epoch as its own choices say",
            message,
        )
        self._pooling = message.epoch if message.share else None
        half = self.half
        if calibrates := bool(norm_layers(half)) and not is_frozen(half):
            calibrate(half.train(), partial(self._measure, message))
        if message.share:
            answer = Weights(self.number, message.epoch, statistics=True, evaluation=message.evaluation)
            yield partial(weights_frame, answer, statistics(half) if calibrates else {})
        if message.evaluation:
            yield partial(self._done, message, 0)

    def _measure(self, message: Calibrate) -> None:
        epoch, what = message.epoch, "evaluation" if message.evaluation else "forward"
        for step, batch in enumerate(islice(self.ledger.each("data", self.train.epoch(epoch)), CALIBRATION_BATCHES)):
            with (
                self.ledger.phase("evaluation" if message.evaluation else "client forward"),
                seeded(self.seed, "calibrate", self.number, epoch, step, device=self.device),
            ):
                self._pass(self.half, batch)
            self.ledger.flops("client", what, self.flops(len(batch.ids))[0])

    def _require(self, ok: bool, expected: str, got: object) -> None:
        if not ok:
            raise RefusedError(f"client {self.number}: expected {expected}, got {got}")

    def leave(self) -> None:
        """Leave the epoch under way, if there is one, unfinished."""
        self._source, self._ahead, self._shares = iter(()), None, False
        self.pending.clear()
        self._trained().pinned = False

    def _go_on(self) -> Iterator[Callable[[], bytes]]:
        """From here to the next frame that the client waits for, or to the end of the epoch."""
        self._shares = False
        while self._ahead is not None:
            batch, self._ahead = self._ahead, next(self._source, None)
            self._steps += 1
            yield from self.forward(self._steps - 1, batch)
            if self.exchange is Exchange.BOTH:
                return
        yield partial(self._done, self.plan, self._steps)

    def _after_update(self) -> Iterator[Callable[[], bytes]]:
        share, last = self.plan.share, self._ahead is None
        if last:
            self._trained().end(self.plan)
        if share is not None and (last or (share > 0 and self._steps % share == 0)):
            self._shares = not last
            message = Weights(self.number, self.plan.epoch, self._steps, last)
            yield partial(weights_frame, message, self.half.state_dict())
            if not last:
                return
        yield from self._go_on()

    def _evaluation(self, ask: EvaluationRequest) -> Iterator[Callable[[], bytes]]:
        """The activations of the test data with the half as it is now, batch by batch."""
        steps = 0
        for batch in self.ledger.each("data", self.test.epoch(0)) if self.test is not None else ():
            half = self.half.eval()
            with self.ledger.phase("evaluation"), torch.no_grad():
                activations = self._pass(half, batch)
            self.ledger.flops("client", "evaluation", self.flops(len(batch.ids), training=False)[0])
            message = Evaluate(self.number, ask.epoch, steps)
            yield partial(self.frames.activations, message, batch, self.defence.noisy(message, activations))
            steps += 1
        yield partial(self._done, ask, steps)

    def _done(self, message: Plan | EvaluationRequest | Calibrate, steps: int) -> bytes:
        asked = not isinstance(message, Plan)
        return pack(Frame(Done(self.number, message.epoch, steps, self.on_done(message), evaluation=asked)))

    # --- a step ---

    def forward(self, step: int, batch: Batch) -> Iterator[Callable[[], bytes]]:
        """The activations of a batch, with ids and labels, in one frame, or in as many as the batch has microbatches.

        Only an A epoch builds a graph; there `backward` takes the replies. The updates of microbatches equal those of
        the whole batch up to the order of float additions, except that batch norm normalizes each microbatch by itself.
        """
        size, anew = -(-len(batch.ids) // self.training.microbatches), self.anew and step == 0
        self.pending.clear()
        if size == len(batch.ids) or self.exchange is not Exchange.BOTH:
            yield self._forward(Step(self.number, self.plan.epoch, step, anew=anew), batch)
            return
        pieces = list(zip(*(tensor.split(size) for tensor in (batch.ids, batch.inputs, batch.labels)), strict=True))
        for number, piece in enumerate(pieces):
            message = Step(self.number, self.plan.epoch, step, number, len(pieces), len(batch.ids), anew)
            yield self._forward(message, Batch(*piece))

    def _forward(self, message: Step, batch: Batch) -> Callable[[], bytes]:
        gradients_come, trained = self.exchange is Exchange.BOTH, self._trained()
        activations = self._activations(message, batch) if self._local is None else batch.inputs
        penalties = self.defence.penalties(message, batch, activations) if gradients_come else []
        activations = self.defence.noisy(message, activations)
        if gradients_come:
            trained.pinned = True
            self.pending.append((message, activations, penalties))
        shown = self.defence.shown(message, batch, gradients_come)
        return partial(self.frames.activations, message, shown, activations)

    def _activations(self, message: Step, batch: Batch) -> Tensor:
        half, gradients_come = self._trained().half, self.exchange is Exchange.BOTH
        set_mode(half, not gradients_come and self.method.norm_in_b != "train")
        self.ledger.flops("client", "forward", self.flops(len(batch.ids))[0])
        name = ("client", self.number, message.epoch, message.step, *microbatch_name(message))
        with (
            self.ledger.phase("client forward"),
            torch.set_grad_enabled(gradients_come),
            seeded(self.seed, *name, device=self.device),
        ):
            return self._pass(half, batch)

    def _pass(self, half: nn.Module, batch: Batch) -> Tensor:
        with self.training.autocast():
            return half(self.training.laid_out(batch.inputs.to(self.device, non_blocking=True)))

    def backward(self, received: Received) -> bool:
        """Finish the step, or its microbatch, that waits for these gradients: backward, and after the last one update.

        Returns whether the step is finished.
        """
        nothing: tuple[Step, Tensor, list[Tensor]] = Step(self.number, self.plan.epoch, -1), torch.empty(0), []
        message, activations, penalties = self.pending[0] if self.pending else nothing
        gradients = self.frames.gradients(received, message, len(activations))
        trained = self._trained()
        with self.ledger.phase("client backward"):
            if message.starts:
                trained.optimizer.zero_grad()
            gradients = self.training.laid_out(gradients.to(activations.dtype))
            torch.autograd.backward([activations, *penalties], [gradients, *(None for _ in penalties)])
            if message.ends and self.defence.accepts(message, trained.half):
                trained.update(self.plan, message.step / self._updates)
        self.ledger.flops("client", "backward", self.flops(len(gradients))[1])
        self.pending.popleft()
        trained.pinned = not message.ends
        return not trained.pinned
