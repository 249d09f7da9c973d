"""The server's process. What happens to a batch is read in the same order as in `training`:

joining: batch, client half, encode    wire    Serving.train_epoch: decode, server half, ..., encode
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cutlayer.checkpoint import save_tensors
from cutlayer.describe import describe
from cutlayer.errors import RefusedError
from cutlayer.formats.base import numel
from cutlayer.history import Baseline, EpochRecord, History
from cutlayer.intake import ClientInfo
from cutlayer.ledger import Ledger
from cutlayer.method import Method, Task, Training
from cutlayer.remote.reception import Reception, as_json, from_json
from cutlayer.remote.signals import Stop
from cutlayer.remote.terms import terms_of
from cutlayer.run import Run
from cutlayer.schedule import Exchange, State
from cutlayer.server import Server
from cutlayer.wire.frames import Ask, Done, Evaluate, Finished, Frame, Refusal, Saved, Step, pack, read_header, unpack
from cutlayer.wire.link import Link, LinkClosed
from cutlayer.wire.listener import Listener, Refusals
from cutlayer.wire.rpc import KEEPALIVE, check_address

log = logging.getLogger("cutlayer.server")


@dataclass(frozen=True, eq=False)
class Served:
    """What `serve` returns: the run's history, the trained server half, and how much was refused from whom."""

    history: History
    half: nn.Module
    refusals: dict[str, int]


def serve(
    half: nn.Module,
    cut_shape: tuple[int, ...],
    *,
    listen: str,
    run: str | Path,
    clients: Sequence[str] = ("client",),
    tls: str | Path | None = None,
    insecure_plaintext: bool = False,
    client_half: nn.Module | None = None,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    config: dict[str, Any] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_listening: Callable[[int], None] | None = None,
    deadline: float = 300.0,
    linger: float = 30.0,
    keepalive: float = KEEPALIVE,
    stop: Stop | None = None,
) -> Served:
    """Hold the server half of a run, for clients that `join` from processes of their own.

    Several clients take turns in a fixed order, batch by batch; each trains a client half of its own.

    Args:
        half: from the activations at the cut to the outputs; trained in place.
        cut_shape: shape of one sample's activations.
        listen: HOST:PORT; port 0 takes a free one.
        run: the run's folder. Where a run was begun there, this goes on with it, to the same bits.
        clients: their names, as in their certificates.
        tls: this machine's folder of certificates (`cutlayer certs`).
        insecure_plaintext: allow addresses beyond this machine without TLS.
        client_half: for its structure alone, which a client's must equal; None compares clients with each other.
        config: what clients that ask for it are told, and config.json holds.
        on_epoch: called after each epoch with its record.
        on_listening: called with the port once connections are taken.
        deadline: seconds after which a client that is connected and sends nothing is disconnected.
        linger: seconds that the end of the run waits for clients to hear of it.
        keepalive: seconds within which a connection whose other end has vanished without a word is given up.
        stop: lets another thread, or signals, end the run early.

    Raises:
        ConfigError: arguments, folder or address do not fit.
        DivergedError, StoreFullError: as in `fit`.
        Stopped: the run was asked to stop; the same call goes on with it.
    """
    check_address(listen, tls, insecure_plaintext)
    serving = _Serving(half, cut_shape, Run(run), clients, client_half, method, training, task, config, deadline)
    serving.stop = stop or Stop()
    refusals, offered = Refusals(), json.dumps(config or {})
    listener = Listener(listen, tls, serving.reception.admit, offered, refusals, 2 * len(clients) + 8, keepalive)
    serving.refusals = refusals
    try:
        if on_listening is not None:
            on_listening(listener.port)
        with serving.run.locked():
            serving.train(on_epoch)
            serving.reception.say_farewell(pack(Frame(Finished())), linger)
    finally:
        serving.reception.close()
        listener.close()
    return Served(History(serving.records, serving.baseline), half, dict(refusals.counts))


class _Serving:
    """A run as its server sees it."""

    def __init__(
        self,
        half: nn.Module,
        cut_shape: tuple[int, ...],
        run: Run,
        names: Sequence[str],
        client_half: nn.Module | None,
        method: Method,
        training: Training,
        task: Task,
        config: dict[str, Any] | None,
        deadline: float,
    ) -> None:
        self.half, self.cut_shape, self.run, self.names = half, cut_shape, run, list(names)
        self.method, self.training, self.task, self.deadline = method, training, task, deadline
        described = {"method": describe(method), "training": describe(training), "task": describe(task)}
        self.config = {**(config or described), "clients": self.names}
        self.ledger = Ledger()
        self.stop = Stop()
        self.refusals = Refusals()
        self.records: list[EpochRecord] = []
        self.baseline = Baseline(0, 0)
        if run.exists():
            run.check(self.config)
        state = run.checkpoints.state() or {}
        self.id = state.get("run") or secrets.token_hex(8)
        hellos = [from_json(values) for values in state.get("hellos", [])]
        terms = terms_of(method, training, cut_shape, client_half)
        self.reception = Reception(names, terms, method.activations, cut_shape, self.id, hellos)

    # --- the run ---

    def train(self, on_epoch: Callable[[EpochRecord], None] | None) -> None:
        """Train to the end, going back to the last checkpoint whenever a client has begun anew within an epoch."""
        self._begin()
        while True:
            try:
                self._load()
                self.reception.open(self._participated())
                while len(self.records) < self.training.epochs:
                    self.stop.check()
                    self._epoch()
                    if on_epoch is not None:
                        on_epoch(self.records[-1])
                self._finish()
                return
            except LinkClosed as reason:
                log.warning("back to the last checkpoint: %s", reason)

    def _begin(self) -> None:
        """Build the server half's trainer, once the numbers of every client's samples are known."""
        if self.run.checkpoints.latest() is None:
            self.reception.open(0)
            self.reception.wait_for_all(self.stop)
        hellos = [self.reception.hellos[number] for number in range(len(self.names))]
        fields = [field.name for field in dataclasses.fields(ClientInfo)]
        infos = [ClientInfo(**{name: getattr(hello, name) for name in fields}) for hello in hellos]
        self.server = Server(self.half, infos, self.cut_shape, self.method, self.training, self.task, self.ledger)
        self.modules = {"server": (self.half, self.server.optimizer.optimizer)}
        self.stores = {"store": self.server.store, "test_store": self.server.test_store}
        samples, flops = (sum(getattr(hello, f"epoch_{what}") for hello in hellos) for what in ("samples", "flops"))
        self.baseline = Baseline(samples * numel(self.cut_shape) * 4 * 2, flops)
        if not self.run.exists():
            self.run.create(self.config, self.baseline)
        if self.run.checkpoints.latest() is None:
            self._save()

    def _load(self) -> None:
        """Bring everything to the newest checkpoint."""
        found = self.run.checkpoints.load(self.modules, self.stores)
        assert found is not None, "a run begins with a checkpoint"
        epochs, state = found
        self.records = self.run.rewind(epochs)
        self.server.go_back(State.restored(state))
        self.ledger.take()

    def _save(self) -> None:
        hellos = [as_json(self.reception.hellos[number]) for number in range(len(self.names))]
        state = {**vars(self.server.state), "run": self.id, "hellos": hellos}
        self.run.checkpoints.save(len(self.records), self.modules, self.stores, state)

    def _participated(self) -> int:
        """After how many epochs the clients did something last."""
        return max((r.epoch + 1 for r in self.records if r.exchange != Exchange.NONE.value), default=0)

    def _finish(self) -> None:
        save_tensors(self.half.state_dict(), self.run.folder / "server.safetensors")

    # --- an epoch ---

    def _epoch(self) -> None:
        server, epoch, exchange = self.server, len(self.records), self.server.exchange
        last = epoch + 1 == self.training.epochs
        tested = any(info.test_samples for info in server.clients)
        due = tested and (last or (epoch + 1) % self.training.evaluate_every == 0)
        server.begin()
        if exchange is Exchange.NONE:
            server.replay()
            loss = server.finish()
        else:
            with self.reception.exchange(self.stop, epoch + 1) as links:
                self._train_epoch(links)
                loss = server.finish()
                # A C epoch is evaluated on what was sent before it.
                if due or (tested and server.exchange is Exchange.NONE):
                    self._gather_evaluation(links, epoch)
        scores = server.evaluate() if due else {}
        self.records.append(EpochRecord(epoch, exchange.value, loss, server.samples, scores, **self.ledger.take()))
        self.run.append(self.records[-1])
        if last or self.stop.requested or (epoch + 1) % self.training.checkpoint_every == 0:
            self._save()

    def _train_epoch(self, links: list[Link]) -> None:
        """An A or a B epoch: the clients take turns, batch by batch."""
        saved = pack(Frame(Saved(self.run.checkpoints.epochs()[-1])))
        for number, link in enumerate(links):
            self._send(link, saved)
            self._send(link, self.server.plan(number))
        self._take_turns(links, Step)

    def _gather_evaluation(self, links: list[Link], epoch: int) -> None:
        for number, link in enumerate(links):
            self._send(link, pack(Frame(Ask(number, epoch))))
        self._take_turns(links, Evaluate)

    def _take_turns(self, links: list[Link], kind: type[Step] | type[Evaluate]) -> None:
        waiting, steps = list(range(len(links))), [0] * len(links)
        while waiting:
            for number in list(waiting):
                done = self._turn(number, links[number], kind, steps[number])
                steps[number] += 1
                if done:
                    waiting.remove(number)

    def _turn(self, number: int, link: Link, kind: type[Step] | type[Evaluate], step: int) -> bool:
        """Take a client's next batch, or its word that there is none; what does not fit is refused."""
        epoch = len(self.records)
        while True:
            data = self._receive(number, link)
            try:
                message = read_header(data)[0].message
                if isinstance(message, Done):
                    self._check_done(message, number, epoch, step)
                    unpack(data)
                    self.ledger.frame("up", data)
                    for what, count in message.flops.items():
                        self.ledger.flops("client", what, count)
                    return True
                if not isinstance(message, kind) or (message.client, message.epoch, message.step) != (
                    number,
                    epoch,
                    step,
                ):
                    raise RefusedError(f"expected {kind(number, epoch, step)}, got {message}")
                reply = self.server.receive(data)
                self.ledger.frame("up", data)
            except RefusedError as error:
                self.refusals.add(self.names[number], error)
                self._send(link, pack(Frame(Refusal(str(error)[:1000]))))
                continue
            if reply is not None:
                self._send(link, reply)
            if not isinstance(message, Step) or message.part + 1 == message.parts:
                return False

    @staticmethod
    def _check_done(message: Done, number: int, epoch: int, step: int) -> None:
        if (message.client, message.epoch, message.steps) != (number, epoch, step):
            raise RefusedError(
                f"expected client {number} to be done after {step} steps of epoch {epoch}, got {message}"
            )
        known = {"forward", "backward", "evaluation"}
        if not set(message.flops) <= known or any(not 0 <= count < 1 << 62 for count in message.flops.values()):
            raise RefusedError(f"flops: expected counts of {sorted(known)}, got {message.flops}")

    # --- waiting ---

    def _receive(self, number: int, link: Link) -> bytes:
        idle = 0.0
        with self.ledger.phase("wait"):
            while True:
                try:
                    return link.receive(0.5)
                except TimeoutError:
                    idle = idle + 0.5 if link.connected else 0.0
                if not link.connected:
                    self.stop.check()
                if idle >= self.deadline:
                    log.warning("client %s: nothing in %.0f s; disconnected", self.names[number], idle)
                    link.disconnect()

    def _send(self, link: Link, frame: bytes) -> None:
        with self.ledger.phase("wait"):
            while True:
                try:
                    link.send(frame, 0.5)
                    break
                except TimeoutError:
                    if not link.connected:
                        self.stop.check()
        self.ledger.frame("down", frame)
