"""The batches of a client's data, with the ids of their samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import default_collate

from cutlayer.data.augment import Augment
from cutlayer.data.images import Images
from cutlayer.errors import ConfigError, some
from cutlayer.seeds import derive, generator, seeded_everywhere


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one step: ids int64 [B] (positions in the data set), inputs [B, ...] and labels [B, ...]."""

    ids: Tensor
    inputs: Tensor
    labels: Tensor


class Batches:
    """The batches of one client's data, epoch by epoch, the same for the same seed.

    Args:
        source: a map-style `Dataset` of (input, label) pairs, shuffled anew each epoch, or a `DataLoader`, whose
            batches, collate function and workers stay; its randomness is seeded by epoch. A sampler of batches must
            not make larger ones than in its first epoch.
        batch_size: samples in a batch, for a `Dataset`.
        seed: the run's seed.
        client: the client's number, part of the name of each draw.
        shuffle: for a `Dataset`, whether its order changes from epoch to epoch.
        drop_last: for a `Dataset`, whether a last, smaller batch is left out.
        augment: applied to the inputs of each batch with a generator of its own.
    """

    def __init__(  # a `DataLoader`'s choices, and what the draws are named for
        self,
        source: Dataset | DataLoader,
        *,
        batch_size: int = 128,
        seed: int = 0,
        client: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        augment: Augment | None = None,
    ) -> None:
        loader = source if isinstance(source, DataLoader) else None
        self.dataset: Any = loader.dataset if loader is not None else source
        if isinstance(self.dataset, tuple):
            raise ConfigError(
                "expected a data set, got a tuple; of tensors use torch.utils.data.TensorDataset(*tensors)"
            )
        if type(self.dataset).__module__.partition(".")[0] in ("pandas", "polars"):
            raise ConfigError(
                f"expected a data set of (input, label) pairs, got a {type(self.dataset).__name__}; make tensors "
                "of its columns: TensorDataset(torch.tensor(frame[inputs].to_numpy(), dtype=torch.float32), "
                "torch.tensor(frame[label].to_numpy()))"
            )
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__"):
            raise ConfigError(
                "expected a map-style data set (with __getitem__ and __len__), whose samples have stable positions; "
                f"got {type(self.dataset).__name__}. The replay store stores activations by sample."
            )
        if len(self) == 0:
            raise ConfigError("the data set is empty; expected at least one sample")
        if loader is not None and loader.batch_sampler is None:
            raise ConfigError("expected a DataLoader with automatic batching, got one with batch_size=None")
        if loader is None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.loader, self.seed, self.client, self.augment = loader, seed, client, augment
        if loader is not None:  # a batch sampler of the user's own knows better than the loader
            drop_last = getattr(loader.batch_sampler, "drop_last", loader.drop_last)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.batch_size = batch_size
        sizes = self.batch_sizes()
        if not sizes:
            raise ConfigError(f"no batch is left of {len(self)} samples: drop_last leaves out the only, smaller one")
        if loader is not None:
            self.batch_size = max(sizes)

    def __len__(self) -> int:
        """Samples in the data set."""
        return len(self.dataset)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of this epoch."""
        for step, (ids, (inputs, labels)) in enumerate(self._fetch(self.order(epoch), epoch)):
            yield Batch(ids, self._augmented(inputs, epoch, step), labels)

    def batch_sizes(self) -> list[int]:
        """Sizes of the batches of an epoch (the first, if a sampler's differ from epoch to epoch)."""
        return [len(batch) for batch in self.order(0)]

    def sample(self) -> Batch:
        """The first one or two samples, as they are trained on, to see shapes and types with."""
        first = self.first()
        return Batch(first.ids, self._augmented(first.inputs, 0, 0), first.labels)

    def first(self) -> Batch:
        """The first one or two samples, not augmented."""
        ids, (inputs, labels) = next(self._fetch([list(range(min(2, len(self))))], 0))
        return Batch(ids, inputs, labels)

    def _augmented(self, inputs: Tensor, epoch: int, step: int) -> Tensor:
        if self.augment is None:
            return inputs
        name = ("augment", self.client, epoch, step)
        with seeded_everywhere(self.seed, *name):  # for an augmentation that does not use the generator it is given
            return self.augment(inputs, generator(self.seed, *name))

    def order(self, epoch: int) -> list[list[int]]:
        """The ids of the samples in each batch of this epoch, without reading a sample."""
        if self.loader is None:
            count = len(self)
            order = torch.arange(count)
            if self.shuffle:
                order = torch.randperm(count, generator=generator(self.seed, "order", self.client, epoch))
            batches = [part.tolist() for part in order.split(self.batch_size)]
            return batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches
        # A sampler draws from a generator of its own, if it has one, from the global one, or from the epoch's number.
        inner = getattr(self.loader.batch_sampler, "sampler", None)
        parts = (self.loader, self.loader.sampler, self.loader.batch_sampler, inner)
        own: list[torch.Generator] = list({id(g): g for p in parts if (g := getattr(p, "generator", None))}.values())
        states = [(draw, draw.get_state()) for draw in own]
        for part in parts[1:]:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for draw in own:
            draw.manual_seed(derive(self.seed, "order", self.client, epoch))
        with seeded_everywhere(self.seed, "order", self.client, epoch):
            batches = [list(batch) for batch in self.loader.batch_sampler]  # type: ignore[union-attr]
        for draw, state in states:
            draw.set_state(state)
        return batches

    def _fetch(self, indices: list[list[int]], epoch: int) -> Iterator[tuple[Tensor, Any]]:
        if type(self.dataset) is Images and self.loader is None:  # one gather instead of a call for each sample
            for batch in indices:
                ids = torch.tensor(batch)
                yield ids, self.dataset.fetch(ids)
            return
        source = iter(self._loader(indices, epoch))
        for step in range(len(indices)):
            # A data set may draw in __getitem__ (random transforms), in this process when there are no workers.
            with seeded_everywhere(self.seed, "fetch", self.client, epoch, step):
                ids, item = next(source)
            if not isinstance(item, (tuple, list)) or len(item) != 2 or not all(isinstance(t, Tensor) for t in item):
                whole = type(item).__name__
                parts = [type(part).__name__ for part in item] if isinstance(item, (tuple, list)) else whole
                raise ConfigError(
                    f"expected a data set of (input, label) pairs that collate to two tensors, got {parts}"
                )
            yield ids, item

    def _loader(self, indices: list[list[int]], epoch: int) -> DataLoader:
        """A loader of these batches that says which samples they hold, otherwise like the user's."""
        given = self.loader
        options: Any = {}
        if given is not None:
            options = {"pin_memory": given.pin_memory, "num_workers": given.num_workers}
            if given.num_workers > 0:
                options |= {
                    "timeout": given.timeout,
                    "worker_init_fn": given.worker_init_fn,
                    "prefetch_factor": given.prefetch_factor,
                    "multiprocessing_context": given.multiprocessing_context,
                }
        return DataLoader(
            _Indexed(self.dataset),
            batch_sampler=indices,
            collate_fn=_CollateIndexed(given.collate_fn if given is not None else default_collate),
            generator=generator(self.seed, "workers", self.client, epoch),
            **options,
        )


class _Indexed(Dataset):
    """A data set whose batches carry the indices of their samples."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> tuple[list[int], list]:
        if hasattr(self.dataset, "__getitems__"):
            return indices, self.dataset.__getitems__(indices)
        return indices, [self.dataset[index] for index in indices]


class _CollateIndexed:
    """Collates what `_Indexed` fetched; a class, because workers may need to pickle it."""

    def __init__(self, collate: Callable[[list], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: Any) -> tuple[Tensor, Any]:
        indices, samples = fetched
        return torch.tensor(indices), self.collate(samples)


def not_finite(batch: Batch, activations: Tensor, test: bool) -> str:
    """Why activations are not finite: the inputs of which samples, or if it is none of those, the training."""
    inputs = batch.inputs.detach().cpu()
    wrong = ~torch.isfinite(inputs).reshape(len(inputs), -1).all(1)
    if bool(wrong.any()):
        of = "test samples" if test else "samples"
        return f"the inputs of {of} {some(batch.ids[wrong].tolist())} hold infinities or NaN; mend or leave out these"
    wrong = ~torch.isfinite(activations.detach().cpu()).reshape(len(activations), -1).all(1)
    return (
        f"activations at the cut are not finite, though the inputs are (samples {some(batch.ids[wrong].tolist())}); "
        "lower the learning rate"
    )
