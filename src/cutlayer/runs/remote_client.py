"""A run as one client sees it: its checkpoints, its sessions with the server, and what it does as the server asks."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.description import client_summary
from cutlayer.backends.grpc.link import LinkClosed
from cutlayer.backends.grpc.policy import OWN_HALF, Policy
from cutlayer.backends.grpc.sending import Sender
from cutlayer.backends.grpc.session import Endpoint, Pause, Session
from cutlayer.backends.grpc.terms import largest_frame, terms_of
from cutlayer.durable import replace
from cutlayer.errors import DamagedError, RefusedError, harmless
from cutlayer.files import save_sealed
from cutlayer.method import Method, Training
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Stateful
from cutlayer.runs.secret import client_secret
from cutlayer.stop_request import Stop
from cutlayer.training.averaging import largest_weights, weights_frame
from cutlayer.training.client import Client
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import ClientJob
from cutlayer.training.plain_epoch import PlainEpoch
from cutlayer.wire.frames import read
from cutlayer.wire.messages import (
    Calibrate,
    EvaluationRequest,
    Finished,
    Hello,
    Plan,
    Refusal,
    Saved,
    Update,
    Weights,
    Welcome,
)

log = logging.getLogger("cutlayer.client")


@dataclass(frozen=True, eq=False)
class Membership:
    """What a client brings to a run.

    Attributes:
        half: from a batch of inputs to the activations at the cut; trained in place.
        folder: for its checkpoints and, at the end, client.safetensors.
        policy: what it is willing to do and to reveal.
    """

    name: str
    half: nn.Module
    data: ClientData
    folder: Path
    method: Method
    training: Training
    policy: Policy = OWN_HALF


class RemoteClient:
    """A client of a run.

    Args:
        on_epoch: called after each of its epochs, with the exchange and the number.
        stop: lets another thread, or signals, end this early.
    """

    def __init__(
        self, member: Membership, on_epoch: Callable[[str, int], None] | None = None, stop: Stop | None = None
    ) -> None:
        self.member, self.half, self.folder, self.policy = member, member.half, member.folder, member.policy
        self.method, self.training = member.method, member.training
        self.on_epoch, self.stop, self.ledger = on_epoch, stop or Stop(), Ledger()
        self.policy.check_method(self.method)
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.checkpoints.set_aside_damaged()  # so that the server is told of those that are whole
        self.trained = TrainedHalf(self.half, self.training.client, self.training)
        # The number, part of the name of each random draw, is the server's to tell; until then it is 0.
        self.client = self._client(0)
        self.policy.check_cut(self.method, self.client.cut_shape, self.client.flops.sample_shape)
        self.run = (self.checkpoints.state() or {}).get("run", "")
        self.half_bytes = largest_weights(self.half)
        self._views = _Views(self.folder / "views.json")
        self._alone: float | None = None  # since when there is no connection
        self._give_up_after: float | None = None
        self._pause = Pause()
        self._known = False  # whether the server has let this client in before
        if self.checkpoints.latest() is None:
            self._save(0)
        self.stop.saved = self.checkpoints.epochs()[-1]

    def _client(self, number: int) -> Client:
        data = self.member.data if self.policy.evaluation else ClientData(self.member.data.train)
        defence = self.method.defence
        secret = client_secret(self.folder) if defence.draws else 0
        job = ClientJob(number, *data.feeds(number, self.training), self.method, self.training, secret)
        return Client(job, lambda: self.trained, self.ledger, on_done=self._done)

    def take_part(self, server: Endpoint, give_up_after: float | None) -> bool:
        """Take part in a session; whether the run came to its end in it."""
        self._alone, self._give_up_after = None, give_up_after
        limit = largest_frame(
            self.method.gradients, self.client.cut_shape, self.client.train.batch_size, self.half_bytes
        )
        session = Session(server, self._hello(), limit, known=self._known)
        with self._pause.after(session, log, self.stop.check):
            welcome = session.welcomed(give_up_after, self.stop.check)
            self._known = True
            self._pause.welcomed()
            try:
                self._restore(welcome)
            except DamagedError as damage:  # since it was looked at
                self.checkpoints.set_aside_damaged()
                raise LinkClosed(f"to tell the server which checkpoints are whole ({damage})") from None
            return self._obey(session)
        return False

    def _hello(self) -> Hello:
        client = self.client
        plain = PlainEpoch.of(client)
        return Hello(
            name=self.member.name,
            run=self.run,
            checkpoints=tuple(self.checkpoints.epochs()),
            **dataclasses.asdict(client_summary(client)),
            epoch_steps=plain.steps,
            epoch_flops=plain.flops,
            epoch_forward=plain.forward,
            epoch_defence=plain.defence,
            epoch_bytes=plain.bytes,
            epoch_labels=plain.labels,
            weights_bytes=len(weights_frame(Weights(0, 1), client.half.state_dict())),
            half_bytes=self.half_bytes,
            terms=terms_of(self.method, self.training, client.cut_shape, client.half),
        )

    def _restore(self, welcome: Welcome) -> None:
        """Bring the half and its optimizer to the checkpoint that the server names."""
        if not welcome.run.isalnum() or len(welcome.run) > 64 or welcome.client < 0:
            raise RefusedError(f"expected a run and a client's number, the server says {welcome!r:.200}")
        if welcome.restore not in self.checkpoints.epochs():
            raise RefusedError(
                f"checkpoint: the server expects one after {welcome.restore} epochs; {self.folder} has none"
            )
        if welcome.client != self.client.number:
            self.client = self._client(welcome.client)
        self.client.leave()
        self.checkpoints.load(self._parts(), welcome.restore)
        self.checkpoints.prune(range(welcome.restore + 1))
        self.run, self.stop.saved = welcome.run, welcome.restore
        self.ledger.take()

    def _parts(self) -> dict[str, Stateful]:
        return {"client": self.trained, **self.client.stores()}

    def _save(self, epochs: int) -> None:
        self.checkpoints.save(epochs, self._parts(), {"run": self.run})
        self.stop.saved = epochs

    def _obey(self, session: Session) -> bool:
        with Sender(partial(self._send, session)) as sender:
            try:
                return self._obey_with(session, sender)
            except BaseException:
                session.link.close("this client gave up")  # so that the sender does not wait for the server
                raise

    def _obey_with(self, session: Session, sender: Sender) -> bool:
        while True:
            received = read(self._receive(session))
            message = received.message
            self.policy.check_message(message, self._views.count)
            if isinstance(message, Plan):
                self.stop.check()
                self._require_room()
                self._views.add()
            if isinstance(message, Plan | Calibrate | Update | Weights | EvaluationRequest):
                for make in self.client.answers(received):
                    sender.put(make)
                sender.drain()
            elif isinstance(message, Saved):
                # What the server cannot go back behind, this client need not, either.
                epochs = self.checkpoints.epochs()
                oldest = max((epoch for epoch in epochs if epoch <= message.epochs), default=0)
                best = max((epoch for epoch in epochs if epoch <= message.best), default=0)
                self.checkpoints.prune([epoch for epoch in epochs if epoch >= oldest or epoch == best])
            elif isinstance(message, Finished):
                self._finish()
                session.link.say_goodbye(5.0)
                return True
            elif isinstance(message, Refusal):
                raise RefusedError(f"the server refused what this client sent: {harmless(message.reason)}")
            else:
                raise RefusedError(f"expected a plan from the server, got {message!r:.500}")

    def _require_room(self) -> None:
        if (count := len(self.checkpoints.epochs())) > self.policy.checkpoints:
            raise RefusedError(
                f"checkpoints: this client stores {count}, as the server has not said that it saved one since; its "
                f"policy allows {self.policy.checkpoints}. A server that saves more seldom needs another policy"
            )

    def _done(self, message: Plan | EvaluationRequest | Calibrate) -> dict[str, int]:
        """An epoch or an evaluation is done; the FLOPs that the server is told of."""
        if isinstance(message, Plan):
            # On the disk before the server hears of it, so that the server never has gone on further than this client.
            self._save(message.epoch + 1)
            if self.on_epoch is not None:
                self.on_epoch(message.exchange, message.epoch)
        costs = self.ledger.take()
        log.info("seconds by phase: %s", json.dumps(costs.seconds))
        return costs.flops["client"]

    def _receive(self, session: Session) -> bytes:
        """The server's next frame. Between epochs, and if the server is unavailable, this is the place to stop."""
        with self.ledger.phase("wait"):
            while True:
                try:
                    return session.link.receive(0.5)
                except TimeoutError:
                    if not (self.client.waits and session.link.connected):
                        self.stop.check()
                    self._check_alone(session)

    def _check_alone(self, session: Session) -> None:
        """Give up if the server has been unavailable for too long."""
        if session.link.connected:
            self._alone = None
            return
        self._alone = self._alone or time.monotonic()
        session.give_up(time.monotonic() - self._alone, self._give_up_after)

    def _send(self, session: Session, frame: bytes) -> None:
        with self.ledger.phase("wait"):
            while True:
                try:
                    session.link.send(frame, 0.5)
                    return
                except TimeoutError:
                    if not session.link.connected:
                        self.stop.check()
                    self._check_alone(session)

    def _finish(self) -> None:
        if not (self.stop.saved or self.client.has_shared):
            raise RefusedError(
                "the server says that the run is at its end, but this client has trained in none of its epochs, and "
                "got no half that others trained: there is nothing to deliver"
            )
        save_sealed(self.half.state_dict(), self.folder / "client.safetensors", {"run": self.run})


class _Views:
    """How often activations of the training data have left, over all of a client's sessions and processes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.count = int(json.loads(file.read_text())["views"]) if file.exists() else 0

    def add(self) -> None:
        """They are about to leave once more. On the disk before they do."""
        self.count += 1
        replace(self.file, json.dumps({"views": self.count}) + "\n")
