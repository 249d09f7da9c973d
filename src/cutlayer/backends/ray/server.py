"""A server whose half is trained by several workers in B and C epochs, when no client waits for its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import torch

from cutlayer.backends.ray.group import Group
from cutlayer.backends.ray.shards import ShardedStore
from cutlayer.backends.ray.worker import Samples
from cutlayer.codecs import Encoded, get_transfer
from cutlayer.errors import ConfigError
from cutlayer.method import Method
from cutlayer.records.ledger import Ledger
from cutlayer.schedule import Exchange
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.server import Server, StepBatch


def check_one_half(method: Method, clients: int) -> None:
    """Raise ConfigError where the server trains more than one half in one state, or needs its store at hand."""
    if get_transfer(method.activations).delta is not None:
        raise ConfigError(
            f"activations {method.activations!r}: 'delta>' needs the store in the server's process; choose workers=1"
        )
    if clients > 1 and (method.fleet.strategy.own_server_halves or method.fleet.state == "own"):
        raise ConfigError(
            f"workers train one server half in one state of the schedule; {type(method.fleet.strategy).__name__} with "
            f'state="{method.fleet.state}" has several. Choose workers=1, or another mode and state="shared"'
        )


class ParallelServer(Server):
    """As `Server`. In A epochs it trains itself; in B and C epochs its workers do, from shards that lie with them.

    A B epoch sends each worker what came in of its samples; a C epoch sends the order of the samples and nothing else.
    """

    def __init__(self, job: Job, clients: list[ClientSummary], ledger: Ledger, group: Group) -> None:
        super().__init__(job, clients, ledger)
        self.group = group
        self._shards = ShardedStore(self.offsets[-1], job.method.store, group)
        self.store = self._shards
        self._ahead = True
        """Whether the half here is newer than the workers'."""

    @property
    def _delegates(self) -> bool:
        return self.states.exchange is not Exchange.BOTH

    def begin(self) -> None:
        """As `Server.begin`; bring the workers' halves to this one."""
        super().begin()
        if not self._delegates:
            self._ahead = True
            return
        state = None
        if self._ahead:
            tensors, about = self.body.tensors()
            state = ray.put(({name: value.cpu() for name, value in tensors.items()}, about))
        self.group.later(self.group.each("begin", lambda rank: (self.states.epoch, state)))
        self._ahead = False

    def train(self, parts: Sequence[StepBatch]) -> list[bytes | None]:
        """As `Server.train`; in a B epoch the workers do it later, in this order."""
        if not self._delegates:
            return super().train(parts)
        step, total = self._steps.get(0, 0), sum(len(part.labels) for part in parts)
        sent = self._sent(parts)
        absent = [part.ids for part in parts if part.message is None and part.ids is not None]
        kept = torch.cat([torch.empty(0, dtype=torch.int64), *absent])
        with self.ledger.phase("server"):
            self.group.later(
                self.group.each(
                    "learn",
                    lambda rank: (
                        step,
                        self.group.mine(rank, sent) if sent is not None else None,
                        self.group.kept(rank, kept),
                        total,
                    ),
                )
            )
        if sent is not None:
            self._shards.mark(sent[0], sent[1])
        for part in parts:
            if part.client is not None and part.message is not None:
                self._last[part.client] = part.message
        self._count(step, total)
        return [None] * len(parts)

    def replay(self) -> None:
        """As `Server.replay`, by the workers, each from its shard."""
        if len(self.store) == 0:
            return super().replay()
        batches = list(self.drawn())
        with self.ledger.phase("server"):
            self.group.later(self.group.each("replay", lambda rank: (batches,)))
            self.group.settle()
        for step, ids in enumerate(batches):
            self._count(step, len(ids))
        return None

    def stored(self, client: int | None = None) -> Iterator[StepBatch]:
        """As `Server.stored`; where workers train, the activations stay with them."""
        if not self._delegates:
            yield from super().stored(client)
            return
        for ids in self.drawn(client):
            nothing = torch.empty(len(ids), 0)
            yield StepBatch(client, nothing, nothing, ids=ids)

    def finish(self) -> float:
        """As `Server.finish`; take over what the workers learned."""
        if self._delegates and self.samples:
            with self.ledger.phase("server"):
                self.group.settle()
                for loss in self.group.get(self.group.each("finish", lambda rank: ())):
                    self._loss_sum += loss
                (state,) = self.group.get([self.group.workers[0].state.remote()])
                self.body.load(*state)
        return super().finish()

    def go_back(self, values: Mapping[str, Any]) -> None:
        """As `Server.go_back`."""
        super().go_back(values)
        self._ahead = True

    def _sent(self, parts: Sequence[StepBatch]) -> Samples | None:
        """What came in from clients, as one batch with ids over all clients."""
        came = [(part, part.ids, part.encoded) for part in parts if part.message is not None]
        ids, rows, shared, labels = [], [], [], []
        for part, own, encoded in came:
            assert own is not None
            assert encoded is not None
            ids.append(own)
            rows.append(encoded.rows.cpu())
            shared.append(encoded.shared.cpu().expand(len(own), -1))
            labels.append(part.labels.cpu())
        if not came:
            return None
        encoded = Encoded(self.store_codec.name, self.cut_shape, torch.cat(rows), torch.cat(shared))
        return torch.cat(ids), encoded, torch.cat(labels)

    def _count(self, step: int, samples: int) -> None:
        self._steps[0] = step + 1
        self.samples += samples
        forward, backward = self.flops(samples, input_gradient=False)
        self.ledger.flops("server", "forward", forward)
        self.ledger.flops("server", "backward", backward)
