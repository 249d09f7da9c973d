"""Taking part in a run from a device without PyTorch: B epochs, which need the forward pass alone, and evaluations."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from cutlayer.backends.grpc.calls import wait_for_config
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.backends.grpc.session import Pause, Session, own_name
from cutlayer.device.choices import NEEDS_TORCH, Choices, frozen_structure
from cutlayer.device.encode import DeviceCodec, integers
from cutlayer.device.half import Data, DeviceHalf, batches, frame
from cutlayer.device.order import epoch_order
from cutlayer.durable import make_folder, replace
from cutlayer.errors import ConfigError, RefusedError, harmless
from cutlayer.wire.envelope import Field, frame_length, header_of, seal
from cutlayer.wire.messages import (
    Calibrate,
    Done,
    Evaluate,
    EvaluationRequest,
    Finished,
    Hello,
    Message,
    Plan,
    Refusal,
    Saved,
    Step,
    Weights,
)

log = logging.getLogger("cutlayer.device")
T = TypeVar("T")
FROM_SERVER = 1 << 22
"""Bytes of the largest frame that a server has reason to send a device, which gets no gradients."""


class Joining:
    """A run as a device sees it.

    Args:
        folder: remembers in which run it took part, and how far.
        on_epoch: called after each epoch with its number.
    """

    def __init__(
        self,
        half: DeviceHalf,
        train: Data,
        test: Data | None,
        folder: Path,
        name: str,
        on_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        self.half, self.train, self.test, self.name, self.on_epoch = half, train, test, name, on_epoch
        for data in (train, test):
            if data is not None:
                half.check(data)
        make_folder(folder)
        self._file = folder / "device-run.json"
        self.run, self.epochs = self._remembered()
        self.codec, self.test_codec = DeviceCodec(half.facts["codec"]), DeviceCodec(half.facts["evaluation_codec"])
        self.number, self._flops = 0, 0
        self._patience: float | None = None  # seconds without a server, after which to give up

    def take_part(self, server: Endpoint, give_up_after: float | None = None) -> None:
        """Take part to the run's end. Raises ConfigError, RefusedError, TimeoutError."""
        self._patience = give_up_after
        config = wait_for_config(server.address, server.tls, give_up_after)
        self.choices, self.terms = Choices.checked(config, self.half), config["terms"]
        known, pause = False, Pause()
        while True:
            session = Session(server, self._hello(), FROM_SERVER, known=known)
            with pause.after(session, log):
                welcome = session.welcomed(give_up_after)
                known = True
                pause.welcomed()
                self.number, self.run = welcome.client, welcome.run
                self.epochs = {epoch for epoch in self.epochs if epoch <= welcome.restore}
                if self._obey(session):
                    return

    def _batches(self, epoch: int) -> list[np.ndarray]:
        choices = self.choices
        order = epoch_order(choices.seed, self.number, epoch, len(self.train), choices.shuffle)
        return list(batches(order, choices.batch_size, choices.drop_last))

    def _hello(self) -> Hello:
        facts, sizes = self.half.facts, [len(ids) for ids in self._batches(0)]
        samples, test = sum(sizes), len(self.test) if self.test is not None else 0
        own = {**self.terms, "client half": frozen_structure(facts)}
        return Hello(
            name=self.name,
            run=self.run,
            checkpoints=tuple(sorted(self.epochs)),
            samples=len(self.train),
            test_samples=test,
            batch_size=self.choices.batch_size,
            drop_last=self.choices.drop_last,
            test_batch_size=self.choices.batch_size if test else 0,
            frozen=True,
            epoch_samples=samples,
            epoch_steps=len(sizes),
            epoch_flops=samples * facts["flops"],
            epoch_forward=samples * facts["flops"],
            epoch_bytes=self._plain_bytes(sizes),
            weights_bytes=facts["weights_bytes"],
            half_bytes=facts["half_bytes"],
            terms=own,
        )

    def _plain_bytes(self, sizes: list[int]) -> int:
        """Of an epoch in 32 bits, as `training.plain_epoch` counts them."""
        total = frame_length(Plan(0, 1, "B")) + frame_length(Done(0, 1, 1, {}))
        assert self.train.labels is not None
        label, last = self.train.labels.max(keepdims=True), np.array([len(self.train) - 1])
        for size in sizes:
            fields = [
                Field(name, kind, size, (), size * len(content))
                for name, (kind, content) in (("ids", integers(last)), ("labels", integers(label)))
            ]
            values = 4 * size * int(np.prod(self.half.cut_shape))
            fields.append(Field("activations", "fp32", size, self.half.cut_shape, values))
            total += frame_length(Step(0, 1, 1), tuple(fields))
        return total

    # --- the server's frames ---

    def _obey(self, session: Session) -> bool:
        """Do what the server says; whether the run came to its end."""
        while True:
            message = header_of(self._until(session, lambda: session.link.receive(0.5)))[0].message
            if isinstance(message, Finished):
                session.link.say_goodbye(5.0)
                return True
            if isinstance(message, Refusal):
                raise RefusedError(f"the server refused what this device sent: {harmless(message.reason)}")
            if isinstance(message, Saved):
                continue
            if isinstance(message, Plan):
                self._epoch(session, message)
            elif isinstance(message, EvaluationRequest):
                self._evaluate(session, message)
            elif isinstance(message, Calibrate):  # of a frozen half there is nothing to measure
                self._calibrate(session, message)
            elif isinstance(message, Weights):
                raise RefusedError(f"weights came: {NEEDS_TORCH}")
            else:
                raise RefusedError(f"expected a plan from the server, got {message!r:.500}")

    def _epoch(self, session: Session, plan: Plan) -> None:
        if plan.exchange != "B" or plan.client != self.number:
            reason = NEEDS_TORCH if plan.exchange == "A" else f"expected a plan for a B epoch, got {plan}"
            raise RefusedError(f"epoch {plan.epoch}: {reason}")
        assert self.train.labels is not None
        found = self._batches(plan.epoch)
        for step, ids in enumerate(found):
            message = Step(self.number, plan.epoch, step)
            self._send(session, frame(message, ids, self.train.labels[ids], self._forward(self.train, ids), self.codec))
        self.epochs.add(plan.epoch + 1)
        self._remember()
        self._done(session, plan, len(found), "forward")
        self.on_epoch(plan.epoch)

    def _evaluate(self, session: Session, ask: EvaluationRequest) -> None:
        found = []
        if self.test is not None and self.test.labels is not None:
            found = list(batches(np.arange(len(self.test)), self.choices.batch_size, False))
            for step, ids in enumerate(found):
                values = self._forward(self.test, ids)
                message = Evaluate(self.number, ask.epoch, step)
                self._send(session, frame(message, ids, self.test.labels[ids], values, self.test_codec))
        self._done(session, ask, len(found), "evaluation")

    def _calibrate(self, session: Session, ask: Calibrate) -> None:
        if ask.share:
            answer = Weights(self.number, ask.epoch, statistics=True, evaluation=ask.evaluation)
            self._send(session, seal(answer))
        if ask.evaluation:
            self._done(session, ask, 0, "evaluation")

    def _forward(self, data: Data, ids: np.ndarray) -> np.ndarray:
        self._flops += len(ids) * self.half.facts["flops"]
        return self.half(data.inputs[ids])

    def _done(self, session: Session, message: Message, steps: int, what: str) -> None:
        flops = {what: self._flops} if self._flops else {}
        self._flops, evaluation = 0, not isinstance(message, Plan)
        self._send(session, seal(Done(self.number, message.epoch, steps, flops, evaluation=evaluation)))  # type: ignore[union-attr]

    def _remembered(self) -> tuple[str, set[int]]:
        try:
            state = json.loads(self._file.read_bytes()) if self._file.exists() else {}
            return str(state.get("run", "")), {int(epoch) for epoch in state.get("epochs", [0])}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self._file} is damaged ({error}); restore it, or delete it to begin anew, which a server that still "
                "has its first checkpoint allows"
            ) from None

    def _remember(self) -> None:
        # On the disk before the server hears that the epoch is done.
        replace(self._file, json.dumps({"run": self.run, "epochs": sorted(self.epochs)}))

    def _until(self, session: Session, call: Callable[[], T]) -> T:
        """What a call returns, made again until it takes no more than its time; ends if there is no server."""
        alone, patience = None, self._patience
        while True:
            try:
                return call()
            except TimeoutError:
                now = time.monotonic()
                alone = None if session.link.connected else alone or now
                if patience is not None and alone is not None and now - alone >= patience:
                    raise TimeoutError(f"no connection to {session.address} in {now - alone:.0f} s") from None

    def _send(self, session: Session, content: bytes) -> None:
        self._until(session, lambda: session.link.send(content, 0.5))


def join(
    server: str | Endpoint,
    half: DeviceHalf,
    train: Data,
    test: Data | None = None,
    *,
    folder: str | Path,
    name: str = "client",
    give_up_after: float | None = None,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Take part in a run whose client half is frozen, from a device without PyTorch.

    Args:
        server: HOST:PORT on this machine, or an `Endpoint`, with certificates for one elsewhere.
        train, test: this device's data; inputs never leave it.
        folder: remembers in which run it took part, to go on after an interruption.
        name: without TLS, this device's name.
        give_up_after: seconds without a server after which this raises TimeoutError.

    Raises:
        ConfigError: the server's run is for another half, codec or cut than this device's export.
        RefusedError: an A epoch was asked for, or the server does not take this device.
    """
    endpoint = Endpoint.of(server)
    name = own_name(endpoint.tls) if endpoint.tls is not None else name
    Joining(half, train, test, Path(folder), name, on_epoch).take_part(endpoint, give_up_after)
