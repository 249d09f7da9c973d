"""How the server learns: halves, steps, the replay store, and what is counted of an epoch. It sees no frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cutlayer.errors import ConfigError
from cutlayer.memory.store import ReplayStore
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Stateful
from cutlayer.schedule import Exchange
from cutlayer.strategies.protocols import StepBatch
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.replay import Replay
from cutlayer.training.server_halves import ServerHalves
from cutlayer.training.step import EpochCounts, TrainingStep


class Learner:
    """The server half in training, in this process.

    Args:
        clients: what is known of each client, by number.
        store: for the activations; by default in this process.

    Attributes:
        counts: of the epoch under way, or the last one.
    """

    def __init__(
        self, job: Job, clients: Sequence[ClientSummary], ledger: Ledger, store: ReplayStore | None = None
    ) -> None:
        self.ledger, self.device = ledger, torch.device(job.training.device)
        self.step = TrainingStep(job)
        self.output_shape = self.step.flops.output_shape  # before the half's first pass
        self.halves = ServerHalves(job, len(clients))
        self.replayed = Replay(job, clients, ledger, store)
        self.epoch, self.exchange = 0, Exchange.BOTH
        self.counts = EpochCounts.empty(self.device)

    def begin(self, epoch: int, exchange: Exchange) -> None:
        """Begin an epoch that exchanges at most this with a client."""
        self.epoch, self.exchange = epoch, exchange
        self.halves.begin(epoch)
        self.counts = EpochCounts.empty(self.device)

    def train(self, batches: Sequence[StepBatch]) -> None:
        """Train on the batches as one, and store those that are to be replayed or to be references."""
        client, owner = batches[0].client, self.halves.owner(batches[0].client)
        name = (self.epoch, self.counts.steps.get(owner, 0), *((owner,) if owner else ()))
        # A C epoch trains on what was checked before, and its end checks the mean; in it the host does not wait.
        check = self.exchange is not Exchange.NONE
        with self.ledger.phase("server"):
            losses = self.step(self.halves.of(client), batches, name, check_loss=check)
        for batch, loss in zip(batches, losses, strict=True):
            self.counts.add(batch.client, loss, len(batch))
            self.halves.count(batch.client, len(batch))
        self.counts.add_step(owner)
        gradients = any(batch.needs_gradients for batch in batches)
        self.step.count_flops(self.ledger, sum(len(batch) for batch in batches), input_gradient=gradients)
        for batch in batches:
            if self.replayed.stores(batch, self.epoch):
                self.replayed.put(batch)

    def stored(self, client: int | None = None) -> Iterator[StepBatch]:
        """What is stored of a client, or of all, in freshly shuffled batches."""
        return self.replayed.batches(self.epoch, client)

    def replay(self) -> None:
        """Train on the stored activations of all clients, freshly shuffled across them, for one epoch."""
        if len(self.replayed.store) == 0:
            raise ConfigError("a C epoch needs stored activations, but no B epoch came before it")
        for batch in self.stored():
            self.train([batch])

    def finish(self) -> None:
        """End the epoch: have everything in `halves` and `counts`."""

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds: the half and its optimizer, the store, and the clients' own server halves."""
        parts: dict[str, Stateful] = {"server": self.halves.main, "store": self.replayed.store}
        if self.replayed.views.count > 1:
            parts["views"] = self.replayed.views
        return parts if self.halves.pool is None else {**parts, "server_halves": self.halves.pool}

    def parts_loaded(self) -> None:
        """The parts were loaded from a checkpoint."""
