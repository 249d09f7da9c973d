"""The replay store if it lies with the server's workers, each of which has a shard of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.backends.ray.group import Group
from cutlayer.codecs import Encoded
from cutlayer.errors import ConfigError
from cutlayer.memory.store import ReplayStore, StoreOptions

CHUNK = 4096
"""Samples that are moved at a time."""


class ShardedStore(ReplayStore):
    """What `ReplayStore` is, with the rows elsewhere. Budgets hold for each shard.

    In checkpoints it is as a store in one process, so a run may go on with another number of workers.
    """

    def __init__(self, capacity: int, options: StoreOptions, group: Group) -> None:
        super().__init__(capacity, options)
        self.group = group

    def put(self, ids: Tensor, activations: Encoded, labels: Tensor | None = None) -> None:
        """Have the workers store samples, which have labels."""
        assert labels is not None
        mine = [self.group.samples_of(rank, (ids, activations, labels)) for rank in range(self.group.world)]
        calls = [w.put.remote(part) for w, part in zip(self.group.workers, mine, strict=True) if part is not None]
        self.group.later(calls)
        self.mark(ids, activations)

    def mark(self, ids: Tensor, activations: Encoded) -> None:
        """Know of samples that workers were given otherwise."""
        self.codec, self.shape = activations.codec, activations.shape
        self._present[ids.numpy()] = True
        self.version += 1

    def get(self, ids: Tensor) -> tuple[Encoded, Tensor]:
        """Fetch samples from the workers."""
        owners = [torch.nonzero(ids % self.group.world == rank).flatten() for rank in range(self.group.world)]
        asked = [rank for rank, places in enumerate(owners) if len(places)]
        calls = [self.group.workers[rank].get.remote(self.group.ids_of(rank, ids)) for rank in asked]
        parts = self.group.get(calls)
        order = torch.argsort(torch.cat([owners[rank] for rank in asked]))
        rows = torch.cat([encoded.rows for encoded, _ in parts])[order]
        shared = torch.cat([encoded.shared for encoded, _ in parts])[order]
        return Encoded(self.codec, self.shape, rows, shared), torch.cat([labels for _, labels in parts])[order]

    def check_budget(self, codec: str, shape: tuple[int, ...], sample_bytes: int) -> bool:
        """As `ReplayStore.check_budget`, for a shard."""
        shard = ReplayStore(math.ceil(self.capacity / self.group.world), self.options)
        return shard.check_budget(codec, shape, sample_bytes)

    # --- checkpoints ---

    def save(self, folder: Path) -> None:
        """Write all shards into a folder, as one store."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "present.npy", self._present, allow_pickle=False)
        files: dict[str, np.ndarray] = {}
        for ids in self._all():
            encoded, labels = self.get(ids)
            for name, values in (("rows", encoded.rows), ("shared", encoded.shared), ("labels", labels)):
                array = values.numpy()
                if name not in files:
                    shape = (self.capacity, *array.shape[1:])
                    files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, shape)
                files[name][ids.numpy()] = array

    def load(self, folder: Path, about: dict[str, Any]) -> None:
        """Read back what `save` wrote, here or in one process."""
        arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in folder.glob("*.npy")}
        present = arrays.pop("present")
        if len(present) != self.capacity:
            raise ConfigError(f"{folder}: the store holds {len(present)} samples, the data set has {self.capacity}")
        self._present[:] = present
        for ids in self._all():
            names = ("rows", "shared", "labels")
            rows, shared, labels = (torch.from_numpy(arrays[name][ids.numpy()]) for name in names)
            self.put(ids, Encoded(about["codec"], tuple(about["shape"]), rows, shared), labels)
        self.group.wait()
        self.version = about["version"]

    def _all(self) -> tuple[Tensor, ...]:
        present = torch.from_numpy(np.flatnonzero(self._present))
        return present.split(CHUNK) if len(present) else ()
