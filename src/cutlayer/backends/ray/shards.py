"""The replay store if it lies with the server's workers, each of which has a shard of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.backends.ray.group import Group
from cutlayer.codecs import Encoded
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

    def state_dict(self) -> dict[str, Any]:
        """As one store has it; what the workers hold is gathered in files without a name."""
        arrays: dict[str, np.ndarray] = {}
        for ids in self._all():
            encoded, labels = self.get(ids)
            for name, values in (("rows", encoded.rows), ("shared", encoded.shared), ("labels", labels)):
                part = values.numpy()
                if name not in arrays:
                    arrays[name] = self._mapped((self.capacity, *part.shape[1:]), part.dtype)
                arrays[name][ids.numpy()] = part
        return {**super().state_dict(), **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the workers what one store, or this one, had."""
        self._check_capacity(state["present"])
        self._present[:] = state["present"]
        arrays = [state[name] for name in ("rows", "shared", "labels") if name in state]
        for ids in self._all():
            rows, shared, labels = (torch.from_numpy(array[ids.numpy()]) for array in arrays)
            self.put(ids, Encoded(state["codec"], tuple(state["shape"]), rows, shared), labels)
        self.group.wait()
        self.version = state["version"]

    def _all(self) -> tuple[Tensor, ...]:
        present = torch.from_numpy(np.flatnonzero(self._present))
        return present.split(CHUNK) if len(present) else ()
