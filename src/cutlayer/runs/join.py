"""A client's process: it does what the server's plan says, and keeps its half, its optimizer and its data to itself."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader, Dataset

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.description import client_summary
from cutlayer.backends.grpc.link import LinkClosed
from cutlayer.backends.grpc.rpc import KEEPALIVE, check_address
from cutlayer.backends.grpc.sending import Sender
from cutlayer.backends.grpc.session import Session, own_name
from cutlayer.backends.grpc.stop import Stop
from cutlayer.backends.grpc.terms import largest_frame, terms_of
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.files import save_sealed
from cutlayer.method import Method, Training, require_choices
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Stateful
from cutlayer.training.averaging import largest_weights, weights_frame
from cutlayer.training.client import Client
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import ClientJob
from cutlayer.training.plain import PlainEpoch
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


def join(
    address: str,
    half: nn.Module,
    train: Dataset | DataLoader,
    test: Dataset | DataLoader | None = None,
    *,
    folder: str | Path,
    name: str | None = None,
    tls: str | Path | None = None,
    insecure_plaintext: bool = False,
    method: Method = Method(),
    training: Training = Training(),
    on_epoch: Callable[[str, int], None] | None = None,
    give_up_after: float | None = None,
    keepalive: float = KEEPALIVE,
    stop: Stop | None = None,
) -> nn.Module:
    """Take part in a run that another process serves; return the trained client half.

    Args:
        address: HOST:PORT of the server. The connection is made from here, and made again whenever it is lost.
        half: from a batch of inputs to the activations at the cut; trained in place.
        train, test: as in `fit`; their inputs never leave this process.
        folder: for this client's checkpoints and, at the end, client.safetensors. Where it took part in the run
            before, it goes on.
        name: this client's name; by default the one in its certificate, without TLS "client".
        tls: this machine's folder of certificates (`cutlayer certs`).
        insecure_plaintext: allow addresses beyond this machine without TLS.
        method, training: as the server's; what matters to both is compared when they meet.
        on_epoch: called after each epoch of this client, with its exchange ("A" or "B") and its number.
        give_up_after: seconds without a server after which this raises TimeoutError; None tries for ever.
        keepalive: seconds within which a connection whose other end has vanished without a word is given up.
        stop: lets another thread, or signals, end this early.

    Raises:
        ConfigError: arguments, folder or address do not fit.
        RefusedError: the server does not take this client, or something it sent; the message says why.
        Stopped: this was asked to stop; the same call goes on.
    """
    check_address(address, tls, insecure_plaintext)
    require_choices(method, training)
    if tls is not None:
        certified = own_name(tls)
        if name not in (None, certified):
            raise ConfigError(f"name: the certificate in {tls} is made out to {certified!r}, not to {name!r}")
        name = certified
    joining = _Joining(name or "client", half, train, test, Path(folder), method, training, on_epoch, stop or Stop())
    while not joining.take_part(address, tls, give_up_after, keepalive):
        pass
    return half


class _Joining:
    """A run as one client sees it."""

    def __init__(
        self,
        name: str,
        half: nn.Module,
        train: Dataset | DataLoader,
        test: Dataset | DataLoader | None,
        folder: Path,
        method: Method,
        training: Training,
        on_epoch: Callable[[str, int], None] | None,
        stop: Stop,
    ) -> None:
        self.name, self.half, self.folder, self.stop, self.on_epoch = name, half, folder, stop, on_epoch
        self.method, self.training = method, training
        self.ledger = Ledger()
        self.train, self.test = train, test
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.checkpoints.set_aside_damaged()  # so that the server is told of those that are whole
        self.trained = TrainedHalf(half, training.client, training)
        # The number, part of the name of each random draw, is the server's to tell; until then it is 0.
        self.client = self._client(0)
        self.run = (self.checkpoints.state() or {}).get("run", "")
        self.half_bytes = largest_weights(half)
        self._alone: float | None = None  # since when there is no connection
        self._give_up_after: float | None = None
        self._known = False  # whether the server has let this client in before
        if self.checkpoints.latest() is None:
            self._save(0)
        self.stop.saved = self.checkpoints.epochs()[-1]

    def _client(self, number: int) -> Client:
        feed, test = ClientData(self.train, self.test).feeds(number, self.training)
        job = ClientJob(number, feed, test, self.method, self.training)
        return Client(job, lambda: self.trained, self.ledger, on_done=self._done)

    def take_part(
        self, address: str, tls: str | Path | None, give_up_after: float | None, keepalive: float = KEEPALIVE
    ) -> bool:
        """Take part in a session; whether the run came to its end in it."""
        self._alone, self._give_up_after = None, give_up_after
        limit = largest_frame(
            self.method.gradients, self.client.cut_shape, self.client.train.batch_size, self.half_bytes
        )
        session = Session(address, tls, self._hello(), limit, keepalive, known=self._known)
        try:
            welcome = self._wait_welcome(session)
            self._known = True
            self._restore(welcome)
            return self._obey(session)
        except LinkClosed as reason:
            if session.refusal is not None:
                raise RefusedError(str(reason)) from None
            log.warning("a new session: %s", reason)
            return False
        finally:
            session.close()

    def _wait_welcome(self, session: Session) -> Welcome:
        waited = 0.0
        while (welcome := session.wait_welcome(0.5)) is None:
            if session.link.closed:
                raise LinkClosed("the server was not ready")
            self.stop.check()
            waited += 0.5
            self._check_patience(session, waited)
        return welcome

    def _check_patience(self, session: Session, waited: float) -> None:
        if self._give_up_after is not None and waited >= self._give_up_after:
            raise TimeoutError(f"no connection to {session.address} in {waited:.0f} s: {session.last_error}")

    def _hello(self) -> Hello:
        client = self.client
        plain = PlainEpoch.of(client)
        return Hello(
            name=self.name,
            run=self.run,
            checkpoints=tuple(self.checkpoints.epochs()),
            **dataclasses.asdict(client_summary(client)),
            epoch_steps=plain.steps,
            epoch_flops=plain.flops,
            epoch_forward=plain.forward,
            epoch_bytes=plain.bytes,
            weights_bytes=len(weights_frame(Weights(0, 1), client.half.state_dict())),
            half_bytes=self.half_bytes,
            terms=terms_of(self.method, self.training, client.cut_shape, client.half),
        )

    def _restore(self, welcome: Welcome) -> None:
        """Bring the half and its optimizer to the checkpoint that the server names."""
        if welcome.restore not in self.checkpoints.epochs():
            raise RefusedError(
                f"checkpoint: the server expects one after {welcome.restore} epochs; {self.folder} has none"
            )
        if welcome.client != self.client.number:
            self.client = self._client(welcome.client)
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
            if isinstance(message, Plan):
                self.stop.check()
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
                raise RefusedError(f"the server refused what this client sent: {message.reason}")
            else:
                raise RefusedError(f"expected a plan from the server, got {message}")

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
        """The server's next frame. Between epochs, and where the server is gone, this is the place to stop."""
        with self.ledger.phase("wait"):
            while True:
                try:
                    return session.link.receive(0.5)
                except TimeoutError:
                    if not (self.client.waits and session.link.connected):
                        self.stop.check()
                    self._check_alone(session)

    def _check_alone(self, session: Session) -> None:
        """Give up where the server has been gone for too long."""
        if session.link.connected:
            self._alone = None
            return
        self._alone = self._alone or time.monotonic()
        self._check_patience(session, time.monotonic() - self._alone)

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
        save_sealed(self.half.state_dict(), self.folder / "client.safetensors", {"run": self.run})
