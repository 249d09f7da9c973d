"""The activations that the server stores, by client, and the shuffled batches in which it trains on them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cutlayer.codecs import Encoded, get_transfer, magnitude
from cutlayer.errors import RefusedError, StoreFullError
from cutlayer.memory.delta import REFERENCE, moved, references
from cutlayer.memory.store import ReplayStore, batches_of
from cutlayer.memory.views import Views
from cutlayer.records.ledger import Ledger
from cutlayer.schedule import Always
from cutlayer.seeds import generator
from cutlayer.strategies.protocols import StepBatch
from cutlayer.training.checks import ClientSummary, ignored_label
from cutlayer.training.job import Job
from cutlayer.wire.messages import Step


class Replay:
    """The replay store of all clients, whose samples lie one client's after the other's.

    Args:
        store: for the samples of all clients; by default in this process.

    Attributes:
        offsets: sample i of client c is sample offsets[c] + i of all.
        views: which rows of the store are views of a sample; with one view, a sample's row is its number.
        codec: that of what is stored.
    """

    def __init__(
        self, job: Job, clients: Sequence[ClientSummary], ledger: Ledger, store: ReplayStore | None = None
    ) -> None:
        transfer = get_transfer(job.method.activations)
        self.clients, self.ledger, self.seed = clients, ledger, job.training.seed
        self.device, self.ignored = torch.device(job.training.device), ignored_label(job.task)
        self.joint = len(clients) > 1 and job.method.fleet.strategy.joint
        self.delta, self.shape = transfer.delta is not None, job.cut_shape
        self.codec = REFERENCE if self.delta else transfer.codec
        self.offsets = [sum(info.samples for info in clients[:c]) for c in range(len(clients) + 1)]
        self.views = Views(self.offsets[-1], job.method.views)
        name = f"replay store with {self.views.count} views a sample" if self.views.count > 1 else "replay store"
        made = ReplayStore(self.views.rows, job.method.store, name, self.views.count) if store is None else store
        self.store = made
        self._fills_from = job.method.views_from
        frozen = all(info.frozen for info in clients)
        if self.delta or frozen or not isinstance(job.method.schedule, Always) or self._fills_from is not None:
            # Better an error now than in the first B epoch.
            sample_bytes = sum(self.codec.layout(job.cut_shape)) + 8
            self.store.check_budget(self.codec.name, job.cut_shape, sample_bytes)

    def samples_of(self, client: int | None) -> tuple[int, int]:
        """First sample of a client, or of all, and the one after the last."""
        return (0, self.offsets[-1]) if client is None else (self.offsets[client], self.offsets[client + 1])

    def has(self, client: int) -> bool:
        """Whether anything of this client is stored."""
        return any(self.store.holds(*rows) for rows in self.views.ranges(*self.samples_of(client)))

    def forget(self, client: int) -> None:
        """Drop all views that are stored of this client."""
        for rows in self.views.ranges(*self.samples_of(client)):
            self.store.clear(*rows)
        self.views.forget(*self.samples_of(client))

    def magnitudes(self, clients: Iterable[int]) -> dict[int, float]:
        """The largest magnitude of what is stored of each of these clients, if anything is."""
        found: dict[int, float] = {}
        for client in clients:
            for rows in self.views.ranges(*self.samples_of(client)):
                for ids in self.store.draw(self.clients[client].batch_size, ids=rows):
                    largest = magnitude(self.codec.decode(self.store.encoded(ids)))
                    found[client] = max(largest, found.get(client, 0.0))
        return found

    def digest(self, client: int) -> int:
        """A digest of what is stored of this client."""
        return self.store.digest(*self.samples_of(client))

    def stores(self, batch: StepBatch, epoch: int) -> bool:
        """Whether a batch of an epoch is to be stored: one that is to be replayed, or to be references."""
        fills = self._fills_from is not None and epoch >= self._fills_from
        return batch.message is not None and (self.delta or fills or not batch.needs_gradients)

    def draw(self, epoch: int, client: int | None = None) -> Iterator[Tensor]:
        """Shuffled batches of rows for an epoch: a stored view of each sample of a client or of all."""
        infos = self.clients if client is None else [self.clients[client]]
        sizes = [info.batch_size for info in infos]
        drop_last = any(info.drop_last for info in infos)
        own = (client,) if client else ()
        shuffle = generator(self.seed, "replay", epoch, *own)
        batch_size = sum(sizes) if client is None and self.joint else max(sizes)
        if self.views.count == 1:
            yield from self.store.draw(batch_size, shuffle, drop_last=drop_last, ids=self.samples_of(client))
            return
        present, choose = self.views.present(*self.samples_of(client)), generator(self.seed, "views", epoch, *own)
        for ids in batches_of(present, batch_size, shuffle, drop_last=drop_last):
            yield self.views.drawn(ids, choose)

    def batches(self, epoch: int, client: int | None = None) -> Iterator[StepBatch]:
        """The stored activations that `draw` names, decoded."""
        for ids in self.draw(epoch, client):
            encoded, labels = self.store.get(ids)
            if not bool(self._told(labels).any()):
                continue
            with self.ledger.phase("decode"):
                activations = self.codec.decode(encoded.to(self.device))
            yield StepBatch(client, activations, labels.to(self.device))

    def check_room(self, labels: Tensor) -> None:
        """Whether samples with labels such as these, the first that come, fit into the store. Raises RefusedError."""
        label_bytes = labels[:1].numel() * labels.element_size()
        try:
            self.store.check_budget(self.codec.name, self.shape, sum(self.codec.layout(self.shape)) + label_bytes)
        except StoreFullError as error:
            raise RefusedError(f"labels {list(labels.shape[1:])}: {error}") from None

    def put(self, batch: StepBatch) -> None:
        """Store a batch that came from a client, but for samples of which the loss leaves out every label.

        The loss of a batch of such alone, which a shuffle may give, is 0/0. References are all stored.
        """
        assert batch.ids is not None
        assert batch.encoded is not None
        ids, encoded, labels = batch.ids, batch.encoded, batch.labels.cpu()
        if not self.delta and not bool((told := self._told(labels)).all()):
            shared = encoded.shared if len(encoded.shared) == 1 else encoded.shared[told]
            encoded = Encoded(encoded.codec, encoded.shape, encoded.rows[told], shared)
            ids, labels = ids[told], labels[told]
        with self.ledger.phase("store"):
            self.store.put(self.views.written(ids), encoded, labels)

    def _told(self, labels: Tensor) -> Tensor:
        """Which samples have a label that the loss does not leave out, bool [B]."""
        if self.ignored is None or labels.is_floating_point():
            return torch.ones(len(labels), dtype=torch.bool)
        return (labels.reshape(len(labels), -1) != self.ignored).any(1)

    def changed(self, ids: Tensor, sent: Tensor, changes: Tensor, message: Step) -> Encoded:
        """The references of these samples after their changes, not stored yet; see `memory.delta`.

        Args:
            ids: rows, int64 [B].
            sent: bool [B], which samples' changes came.
            changes: float32, of those samples.

        Raises:
            RefusedError: a sample has neither a change nor a reference.
        """
        client, anew = message.client, message.anew and message.starts
        known = self.store.present(ids) & (not anew)
        if not bool((sent | known).all()):
            lacking = (ids - self.offsets[client])[~(sent | known)].tolist()
            raise RefusedError(f"client {client}: sent: expected changes of samples {lacking}, which have no reference")
        if anew:
            self.store.clear(*self.samples_of(client))  # with delta there is one view, so a sample's row is its number
        return moved(references(self.store, ids, changes), sent.to(changes.device), changes)
