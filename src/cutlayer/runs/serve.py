"""The server's process. What happens to a batch is read in the same order as in `training`:

joining: batch, client half, encode    wire    Serving.train_epoch: decode, server half, ..., encode
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cutlayer.backends.grpc.admission import Admission, as_json, from_json
from cutlayer.backends.grpc.link import Link, LinkClosed
from cutlayer.backends.grpc.listener import Listener, Refusals
from cutlayer.backends.grpc.peer import LinkPeer
from cutlayer.backends.grpc.rpc import KEEPALIVE, check_address
from cutlayer.backends.grpc.stop import Stop
from cutlayer.backends.grpc.terms import terms_of
from cutlayer.backends.grpc.waiting import Waiting
from cutlayer.describe import describe
from cutlayer.errors import ClientUnavailableError, ConfigError
from cutlayer.method import Method, Task, Training, require_choices
from cutlayer.records.history import Baseline, EpochRecord, History, crossed
from cutlayer.records.ledger import Ledger
from cutlayer.runs.fit import train_epoch
from cutlayer.runs.run import Run
from cutlayer.runs.watch import Watch
from cutlayer.runs.weights import save_halves
from cutlayer.schedule import Exchange
from cutlayer.training.averaging import SharedHalf
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.participants import evaluate, testers
from cutlayer.training.plain import PlainEpoch, baseline_of
from cutlayer.training.server import Server
from cutlayer.wire.frames import Finished, Frame, Saved, Weights, pack

log = logging.getLogger("cutlayer.training.server")


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
    on_wait: Callable[[str], None] | None = None,
    deadline: float = 300.0,
    patience: float | None = None,
    linger: float = 30.0,
    keepalive: float = KEEPALIVE,
    stop: Stop | None = None,
) -> Served:
    """Hold the server half of a run, for clients that `join` from processes of their own.

    Several clients work together as `Method.fleet` says.

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
        on_wait: called now and then with a line that says whom the server waits for and since when.
        deadline: seconds after which a client that is connected and sends nothing is disconnected.
        patience: seconds after which an epoch goes on without a client that is not there, or of which nothing comes. A
            client that comes back takes part in the next epoch. The result then depends on who was there in time. None
            waits for all, and to the same bits: a client that begins anew takes the run back to its last checkpoint.
        linger: seconds that the end of the run waits for clients to hear of it.
        keepalive: seconds within which a connection whose other end has vanished without a word is given up.
        stop: lets another thread, or signals, end the run early.

    Raises:
        ConfigError: arguments, folder or address do not fit.
        DivergedError, StoreFullError: as in `fit`.
        Stopped: the run was asked to stop; the same call goes on with it.
    """
    check_address(listen, tls, insecure_plaintext)
    require_choices(method, training, task)
    if method.fleet.dropout:
        raise ConfigError("dropout simulates the loss of clients in one process; between processes leave it at 0")
    job = Job(half, cut_shape, method, training, task)
    serving = _Serving(job, Run(run), clients, client_half, config, deadline, patience)
    serving.stop, serving.on_wait = stop or Stop(), on_wait
    refusals, offered = Refusals(), json.dumps(config or {})
    listener = Listener(listen, tls, serving.admission.admit, offered, refusals, 2 * len(clients) + 8, keepalive)
    serving.refusals = refusals
    try:
        if on_listening is not None:
            on_listening(listener.port)
        with serving.run.locked():
            serving.train(on_epoch)
            serving.admission.say_farewell(serving.farewell, linger)
    finally:
        serving.admission.close()
        listener.close()
    return Served(History(serving.records, serving.baseline, serving.run.given_up()), half, dict(refusals.counts))


class _Serving:
    """A run as its server sees it."""

    def __init__(
        self,
        job: Job,
        run: Run,
        names: Sequence[str],
        client_half: nn.Module | None,
        config: dict[str, Any] | None,
        deadline: float,
        patience: float | None,
    ) -> None:
        self.patience = patience
        method, training, task, cut_shape = job.method, job.training, job.task, job.cut_shape
        self.job, self.half, self.run, self.names, self.deadline = job, job.half, run, list(names), deadline
        self.method, self.training, self.task = method, training, task
        described = {"method": describe(method), "training": describe(training), "task": describe(task)}
        self.config = {**(config or described), "clients": self.names}
        self.ledger = Ledger()
        self.stop = Stop()
        self.refusals = Refusals()
        self.on_wait: Callable[[str], None] | None = None
        self.waiting = Waiting(self._say)
        self.records: list[EpochRecord] = []
        self.watch = Watch()
        self.baseline = Baseline(0, 0)
        if run.exists():
            run.check(self.config)
        state = run.checkpoints.state() or {}
        self.id = state.get("run") or secrets.token_hex(8)
        hellos = [from_json(values) for values in state.get("hellos", [])]
        terms = terms_of(method, training, cut_shape, client_half)
        self.admission = Admission(names, terms, method.activations, cut_shape, self.id, hellos, patience)
        # After how many epochs each client did something last.
        self.took_part: list[int] = [0] * len(names)
        self.client_half = client_half

    def _say(self, line: str) -> None:
        line = f"epoch {len(self.records) + 1}/{self.training.epochs}: {line}"
        log.info(line)
        if self.on_wait is not None:
            self.on_wait(line)

    # --- the run ---

    def train(self, on_epoch: Callable[[EpochRecord], None] | None) -> None:
        """Train to the end, going back to the last checkpoint whenever a client has begun anew within an epoch."""
        self._begin()
        while True:
            try:
                self._load()
                self.admission.open(self.took_part)
                while not self.training.ending.reached(self.records):
                    self.stop.check()
                    self._epoch()
                    if on_epoch is not None:
                        on_epoch(self.records[-1])
                self._finish()
                return
            except (LinkClosed, ClientUnavailableError) as reason:
                log.warning("back to the last checkpoint: %s", reason)
                self.admission.break_off(f"the server went back to its last checkpoint: {reason}")
            finally:  # what an epoch that did not come to its end has sent; it will be trained again
                self.run.give_up(crossed(self.ledger.take()["bytes"]))

    def _begin(self) -> None:
        """Build the server half's trainer, once the numbers of every client's samples are known."""
        if self.run.checkpoints.latest() is None:
            self.admission.open(self.took_part)
            self.admission.wait_for_all(self.stop, self.waiting)
        hellos = [self.admission.hellos[number] for number in range(len(self.names))]
        fields = [field.name for field in dataclasses.fields(ClientSummary)]
        infos = [ClientSummary(**{name: getattr(hello, name) for name in fields}) for hello in hellos]
        self.server = Server(self.job, infos, self.ledger)
        if self.client_half is not None:
            self.server.shared = SharedHalf(self.client_half.state_dict())
        self.modules, self.stores = self.server.modules(), self.server.stores()
        plain = [PlainEpoch(h.epoch_samples, h.epoch_steps, h.epoch_flops, h.epoch_bytes) for h in hellos]
        self.baseline = baseline_of(plain, self.server, hellos[0].weights_bytes)
        self.training.ending.check({"loss", *self.task.metrics}, any(info.test_samples for info in infos))
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
        self.run.adopt(self.config, epochs)
        self.run.forget_models(self.records, self.training)
        self.server.go_back(state)
        self.took_part = list(state["took_part"])
        self.stop.saved = epochs

    def _save(self) -> None:
        hellos = [as_json(self.admission.hellos[number]) for number in range(len(self.names))]
        state = {**self.server.saved(), "run": self.id, "hellos": hellos, "took_part": self.took_part}
        keep, also = self.training.keep_checkpoints, self.training.ending.kept(self.records)
        self.run.checkpoints.save(len(self.records), self.modules, self.stores, state, keep=keep, also=also)
        self.stop.saved = len(self.records)

    def farewell(self, client: int) -> list[bytes]:
        """The last frames for a client: the half that all share, if there is one, and that the run is at its end."""
        shared = self.server.shared.frames(Weights(client, len(self.records)))
        return [*shared, pack(Frame(Finished()))]

    def _finish(self) -> None:
        save_halves(self.run.folder, self.half, self.server.shared.tensors, self.id)

    # --- an epoch ---

    def _epoch(self) -> None:
        server, epoch, exchange = self.server, len(self.records), self.server.states.exchange
        states = server.states.letters()
        each = server.states.each(len(self.names))
        due = any(info.test_samples for info in server.clients) and self.training.evaluates(epoch)
        if exchange is Exchange.NONE:
            loss = train_epoch(server, [])
        else:
            chosen = self.method.fleet.participants(self.training.seed, epoch, len(self.names))
            planned = [state is not Exchange.NONE for state in each]
            wanted = [number for number in chosen if planned[number]]
            # Without patience what is evaluated must not depend on who is there, either.
            testing = [n for n, info in enumerate(server.clients) if info.test_samples and planned[n]]
            testing = testing if self.patience is None else []
            with self.admission.exchange(self.stop, self.waiting, sorted({*wanted, *testing}), self.took_part) as links:
                peers = {number: self._peer(number, link) for number, link in links.items()}
                # Where none of the chosen is there in time, those that are take their place.
                there = [n for n in wanted if n in peers] or [n for n in peers if planned[n]]
                self._tell_saved([peers[number] for number in there])
                loss = train_epoch(server, [peers[number] for number in there])
                for number in there:
                    if number not in server.absent:
                        self.took_part[number] = epoch + 1
                for number in testers(server, each, due):
                    if number in peers:
                        with suppress(ClientUnavailableError):  # what it sent of an earlier epoch is evaluated
                            evaluate(server, peers[number], epoch)
        scores = self._scores() if due else {}
        costs = self.ledger.take()
        more: dict[str, Any] = {**costs, "states": states, "absent": sorted(server.absent)}
        self.records.append(EpochRecord(epoch, exchange.value, loss, server.samples, scores, **more))
        self.watch(self.records)
        self.run.append(self.records[-1])
        if self.stop.requested or self.training.saves(epoch) or self.training.ending.saves(self.records):
            self._save()

    def _scores(self) -> dict[str, float]:
        try:
            return self.server.evaluate()
        except ConfigError as error:  # a client's labels do not end the run for the others
            log.warning("epoch %d is not evaluated: %s", len(self.records), error)
            return {}

    def _tell_saved(self, peers: Sequence[LinkPeer]) -> None:
        """Tell the clients which checkpoint this server cannot go back behind: its oldest."""
        best = self.training.ending.kept(self.records)
        oldest = self.run.checkpoints.epochs()[-self.training.keep_checkpoints :][0]
        saved = pack(Frame(Saved(oldest, max(best, default=-1))))
        for peer in peers:
            with suppress(ClientUnavailableError):
                peer.send(saved)
                self.ledger.frame("down", saved)

    def _peer(self, number: int, link: Link) -> LinkPeer:
        more = self.ledger, self.refusals, self.stop, self.waiting, self.deadline, self.patience
        return LinkPeer(number, self.names[number], link, *more)
