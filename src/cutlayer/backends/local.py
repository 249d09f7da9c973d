"""Clients in this process: the same frames as between machines, moved by function calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from cutlayer.backends.base import TrustedClients
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.description import ClientDescription
from cutlayer.backends.group import build_clients, store_name
from cutlayer.data.batches import Batches
from cutlayer.errors import ClientUnavailableError, RefusedError
from cutlayer.method import Method, Training
from cutlayer.records.checkpoint import Store
from cutlayer.records.ledger import Ledger


class LocalPeer:
    """The server's connection to a client in the same process.

    The client works when its next frame is asked for, so that no more is in memory than is on its way.

    Args:
        number: the client's.
        answers: from a frame to what the client sends in answer, as calls that make the frames.
        leave: has the client leave the epoch, where it is lost.
    """

    def __init__(
        self,
        number: int,
        answers: Callable[[bytes], Iterator[Callable[[], bytes]]],
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.number, self.answers, self.leave = number, answers, leave
        self._answers: deque[Iterator[Callable[[], bytes]]] = deque()
        self._lost_after: int | None = None

    def send(self, frame: bytes) -> None:
        """Send a frame to the client."""
        self._answers.append(self.answers(frame))

    def receive(self) -> bytes:
        """The client's next frame."""
        while self._answers:
            make = next(self._answers[0], None)
            if make is not None:
                self._count_down()
                return make()
            self._answers.popleft()
        raise RuntimeError(f"client {self.number} has nothing more to send; it waits for a frame")

    def refuse(self, error: RefusedError) -> None:
        """In one process a frame that is refused is an error of this program, or of its user's data."""
        raise error

    def lose_after(self, frames: int | None) -> None:
        """Simulate the loss of the client: of the frames from now on only so many come; all for None."""
        self._lost_after = frames

    def _count_down(self) -> None:
        if self._lost_after == 0:
            self._answers.clear()
            self.leave()
            raise ClientUnavailableError(f"client {self.number} is lost")
        if self._lost_after is not None:
            self._lost_after -= 1


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
        for number, client in group.by_number.items():
            self.stores |= {store_name(name, number, len(data)): s for name, s in client.stores().items()}
        self.descriptions = [ClientDescription.of(client) for client in group.by_number.values()]
        self._tests = [client.test for client in group.by_number.values() if client.test is not None]
        self.peers = [LocalPeer(number, client.answers, client.leave) for number, client in group.by_number.items()]
        self.describe(half, method.fleet, training.seed)

    def test_batches(self) -> list[Batches]:
        """Those that the clients have."""
        return self._tests

    def load_half(self, half: nn.Module) -> None:
        """Nothing to do: it is the module that was trained."""
