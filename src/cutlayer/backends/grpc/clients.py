"""The clients of a run that joined from processes of their own, as the loop of the server's process reaches them."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from cutlayer.backends.base import Attendance, Clients
from cutlayer.backends.grpc.admission import Admission
from cutlayer.backends.grpc.claims import Claims, Outline, as_json, plain_of, summary_of
from cutlayer.backends.grpc.listener import Reception
from cutlayer.backends.grpc.members import Members, known_from
from cutlayer.backends.grpc.operation import Operation
from cutlayer.backends.grpc.peer import Desk, LinkPeer
from cutlayer.backends.grpc.refusals import Refusals
from cutlayer.backends.grpc.slots import Slots
from cutlayer.backends.grpc.waiting import Waiting
from cutlayer.backends.grpc.way_back import WayBack
from cutlayer.errors import ClientUnavailableError, ConfigError, DivergedError, StateLostError
from cutlayer.records.admitted import Admitted
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.ledger import Ledger
from cutlayer.records.noted import Noted, gone_back
from cutlayer.records.state_dicts import Store
from cutlayer.training.averaging import SharedHalf
from cutlayer.training.job import Job
from cutlayer.training.peers import send
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, pack, packed
from cutlayer.wire.messages import Finished, Hello, Saved, Weights

log = logging.getLogger("cutlayer.server")

ROOM = 64
"""Clients that may be admitted to a run while one process serves it."""


class GrpcClients(Clients):
    """The clients of one run, behind links.

    Args:
        run: what is known of it before anyone has come.
        operation: what the server's operator chooses.
        checkpoints: the run's.
        left_out: the record of clients that the run goes on without, in its folder.
        oldest: called for the epochs of the oldest checkpoint that the server may go back to, and for those beside it.
    """

    can_lose_state: ClassVar[bool] = True
    trusted: ClassVar[bool] = False

    def __init__(
        self,
        run: Outline,
        operation: Operation,
        checkpoints: Checkpoints,
        oldest: Callable[[], Saved],
        left_out: Noted,
    ) -> None:
        self.half, self.waits, self.stop = run.half, operation.waits, operation.stop
        self.epochs, self._oldest, self._say = run.training.epochs, oldest, operation.callbacks.on_wait
        saved = checkpoints.state() or {}
        self.run = saved.get("run") or secrets.token_hex(8)
        self.refusals, self.waiting, self._epoch = Refusals(), Waiting(self._tell), 0
        self.traffic: Counter[tuple[str, str]] = Counter()
        """Bytes of frames by client and direction, since this process began."""
        listening, limits = operation.listening, operation.limits
        self._desk = Desk(self.waits, self.waiting, self.refusals, self.stop, limits.slowest, self.traffic)
        folder, self._begun = left_out.file.parent, int(saved.get("epoch", 0))
        admitted = Admitted(folder)
        known = known_from(run.names, saved.get("hellos", []), admitted)
        self._way_back = WayBack(self.run, checkpoints, limits.goings_back, gone_back(folder))
        self.claims = Claims(run, limits)
        self.admission = Admission(self.claims, self._way_back, self.waits.patience, listening.keepalive, known)
        self.members, self.names = Members(self.admission, admitted, left_out), self.admission.names
        room = ROOM if listening.admitted is not None else 0
        self.slots = Slots(self.names, limits, named=listening.tls is not None, room=room)
        self.stores: dict[str, Store] = {}
        self._took_part = [0] * len(self.names)
        """After how many epochs each client did something last."""
        self._server: Server | None = None
        self._dropped: set[int] = set()
        """Clients of which the server stores nothing any more."""
        self._strikes: Counter[int] = Counter()
        """Epochs in a row that each client began and did not complete."""
        self._failed: tuple[int, set[int]] = (-1, set())
        """Clients with which this epoch came to nothing before."""
        if listening.revoked is not None:
            listening.revoked.listen(self.members.revoke)
        if listening.admitted is not None:
            listening.admitted.listen(self._expect)

    def _tell(self, line: str) -> None:
        line = f"epoch {self._epoch + 1}/{self.epochs}: {line}"
        log.info(line)
        self._say(line)

    def reception(self, config: str) -> Reception:
        """Who is let in, for a listener; clients that ask get the run's config, as JSON."""
        why, missing = self.admission.barred.get, self.waiting.awaited
        return Reception(self.admission.admit, config, self.refusals, self.slots, self.members.leave, missing, why)

    def meet(self) -> None:
        """Learn what each client holds: from the newest checkpoint, or from the clients, once all have come."""
        if len(self.admission.hellos) < len(self.names):
            self.admission.open(self._took_part)
            self.admission.wait_for_all(self.stop, self.waiting)
        self.group(self._begun)

    def group(self, epochs: int, newcomer: Hello | None = None) -> None:
        """Have those take part that do in the epoch after so many, and perhaps a newcomer, who is no member yet."""
        hellos = [self.admission.hellos[number] for number in range(self.members.count(epochs))]
        self.tries_newcomer = newcomer is not None
        hellos += [newcomer] if newcomer is not None else []
        self.summaries, self.plain = [summary_of(hello) for hello in hellos], [plain_of(hello) for hello in hellos]
        self.weights_bytes = hellos[0].weights_bytes

    def _expect(self, names: set[str]) -> None:
        """These may come to be admitted. From any thread."""
        try:
            self.slots.add(names)
        except ConfigError as error:
            log.warning("%s", error)
            return
        self.admission.newcomers.expect(names)

    def let_go(self) -> None:
        """Of the server, whose place another one takes."""
        self._server = None

    def changed(self, epochs: int) -> bool:
        """Whether a client waits to be admitted, or the server went back behind the admission of one."""
        self.members.epochs = epochs
        return self.members.count(epochs) != len(self.summaries) or self.members.newcomer() is not None

    def may_come(self, client: int) -> bool:
        """With patience, if it is there: in an epoch in which the others rest, none of them need be."""
        there = self.waits.patience is None or self.names[client] in self.admission.present()
        return super().may_come(client) and there

    def between_epochs(self) -> bool:
        """Of those that are left out nothing stays."""
        leavers = self.members.forgotten - self._dropped
        for number in leavers:
            if self._server is not None and number < len(self.summaries):
                self._server.forget(number)
            self._dropped.add(number)
        return bool(leavers)

    def server(self, job: Job, ledger: Ledger) -> Server:
        """The server for these clients, which knows what their half must look like."""
        server = super().server(job, ledger)
        if self.half is not None:
            server.shared = SharedHalf(self.half.state_dict())
        self.ledger, self._server = ledger, server
        if self.members.grown or self.tries_newcomer:
            server.may_have_grown()
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
        failed = self._failed[1] if self._failed[0] == epoch else set()
        with self.admission.exchange(self.stop, self.waiting, needed, self._took_part) as links:
            peers = {
                number: LinkPeer(number, self.names[number], link, self.ledger, self._desk, self._strikes[number])
                for number, link in links.items()
            }
            # If none of those that are wanted is there in time, or does anything, the others take their place.
            others = [number for number in peers if number in active]
            present = [number for number in wanted if number in peers and number not in failed]
            present = present or [number for number in others if number not in failed] or others
            there = {number: peers[number] for number in present}
            for number in there:
                self._strikes[number] += 1
            self._tell_saved(list(there.values()))
            try:
                yield Attendance(there, peers)
            except ClientUnavailableError:
                self._failed = epoch, failed | set(there)
                raise

    def _tell_saved(self, peers: Sequence[LinkPeer]) -> None:
        """Tell the clients which checkpoint this server cannot go back behind."""
        saved = packed(Frame(self._oldest()))
        for peer in peers:
            with suppress(ClientUnavailableError):
                send(self.ledger, peer, saved)

    def epochs_before_exchange(self) -> list[int]:
        """For a client that has lost what it saved in the last one."""
        return self._way_back.epochs_before_exchange(self._took_part)

    def completed(self, epoch: int, clients: Sequence[int]) -> None:
        """These have a checkpoint after this epoch."""
        for number in clients:
            self._took_part[number] = epoch + 1
            self._strikes[number] = 0

    def leave_out(self, reason: DivergedError) -> bool:
        """Leave out the client whose activations are out of line, if another one is left."""
        there = [number for number in range(len(self.summaries)) if number not in self.left_out]
        if self._server is None or (number := self._server.suspect(there)) is None:
            return False
        why = f"training diverged on its activations, which are far larger than the others' ({reason})"
        log.warning("client %s is left out from now on: %s", self.names[number], why)
        self.members.leave_out(number, why)
        return True

    @property
    def left_out(self) -> set[int]:  # type: ignore[override]
        """Those of left_out.json, and those whose certificates are revoked."""
        return self.members.gone

    def stored_bytes(self) -> int | None:
        """Bytes of the replay store; None before it is there."""
        return None if self._server is None else self._server.replayed.store.nbytes

    def recover(self, reason: StateLostError | ClientUnavailableError) -> None:
        """End all sessions: every client that comes loads the checkpoint that fits the server's."""
        self.admission.break_off(f"the server went back to its last checkpoint: {reason}")
        self._way_back.take()

    def collect(self) -> None:
        """The costs are in the ledger already. Raises StateLostError if the server is to go back.

        Before the next checkpoint takes the place of the one to go back to.
        """
        self.admission.check()

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """The run's id, and what each client said of itself and took part in last."""
        hellos = [as_json(self.admission.hellos[number]) for number in range(len(self.summaries))]
        self.admission.saved(self._took_part)
        return {"run": self.run, "hellos": hellos, "took_part": self._took_part[: len(hellos)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, and let the clients in with the checkpoints that fit it.

        Of those that are left out nothing stays. Clients that are not in it were admitted since.
        """
        known, count = len(state["took_part"]), max(len(self.names), len(self.summaries))
        self._took_part = [*state["took_part"], *(0,) * (count - known)]
        self._dropped.clear()
        if self._server is not None:  # who was admitted since may have left since, too
            self._server.states.welcome(range(known, len(self.summaries)))
        self.between_epochs()
        self.admission.open(self._took_part)

    # --- the end ---

    def say_farewell(self, server: Server, epochs: int, delivered: Noted, linger: float | None) -> None:
        """Send every client the half that all share, if there is one, and that the run is at its end.

        Args:
            delivered: who has got it, also from an earlier process.
            linger: seconds to wait for those that have not; None waits for all.
        """

        def farewell(client: int) -> list[bytes]:
            shared = [frame.data for frame in server.shared.frames(Weights(client, epochs))]
            return [*shared, pack(Frame(Finished()))]

        self.admission.end(self._took_part)
        deadline = None if linger is None else time.monotonic() + linger
        told: set[str] = set()
        while missing := [name for name in self._wanted() if name not in delivered.read()]:
            for number in self.admission.say_farewell(farewell, told):
                if self.names[number] in missing:
                    delivered.add(self.names[number], time.strftime("%Y-%m-%d %H:%M:%S"))
            if self.stop.requested or (deadline is not None and time.monotonic() >= deadline):
                log.warning("the run is at its end; %s have not heard of it (serve --farewell)", ", ".join(missing))
                break
            self.waiting.on(", ".join(missing), "to hear of the end")
            time.sleep(0.02)
        self.waiting.over()

    def _wanted(self) -> list[str]:
        """The names of those that are not left out."""
        return [name for number, name in enumerate(self.names) if number not in self.left_out]

    def close(self) -> None:
        """Let no one in any more, and end all sessions."""
        self.admission.close()
