"""A server half that several workers train in B and C epochs, when no client waits for its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray
import torch

from cutlayer.backends.ray.group import Group
from cutlayer.backends.ray.shards import ShardedStore
from cutlayer.backends.ray.worker import Samples
from cutlayer.codecs import Encoded, get_transfer
from cutlayer.errors import ConfigError
from cutlayer.method import Method
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import on_cpu
from cutlayer.schedule import Exchange
from cutlayer.strategies.protocols import StepBatch
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.learner import Learner


def check_one_half(method: Method, clients: int) -> None:
    """Raise ConfigError if the server trains more than one half in one state, or needs its store at hand."""
    if get_transfer(method.activations).delta is not None:
        raise ConfigError(
            f"activations {method.activations!r}: 'delta>' needs the store in the server's process; choose workers=1"
        )
    if clients > 1 and (method.fleet.strategy.own_server_halves or method.fleet.state == "own"):
        raise ConfigError(
            f"workers train one server half in one state of the schedule; {type(method.fleet.strategy).__name__} with "
            f'state="{method.fleet.state}" has several. Choose workers=1, or another mode and state="shared"'
        )


class ParallelLearner(Learner):
    """As `Learner`. In A epochs it trains itself; in B and C epochs its workers do, from shards that lie with them.

    A B epoch sends each worker what came in of its samples; a C epoch sends the order of the samples and nothing else.
    """

    def __init__(self, job: Job, clients: Sequence[ClientSummary], ledger: Ledger, group: Group) -> None:
        self.group = group
        self._shards = ShardedStore(job.method.views * sum(info.samples for info in clients), job.method.store, group)
        super().__init__(job, clients, ledger, self._shards)
        self._ahead = True
        """Whether the half here is newer than the workers'."""

    @property
    def _delegates(self) -> bool:
        return self.exchange is not Exchange.BOTH

    def begin(self, epoch: int, exchange: Exchange) -> None:
        """As `Learner.begin`; bring the workers' halves to this one."""
        super().begin(epoch, exchange)
        if not self._delegates:
            self._ahead = True
            return
        state = None
        if self._ahead:
            state = ray.put(on_cpu(self.halves.main.state_dict()))
        self.group.later(self.group.each("begin", lambda rank: (epoch, state)))
        self._ahead = False

    def train(self, batches: Sequence[StepBatch]) -> None:
        """As `Learner.train`; in a B epoch the workers do it later, in this order."""
        if not self._delegates:
            super().train(batches)
            return
        step, total = self.counts.steps.get(0, 0), sum(len(batch) for batch in batches)
        sent = self._sent(batches)
        replayed = [batch.ids for batch in batches if batch.message is None and batch.ids is not None]
        stored = torch.cat([torch.empty(0, dtype=torch.int64), *replayed])

        def arguments(rank: int) -> tuple[int, Samples | None, torch.Tensor, int]:
            mine = self.group.samples_of(rank, sent) if sent is not None else None
            return step, mine, self.group.ids_of(rank, stored), total

        with self.ledger.phase("server"):
            self.group.later(self.group.each("train", arguments))
        if sent is not None:
            self._shards.mark(sent[0], sent[1])
        self._count(total)

    def replay(self) -> None:
        """As `Learner.replay`, by the workers, each from its shard."""
        if len(self.replayed.store) == 0:
            super().replay()
        batches = list(self.replayed.draw(self.epoch))
        with self.ledger.phase("server"):
            self.group.later(self.group.each("replay", lambda rank: (batches,)))
            self.group.wait()
        for ids in batches:
            self._count(len(ids))

    def stored(self, client: int | None = None) -> Iterator[StepBatch]:
        """As `Learner.stored`; if workers train, the activations stay with them."""
        if not self._delegates:
            yield from super().stored(client)
            return
        for ids in self.replayed.draw(self.epoch, client):
            nothing = torch.empty(len(ids), 0)
            yield StepBatch(client, nothing, nothing, ids=ids)

    def finish(self) -> None:
        """As `Learner.finish`; take over what the workers learned."""
        if self._delegates and self.counts.samples:
            with self.ledger.phase("server"):
                self.group.wait()
                for loss in self.group.get(self.group.each("finish", lambda rank: ())):
                    self.counts.loss_sum += loss
                (state,) = self.group.get([self.group.workers[0].state_dict.remote()])
                self.halves.main.load_state_dict(state)
        super().finish()

    def parts_loaded(self) -> None:
        """As `Learner.parts_loaded`."""
        self._ahead = True

    def _sent(self, batches: Sequence[StepBatch]) -> Samples | None:
        """What came in from clients, as one batch, with the rows of the store that it goes to."""
        ids, rows, shared, labels = [], [], [], []
        for batch in batches:
            if batch.message is None:
                continue
            assert batch.ids is not None
            assert batch.encoded is not None
            ids.append(self.replayed.views.written(batch.ids))
            rows.append(batch.encoded.rows.cpu())
            shared.append(batch.encoded.shared.cpu().expand(len(batch), -1))
            labels.append(batch.labels.cpu())
        if not ids:
            return None
        codec, shape = self.replayed.codec.name, self.step.job.cut_shape
        return torch.cat(ids), Encoded(codec, shape, torch.cat(rows), torch.cat(shared)), torch.cat(labels)

    def _count(self, samples: int) -> None:
        """Count a step of the workers, whose losses come at the end."""
        self.counts.add_step(0)
        self.counts.samples += samples
        self.step.count_flops(self.ledger, samples, input_gradient=False)
