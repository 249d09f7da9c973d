"""Clients that are to be admitted to a run that has begun: held until an epoch has ended.

Nothing of the run is changed by one that waits; what it says of itself is checked first. Between two epochs the
server's main thread takes the one that has waited longest, see `members`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from cutlayer.backends.grpc.claims import Claims
from cutlayer.backends.grpc.refusals import SessionUnknown
from cutlayer.backends.grpc.way_back import WayBack
from cutlayer.errors import RefusedError
from cutlayer.wire.messages import Hello

log = logging.getLogger("cutlayer.server")


@dataclass(eq=False)
class Roll:
    """The clients of a run, of whom some are let in no more. It is changed with admission's lock held.

    Attributes:
        names: of all clients, in the order of their numbers.
        hellos: what they say of themselves, by number.
        barred: names that are let in no more, and why.
    """

    names: list[str]
    hellos: dict[int, Hello] = field(default_factory=dict)
    barred: dict[str, str] = field(default_factory=dict)


class Newcomers:
    """Who waits to be admitted.

    Args:
        condition: admission's, which is reentrant.

    Attributes:
        expected: names that the server's operator has given.
        closed: whether the server is going down.
    """

    def __init__(self, claims: Claims, way_back: WayBack, roll: Roll, condition: threading.Condition) -> None:
        self.expected: frozenset[str] = frozenset()
        self.closed = False
        self._claims, self._way_back, self._roll, self._condition = claims, way_back, roll, condition
        self._held: dict[str, tuple[Hello, Callable[[], bool]]] = {}
        self._turned_away: dict[str, str] = {}

    def hold(self, hello: Hello, alive: Callable[[], bool]) -> None:
        """Hold a client until it is a member, or it is not `alive` any more. With the lock held.

        Raises:
            RefusedError: it cannot be admitted.
            SessionUnknown: it is to try again.
        """
        name = hello.name
        self._check(hello)
        if name in self._held:
            raise SessionUnknown(f"another process of client {name} waits to be admitted already")
        self._held[name] = hello, alive
        log.info("client %s waits to be admitted", name)
        try:
            while name not in self._roll.names:
                self._check_still(name)
                if not alive():
                    raise SessionUnknown("the connection was lost")
                self._condition.wait(0.5)
        finally:
            del self._held[name]

    def _check(self, hello: Hello) -> None:
        roll = self._roll
        if hello.session or len(roll.hellos) < len(roll.names):
            raise SessionUnknown("the clients that the run begins with are not there yet")
        self._claims.check_newcomer(hello, [roll.hellos[number] for number in range(len(roll.names))])
        if hello.run not in ("", self._way_back.run) or 0 not in hello.checkpoints:
            raise RefusedError(
                f"checkpoint: expected a client that has not taken part in any run, got one of run {hello.run[:32]} "
                f"after {list(hello.checkpoints[:100])} epochs; give it an empty folder"
            )

    def _check_still(self, name: str) -> None:
        if name in self._roll.barred:
            raise RefusedError(f"client {name} takes part no more: {self._roll.barred[name]}")
        if name in self._turned_away:
            raise RefusedError(f"client {name} cannot be admitted: {self._turned_away[name]}")
        if name not in self.expected:
            raise RefusedError(f"client {name} is not to be admitted any more")
        if self._way_back.over:
            raise RefusedError("the run is at its end; no one is admitted any more")
        if self.closed:
            raise SessionUnknown("the server is going down")

    # --- for other threads ---

    def expect(self, names: Collection[str]) -> None:
        """These may come, in place of those that might before; those that were turned away may try again."""
        with self._condition:
            self.expected = frozenset(names)
            self._turned_away.clear()
            self._condition.notify_all()

    def first(self) -> Hello | None:
        """Who has waited longest, of those that are still there."""
        with self._condition:
            there = (hello for hello, alive in self._held.values() if hello.name not in self._turned_away and alive())
            return next((hello for hello in there if hello.name not in self._roll.barred), None)

    def waits(self, hello: Hello) -> bool:
        """Whether this one still waits, and may come."""
        with self._condition:
            held, alive = self._held.get(hello.name, (None, bool))
            barred = hello.name in self._turned_away or hello.name in self._roll.barred
            return held is hello and hello.name in self.expected and not barred and alive()

    def admit(self, hello: Hello) -> None:
        """One is a member from now on, with the next number."""
        with self._condition:
            self._roll.hellos[len(self._roll.names)] = hello
            self._roll.names.append(hello.name)
            self._condition.notify_all()

    def turn_away(self, name: str, reason: str) -> None:
        """One cannot be admitted, nor when it comes again."""
        with self._condition:
            self._turned_away[name] = reason
            self._condition.notify_all()
