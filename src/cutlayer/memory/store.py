"""The replay store: each sample's newest activation, or its newest views, encoded, with its label.

B epochs fill it, and so do A epochs with `views_from` or a codec of changes (`delta`).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutlayer.codecs import Encoded
from cutlayer.errors import ConfigError, RefusedError, StoreFullError

Placement = Literal["auto", "memory", "disk"]


@dataclass(frozen=True)
class StoreOptions:
    """Where the replay store lies and how large it may grow."""

    placement: Placement = "auto"
    """"memory", "disk" (activations in a memory-mapped file), or "auto": in memory within the budget, then on disk."""
    memory_budget_mib: int = 4096
    """Largest store in memory (there is one for training and one for test data). Beyond it "auto" goes to disk."""
    disk_budget_mib: int = 65536
    """Largest store on disk; beyond it is an error."""
    folder: str | None = None
    """Folder for the file, which vanishes with the process; by default the system's temporary folder (which may itself
    lie in memory)."""

    def __post_init__(self) -> None:
        if self.placement not in ("auto", "memory", "disk"):
            raise ConfigError(f"unknown store placement {self.placement!r}; known: auto, memory, disk")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"store folder {self.folder!r}: expected an existing folder")


class ReplayStore:
    """Activations and labels of `capacity` samples, each in the row of its id.

    Rows hold the codec's bytes, not floats, so 8-bit activations take a quarter of the memory of 32-bit ones, and a
    sample decodes to the bits that it decoded to when it arrived. Memory is taken at the first `put`, when the size of
    a row is known.

    Args:
        capacity: number of samples; ids go from 0 to capacity - 1.
        options: placement and budgets.
        name: what an error calls it.
        blocks: equal parts of the rows, each of which has a row for every sample; see `views`.

    Attributes:
        grows: whether a checkpoint may hold fewer samples, from before clients were admitted: the rest are new.
    """

    def __init__(
        self, capacity: int, options: StoreOptions = StoreOptions(), name: str = "replay store", blocks: int = 1
    ) -> None:
        self.capacity, self.options, self.name, self.blocks = capacity, options, name, blocks
        self.grows = False
        self.codec = ""
        self.shape: tuple[int, ...] = ()
        self.version = 0
        """Counts the changes, so that a checkpoint knows whether it must write the store again."""
        self._arrays: dict[str, np.ndarray] = {}
        self._present = np.zeros(capacity, bool)

    def __len__(self) -> int:
        """Samples that are there."""
        return int(self._present.sum())

    def holds(self, start: int, stop: int) -> bool:
        """Whether any sample with an id from `start` to before `stop` is there."""
        return bool(self._present[start:stop].any())

    @property
    def nbytes(self) -> int:
        """Bytes that the store takes, in memory or on disk."""
        return sum(array.nbytes for array in self._arrays.values()) + self._present.nbytes

    @property
    def on_disk(self) -> bool:
        """Whether the rows lie in a memory-mapped file."""
        return isinstance(self._arrays.get("rows"), np.memmap)

    def put(self, ids: Tensor, activations: Encoded, labels: Tensor | None = None) -> None:
        """Store a batch in place of what was stored of these samples.

        Args:
            ids: int64 [B], from 0 to capacity - 1.
            activations: B encoded samples, of the codec and shape of all the others.
            labels: [B, ...]; a store has them always or never.

        Raises:
            StoreFullError: at the first call, when the store for all samples would be larger than the budget or the
                disk.
            RefusedError: ids out of range, or another codec, shape or type than before. Nothing is stored then.
        """
        index = ids.numpy()
        if index.size and (index.min() < 0 or index.max() >= self.capacity):
            raise RefusedError(f"expected sample ids from 0 to {self.capacity - 1}, got {index.min()} to {index.max()}")
        arrays = {
            "rows": activations.rows.cpu().numpy(),
            "shared": activations.shared.expand(len(ids), -1).cpu().numpy(),
        }
        if labels is not None:
            arrays["labels"] = labels.cpu().numpy()
        if not self._arrays:
            self._allocate(activations.codec, activations.shape, arrays)
        if (activations.codec, activations.shape) != (self.codec, self.shape):
            raise RefusedError(
                f"expected activations in {self.codec} of shape {list(self.shape)}, got {activations.codec} of shape "
                f"{list(activations.shape)}"
            )
        for name, values in arrays.items():
            stored = self._arrays[name]
            if (values.shape, values.dtype) != ((len(index), *stored.shape[1:]), stored.dtype):
                expected = f"{stored.dtype} {[len(index), *stored.shape[1:]]}"
                raise RefusedError(f"{name}: expected {expected}, got {values.dtype} {list(values.shape)}")
        for name, values in arrays.items():
            self._arrays[name][index] = values
        self._present[index] = True
        self.version += 1

    def get(self, ids: Tensor) -> tuple[Encoded, Tensor]:
        """The encoded activations and the labels of these samples, which must be there."""
        return self.encoded(ids), torch.from_numpy(self._arrays["labels"][ids.numpy()])

    def encoded(self, ids: Tensor) -> Encoded:
        """The encoded activations of these samples; bytes of 0 for one that is not there, in a store that has some."""
        rows, shared = (torch.from_numpy(self._arrays[name][ids.numpy()]) for name in ("rows", "shared"))
        return Encoded(self.codec, self.shape, rows, shared)

    def present(self, ids: Tensor) -> Tensor:
        """Which of these samples are there, bool [B]."""
        return torch.from_numpy(self._present[ids.numpy()])

    def clear(self, start: int, stop: int) -> None:
        """Forget the samples with ids from start to stop - 1."""
        self._present[start:stop] = False
        for array in self._arrays.values():
            array[start:stop] = 0
        self.version += 1

    def digest(self, start: int, stop: int) -> int:
        """CRC-32 of which samples from start to stop - 1 are there, and of their rows."""
        present = self._present[start:stop]
        digest = zlib.crc32(present.data)
        return zlib.crc32(self._arrays["rows"][start:stop].data, digest) if present.any() else digest

    def batches(
        self,
        batch_size: int,
        shuffle: torch.Generator | None = None,
        *,
        drop_last: bool = False,
        ids: tuple[int, int] | None = None,
    ) -> Iterator[tuple[Encoded, Tensor]]:
        """All samples once, in batches, as `draw` says."""
        for drawn in self.draw(batch_size, shuffle, drop_last=drop_last, ids=ids):
            yield self.get(drawn)

    def draw(
        self,
        batch_size: int,
        shuffle: torch.Generator | None = None,
        *,
        drop_last: bool = False,
        ids: tuple[int, int] | None = None,
    ) -> Iterator[Tensor]:
        """Ids of all samples once, in batches: shuffled across the whole store, or in their order for None.

        `drop_last` leaves out a last batch that is smaller, unless it is the only one. With `ids` only the samples from
        the first to before the second are taken.
        """
        start, stop = ids or (0, self.capacity)
        present = torch.from_numpy(np.flatnonzero(self._present[start:stop]) + start)
        return batches_of(present, batch_size, shuffle, drop_last=drop_last)

    def check_budget(self, codec: str, shape: tuple[int, ...], sample_bytes: int) -> bool:
        """Whether the store of all samples, of this many bytes each, goes to disk. Raises StoreFullError if nowhere."""
        options, needed = self.options, self.capacity * sample_bytes / (1 << 20)
        on_disk = options.placement == "disk" or (options.placement == "auto" and needed > options.memory_budget_mib)
        budget, place = (options.disk_budget_mib, "disk") if on_disk else (options.memory_budget_mib, "memory")
        if needed > budget:
            raise StoreFullError(
                f"the {self.name} of {self.capacity} samples {list(shape)} in {codec} takes {needed:.1f} MiB, "
                f"the budget on {place} is {budget} MiB; raise it, use placement 'auto' or 'disk', a later cut, "
                "or fewer bits"
            )
        return on_disk

    def _allocate(self, codec: str, shape: tuple[int, ...], arrays: dict[str, np.ndarray]) -> None:
        shapes = {name: (self.capacity, *values.shape[1:]) for name, values in arrays.items()}
        on_disk = self.check_budget(codec, shape, sum(a.itemsize * math.prod(a.shape[1:]) for a in arrays.values()))
        allocated = {
            name: np.zeros(shapes[name], arrays[name].dtype) for name in shapes if name != "rows" or not on_disk
        }
        if on_disk:
            allocated["rows"] = self._mapped(shapes["rows"], arrays["rows"].dtype)
        self._arrays, self.codec, self.shape = allocated, codec, shape

    def _mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Zeros in a file without a name; its room is taken now, as a full disk later would end the process."""
        size = math.prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.options.folder, prefix="cutlayer-store-") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
                return np.memmap(file, dtype, "r+", shape=shape)
        except OSError as error:
            folder = self.options.folder or tempfile.gettempdir()
            raise StoreFullError(
                f"the {self.name} takes {size / (1 << 20):.1f} MiB in {folder}, "
                f"{shutil.disk_usage(folder).free >> 20} MiB are free there ({error.strerror}); free some, or "
                "choose another folder"
            ) from error

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """The arrays, which it shares, and the facts about them."""
        facts = {"codec": self.codec, "shape": list(self.shape), "version": self.version}
        return {**facts, **self._arrays, "present": self._present}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, with a copy of the arrays."""
        self._check_capacity(state["present"])
        arrays = {name: state[name] for name in ("rows", "shared", "labels") if name in state}
        self._arrays = {}
        if arrays:
            self._allocate(state["codec"], tuple(state["shape"]), arrays)
            for name, array in arrays.items():
                self._fill(self._arrays[name], array)
        self._present[:] = False
        self._fill(self._present, state["present"])
        # If it grew, its files in the checkpoint are not those of the next one.
        self.version = state["version"] + (len(state["present"]) < self.capacity)

    def _fill(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy rows into the beginning of each block."""
        own, others = (
            each.reshape(self.blocks, len(each) // self.blocks, *each.shape[1:]) for each in (target, source)
        )
        own[:, : others.shape[1]] = others

    def _check_capacity(self, present: np.ndarray) -> None:
        if len(present) > self.capacity or (len(present) < self.capacity and not self.grows):
            raise ConfigError(
                f"the {self.name} of the checkpoint holds {len(present)} samples, the data set has {self.capacity}"
            )


def batches_of(
    present: Tensor, batch_size: int, shuffle: torch.Generator | None = None, *, drop_last: bool = False
) -> Iterator[Tensor]:
    """Sample ids, int64 [N], in batches, as `ReplayStore.draw` says."""
    if shuffle is not None:
        present = present[torch.randperm(len(present), generator=shuffle)]
    for batch in present.split(batch_size) if len(present) else ():  # of nothing PyTorch makes one part
        if drop_last and len(batch) < min(batch_size, len(present)):
            return
        yield batch
