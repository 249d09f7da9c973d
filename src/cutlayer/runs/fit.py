"""The loop. What happens to a batch, in order, and where to read it:

    batch                        feed.Batches
    client half, encode          client.Client.forward
    wire                         wire.inproc, wire.rpc between machines, cluster.peer on Ray
    checks                       checks.FrameChecks
    decode                       server.Server.take
    server half, loss, backward,
    update, encode               server.Server.train
    wire
    decode, backward, update     client.Client.backward

In a B epoch the way ends at the server, which keeps what it got; a C epoch is the server's alone. With several clients
`modes` says whose batch comes when.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cutlayer.backends.base import LOCAL, Backend, ClientDescription, Clients, Data, LosablePeer, client_data_of
from cutlayer.describe import describe, structure
from cutlayer.errors import ClientUnavailableError, ConfigError, StateLostError
from cutlayer.method import Method, Task, Training, require_choices
from cutlayer.models.cut import Halves, copied
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.history import Baseline, EpochRecord, History, crossed
from cutlayer.records.ledger import Ledger
from cutlayer.report import shown
from cutlayer.runs.initial import initialize
from cutlayer.runs.run import Run
from cutlayer.runs.watch import Watch
from cutlayer.schedule import Exchange
from cutlayer.training.averaging import weights_frame
from cutlayer.training.evaluation import scores_of
from cutlayer.training.job import Job
from cutlayer.training.participants import (
    LiveParticipant,
    Participant,
    Peer,
    ReplayedParticipant,
    calibrate,
    evaluate,
    testers,
)
from cutlayer.training.plain import baseline_of
from cutlayer.training.server import Server
from cutlayer.wire.frames import Weights

log = logging.getLogger("cutlayer.runs.fit")


def train_epoch(server: Server, peers: Sequence[Peer]) -> float:
    """Train for the epoch that the server's schedule names, with the clients that are there; return its mean loss."""
    server.begin()
    if server.states.exchange is Exchange.NONE and server.halves is None and not server.states.own:
        server.replay()
    else:
        participants = participants_of(server, peers)
        if server.calibrates():
            calibrate(server, participants)
        server.mode.train(server, participants)
    return server.finish()


def participants_of(server: Server, peers: Sequence[Peer]) -> list[Participant]:
    """Who takes part in an epoch, by number: the clients that are there, and the store for those that are not."""
    there = {peer.number: peer for peer in peers}
    participants: list[Participant] = []
    for client in range(len(server.clients)):
        resting = server.states.of(client) is Exchange.NONE
        if not resting and client in there:
            participants.append(LiveParticipant(server, there[client]))
            continue
        if not resting:
            server.absent.add(client)
        if server.keeps(client) and (resting or server.method.fleet.replay_absent):
            participants.append(ReplayedParticipant(server, client))
    return participants


@dataclass(frozen=True, eq=False)
class Result:
    """What `fit` returns: the history, the uncut network with the trained weights in eval mode, and the halves."""

    history: History
    model: nn.Module
    halves: Halves

    def __repr__(self) -> str:
        """Short: the history, and the model's class."""
        return f"Result({self.history!r}, model=<{type(self.model).__name__}>)"


def fit(
    halves: Halves,
    train: Data | Sequence[Data],
    test: Data | Sequence[Data | None] | None = None,
    *,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    run: str | Path | Run | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: bool | None = None,
    backend: Backend = LOCAL,
    init: str | Path | Run | None = None,
) -> Result:
    """Train a network that is cut in two, over real frames; its clients in this process, or where a backend has them.

    Args:
        halves: from `split`, or two modules of your own. Copies of them are trained.
        train: map-style data set of (input, label), a list of such pairs among them, or a loader of one, or a function
            that returns either, called where the client is; a list of these for several clients, which work together
            as `Method.fleet` says.
        test: the same for evaluation, which goes over the wire, too, and is counted apart. One data set is held by
            client 0; a list has one for each client. At the end the merged model is evaluated on them, too, in this
            process and in 32 bits (`History.merged`), unless a function returns them elsewhere.
        method: when to communicate and in which number format.
        training: epochs, optimizers, seed, device.
        task: loss and metrics; cross-entropy and accuracy by default.
        run: folder to write config, metrics, checkpoints and the merged model to.
        resume: go on from the newest checkpoint in `run`, if there is one; with the same arguments as before, the
            result is the same, bit for bit, as without the interruption, whatever the backend before and now. With
            more `epochs` than before the run is extended; see docs/runs.md.
        on_epoch: called after each epoch with its record; again for epochs that are trained again, where a backend lost
            something.
        progress: whether to show on stderr how far the run is: a bar on a terminal, elsewhere a line now and then. By
            default it is shown on a terminal and in a notebook, and a script whose output goes elsewhere is quiet.
        backend: where the clients are, such as `cluster.Ray()`. The result is the same, bit for bit.
        init: a run, finished or not, whose weights the halves begin with; its network must have the same structure.

    Raises:
        ConfigError: the arguments contradict each other, the data, or the run that is to be resumed.
        DivergedError: loss, activations or gradients became infinite or NaN; the last checkpoint stays.
        StoreFullError: the activations of all samples exceed the replay store's budget, which is checked before
            training begins (for labels of one number), or the disk is full.
    """
    if not isinstance(halves, Halves):
        raise ConfigError(
            f"expected Halves, from split(model, layer) or Halves(client, server), got {type(halves).__name__}"
        )
    require_choices(method, training, task)
    if resume and run is None:
        raise ConfigError("resume needs the folder of the run")
    halves, ledger, folder = copied(halves), Ledger(), run if isinstance(run, Run) or run is None else Run(run)
    initialize(halves, init, folder, resume)
    holdings = client_data_of(train, test)
    with ExitStack() as stack:
        clients = stack.enter_context(closing(backend.open(halves.client, holdings, method, training, ledger)))
        job = Job(halves.server, clients.facts[0].cut_shape, method, training, task)
        server = clients.server(job, ledger)
        training.ending.check({"loss", *task.metrics}, any(facts.info.test_samples for facts in clients.facts))
        fitting = _Fitting(clients, server, training, folder, _baseline(clients.facts, server, halves.client))
        if folder is not None:
            stack.enter_context(folder.locked())
        elif clients.mortal:
            fitting.checkpoints = Checkpoints(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        chosen = {"method": describe(method), "training": describe(training), "task": describe(task)}
        fitting.open(chosen, _facts(halves, clients.facts), resume)
        title = type(method.schedule).__name__.lower()
        view = stack.enter_context(shown(title, training.epochs, fitting.records, progress))
        listeners = [each for each in (view, on_epoch) if each is not None]
        while not training.ending.reached(fitting.records):
            try:
                fitting.epoch()
            except (StateLostError, ClientUnavailableError) as reason:
                fitting.go_back(reason)
                continue
            except BaseException:
                fitting.give_up()
                raise
            for listener in listeners:
                listener(fitting.records[-1])
        clients.load_half(halves.client)
        if server.shared.tensors:
            halves.client.load_state_dict(server.shared.tensors)
        model = halves.merged()
        if folder is not None:
            folder.save_model(model)
        merged = scores_of(model, clients.test_feeds(), task, training.device)
        if folder is not None:
            folder.save_merged(merged, training.epochs)
        history = History(fitting.records, fitting.baseline, fitting.given_up(), merged)
    return Result(history, model, halves)


class _Fitting:
    """A run of `fit`: its clients, its server, the epochs that are done, and the checkpoints to go back to."""

    def __init__(
        self, clients: Clients, server: Server, training: Training, folder: Run | None, baseline: Baseline
    ) -> None:
        self.clients, self.server, self.training, self.folder = clients, server, training, folder
        self.checkpoints = folder.checkpoints if folder is not None else None
        self.records: list[EpochRecord] = []
        self._lost: list[dict[str, dict[str, int]]] = []
        self.watch = Watch()
        self.baseline = baseline
        self.modules, self.stores = server.modules(), {**clients.stores, **server.stores()}

    def open(self, config: dict[str, Any], facts: dict[str, Any], resume: bool) -> None:
        """Begin, or go on from the newest checkpoint."""
        if self.folder is not None:
            found = self.folder.open(config, facts, self.baseline, resume, self.modules, self.stores)
            self.records, state = found
            if state is not None:
                self.server.go_back(state)
            self.folder.forget_models(self.records, self.training)
        if self.clients.mortal and self.checkpoints is not None and self.checkpoints.latest() is None:
            self._save()

    def go_back(self, reason: StateLostError | ClientUnavailableError) -> None:
        """To the newest checkpoint, with what was lost put back in place. Raises `reason` where that cannot be."""
        self.give_up()
        while True:
            try:
                self.clients.recover(reason)
                log.warning("back to the last checkpoint: %s", reason)
                assert self.checkpoints is not None, "there is one wherever something may be lost"
                found = self.checkpoints.load(self.modules, self.stores)
            except (StateLostError, ClientUnavailableError) as again:
                reason = again
                continue
            assert found is not None, "the run began with one"
            epochs, state = found
            self.server.go_back(state)
            self.server.ledger.take()
            if self.folder is not None:
                self.records = self.folder.rewind(epochs)
            else:
                self._lost += [record.bytes for record in self.records[epochs:]]
                self.records = self.records[:epochs]
            return

    def give_up(self) -> None:
        """Count what the epoch under way, which will be trained again, has sent."""
        sent = self.server.ledger.take()["bytes"]
        if self.folder is not None:
            self.folder.give_up(crossed(sent))
        else:
            self._lost.append(sent)

    def given_up(self) -> dict[str, int]:
        """Bytes, by direction, of epochs that were trained again; empty if there are none."""
        if self.folder is not None:
            return self.folder.given_up()
        size = crossed(*self._lost)
        return size if any(size.values()) else {}

    def epoch(self) -> None:
        """Train, evaluate, and write down what it gave."""
        server, training, epoch = self.server, self.training, len(self.records)
        exchange, states = server.states.exchange, server.states.letters()
        each = server.states.each(len(server.clients))
        if exchange is not Exchange.NONE:
            self.clients.begin()
        loss = train_epoch(server, self._present(epoch))
        due = any(info.test_samples for info in server.clients) and training.evaluates(epoch)
        for number in testers(server, each, due):
            peer = self.clients.peers[number]
            peer.lose_after(None)  # who was lost in the epoch is there again to be evaluated
            with suppress(ClientUnavailableError):  # what it sent of an earlier epoch is evaluated
                evaluate(server, peer, epoch)
        scores = server.evaluate() if due else {}
        self.clients.collect()
        costs = server.ledger.take()
        more: dict[str, Any] = {**costs, "states": states, "absent": sorted(server.absent)}
        self.records.append(EpochRecord(epoch, exchange.value, loss, server.samples, scores, **more))
        self.watch(self.records)
        if self.folder is not None:
            # Metrics first: a kill between the two leaves a line too many, which the next start drops.
            self.folder.append(self.records[-1])
        if training.saves(epoch) or training.ending.saves(self.records):
            self._save()

    def _present(self, epoch: int) -> list[LosablePeer]:
        """The clients that take part in an epoch; some are lost in its midst, where the fleet's dropout says so."""
        peers, seed, fleet = self.clients.peers, self.training.seed, self.server.method.fleet
        chosen = [peers[number] for number in fleet.participants(seed, epoch, len(peers))]
        for peer in chosen:
            steps = len(self.clients.facts[peer.number].sizes)
            peer.lose_after(fleet.lost_after(seed, epoch, peer.number, steps))
        return chosen

    def _save(self) -> None:
        if self.checkpoints is not None:
            keep, also = self.training.keep_checkpoints, self.training.ending.kept(self.records)
            state = self.server.saved()
            self.checkpoints.save(len(self.records), self.modules, self.stores, state, keep=keep, also=also)


def _baseline(clients: Sequence[ClientDescription], server: Server, half: nn.Module) -> Baseline:
    """Costs of an epoch of plain split learning in 32 bits with the clients' data and batches."""
    sizes = [size for facts in clients for size in facts.sizes]
    for size in set(sizes):  # a size that the server half cannot be trained on is better known now than in the epoch
        server.flops(size, input_gradient=True)
    weights = len(weights_frame(Weights(0, 1), half.state_dict()))
    return baseline_of([facts.plain for facts in clients], server, weights)


def _facts(halves: Halves, clients: Sequence[ClientDescription]) -> dict[str, Any]:
    """What can be said of halves and data, so that a run is not resumed with others by mistake."""
    facts = {"client half": structure(halves.client), "server half": structure(halves.server)}
    for number, client in enumerate(clients):
        facts |= client.as_dict(f" of client {number}" if len(clients) > 1 else "")
    return facts
