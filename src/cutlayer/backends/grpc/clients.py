"""The clients of a run that joined from processes of their own, as the loop of the server's process reaches them."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from cutlayer.backends.base import Attendance, Clients
from cutlayer.backends.grpc.admission import Admission
from cutlayer.backends.grpc.claims import Claims, Outline, as_json, from_json
from cutlayer.backends.grpc.listener import Reception
from cutlayer.backends.grpc.operation import Operation
from cutlayer.backends.grpc.peer import Desk, LinkPeer
from cutlayer.backends.grpc.places import Places
from cutlayer.backends.grpc.refusals import Refusals
from cutlayer.backends.grpc.revocations import REASON
from cutlayer.backends.grpc.waiting import Waiting
from cutlayer.backends.grpc.way_back import WayBack
from cutlayer.errors import ClientUnavailableError, ConfigError, DivergedError, StateLostError
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.ledger import Ledger
from cutlayer.records.noted import Noted, gone_back
from cutlayer.records.state_dicts import Store
from cutlayer.training.averaging import SharedHalf
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.peers import send
from cutlayer.training.plain_epoch import PlainEpoch
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, pack, packed
from cutlayer.wire.messages import Finished, Saved, Weights

log = logging.getLogger("cutlayer.server")


class GrpcClients(Clients):
    """The clients of one run, behind links.

    Args:
        run: what is known of it before anyone has come.
        operation: what the server's operator chooses.
        checkpoints: the run's.
        left_out: the record of clients that the run goes on without.
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
        self.names, self.half, self.waits, self.stop = list(run.names), run.half, operation.waits, operation.stop
        self.epochs, self._oldest, self._say = run.training.epochs, oldest, operation.callbacks.on_wait
        saved = checkpoints.state() or {}
        self.run = saved.get("run") or secrets.token_hex(8)
        self.refusals, self.waiting, self._epoch = Refusals(), Waiting(self._tell), 0
        self.traffic: Counter[tuple[str, str]] = Counter()
        """Bytes of frames by client and direction, since this process began."""
        listening, limits = operation.listening, operation.limits
        self._desk = Desk(self.waits, self.waiting, self.refusals, self.stop, limits.slowest, self.traffic)
        self._limits, self._named = limits, listening.tls is not None
        hellos = [from_json(values) for values in saved.get("hellos", [])]
        self._way_back = WayBack(self.run, checkpoints, limits.goings_back, gone_back(left_out.file.parent))
        self.claims = Claims(run, limits)
        self.admission = Admission(self.claims, self._way_back, self.waits.patience, listening.keepalive, hellos)
        self.stores: dict[str, Store] = {}
        self._took_part = [0] * len(run.names)
        """After how many epochs each client did something last."""
        self._left_out, self._forgotten, self._revoked = left_out, set(), set()
        self._server: Server | None = None
        self._leave_out()
        if listening.revoked is not None:
            listening.revoked.listen(self._revoke)
        self._strikes = [0] * len(run.names)
        """Epochs in a row that each client began and did not complete."""
        self._failed: tuple[int, set[int]] = (-1, set())
        """Clients with which this epoch came to nothing before."""

    def _tell(self, line: str) -> None:
        line = f"epoch {self._epoch + 1}/{self.epochs}: {line}"
        log.info(line)
        self._say(line)

    def reception(self, config: str) -> Reception:
        """Who is let in, for a listener; clients that ask get the run's config, as JSON."""
        places = Places(self.names, self._limits, named=self._named)
        known = self.admission.barred
        return Reception(self.admission.admit, config, self.refusals, places, self.waiting.awaited, known.get)

    def meet(self) -> None:
        """Learn what each client holds: from the newest checkpoint, or from the clients, once all have come."""
        if len(self.admission.hellos) < len(self.names):
            self.admission.open(self._took_part)
            self.admission.wait_for_all(self.stop, self.waiting)
        hellos = [self.admission.hellos[number] for number in range(len(self.names))]
        fields = [field.name for field in dataclasses.fields(ClientSummary)]
        self.summaries = [ClientSummary(**{name: getattr(hello, name) for name in fields}) for hello in hellos]
        self.plain = [
            PlainEpoch(
                *(h.epoch_samples, h.epoch_steps, h.epoch_flops, h.epoch_bytes, h.epoch_forward, h.epoch_defence),
                h.epoch_labels,
            )
            for h in hellos
        ]
        self.weights_bytes = hellos[0].weights_bytes

    def server(self, job: Job, ledger: Ledger) -> Server:
        """The server for these clients, which knows what their half must look like."""
        server = super().server(job, ledger)
        if self.half is not None:
            server.shared = SharedHalf(self.half.state_dict())
        self.ledger, self._server = ledger, server
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
        there = [number for number in range(len(self.names)) if number not in self.left_out]
        if self._server is None or (number := self._server.suspect(there)) is None:
            return False
        why = f"training diverged on its activations, which are far larger than the others' ({reason})"
        log.warning("client %s is left out from now on: %s", self.names[number], why)
        self._left_out.add(self.names[number], why)
        self._leave_out()
        return True

    def _leave_out(self) -> None:
        """Let those in no more that left_out.json names."""
        reasons = self._left_out.read()
        self._forgotten = {number for number, name in enumerate(self.names) if name in reasons}
        if len(self._forgotten) == len(self.names):
            raise ConfigError(f"all clients of the run are left out, as {self._left_out.file} says")
        for number in self._forgotten:
            self.admission.bar(self.names[number], reasons[self.names[number]])

    def _revoke(self, names: set[str]) -> None:
        """Let these in no more, nor any others in place of them that were revoked before. From any thread."""
        self._revoked = {number for number, name in enumerate(self.names) if name in names}
        left_out = self._left_out.read()
        for name in self.names:
            if name in names:
                self.admission.bar(name, REASON)
            elif name in left_out:  # and stays so, whether it was revoked as well or not
                self.admission.bar(name, left_out[name])
            elif self.admission.barred.get(name) == REASON:
                self.admission.barred.pop(name)

    @property
    def left_out(self) -> set[int]:  # type: ignore[override]
        """Those of left_out.json, and those whose certificates are revoked."""
        return self._forgotten | self._revoked

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
        hellos = [as_json(self.admission.hellos[number]) for number in range(len(self.names))]
        self.admission.saved(self._took_part)
        return {"run": self.run, "hellos": hellos, "took_part": list(self._took_part)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, and let the clients in with the checkpoints that fit it.

        Of those that are left out nothing stays.
        """
        for number in self._forgotten:
            if self._server is not None:
                self._server.forget(number)
        self._took_part = list(state["took_part"])
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
