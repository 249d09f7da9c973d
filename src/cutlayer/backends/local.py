"""Clients in this process: the same frames as between machines, moved by function calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cutlayer.backends.answers import Answers, TrustedPeer
from cutlayer.backends.base import TrustedClients
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.description import ClientDescription
from cutlayer.backends.group import build_clients, store_name
from cutlayer.data.batches import Batches
from cutlayer.method import Method, Training
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Store
from cutlayer.training.client import Client


class LocalPeer(TrustedPeer):
    """The server's connection to a client in the same process."""

    def __init__(self, client: Client) -> None:
        super().__init__(client.number)
        self.answers = Answers(client)

    def send(self, frame: bytes) -> None:
        """Send a frame to the client."""
        self.answers.add(frame)

    def receive(self) -> bytes:
        """The client's next frame. Raises ClientUnavailableError if it is lost on purpose."""
        make = self.answers.next()
        if make is None:
            raise RuntimeError(f"client {self.number} has nothing more to send; it waits for a frame")
        self.count_down()
        return make()

    def give_up(self) -> None:
        """Have the client leave the epoch."""
        self.answers.give_up()


class Local:
    """All clients in this process."""

    def open(
        self, half: nn.Module, data: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> TrustedClients:
        """As in `Backend`."""
        return LocalClients(half, data, method, training, ledger)


LOCAL = Local()


class LocalClients(TrustedClients):
    """The clients of one run in this process."""

    def __init__(
        self, half: nn.Module, data: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> None:
        group = build_clients(half, dict(enumerate(data)), method, training, ledger, method.store.folder)
        self.stores: dict[str, Store] = {"clients": group.pool}
        self._pool = group.pool
        for number, client in group.by_number.items():
            self.stores |= {store_name(name, number, len(data)): s for name, s in client.stores().items()}
        self.descriptions = [ClientDescription.of(client) for client in group.by_number.values()]
        self._tests = [client.test for client in group.by_number.values() if client.test is not None]
        self.peers = [self.peer(client) for client in group.by_number.values()]
        self.describe(half, method.fleet, training.seed)

    def peer(self, client: Client) -> LocalPeer:
        """The server's connection to one of the clients."""
        return LocalPeer(client)

    def test_batches(self) -> list[Batches]:
        """Those that the clients have."""
        return self._tests

    def load_half(self, half: nn.Module) -> None:
        """Nothing to do: it is the module that was trained."""

    def close(self) -> None:
        """Remove the files of halves that are not in memory."""
        self._pool.close()
