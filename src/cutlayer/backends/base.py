"""What a backend is: where the clients of a run are, and how the loop reaches them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from cutlayer.backends.answers import TrustedPeer
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.description import ClientDescription
from cutlayer.data.batches import Batches
from cutlayer.errors import ClientUnavailableError, DivergedError, StateLostError
from cutlayer.fleet import Fleet
from cutlayer.method import Method, Training
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Store
from cutlayer.training.averaging import weights_frame
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.peers import Peer
from cutlayer.training.plain_epoch import PlainEpoch
from cutlayer.training.server import Server
from cutlayer.wire.messages import Weights


@dataclass(frozen=True, eq=False)
class Attendance:
    """Who is there in an epoch that exchanges something.

    Attributes:
        training: the clients that take part in it, by number.
        all: all that are there, and can be evaluated.
    """

    training: Mapping[int, Peer]
    all: Mapping[int, Peer]


class Clients(ABC):
    """The clients of one run.

    Attributes:
        summaries: what the server is told of each, by number.
        plain: each client's share of an epoch of plain split learning.
        weights_bytes: bytes of a frame with the weights of the client half.
        stores: what checkpoints hold of them, by name, the same wherever the clients are: all halves and optimizers
            under "clients".
        left_out: clients that the run goes on without, for good.
        can_lose_state: whether `StateLostError` may be raised, so that there must always be a checkpoint to go back to.
        trusted: whether what they send is an error of this program's user; otherwise it ends the run for no one else.
    """

    summaries: list[ClientSummary]
    plain: list[PlainEpoch]
    weights_bytes: int
    stores: dict[str, Store]
    left_out: Collection[int] = ()
    can_lose_state: ClassVar[bool] = False
    trusted: ClassVar[bool] = True

    def server(self, job: Job, ledger: Ledger) -> Server:
        """The server for these clients."""
        return Server(job, self.summaries, ledger)

    @abstractmethod
    @contextmanager
    def exchange(
        self, epoch: int, wanted: Sequence[int], active: Sequence[int], calibrating: Collection[int] = ()
    ) -> Iterator[Attendance]:
        """Inside the block the epoch depends on the clients.

        Args:
            epoch: its number.
            wanted: those that are to take part.
            active: those that do not rest in it, which may take their place, and may be evaluated at its end.
            calibrating: those that send a frame before their first step.
        """

    def training_over(self) -> None:  # noqa: B027
        """All steps of the epoch are done; evaluation follows."""

    def changed(self, epochs: int) -> bool:
        """Whether others take part in the epoch after so many than in the one before; the loop is to begin anew."""
        return False

    def may_come(self, client: int) -> bool:
        """Whether an epoch that needs this client alone is to wait for it."""
        return client not in self.left_out

    def between_epochs(self) -> bool:
        """An epoch is about to begin, or none is any more. Whether anything of clients that have left was dropped."""
        return False

    def completed(self, epoch: int, clients: Sequence[int]) -> None:  # noqa: B027
        """These did all that the epoch asked of them."""

    def epochs_before_exchange(self) -> Sequence[int]:
        """The epochs of a checkpoint that is to stay: the newest from before the last exchange, if one is needed."""
        return ()

    def collect(self) -> None:  # noqa: B027
        """After an epoch: have its costs in the ledger."""

    def leave_out(self, reason: DivergedError) -> bool:
        """Training diverged: go on, from a checkpoint before, without the client that made it; whether there is one."""
        return False

    def recover(self, reason: StateLostError | ClientUnavailableError) -> None:
        """Put back in place what was lost; its state then comes from the last checkpoint. Raises if it cannot."""
        raise reason

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of them beside the stores, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from what `state_dict` returned, once the stores are loaded; also at the beginning, from its state."""

    def close(self) -> None:  # noqa: B027
        """Let go of what the clients took."""


class TrustedClients(Clients):
    """Clients that one program began, with their data: in its process, or on a cluster.

    Attributes:
        descriptions, peers: by number.
    """

    descriptions: list[ClientDescription]
    peers: Sequence[TrustedPeer]

    def describe(self, half: nn.Module, fleet: Fleet, seed: int) -> None:
        """Take over what follows from the clients' descriptions."""
        self.summaries = [description.summary for description in self.descriptions]
        self.plain = [description.plain for description in self.descriptions]
        self.weights_bytes = len(weights_frame(Weights(0, 1), half.state_dict()))
        self._fleet, self._seed = fleet, seed

    @contextmanager
    def exchange(
        self, epoch: int, wanted: Sequence[int], active: Sequence[int], calibrating: Collection[int] = ()
    ) -> Iterator[Attendance]:
        """All clients are there; some are lost in the midst of the epoch, if the fleet's dropout says so."""
        self.begin()
        for number in wanted:
            steps = len(self.descriptions[number].sizes)
            after = self._fleet.lost_after(self._seed, epoch, number, steps)
            self.peers[number].lose_after(after if after is None else after + (number in calibrating))
        yield Attendance({number: self.peers[number] for number in wanted}, dict(enumerate(self.peers)))

    def training_over(self) -> None:
        """Who was lost on purpose is there again to be evaluated."""
        for peer in self.peers:
            peer.lose_after(None)

    def begin(self) -> None:
        """Before an epoch that exchanges something: have all there that can be."""

    def test_batches(self) -> list[Batches]:
        """All clients' test data, if they can be read in this process; otherwise nothing."""
        return []

    @abstractmethod
    def load_half(self, half: nn.Module) -> None:
        """At the end of the run: load the first client's half, if it is not this module itself."""


class Backend(Protocol):
    """Where the clients of `fit` are."""

    def open(
        self, half: nn.Module, data: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> TrustedClients:
        """Clients that begin with this half, each with its data."""
        ...
