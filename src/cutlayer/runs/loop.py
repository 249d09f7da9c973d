"""The loop. What happens to a batch, in order, and where to read it:

    batch                        data.batches.Batches
    client half, encode          training.client.Client.forward, training.client_frames
    wire                         backends: local, grpc between machines, ray on a cluster
    checks                       training.checks.FrameChecks
    decode                       training.server.Server.take
    server half, loss, backward,
    update                       training.server.Server.train -> learner.Learner.train -> step.TrainingStep
    encode                       training.server.Server.train
    wire
    decode, backward, update     training.client.Client.backward

In a B epoch the way ends at the server, which stores what it got; a C epoch is the server's alone. With several clients
a strategy says whose batch comes when.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cutlayer.backends.base import Clients
from cutlayer.errors import ClientUnavailableError, ConfigError, DivergedError, StateLostError
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.folder import RunFolder
from cutlayer.records.history import EpochRecord, crossed
from cutlayer.records.state_dicts import Stateful
from cutlayer.runs.overfitting_watch import watch
from cutlayer.schedule import Exchange
from cutlayer.stop_request import Stop
from cutlayer.strategies.protocols import Participant
from cutlayer.training.baseline import baseline_of
from cutlayer.training.end_of_epoch import evaluate, measure, testers
from cutlayer.training.participants import LiveParticipant, ReplayedParticipant, calibrate_clients
from cutlayer.training.peers import Peer
from cutlayer.training.server import Server

log = logging.getLogger("cutlayer.training")


def train_epoch(server: Server, peers: Sequence[Peer]) -> float:
    """Train for the epoch that the server's schedule names, with the clients that are there; return its mean loss."""
    server.begin()
    if server.replays_alone():
        server.learner.replay()
    else:
        participants = participants_of(server, peers)
        if server.calibrates():
            calibrate_clients(server, participants)
        server.strategy.train(server, participants)
    return server.finish()


def participants_of(server: Server, peers: Sequence[Peer]) -> list[Participant]:
    """Who takes part in an epoch, by number: the clients that are there, and the store for those that are not.

    Those that should be there and are not are added to `server.absent`.
    """
    there = {peer.number: peer for peer in peers}
    participants: list[Participant] = []
    for client in range(len(server.clients)):
        resting = server.states.of(client) is Exchange.NONE
        if not resting and client in there:
            participants.append(LiveParticipant(server, there[client]))
            continue
        if not resting:
            server.absent.add(client)
        if server.replayed.has(client) and (resting or server.method.fleet.replay_absent):
            participants.append(ReplayedParticipant(server, client))
    return participants


class Loop:
    """A run: its clients, its server, the epochs that are done, and the checkpoints to go back to.

    Args:
        folder: the run's folder, if it has one.
        checkpoints: where checkpoints are; None for none.
        stop: asks for the end of the run after the epoch under way.

    Attributes:
        records: of the epochs that are done.
        baseline: what savings are measured against.
    """

    def __init__(
        self,
        clients: Clients,
        server: Server,
        folder: RunFolder | None,
        checkpoints: Checkpoints | None,
        stop: Stop | None = None,  # a run in one process is stopped by an exception
    ) -> None:
        self.clients, self.server, self.folder = clients, server, folder
        self.training, self.checkpoints, self.stop = server.job.training, checkpoints, stop
        tested = any(summary.test_samples for summary in clients.summaries)
        self.training.ending.check({"loss", *server.job.task.metrics}, tested)
        self.baseline = baseline_of(clients.plain, server, clients.weights_bytes)
        self.records: list[EpochRecord] = []
        self._diverged_before = -1
        self._lost: list[dict[str, dict[str, int]]] = []
        server.look_ahead(clients.plain, clients.weights_bytes)
        self.parts: dict[str, Stateful] = {**server.parts(), **clients.stores}

    # --- the run ---

    def open(self, config: dict[str, Any], facts: dict[str, Any], resume: bool) -> None:
        """Begin, or go on from the newest checkpoint."""
        state = None
        if self.folder is not None:
            found = self.folder.open(config, facts, self.baseline, resume, self.parts)
            self.records, state = found
            self.folder.forget_models(self.records, self.training)
        if state is not None:
            self._restore(state)
            return
        if self.clients.can_lose_state:
            self.save()
        self.clients.load_state_dict(self.clients.state_dict())

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to train."""
        return self.training.ending.reached(self.records)

    def train(self, listeners: Sequence[Callable[[EpochRecord], None]]) -> None:
        """Train to the end, going back to the last checkpoint if something is lost.

        If others are to take part from some epoch on, train up to it; there is a checkpoint then.
        """
        while not self.ended:
            try:
                if self.stop is not None:
                    self.stop.check()
                if self.clients.changed(len(self.records)):
                    self.clients.collect()
                    self._save_once()
                    return
                self.epoch()
            except (StateLostError, ClientUnavailableError) as reason:
                self.go_back(reason)
                continue
            except DivergedError as error:
                self.go_back(self._reason_to_go_back(error))
                continue
            except BaseException:
                self.give_up()
                raise
            for listener in listeners:
                listener(self.records[-1])

    def go_back(self, reason: StateLostError | ClientUnavailableError) -> None:
        """To the newest checkpoint, with what was lost put back in place. Raises `reason` if that cannot be."""
        self.give_up()
        while True:
            try:
                self.clients.recover(reason)
                log.warning("back to the last checkpoint: %s", reason)
                assert self.checkpoints is not None, "there is one wherever something may be lost"
                found = self.checkpoints.load(self.parts)
            except (StateLostError, ClientUnavailableError) as again:
                if again is reason:  # nothing can be put back in place
                    raise
                reason = again
                continue
            assert found is not None, "the run began with one"
            epochs, state = found
            if self.folder is not None:
                self.records = self.folder.rewind(epochs)
            else:
                self._lost += [record.bytes for record in self.records[epochs:]]
                self.records = self.records[:epochs]
            self._restore(state)
            return

    def _reason_to_go_back(self, error: DivergedError) -> StateLostError:
        """Why to go back when training diverged, and then without whom. Raises the error if there is no way on.

        Should it diverge again before it has come further, what came before was spoiled, too: the newest checkpoint is
        dropped for the one before it.
        """
        epoch, again = len(self.records), len(self.records) <= self._diverged_before
        epochs = self.checkpoints.epochs() if self.checkpoints is not None else []
        if again and not self.clients.trusted and self.checkpoints is not None and len(epochs) > 1:
            self.checkpoints.prune(epochs[:-1])
        elif again or not self.clients.leave_out(error):
            self.give_up()
            raise error
        self._diverged_before = epoch
        return StateLostError(str(error))

    def give_up(self) -> None:
        """Count what the epoch under way, which will be trained again, has sent."""
        sent = self.server.ledger.take().bytes
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

    # --- an epoch ---

    def epoch(self) -> None:
        """Train, evaluate, and write down what it gave."""
        server, epoch, count = self.server, len(self.records), len(self.server.clients)
        self.clients.between_epochs()
        called = server.states.call([client for client in range(count) if self.clients.may_come(client)])
        exchange, states, each = server.states.exchange, server.states.letters(count), server.states.each(count)
        due = any(summary.test_samples for summary in server.clients) and self.training.evaluates(epoch)
        active = [client for client, planned in enumerate(each) if planned is not Exchange.NONE]
        staying = [client for client in range(count) if client not in self.clients.left_out]
        active = [client for client in active if client in staying]
        if active:
            drawn = {staying[place] for place in server.method.fleet.draw(self.training.seed, epoch, len(staying))}
            wanted = [client for client in active if client in drawn | called]
            with self.clients.exchange(epoch, wanted, active, server.calibrating()) as attendance:
                loss = train_epoch(server, list(attendance.training.values()))
                done = [client for client in attendance.training if client not in server.absent]
                self.clients.completed(epoch, done)
                self.clients.training_over()
                if server.measures(each) and (due or epoch + 1 == self.training.epochs):
                    measure(server, [attendance.training[client] for client in done], epoch)
                for client in testers(server, each, due):
                    if client in attendance.all:
                        with suppress(ClientUnavailableError):  # what it sent of an earlier epoch is evaluated
                            evaluate(server, attendance.all[client], epoch)
        else:
            loss = train_epoch(server, [])
        scores = self._scores() if due else {}
        self.clients.collect()
        costs = server.ledger.take()
        spent = (costs.bytes, costs.flops, costs.seconds)
        record = EpochRecord(epoch, exchange.value, loss, server.samples, scores, *spent, states, sorted(server.absent))
        self.records.append(record)
        watch(self.records)
        if self.folder is not None:
            # Metrics first: a kill between the two leaves a line too many, which the next start drops.
            self.folder.append(self.records[-1])
        stops = self.stop is not None and self.stop.requested
        if stops or self.training.saves(epoch) or self.training.ending.saves(self.records):
            self.save()

    def _scores(self) -> dict[str, float]:
        try:
            return self.server.evaluate()
        except ConfigError as error:
            if self.clients.trusted:
                raise
            log.warning("epoch %d is not evaluated: %s", len(self.records), error)  # it ends the run for no one else
            return {}

    # --- checkpoints ---

    def epochs_to_keep(self) -> Sequence[int]:
        """The epochs of a checkpoint that stays beside the newest, unless only one is to stay."""
        return self.clients.epochs_before_exchange() if self.training.keep_checkpoints > 1 else ()

    def save(self) -> None:
        """Write a checkpoint, if there is to be any."""
        if self.checkpoints is not None:
            keep = self.training.keep_checkpoints
            also = {*self.training.ending.kept(self.records), *self.epochs_to_keep()}
            state = {**self.server.state_dict(), **self.clients.state_dict()}
            self.checkpoints.save(len(self.records), self.parts, state, keep=keep, also=also)
            self._saved()

    def _save_once(self) -> None:
        """Save, unless there is a checkpoint after so many epochs already."""
        if self.checkpoints is not None and len(self.records) not in self.checkpoints.epochs():
            self.save()

    def _restore(self, state: Mapping[str, Any]) -> None:
        """The parts are loaded; the rest of the state follows."""
        self.server.load_state_dict(state)
        self.clients.load_state_dict(state)
        self.server.ledger.take()
        self._saved()

    def _saved(self) -> None:
        if self.stop is not None:
            self.stop.saved = len(self.records)
