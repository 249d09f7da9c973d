"""The server's connection to one client in a process of its own: a link, what it costs, and how long to wait."""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from cutlayer.backends.grpc.link import Link, LinkClosed
from cutlayer.backends.grpc.operation import Waits
from cutlayer.backends.grpc.refusals import Refusals
from cutlayer.backends.grpc.waiting import LONG, Waiting
from cutlayer.errors import ClientUnavailableError, RefusedError
from cutlayer.records.ledger import Ledger
from cutlayer.stop_request import Stop
from cutlayer.wire.frames import Frame, pack
from cutlayer.wire.messages import Refusal

log = logging.getLogger("cutlayer.server")


@dataclass(frozen=True, eq=False)
class Desk:
    """What the connections of a server share: how long to wait and what to say meanwhile, and what was refused.

    Attributes:
        traffic: bytes of frames by client and direction.
        slowest: bytes a second. Time that a frame takes counts as waiting if it comes more slowly.
    """

    waits: Waits
    waiting: Waiting
    refusals: Refusals
    stop: Stop
    slowest: int
    traffic: Counter[tuple[str, str]] = field(default_factory=Counter)


class LinkPeer:
    """A client behind a link.

    Time is on the client's account from the call for a frame to a frame that is good. Bytes of frames on their way are
    the one thing that extends it, at `Desk.slowest` a second: neither confirmations nor what is refused do.

    Args:
        strikes: epochs in a row in which the client was late. Each halves the patience with it.
    """

    def __init__(self, number: int, name: str, link: Link, ledger: Ledger, desk: Desk, strikes: int = 0) -> None:
        self.number, self.name, self.link, self.ledger, self.desk = number, name, link, ledger, desk
        self.deadline, self.patience = desk.waits.deadline, desk.waits.patience
        if self.patience is not None:
            self.patience /= 1 << min(strikes, 30)
        # Seconds that were waited: before the next frame, and up to the last one, for a frame that is good.
        self._waited = self._spent = 0.0

    def send(self, frame: bytes) -> None:
        """Send a frame to the client; waits while it takes none."""
        begin, connected = time.monotonic(), time.monotonic()
        with self.ledger.phase("wait"):
            while True:
                try:
                    self.link.send(frame, 0.5)
                    self.desk.traffic[self.name, "down"] += len(frame)
                    self.desk.waiting.over()
                    break
                except TimeoutError:
                    self._check(time.monotonic() - begin)
                    connected = self._check_connection(connected, time.monotonic() - connected)
                except LinkClosed as reason:
                    self._closed(reason)

    def receive(self) -> bytes:
        """The client's next frame."""
        begin, before, taken = time.monotonic(), self._waited, self.link.taken
        connected = begin
        with self.ledger.phase("wait"):
            while True:
                try:
                    data = self.link.receive(0.5)
                    self.desk.traffic[self.name, "up"] += len(data)
                    self.desk.waiting.over()
                    self._waited, self._spent = 0.0, before + time.monotonic() - begin
                    break
                except TimeoutError:
                    earned = (self.link.taken - taken) / self.desk.slowest
                    now = time.monotonic()
                    self._check(before + now - begin - earned)
                    connected = self._check_connection(connected, now - connected - earned)
                except LinkClosed as reason:
                    self._closed(reason)
        return data

    def refuse(self, error: RefusedError) -> None:
        """Count what was refused and tell the client why; patience is not gained by what is refused."""
        self.desk.refusals.add(self.name, error)
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
            self.desk.waiting.on(self.name, "connected, sends nothing", after=LONG)
        else:
            self.desk.stop.check()
            self.desk.waiting.on(self.name, "its connection is lost")

    def _check_connection(self, since: float, quiet: float) -> float:
        """Give up a connection over which nothing came for too long; since when the one that is there is waited for."""
        if not self.link.connected or quiet < self.deadline:
            return since
        log.warning("client %s: nothing in %.0f s; disconnected", self.name, quiet)
        self.link.disconnect()
        return time.monotonic()

    def _closed(self, reason: LinkClosed) -> None:
        if self.patience is None:
            raise reason
        raise ClientUnavailableError(f"client {self.name}: {reason}")
