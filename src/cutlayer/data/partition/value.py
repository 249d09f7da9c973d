"""A partition: which training samples each client has, how that was decided, and the file that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from cutlayer import files
from cutlayer.data.images import Images
from cutlayer.data.partition.file import decode, encode
from cutlayer.describe import fingerprint
from cutlayer.errors import ConfigError

MOST_CLASSES = 2**16

Labels = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True, eq=False)
class Partition:
    """Which training samples each client has, and how that was decided.

    Attributes:
        clients: for each client its samples' positions in the data set: int64, sorted, read-only. No sample is with two
            clients; the functions that make partitions leave no sample out, a file of one's own may.
        samples: number of samples in the data set.
        method: name of the function that made it, or what a file says.
        parameters: that function's own arguments, such as {"alpha": 0.5}, and what it did to meet them.
        seed: the draw's seed.
        data: name of the data set, if it is known.
        labels: fingerprint of its labels, if they are known.
        class_counts: int64 [clients, classes]: samples of each class with each client, if the labels are known.
    """

    clients: tuple[np.ndarray, ...]
    samples: int
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    data: str | None = None
    labels: str | None = None
    class_counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"expected at least one sample, got {self.samples}")
        owner = np.full(self.samples, -1, np.int64)
        clients = tuple(np.array(indices, dtype=np.int64) for indices in self.clients)
        if not clients:
            raise ConfigError("expected at least one client")
        for client, indices in enumerate(clients):
            if (np.diff(indices) <= 0).any():
                raise ConfigError(f"client {client}: expected indices that increase, each once")
            if len(indices) and not 0 <= indices[0] <= indices[-1] < self.samples:
                wrong = indices[0] if indices[0] < 0 else indices[-1]
                raise ConfigError(f"client {client}: expected indices from 0 to {self.samples - 1}, got {wrong}")
            if (taken := owner[indices] >= 0).any():
                index = indices[taken][0]
                raise ConfigError(f"sample {index} is with client {owner[index]} and with client {client}; keep one")
            owner[indices] = client
            indices.flags.writeable = False
        object.__setattr__(self, "clients", clients)

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.clients)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and encode(vars(self)) == encode(vars(other))

    def __hash__(self) -> int:
        return hash(encode(vars(self)))

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each client: int64 [clients]."""
        return np.array([len(indices) for indices in self.clients])

    @property
    def how(self) -> str:
        """How it was made, in words, such as "dirichlet, alpha 0.5, min_samples 10, seed 0"."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return ", ".join([self.method, *(f"{name} {value}" for name, value in (self.parameters | seed).items())])

    def subset(self, dataset: Dataset, client: int) -> Dataset:
        """One client's samples, in the order of `clients`: `Images` of `Images`, a `Subset` of any other data set.

        Raises ConfigError for a data set with another number of samples, or a client that there is not.
        """
        if not 0 <= client < len(self):
            raise ConfigError(f"expected a client from 0 to {len(self) - 1}, got {client}")
        self._check_samples(len(dataset))  # type: ignore[arg-type]
        if isinstance(dataset, Images):
            return dataset.take(torch.tensor(self.clients[client]))
        return Subset(dataset, self.clients[client].tolist())

    def counts(self, labels: Labels) -> np.ndarray:
        """Samples of each class with each client: int64 [clients, classes].

        Args:
            labels: the class of each sample in the data set, [samples] integers from 0; `classes` is one more than the
                largest.
        """
        array = label_array(labels)
        self._check_samples(len(array))
        classes = int(array.max()) + 1
        return np.stack([np.bincount(array[indices], minlength=classes) for indices in self.clients])

    def of(self, labels: Labels, data: str | None = None) -> Partition:
        """The same, with what the labels (integers [samples]) tell and the data set's name, for its file to hold."""
        array = label_array(labels)
        return dataclasses.replace(
            self, data=data, labels=fingerprint(torch.tensor(array)), class_counts=self.counts(array)
        )

    def check(self, labels: Labels, data: str | None = None) -> None:
        """Raise ConfigError if this was made for another data set: other labels (integers [samples]) or name."""
        if data is not None and self.data is not None and data != self.data:
            raise ConfigError(f"the partition is of the data set {self.data!r}, not of {data!r}")
        array = label_array(labels)
        self._check_samples(len(array))
        if self.labels is not None and (found := fingerprint(torch.tensor(array))) != self.labels:
            raise ConfigError(
                f"the partition was made for other labels (fingerprint {self.labels}) than this data set's ({found}); "
                "make it anew, or use the data set that it was made for"
            )
        if self.class_counts is not None and not np.array_equal(self.class_counts, self.counts(array)):
            raise ConfigError("the partition's class counts are not those of its indices and this data set's labels")

    def save(self, file: str | Path) -> None:
        """Write it to a JSON file for people to read and `load` to check, as a whole or not at all."""
        files.replace(Path(file), encode(vars(self)))

    @staticmethod
    def load(file: str | Path, *, allow_empty: bool = False) -> Partition:
        """Read and check a file that `save` or a person wrote; `check` then compares it with the data set.

        Raises ConfigError, with the file's name, for one that is missing or damaged, whose indices are out of range or
        with two clients, whose numbers contradict each other, or if a client has no sample, unless `allow_empty`.
        """
        try:
            return Partition(**decode(Path(file).read_bytes(), allow_empty))
        except FileNotFoundError:
            raise ConfigError(f"{file}: no such file; `cutlayer partition` makes one") from None
        except ConfigError as error:
            raise ConfigError(f"{file}: not a partition that can be used: {error}") from None

    def _check_samples(self, samples: int) -> None:
        if samples != self.samples:
            raise ConfigError(f"the partition is of {self.samples} samples, the data set has {samples}")


def label_array(labels: Labels) -> np.ndarray:
    """Labels as int64 [samples]. Raises ConfigError for what are no class numbers."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise ConfigError(f"expected the class of each sample, integers [samples], got {array.dtype} {array.shape}")
    if array.min() < 0 or array.max() >= MOST_CLASSES:
        raise ConfigError(f"expected classes from 0 to {MOST_CLASSES - 1}, got {array.min()} to {array.max()}")
    return array.astype(np.int64)
