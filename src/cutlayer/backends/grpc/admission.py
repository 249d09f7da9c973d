"""The server's admission: who may come in, with which checkpoint, and who is there.

A client that lost its connection goes on with its session. A client that begins a session (its process is new, or the
server's is) gets the number of epochs after which it is to load its checkpoint. While nothing of the epoch under way
depends on the clients, that is all; otherwise the epoch has been trained in part with a client that is gone: all
sessions are closed, the server goes back to its last checkpoint and every client to the one that fits it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec

from cutlayer.backends.grpc.link import Connection, Link, LinkClosed
from cutlayer.backends.grpc.listener import SessionUnknown
from cutlayer.backends.grpc.stop import Stop
from cutlayer.backends.grpc.terms import check_terms, largest_frame
from cutlayer.backends.grpc.waiting import Waiting
from cutlayer.errors import RefusedError
from cutlayer.wire.messages import Hello, Welcome

MOST_FRAME_BYTES = 4 << 30
# What a client may say of itself: memory is taken for it before a sample has come.
MOST = {
    "samples": 1 << 28,
    "test_samples": 1 << 28,
    "batch_size": 1 << 20,
    "test_batch_size": 1 << 20,
    "half_bytes": 1 << 30,
    "weights_bytes": 1 << 30,
    "epoch_steps": 1 << 28,
    "epoch_bytes": 1 << 62,
}
IDENTITY = (
    "samples",
    "test_samples",
    "batch_size",
    "drop_last",
    "test_batch_size",
    "frozen",
    "epoch_samples",
    "epoch_flops",
    "epoch_forward",
)


@dataclass
class Session:
    """A client that is there, or was a moment ago: the session's id and its link."""

    id: str
    link: Link


class Admission:
    """Takes the clients' Hellos, from the threads of their connections.

    Args:
        names: the clients, in the order of their numbers.
        terms: what they must agree to.
        run: the run's id.
        known: their Hellos from earlier, where the run is not new.
        patience: as in `peer.LinkPeer`.
    """

    def __init__(
        self,
        names: Sequence[str],
        terms: dict[str, str],
        activations: str,
        cut_shape: tuple[int, ...],
        run: str,
        known: Sequence[Hello] = (),
        patience: float | None = None,
    ) -> None:
        self.names, self.terms, self.run = list(names), terms, run
        self.activations, self.cut_shape = activations, cut_shape
        self.patience = patience
        self.hellos: dict[int, Hello] = dict(enumerate(known))
        self._sessions: dict[int, Session] = {}
        self._restore: list[int] | None = None  # None: the server is on its way back to a checkpoint
        self._busy = self._broken = self._closed = False
        self._needed: set[int] = set()  # clients that the epoch under way depends on
        self._condition = threading.Condition()  # reentrant

    def admit(self, hello: Hello) -> tuple[Welcome, Connection]:
        """Let a client in, or raise RefusedError."""
        with self._condition:
            if hello.name not in self.names:
                raise RefusedError(f"name: expected one of {self.names}, got {hello.name!r}")
            number = self.names.index(hello.name)
            if hello.session:
                return self._go_on(number, hello)
            self._check(number, hello)
            if self._busy and number in self._needed and number in self._sessions and self.patience is None:
                self.break_off(f"client {hello.name} began anew")
            # With patience, which checkpoint fits a client is known when the epoch under way has ended.
            if not self._condition.wait_for(lambda: self._closed or self._ready(), 60.0):
                raise SessionUnknown("the server is not ready yet")
            if self._closed or self._restore is None:
                raise SessionUnknown("the server is going down")
            restore = self._restore[number]
            if restore not in hello.checkpoints or (restore > 0 and hello.run != self.run):
                raise RefusedError(
                    f"checkpoint: expected one of run {self.run} after {restore} epochs, the client has those "
                    f"after {list(hello.checkpoints)} epochs of run {hello.run or '(none)'}; give it the folder it had "
                    "in this run, or an empty one and begin a new run"
                )
            if number in self._sessions:
                self._sessions[number].link.close("the client began a new session")
            largest = max(hello.batch_size, hello.test_batch_size)
            limit = largest_frame(self.activations, self.cut_shape, largest, hello.half_bytes)
            if limit > MOST_FRAME_BYTES:
                raise RefusedError(
                    f"frames: expected a batch, with labels of up to 64 KiB a sample, to fit {MOST_FRAME_BYTES} bytes; "
                    f"one of {largest} samples may take {limit}. Choose a smaller batch_size"
                )
            session = self._sessions[number] = Session(secrets.token_hex(8), Link(limit))
            self.hellos.setdefault(number, hello)
            self._condition.notify_all()
            return Welcome(number, session.id, 0, self.run, restore), session.link.attach(0)

    # --- for the server's main thread ---

    def open(self, restore: Sequence[int]) -> None:
        """Begin: clients that come are to load their checkpoint after so many epochs, given by client."""
        with self._condition:
            self._restore, self._broken, self._busy = list(restore), False, False
            self._condition.notify_all()

    def wait_for_all(self, stop: Stop, waiting: Waiting) -> None:
        """Wait until all clients have come. Raises Stopped where the run is to stop before."""
        while True:
            with self._condition:
                if self._condition.wait_for(lambda: len(self._sessions) == len(self.names), 0.5):
                    break
                missing = self._missing(range(len(self.names)))
            stop.check()
            waiting.on(missing, "not there yet", after=0.0)
        waiting.over()

    @contextmanager
    def exchange(
        self, stop: Stop, waiting: Waiting, wanted: Sequence[int], restore: list[int]
    ) -> Iterator[dict[int, Link]]:
        """Inside the block the server depends on the clients; yields the links of all that are there, by number.

        The block begins when all the `wanted` are there; with patience, once that has passed, when anyone is.
        After the block clients are to load the checkpoints in `restore`, which may change inside it.

        Raises LinkClosed where, without patience, a client began anew in the meantime.
        """
        begin = time.monotonic()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: len(self._there(wanted)) == len(wanted), 0.5)
                there = self._there(wanted)
                late = self.patience is not None and time.monotonic() - begin >= self.patience
                links = self._there(range(len(self.names)))
                if len(there) == len(wanted) or (late and links):
                    self._busy, self._needed = True, set(wanted)
                    break
                missing = self._missing(wanted)
            stop.check()
            waiting.on(missing, "not there")
        waiting.over()
        yield links
        with self._condition:
            if self._broken:
                raise LinkClosed("a client began anew")
            self._busy, self._restore = False, list(restore)
            self._condition.notify_all()

    def say_farewell(self, farewell: Callable[[int], list[bytes]], linger: float) -> None:
        """Send every client its last frames, those that come late as well; wait `linger` seconds for their arrival."""
        deadline, told = time.monotonic() + linger, set()
        while time.monotonic() < deadline:
            with self._condition:
                sessions = list(self._sessions.items())
            for number, session in sessions:
                # It may have just begun anew, or be gone, or not have taken what came before.
                with suppress(LinkClosed, TimeoutError):
                    if session.id not in told:
                        for frame in farewell(number):
                            session.link.send(frame, 0.0)
                        told.add(session.id)
            heard = [session.id in told and session.link.flush(0.2) for _, session in sessions]
            if len(heard) == len(self.names) and all(heard):
                return
            time.sleep(0.01)

    def break_off(self, reason: str) -> None:
        """End all sessions, as the server goes back to its last checkpoint: clients that come wait for `open`."""
        with self._condition:
            self._broken, self._restore = True, None
            for session in self._sessions.values():
                session.link.close(reason)
            self._sessions.clear()

    def close(self) -> None:
        """Let no one in any more, and end all sessions."""
        with self._condition:
            self._closed = True
            for session in self._sessions.values():
                session.link.close("the server went down")
            self._condition.notify_all()

    # --- with the lock held ---

    def _ready(self) -> bool:
        """Whether it is known which checkpoint a client that begins anew is to load."""
        return self._restore is not None and (self.patience is None or not self._busy)

    def _there(self, wanted: Sequence[int]) -> dict[int, Link]:
        """The links of these clients. With patience a client that has no connection, or was too late, is not there."""
        links = {number: self._sessions[number].link for number in wanted if number in self._sessions}
        if self.patience is None:
            return links
        return {number: link for number, link in links.items() if link.connected and not link.closed}

    def _missing(self, wanted: Sequence[int]) -> str:
        """The names of those that are not there."""
        there = self._there(wanted)
        return ", ".join(self.names[number] for number in wanted if number not in there)

    def _go_on(self, number: int, hello: Hello) -> tuple[Welcome, Connection]:
        session = self._sessions.get(number)
        if session is None or session.id != hello.session or session.link.closed:
            raise SessionUnknown("this server does not hold that session any more; begin a new one")
        connection = session.link.attach(hello.received)
        return Welcome(number, session.id, session.link.received, self.run, -1), connection

    def _check(self, number: int, hello: Hello) -> None:
        for field in IDENTITY:
            if getattr(hello, field) < 0:
                raise RefusedError(f"{field}: expected at least 0, got {getattr(hello, field)}")
        for field in ("samples", "batch_size"):
            if getattr(hello, field) < 1:
                raise RefusedError(f"{field}: expected at least 1, got {getattr(hello, field)}")
        for field, most in MOST.items():
            if not 0 <= getattr(hello, field) <= most:
                raise RefusedError(f"{field}: expected at most {most}, got {getattr(hello, field)}")
        if hello.frozen != hello.terms.get("client half", "").endswith("(frozen)"):
            raise RefusedError(f"frozen: expected what its half says of itself, got {hello.frozen}")
        # A term that this server cannot know is what the first client said.
        first = next(iter(self.hellos.values()), hello)
        check_terms({**first.terms, **self.terms}, hello.terms)
        before = self.hellos.get(number, hello)
        for field in IDENTITY:
            if getattr(before, field) != getattr(hello, field):
                raise RefusedError(
                    f"{field}: expected {getattr(before, field)}, as when the run began, got {getattr(hello, field)}"
                )


def as_json(hello: Hello) -> dict[str, object]:
    """What a checkpoint keeps of a client's Hello."""
    return msgspec.to_builtins(msgspec.structs.replace(hello, session="", received=0, run="", checkpoints=()))


def from_json(values: dict[str, object]) -> Hello:
    """Inverse of `as_json`."""
    return msgspec.convert(values, Hello)
