"""3, 9. The client half: forward, and in an A epoch backward and update. Holds the data; never sees the server half."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cutlayer.errors import ConfigError, DivergedError, RefusedError
from cutlayer.feed import Batch, Feed
from cutlayer.flops import FlopTable
from cutlayer.formats import encode_exactly, get_float_codec, isfinite
from cutlayer.ledger import Ledger
from cutlayer.method import Method, Training
from cutlayer.optim import ScheduledOptimizer
from cutlayer.schedule import Exchange
from cutlayer.seeds import derive, seeded
from cutlayer.wire.frames import Evaluate, Frame, Plan, Step, Update, pack, unpack


def _part(message: Step | Evaluate) -> tuple[int, ...]:
    """What a part adds to the name of a random draw; nothing where a batch is whole."""
    return (message.part,) if isinstance(message, Step) and message.parts > 1 else ()


class Client:
    """One client: its half, its data, its optimizer.

    Args:
        number: the client's number, from 0.
        half: from a batch of inputs to the activations at the cut.
        train, test: its batches for training and, if it has any, for evaluation.
    """

    def __init__(
        self,
        number: int,
        half: nn.Module,
        train: Feed,
        test: Feed | None,
        method: Method,
        training: Training,
        ledger: Ledger,
    ) -> None:
        self.number, self.train, self.test = number, train, test
        self.device = torch.device(training.device)
        if not any(parameter.requires_grad for parameter in half.parameters()):
            raise ConfigError("nothing to train in the client half: it has no parameters, or all are frozen")
        sample = train.sample()
        # The table copies the half, so it comes before the half's first pass.
        self.flops = FlopTable(half, tuple(sample.inputs.shape[1:]), sample.inputs.dtype)
        self.half = half.to(self.device)
        self.optimizer = ScheduledOptimizer(training.client, self.half.parameters(), training.epochs)
        self.method, self.seed, self.ledger = method, training.seed, ledger
        self.codec = get_float_codec(method.activations)
        self.gradient_codec = get_float_codec(method.gradients)
        self.cut_shape = self.flops.output_shape
        self.plan = Plan(number, -1, "")
        self.pending: deque[tuple[Step, Tensor]] = deque()

    def begin(self, data: bytes) -> None:
        """Take the server's plan for an epoch that exchanges something."""
        plan = unpack(data).message
        if not isinstance(plan, Plan) or plan.client != self.number or plan.exchange not in ("A", "B"):
            raise RefusedError(f"client {self.number}: expected its plan for an A or a B epoch, got {plan}")
        self.plan, self.pending = plan, deque()
        self.half.train()
        if self.exchange is Exchange.ACTIVATIONS and self.method.norm_in_b == "eval":
            for module in self.half.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        self.optimizer.begin(plan.epoch)

    @property
    def exchange(self) -> Exchange:
        """What the epoch under way exchanges."""
        return Exchange(self.plan.exchange)

    def batches(self) -> Iterator[Batch]:
        """The training batches of the epoch under way."""
        return self._timed(self.train.epoch(self.plan.epoch))

    def forward(self, step: int, batch: Batch) -> Callable[[], bytes]:
        """Run a batch through the half. Only an A epoch builds a graph.

        Returns a call that encodes the activations and makes the frame, with ids and labels. It may be made in another
        thread, while the next batch is in the half.
        """
        self.pending.clear()
        return self._forward(Step(self.number, self.plan.epoch, step), batch)

    def forward_parts(self, step: int, batch: Batch, parts: int) -> Iterator[Callable[[], bytes]]:
        """`forward` for a batch in up to so many parts, each when it is asked for; `backward` takes the replies.

        Without parts, and in a B epoch, this is the one of `forward`. The updates equal those of the whole batch
        up to the order of float additions, except that batch norm normalizes each part by itself.
        """
        size = -(-len(batch.ids) // parts)
        if size == len(batch.ids) or self.exchange is not Exchange.BOTH:
            yield self.forward(step, batch)
            return
        self.pending.clear()
        pieces = list(zip(*(tensor.split(size) for tensor in (batch.ids, batch.inputs, batch.labels)), strict=True))
        for part, piece in enumerate(pieces):
            message = Step(self.number, self.plan.epoch, step, part, len(pieces), len(batch.ids))
            yield self._forward(message, Batch(*piece))

    def _forward(self, message: Step, batch: Batch) -> Callable[[], bytes]:
        learns = self.exchange is Exchange.BOTH
        with self.ledger.phase("client forward"):
            name = ("client", self.number, message.epoch, message.step, *_part(message))
            with torch.set_grad_enabled(learns), seeded(self.seed, *name, device=self.device):
                activations = self.half(batch.inputs.to(self.device, non_blocking=True))
        if learns:
            self.pending.append((message, activations))
        self.ledger.flops("client", "forward", self.flops(len(batch.ids))[0])
        return partial(self._frame, message, batch, activations)

    def backward(self, data: bytes) -> None:
        """Finish the step, or the part of one, that waits for these gradients: backward, and after all parts update."""
        frame = unpack(data)
        nothing = Step(self.number, self.plan.epoch, -1), torch.empty(0)
        message, activations = self.pending[0] if self.pending else nothing
        expected = Update(self.number, message.epoch, message.step, message.part)
        if frame.message != expected or list(frame.tensors) != ["gradients"]:
            raise RefusedError(
                f"client {self.number}: expected the gradients of epoch {message.epoch}, step {message.step}, "
                f"part {message.part}, got {frame.message}"
            )
        encoded = frame.tensors["gradients"]
        if (encoded.codec, len(encoded), encoded.shape) != (
            self.gradient_codec.name,
            len(activations),
            self.cut_shape,
        ):
            raise RefusedError(
                f"client {self.number}: expected gradients in {self.gradient_codec.name} of shape "
                f"{list(activations.shape)}, got {encoded.codec} of shape {[len(encoded), *encoded.shape]}"
            )
        with self.ledger.phase("decode"):
            gradients = self.gradient_codec.decode(encoded.to(self.device))
            if not isfinite(gradients):
                raise RefusedError(f"client {self.number}: gradients: expected finite values, got infinities or NaN")
        with self.ledger.phase("client backward"):
            if message.part == 0:
                self.optimizer.zero_grad()
            activations.backward(gradients)
            if message.part + 1 == message.parts:
                self.optimizer.step()
        self.ledger.flops("client", "backward", self.flops(len(encoded))[1])
        self.pending.popleft()

    def evaluation_frames(self, epoch: int) -> Iterator[bytes]:
        """The activations of the test data with the half as it is after this epoch, batch by batch, as frames."""
        if self.test is None:
            return
        self.half.eval()
        for step, batch in enumerate(self._timed(self.test.epoch(0))):
            with self.ledger.phase("evaluation"), torch.no_grad():
                activations = self.half(batch.inputs.to(self.device))
            self.ledger.flops("client", "evaluation", self.flops(len(batch.ids), training=False)[0])
            yield self._frame(Evaluate(self.number, epoch, step), batch, activations)

    def _frame(self, message: Step | Evaluate, batch: Batch, activations: Tensor) -> bytes:
        with self.ledger.phase("encode"):
            if not isfinite(activations):
                what = "evaluation after epoch" if isinstance(message, Evaluate) else "epoch"
                raise DivergedError(
                    f"client {self.number}, {what} {message.epoch}, step {message.step}: activations at the cut are "
                    "not finite; lower the learning rate, or look for inputs that are not finite"
                )
            name = ("encode", "up", self.number, message.epoch, message.step, *_part(message))
            encoded = self.codec.encode(activations, derive(self.seed, *name))
            return pack(
                Frame(
                    message,
                    {
                        "ids": encode_exactly(batch.ids),
                        "labels": encode_exactly(batch.labels),
                        "activations": encoded,
                    },
                )
            )

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with self.ledger.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
