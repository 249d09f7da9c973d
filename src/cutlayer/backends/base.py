"""The clients of a run as `fit` knows them: what they hold, and where they are. Here that is this process.

A backend that has them elsewhere, such as `cluster`, gives another `Clients`; the loop stays the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cutlayer.backends.local import LocalPeer
from cutlayer.data.batches import Batches
from cutlayer.describe import describe, fingerprint
from cutlayer.errors import ClientUnavailableError, ConfigError, StateLostError
from cutlayer.method import Method, Training
from cutlayer.models.cut import is_frozen
from cutlayer.records.checkpoint import Store
from cutlayer.records.ledger import Ledger
from cutlayer.training.checks import ClientSummary
from cutlayer.training.client import Client
from cutlayer.training.halves import HalfPool
from cutlayer.training.job import ClientJob, Job
from cutlayer.training.participants import Peer
from cutlayer.training.plain import PlainEpoch
from cutlayer.training.server import Server

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


def client_summary(train: Batches, test: Batches | None, half: nn.Module) -> ClientSummary:
    """What the server is told of a client's data, and of its half."""
    test_samples, test_batch_size = (len(test), test.batch_size) if test is not None else (0, 0)
    samples = sum(train.batch_sizes())
    return ClientSummary(
        len(train), test_samples, train.batch_size, train.drop_last, test_batch_size, samples, is_frozen(half)
    )


@dataclass(frozen=True)
class ClientDescription:
    """What can be said of a client before it trains.

    Attributes:
        info: what the server is told.
        cut_shape: shape of one sample's activations.
        inputs: type and shape of one sample.
        sizes: samples in each batch of an epoch.
        plain: its part in an epoch of plain split learning.
        stores: names of what a checkpoint holds of it beside its half and optimizer.
        first: a digest of its first samples, so that a run is not resumed with other data by mistake.
    """

    info: ClientSummary
    cut_shape: tuple[int, ...]
    inputs: str
    sizes: list[int]
    plain: PlainEpoch
    stores: list[str]
    first: str

    @staticmethod
    def of(client: Client) -> ClientDescription:
        """Those of this client."""
        first, sizes = client.train.first(), client.train.batch_sizes()
        return ClientDescription(
            client_summary(client.train, client.test, client.half),
            client.cut_shape,
            f"{client.flops.dtype} {list(client.flops.sample_shape)}",
            sizes,
            PlainEpoch.of(client),
            [*client.stores()],
            fingerprint(first.inputs, first.labels),
        )

    def as_dict(self, whose: str) -> dict[str, Any]:
        """As config.json names them."""
        return {
            f"training samples{whose}": self.info.samples,
            f"batches{whose}": describe(self.sizes[:1] + self.sizes[-1:]),
            f"first samples{whose}": self.first,
            f"test samples{whose}": self.info.test_samples,
        }


class LosablePeer(Peer, Protocol):
    """A connection to a client that can be lost on purpose, to simulate it."""

    def lose_after(self, frames: int | None) -> None:
        """Of the frames from now on only so many come; all for None."""
        ...


class Clients(ABC):
    """The clients of one run.

    Attributes:
        facts, peers: by number.
        stores: what checkpoints hold of them, by name, the same wherever the clients are: all halves and optimizers
            under "clients".
        mortal: whether `StateLostError` may be raised, so that there must always be a checkpoint to go back to.
    """

    facts: list[ClientDescription]
    peers: Sequence[LosablePeer]
    stores: dict[str, Store]
    mortal: ClassVar[bool] = False

    def server(self, job: Job, ledger: Ledger) -> Server:
        """The server for these clients."""
        return Server(job, [facts.info for facts in self.facts], ledger)

    def begin(self) -> None:  # noqa: B027
        """Before an epoch that exchanges something: have all there that can be."""

    def collect(self) -> None:  # noqa: B027
        """After an epoch: have its costs in the ledger."""

    def recover(self, reason: StateLostError | ClientUnavailableError) -> None:
        """Put back in place what was lost; its state then comes from the last checkpoint. Raises if it cannot."""
        raise reason

    def test_feeds(self) -> list[Batches]:
        """All clients' test data, if they can be read in this process; otherwise nothing."""
        return []

    @abstractmethod
    def load_half(self, half: nn.Module) -> None:
        """At the end of the run: load the first client's half, where it is not this module itself."""

    def close(self) -> None:  # noqa: B027
        """Let go of what the clients took."""


class Backend(Protocol):
    """Where clients are."""

    def open(
        self, half: nn.Module, holdings: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> Clients:
        """Clients that begin with this half, each with its data."""
        ...


class Local:
    """All clients in this process."""

    def open(
        self, half: nn.Module, holdings: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> Clients:
        """As in `Backend`."""
        return _ClientsHere(half, holdings, method, training, ledger)


LOCAL = Local()


class _ClientsHere(Clients):
    def __init__(
        self, half: nn.Module, holdings: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> None:
        clients = build_clients(half, dict(enumerate(holdings)), method, training, ledger, method.store.folder)
        self.stores: dict[str, Store] = {"clients": clients.pool}
        for number, client in clients.by_number.items():
            self.stores |= {store_name(name, number, len(holdings)): s for name, s in client.stores().items()}
        self.facts = [ClientDescription.of(client) for client in clients.by_number.values()]
        self._tests = [client.test for client in clients.by_number.values() if client.test is not None]
        self.peers = [LocalPeer(number, client.answers, client.leave) for number, client in clients.by_number.items()]

    def test_feeds(self) -> list[Batches]:
        """Those that the clients have."""
        return self._tests

    def load_half(self, half: nn.Module) -> None:
        """Nothing to do: it is the module that was trained."""


def store_name(name: str, number: int, clients: int) -> str:
    """What checkpoints call a client's own store of this name."""
    return f"{name}_{number}" if clients > 1 else name


@dataclass(frozen=True, eq=False)
class ClientGroup:
    """Clients in one process, by number, and what holds their halves."""

    pool: HalfPool
    by_number: dict[int, Client]


def build_clients(
    half: nn.Module,
    holdings: dict[int, ClientData],
    method: Method,
    training: Training,
    ledger: Ledger,
    folder: str | None,
) -> ClientGroup:
    """Clients with these numbers and data in this process.

    Args:
        half: what all begin with; it becomes the half of the first.
        folder: for the halves that are not in memory.
    """
    feeds = {number: holding.feeds(number, training) for number, holding in holdings.items()}
    live, owners = method.fleet.live, len(feeds)
    pool = HalfPool(half, training.client, training.epochs, training.device, owners=owners, live=live, folder=folder)
    clients: dict[int, Client] = {}
    table = None
    for number, (train, test) in feeds.items():
        job = ClientJob(number, train, test, method, training)
        clients[number] = Client(job, partial(pool.take, number), ledger, table)
        table = clients[number].flops
    return ClientGroup(pool, clients)
