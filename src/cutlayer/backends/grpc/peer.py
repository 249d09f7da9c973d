"""The server's connection to one client in a process of its own: a link, what it costs, and how long to wait."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from cutlayer.backends.grpc.link import Link, LinkClosed
from cutlayer.backends.grpc.listener import Refusals
from cutlayer.backends.grpc.stop import Stop
from cutlayer.backends.grpc.waiting import LONG, Waiting
from cutlayer.errors import ClientUnavailableError, RefusedError
from cutlayer.records.ledger import Ledger
from cutlayer.wire.frames import Frame, pack
from cutlayer.wire.messages import Refusal

log = logging.getLogger("cutlayer.server")


class LinkPeer:
    """A client behind a link.

    Args:
        number, name: the client's.
        deadline: seconds after which a client that is connected and sends nothing is disconnected.
        patience: seconds after which the epoch goes on without a client of which nothing comes; None waits for ever,
            and a client that begins anew takes the run back to its last checkpoint.
    """

    def __init__(
        self,
        number: int,
        name: str,
        link: Link,
        ledger: Ledger,
        refusals: Refusals,
        stop: Stop,
        waiting: Waiting,
        deadline: float,
        patience: float | None,
    ) -> None:
        self.number, self.name, self.link, self.ledger = number, name, link, ledger
        self.refusals, self.stop, self.waiting = refusals, stop, waiting
        self.deadline, self.patience = deadline, patience
        # Seconds that were waited: before the next frame, and up to the last one, for a frame that is good.
        self._waited = self._spent = 0.0

    def send(self, frame: bytes) -> None:
        """Send a frame to the client; waits while it takes none."""
        waited = 0.0
        with self.ledger.phase("wait"):
            while True:
                try:
                    self.link.send(frame, 0.5)
                    self.waiting.over()
                    break
                except TimeoutError:
                    waited += 0.5
                    self._check(waited)
                except LinkClosed as reason:
                    self._closed(reason)

    def receive(self) -> bytes:
        """The client's next frame."""
        begin, before, quiet = time.monotonic(), self._waited, 0.0
        with self.ledger.phase("wait"):
            while True:
                try:
                    data = self.link.receive(0.5)
                    self.waiting.over()
                    self._waited, self._spent = 0.0, before + time.monotonic() - begin
                    break
                except TimeoutError:
                    quiet = time.monotonic() - max(begin, self.link.heard)
                    self._check(before + quiet)
                except LinkClosed as reason:
                    self._closed(reason)
                if self.link.connected and quiet >= self.deadline:
                    log.warning("client %s: nothing in %.0f s; disconnected", self.name, quiet)
                    self.link.disconnect()
                    begin = time.monotonic()
        return data

    def refuse(self, error: RefusedError) -> None:
        """Count what was refused and tell the client why; patience is not gained by what is refused."""
        self.refusals.add(self.name, error)
        self._waited = self._spent
        self._check(self._waited)
        # One is enough to end the client, which may be sending and not reading: this side does not wait for it.
        with suppress(TimeoutError, LinkClosed):
            self.link.send(pack(Frame(Refusal(str(error)[:1000]))), 0.0)

    def _check(self, waited: float) -> None:
        if self.patience is not None and waited >= self.patience:
            log.warning("client %s: nothing in %.1f s; the epoch goes on without it", self.name, waited)
            self.link.close("too late: the epoch went on without this client")
            raise ClientUnavailableError(f"client {self.name} is late")
        if self.link.connected:
            self.waiting.on(self.name, "connected, sends nothing", after=LONG)
        else:
            self.stop.check()
            self.waiting.on(self.name, "its connection is lost")

    def _closed(self, reason: LinkClosed) -> None:
        if self.patience is None:
            raise reason
        raise ClientUnavailableError(f"client {self.name}: {reason}")
