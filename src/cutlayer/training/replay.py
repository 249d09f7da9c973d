"""The activations that the server stores, by client, and the shuffled batches in which it trains on them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cutlayer.codecs import Encoded, get_transfer
from cutlayer.errors import RefusedError
from cutlayer.memory.delta import REFERENCE, moved, references
from cutlayer.memory.store import ReplayStore
from cutlayer.records.ledger import Ledger
from cutlayer.schedule import Always
from cutlayer.seeds import generator
from cutlayer.strategies.party import StepBatch
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.wire.messages import Step


class Replay:
    """The replay store of all clients, whose samples lie one client's after the other's.

    Args:
        store: for the samples of all clients; by default in this process.

    Attributes:
        offsets: sample i of client c is row offsets[c] + i of the store.
        codec: that of what is stored.
    """

    def __init__(
        self, job: Job, clients: Sequence[ClientSummary], ledger: Ledger, store: ReplayStore | None = None
    ) -> None:
        transfer = get_transfer(job.method.activations)
        self.clients, self.ledger, self.seed = clients, ledger, job.training.seed
        self.device = torch.device(job.training.device)
        self.joint = len(clients) > 1 and job.method.fleet.strategy.joint
        self.delta = transfer.delta is not None
        self.codec = REFERENCE if self.delta else transfer.codec
        self.offsets = [sum(info.samples for info in clients[:c]) for c in range(len(clients) + 1)]
        self.store = ReplayStore(self.offsets[-1], job.method.store) if store is None else store
        frozen = all(info.frozen for info in clients)
        if self.delta or frozen or not isinstance(job.method.schedule, Always):
            # Better an error now than in the first B epoch.
            sample_bytes = sum(self.codec.layout(job.cut_shape)) + 8
            self.store.check_budget(self.codec.name, job.cut_shape, sample_bytes)

    def rows(self, client: int | None) -> tuple[int, int]:
        """First row of a client, or of all, and the one after the last."""
        return (0, self.offsets[-1]) if client is None else (self.offsets[client], self.offsets[client + 1])

    def has(self, client: int) -> bool:
        """Whether anything of this client is stored."""
        return self.store.holds(*self.rows(client))

    def digest(self, client: int) -> int:
        """A digest of what is stored of this client."""
        return self.store.digest(*self.rows(client))

    def draw(self, epoch: int, client: int | None = None) -> Iterator[Tensor]:
        """Shuffled batches of stored sample ids, of a client or of all, for an epoch."""
        infos = self.clients if client is None else [self.clients[client]]
        sizes = [info.batch_size for info in infos]
        drop_last = any(info.drop_last for info in infos)
        shuffle = generator(self.seed, "replay", epoch, *((client,) if client else ()))
        batch_size = sum(sizes) if client is None and self.joint else max(sizes)
        return self.store.draw(batch_size, shuffle, drop_last=drop_last, ids=self.rows(client))

    def batches(self, epoch: int, client: int | None = None) -> Iterator[StepBatch]:
        """The stored activations that `draw` names, decoded."""
        for ids in self.draw(epoch, client):
            encoded, labels = self.store.get(ids)
            with self.ledger.phase("decode"):
                activations = self.codec.decode(encoded.to(self.device))
            yield StepBatch(client, activations, labels.to(self.device))

    def put(self, batch: StepBatch) -> None:
        """Store a batch that came from a client."""
        assert batch.ids is not None
        assert batch.encoded is not None
        with self.ledger.phase("store"):
            self.store.put(batch.ids, batch.encoded, batch.labels.cpu())

    def changed(self, ids: Tensor, sent: Tensor, changes: Tensor, message: Step) -> Encoded:
        """The references of these samples after their changes, not stored yet; see `memory.delta`.

        Args:
            ids: rows, int64 [B].
            sent: bool [B], which samples' changes came.
            changes: float32, of those samples.

        Raises:
            RefusedError: a sample has neither a change nor a reference.
        """
        client, anew = message.client, message.anew and message.part == 0
        known = self.store.present(ids) & (not anew)
        if not bool((sent | known).all()):
            lacking = (ids - self.offsets[client])[~(sent | known)].tolist()
            raise RefusedError(f"client {client}: sent: expected changes of samples {lacking}, which have no reference")
        if anew:
            self.store.clear(*self.rows(client))
        return moved(references(self.store, ids, changes), sent.to(changes.device), changes)
