"""The clients of a run that joined from processes of their own, as the loop of the server's process reaches them."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from cutlayer.backends.base import Attendance, Clients
from cutlayer.backends.grpc.admission import Admission, as_json, from_json
from cutlayer.backends.grpc.link import Link
from cutlayer.backends.grpc.listener import Refusals
from cutlayer.backends.grpc.peer import LinkPeer
from cutlayer.backends.grpc.stop import Stop
from cutlayer.backends.grpc.terms import terms_of
from cutlayer.backends.grpc.waiting import Waiting
from cutlayer.errors import ClientUnavailableError, StateLostError
from cutlayer.method import Method, Training
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Store
from cutlayer.training.averaging import SharedHalf
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.peers import send
from cutlayer.training.plain import PlainEpoch
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, pack
from cutlayer.wire.messages import Finished, Saved, Weights

log = logging.getLogger("cutlayer.server")


@dataclass(frozen=True)
class Waits:
    """How long the server waits for clients, in seconds.

    Attributes:
        deadline: after which a client that is connected and sends nothing is disconnected.
        patience: after which an epoch goes on without a client that is not there, or of which nothing comes; None waits
            for all, and a client that begins anew takes the run back to its last checkpoint.
    """

    deadline: float = 300.0
    patience: float | None = None


class GrpcClients(Clients):
    """The clients of one run, behind links.

    Args:
        names: the clients, in the order of their numbers.
        half: the client half, for its structure alone; None compares the clients' halves with each other.
        saved: the state in the run's newest checkpoint; empty if the run is new.
        oldest: called for the epochs of the oldest checkpoint that the server may go back to, and for those beside it.
        say: called with lines that say whom the server waits for.
    """

    can_lose_state: ClassVar[bool] = True
    trusted: ClassVar[bool] = False

    def __init__(  # what a run is, whom it is with, and how long to wait for them
        self,
        names: Sequence[str],
        half: nn.Module | None,
        cut_shape: tuple[int, ...],
        method: Method,
        training: Training,
        waits: Waits,
        stop: Stop,
        saved: Mapping[str, Any],
        oldest: Callable[[], Saved],
        say: Callable[[str], None],
    ) -> None:
        self.names, self.half, self.waits, self.stop = list(names), half, waits, stop
        self.epochs, self._oldest, self._say = training.epochs, oldest, say
        self.run = saved.get("run") or secrets.token_hex(8)
        self.refusals, self.waiting, self._epoch = Refusals(), Waiting(self._tell), 0
        hellos = [from_json(values) for values in saved.get("hellos", [])]
        terms = terms_of(method, training, cut_shape, half)
        self.admission = Admission(names, terms, method.activations, cut_shape, self.run, hellos, waits.patience)
        self.stores: dict[str, Store] = {}
        self._took_part = [0] * len(names)
        """After how many epochs each client did something last."""

    def _tell(self, line: str) -> None:
        line = f"epoch {self._epoch + 1}/{self.epochs}: {line}"
        log.info(line)
        self._say(line)

    def meet(self) -> None:
        """Learn what each client holds: from the newest checkpoint, or from the clients, once all have come."""
        if len(self.admission.hellos) < len(self.names):
            self.admission.open(self._took_part)
            self.admission.wait_for_all(self.stop, self.waiting)
        hellos = [self.admission.hellos[number] for number in range(len(self.names))]
        fields = [field.name for field in dataclasses.fields(ClientSummary)]
        self.summaries = [ClientSummary(**{name: getattr(hello, name) for name in fields}) for hello in hellos]
        self.plain = [
            PlainEpoch(h.epoch_samples, h.epoch_steps, h.epoch_flops, h.epoch_bytes, h.epoch_forward) for h in hellos
        ]
        self.weights_bytes = hellos[0].weights_bytes

    def server(self, job: Job, ledger: Ledger) -> Server:
        """The server for these clients, which knows what their half must look like."""
        server = super().server(job, ledger)
        if self.half is not None:
            server.shared = SharedHalf(self.half.state_dict())
        self.ledger = ledger
        return server

    @contextmanager
    def exchange(
        self, epoch: int, wanted: Sequence[int], active: Sequence[int], calibrating: Collection[int] = ()
    ) -> Iterator[Attendance]:
        """The block begins when all that are wanted are there; with patience, once that has passed, when anyone is.

        Raises StateLostError if, without patience, a client began anew in the meantime.
        """
        self._epoch = epoch
        # Without patience what is evaluated must not depend on who is there, either.
        tested = [number for number in active if self.summaries[number].test_samples and self.waits.patience is None]
        needed = sorted({*wanted, *tested})
        with self.admission.exchange(self.stop, self.waiting, needed, self._took_part) as links:
            peers = {number: self._peer(number, link) for number, link in links.items()}
            # If none of those that are wanted is there in time, the others take their place.
            present = [number for number in wanted if number in peers] or [n for n in peers if n in active]
            there = {number: peers[number] for number in present}
            self._tell_saved(list(there.values()))
            yield Attendance(there, peers)

    def _peer(self, number: int, link: Link) -> LinkPeer:
        waits = self.waits.deadline, self.waits.patience
        return LinkPeer(number, self.names[number], link, self.ledger, self.refusals, self.stop, self.waiting, *waits)

    def _tell_saved(self, peers: Sequence[LinkPeer]) -> None:
        """Tell the clients which checkpoint this server cannot go back behind."""
        saved = pack(Frame(self._oldest()))
        for peer in peers:
            with suppress(ClientUnavailableError):
                send(self.ledger, peer, saved)

    def completed(self, epoch: int, clients: Sequence[int]) -> None:
        """These have a checkpoint after this epoch."""
        for number in clients:
            self._took_part[number] = epoch + 1

    def recover(self, reason: StateLostError | ClientUnavailableError) -> None:
        """End all sessions: every client that comes loads the checkpoint that fits the server's."""
        self.admission.break_off(f"the server went back to its last checkpoint: {reason}")

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """The run's id, and what each client said of itself and took part in last."""
        hellos = [as_json(self.admission.hellos[number]) for number in range(len(self.names))]
        return {"run": self.run, "hellos": hellos, "took_part": list(self._took_part)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, and let the clients in with the checkpoints that fit it."""
        self._took_part = list(state["took_part"])
        self.admission.open(self._took_part)

    # --- the end ---

    def say_farewell(self, server: Server, epochs: int, linger: float) -> None:
        """Send every client the half that all share, if there is one, and that the run is at its end."""

        def farewell(client: int) -> list[bytes]:
            return [*server.shared.frames(Weights(client, epochs)), pack(Frame(Finished()))]

        self.admission.say_farewell(farewell, linger)

    def close(self) -> None:
        """Let no one in any more, and end all sessions."""
        self.admission.close()
