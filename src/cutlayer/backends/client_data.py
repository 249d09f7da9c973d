"""What each client of a run holds: its data for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cutlayer.data.batches import Batches
from cutlayer.errors import ConfigError
from cutlayer.method import Training

Data = Dataset | DataLoader | Callable[[], Dataset | DataLoader]


@dataclass(frozen=True, eq=False)
class ClientData:
    """A client's data: a data set, a loader of one, or a function that returns either, called where the client is."""

    train: Data
    test: Data | None = None

    def feeds(self, number: int, training: Training) -> tuple[Batches, Batches | None]:
        """Its batches for training and for evaluation."""
        feed = Batches(
            _called(self.train),
            batch_size=training.batch_size,
            seed=training.seed,
            client=number,
            shuffle=training.shuffle,
            drop_last=training.drop_last,
            augment=training.augment,
        )
        return feed, self.test_feed(number, training, feed.batch_size)

    def test_feed(self, number: int, training: Training, batch_size: int) -> Batches | None:
        """Its batches for evaluation, if it has any."""
        if self.test is None:
            return None
        return Batches(_called(self.test), batch_size=batch_size, seed=training.seed, client=number, shuffle=False)

    @property
    def tests_here(self) -> bool:
        """Whether its test data, if it has any, are at hand, and not what a function returns elsewhere."""
        return self.test is None or isinstance(self.test, DataLoader) or not callable(self.test)


def _called(source: Any) -> Dataset | DataLoader:
    return source() if callable(source) and not isinstance(source, (Dataset, DataLoader)) else source


def client_data_of(train: Data | Sequence[Data], test: Data | Sequence[Data | None] | None) -> list[ClientData]:
    """What each client holds, from the arguments of `fit`."""
    parts, tests = _by_client(train), _by_client(test)
    if not parts or len(tests) > len(parts):
        raise ConfigError(
            f"expected training data of at least one client, and test data of no more clients than that, got "
            f"{len(parts)} and {len(tests)}"
        )
    tests += [None] * (len(parts) - len(tests))
    return [ClientData(*pair) for pair in zip(parts, tests, strict=True)]


def _by_client(data: Any) -> list[Any]:
    """The data of each client: of a list of data sets each is one's, and a list of samples is the first client's."""
    if not isinstance(data, (list, tuple)) or (isinstance(data, tuple) and all(map(_is_array, data))):
        return [data]  # arrays are refused by `Batches`, with a hint
    pairs = [item for item in data if isinstance(item, tuple) and len(item) == 2]
    if not pairs or len(pairs) < len(data):
        return list(data)
    if any(_is_array(label) and label.ndim > 0 for _, label in pairs):
        raise ConfigError(
            "expected a data set, or a list with one for each client, got a list of pairs of tensors. If each is a "
            "sample, (input, label), give [pairs]: one client with these samples. If each is a client's inputs and "
            "labels, give [torch.utils.data.TensorDataset(*pair) for pair in pairs]"
        )
    return [data]


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))
