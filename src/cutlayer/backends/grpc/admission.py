"""The server's admission: who may come in, with which checkpoint, and who is there.

A client that lost its connection goes on with its session. A client that begins a session (its process is new, or the
server's is) gets the number of epochs after which it is to load its checkpoint. While nothing of the epoch under way
depends on the clients, that is all; otherwise the epoch has been trained in part with a client that is gone: all
sessions are closed, the server goes back to its last checkpoint and every client to the one that fits it.

A Hello that is refused changes nothing: all of it is checked before anyone's session is touched.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cutlayer.backends.grpc.claims import Claims
from cutlayer.backends.grpc.link import Connection, Link, LinkClosed
from cutlayer.backends.grpc.newcomers import Newcomers, Roll
from cutlayer.backends.grpc.refusals import SessionUnknown
from cutlayer.backends.grpc.rpc import KEEPALIVE
from cutlayer.backends.grpc.waiting import Waiting
from cutlayer.backends.grpc.way_back import WayBack
from cutlayer.errors import RefusedError
from cutlayer.stop_request import Stop
from cutlayer.wire.messages import Hello, Welcome

READY_SECONDS = 60.0
"""How long a client that comes while the server goes back to a checkpoint is held before it is to ask again."""


@dataclass
class Session:
    """A client that is there, or was a moment ago: the session's id and its link."""

    id: str
    link: Link

    @property
    def up(self) -> bool:
        """Whether it has a connection, as far as this side knows."""
        return self.link.connected and not self.link.closed


class Admission:
    """Takes the clients' Hellos, from the threads of their connections.

    Args:
        claims: what they may say of themselves.
        way_back: which checkpoints go with the server's.
        patience: see `Waits`.
        keepalive: see `Endpoint`. So long a second process with a client's certificate is held, in case the first one
            has vanished.
        known: their Hellos from earlier, by name, if the run is not new; those of clients that were admitted last.

    Attributes:
        names, hellos, barred: as in `Roll`.
        newcomers: who waits to be admitted.
    """

    def __init__(
        self,
        claims: Claims,
        way_back: WayBack,
        patience: float | None = None,
        keepalive: float = KEEPALIVE,
        known: Mapping[str, Hello] | None = None,
    ) -> None:
        self.claims, self.way_back, self.run = claims, way_back, way_back.run
        self.patience, self.keepalive, known = patience, keepalive, known or {}
        names = [*claims.run.names, *(name for name in known if name not in claims.run.names)]
        roll = Roll(names, {names.index(name): hello for name, hello in known.items()})
        self.names, self.hellos, self.barred = roll.names, roll.hellos, roll.barred
        self._sessions: dict[int, Session] = {}
        self._restore: list[int] | None = None  # None: the server is on its way back to a checkpoint
        self._saved: list[int] = [0] * len(self.names)  # what `_restore` would be if it went back now
        self._given_up: set[int] = set()  # clients that were waited for in vain, and were not there since
        self._held: set[int] = set()  # clients of which a Hello waits for the end of the session before
        self._busy = self._broken = self._closed = False
        self._needed: set[int] = set()  # clients that the epoch under way depends on
        self._condition = threading.Condition()  # reentrant
        self.newcomers = Newcomers(claims, way_back, roll, self._condition)

    def admit(self, hello: Hello, alive: Callable[[], bool] = lambda: True) -> tuple[Welcome, Connection]:
        """Let a client in, or raise RefusedError. A newcomer is held, while it is `alive`, until an epoch has ended."""
        with self._condition:
            if hello.name in self.newcomers.expected and hello.name not in self.names:
                self.newcomers.hold(hello, alive)
            number = self._check(hello)
            if hello.session:
                return self._go_on(number, hello)
            self._wait_until_alone(number)
            if self._busy and number in self._needed and number in self._sessions and self.patience is None:
                self.way_back.fits(number, hello, self._saved[number])  # or the server goes back further
                self.break_off(f"client {hello.name} began anew")
            while not self.way_back.fits(number, hello, restore := self._wait_restore(number, hello)):
                self.break_off(f"client {hello.name} has lost its newest checkpoint")
            return self._begin(number, hello, restore)

    # --- for the server's main thread ---

    def open(self, restore: Sequence[int]) -> None:
        """Begin: clients that come are to load their checkpoint after so many epochs, given by client."""
        with self._condition:
            self._restore, self._broken, self._busy = list(restore), False, False
            self._saved = list(restore)
            self._condition.notify_all()

    def check(self) -> None:
        """Raise LinkClosed if the server is to go back to a checkpoint."""
        with self._condition:
            if self._broken:
                raise LinkClosed("a client began anew")

    def end(self, restore: Sequence[int]) -> None:
        """The run is at its end: clients may come for its last frames, and none is trained with again."""
        with self._condition:
            self.way_back.over = True
            self.open(restore)

    def saved(self, restore: Sequence[int]) -> None:
        """The server saved a checkpoint. Should it go back, clients are to load theirs after so many epochs."""
        with self._condition:
            self._saved = list(restore)

    def present(self) -> list[str]:
        """Who is connected."""
        with self._condition:
            return [self.names[number] for number, session in self._sessions.items() if session.up]

    def bar(self, name: str, reason: str) -> None:
        """Let a client in no more, and end its session."""
        with self._condition:
            self.barred[name] = reason
            session = self._sessions.pop(self.names.index(name), None) if name in self.names else None
            if session is not None:
                session.link.close(reason)
            self._condition.notify_all()

    def wait_for_all(self, stop: Stop, waiting: Waiting) -> None:
        """Wait until all clients have come. Raises Stopped if the run is to stop before."""
        while True:
            with self._condition:
                if self._condition.wait_for(lambda: len(self.hellos) == len(self.names), 0.5):
                    break
                missing = ", ".join(name for number, name in enumerate(self.names) if number not in self.hellos)
            stop.check()
            waiting.on(missing, "not there yet", after=0.0)
        waiting.over()

    @contextmanager
    def exchange(
        self, stop: Stop, waiting: Waiting, wanted: Sequence[int], restore: list[int]
    ) -> Iterator[dict[int, Link]]:
        """Inside the block the server depends on the clients; yields the links of all that are there, by number.

        The block begins when all the `wanted` are there; with patience, once that has passed, when anyone is. Who was
        waited for in vain is not waited for again until it is there when one begins.
        After the block clients are to load the checkpoints in `restore`, which may change inside it.

        Raises LinkClosed if the server is to go back: without patience, as a client began anew in the meantime; or for
        a client that has lost its newest checkpoint.
        """
        begin = time.monotonic()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._broken or self._complete(wanted), 0.5)
                self.check()
                if gone := [self.names[number] for number in wanted if self.names[number] in self.barred]:
                    raise LinkClosed(f"{', '.join(gone)} takes part no more")
                late = self.patience is not None and time.monotonic() - begin >= self.patience
                links = self._there(range(len(self.names)))
                if self._complete(wanted) or (late and links):
                    self._given_up = (self._given_up | set(wanted)) - links.keys()
                    self._busy, self._needed = True, set(wanted)
                    break
                missing = self._missing(wanted)
            stop.check()
            waiting.on(missing, "not there")
        waiting.over()
        yield links
        with self._condition:
            self.check()
            self._busy, self._restore = False, list(restore)
            self._condition.notify_all()

    def say_farewell(self, farewell: Callable[[int], list[bytes]], told: set[str]) -> list[int]:
        """Send every client that is there its last frames, unless they are in `told`, by session; who has them all."""
        with self._condition:
            sessions = list(self._sessions.items())
        for number, session in sessions:
            # It may have just begun anew, or be gone, or not have taken what came before.
            with suppress(LinkClosed, TimeoutError):
                if session.id not in told:
                    for frame in farewell(number):
                        session.link.send(frame, 0.0)
                    told.add(session.id)
        return [number for number, session in sessions if session.id in told and session.link.flush(0.1)]

    def break_off(self, reason: str) -> None:
        """End all sessions, as the server goes back to its last checkpoint: clients that come wait for `open`."""
        with self._condition:
            self._broken, self._restore = True, None
            for session in self._sessions.values():
                session.link.close(reason)
            self._sessions.clear()
            self._condition.notify_all()

    def close(self) -> None:
        """Let no one in any more, and end all sessions."""
        with self._condition:
            self._closed = self.newcomers.closed = True
            for session in self._sessions.values():
                session.link.close("the server went down")
            self._condition.notify_all()

    # --- with the lock held ---

    def _check(self, hello: Hello) -> int:
        """The client's number. Raises RefusedError for one that is not let in, and for what it may not claim."""
        if hello.name not in self.names:
            raise RefusedError(
                f"name: expected one of {self.names}, got {hello.name!r}. The server's operator admits a client to a "
                "run that has begun by its name in a file: serve --admit FILE, read again on SIGHUP"
            )
        if hello.name in self.barred:
            raise RefusedError(f"client {hello.name} takes part no more: {self.barred[hello.name]}")
        number = self.names.index(hello.name)
        if not hello.session:
            self.claims.check(hello, next(iter(self.hellos.values()), None), self.hellos.get(number))
        return number

    def _ready(self) -> bool:
        """Whether it is known which checkpoint a client that begins anew is to load."""
        return self._restore is not None and (self.patience is None or not self._busy)

    def _there(self, wanted: Sequence[int]) -> dict[int, Link]:
        """The links of these clients. With patience a client that has no connection, or was too late, is not there."""
        sessions = {number: self._sessions[number] for number in wanted if number in self._sessions}
        return {number: each.link for number, each in sessions.items() if self.patience is None or each.up}

    def _complete(self, wanted: Sequence[int]) -> bool:
        """Whether all of these are there that are waited for, and one of them at least."""
        there = self._there(wanted)
        return all(number in there or number in self._given_up for number in wanted) and (bool(there) or not wanted)

    def _missing(self, wanted: Sequence[int]) -> str:
        """The names of those that are not there."""
        there = self._there(wanted)
        return ", ".join(self.names[number] for number in wanted if number not in there)

    def _wait_until_alone(self, number: int) -> None:
        """Hold a client that begins a session while it has another one, until it is known whether that one lives."""
        name = self.names[number]
        if number in self._held:
            raise SessionUnknown(f"another process of client {name} asks to come in already")
        self._held.add(number)
        try:
            deadline = time.monotonic() + 1.2 * self.keepalive + 0.5
            while number in self._sessions and self._sessions[number].up and not self._closed:
                if time.monotonic() > deadline:
                    raise RefusedError(
                        f"client {name} is connected already, from another process with the same certificate or name, "
                        "which goes on; end one of the two"
                    )
                self._condition.wait(0.05)
        finally:
            self._held.discard(number)

    def _wait_restore(self, number: int, hello: Hello) -> int:
        """After how many epochs a client that begins anew is to load its checkpoint, once that is known."""
        # With patience that is when the epoch under way has ended.
        if not self._condition.wait_for(lambda: self._closed or self._ready(), READY_SECONDS):
            raise SessionUnknown("the server is not ready yet")
        if self._closed or self._restore is None:
            raise SessionUnknown("the server is going down")
        if number in self._sessions and self._sessions[number].up:
            raise SessionUnknown("another process of this client was faster")
        self._check(hello)  # again: while it waited it may have been barred, and the first client may have come in
        return self._restore[number]

    def _begin(self, number: int, hello: Hello, restore: int) -> tuple[Welcome, Connection]:
        if number in self._sessions:
            self._sessions[number].link.close("the client began a new session")
        link = Link(self.claims.largest_frame(hello), window_bytes=self.claims.limits.window)
        session = self._sessions[number] = Session(secrets.token_hex(8), link)
        self.hellos.setdefault(number, hello)
        self._condition.notify_all()
        return Welcome(number, session.id, 0, self.run, restore), session.link.attach(0)

    def _go_on(self, number: int, hello: Hello) -> tuple[Welcome, Connection]:
        session = self._sessions.get(number)
        if session is None or session.id != hello.session or session.link.closed:
            raise SessionUnknown("this server does not hold that session any more; begin a new one")
        connection = session.link.attach(hello.received)
        self._condition.notify_all()
        return Welcome(number, session.id, session.link.received, self.run, -1), connection
