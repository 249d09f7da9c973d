"""The wire on a Ray cluster: the same frames, as arguments and results of an actor's calls."""

from __future__ import annotations

from collections import deque
from typing import Any

from cutlayer.backends.answers import TrustedPeer
from cutlayer.backends.ray.handle import ActorHandle
from cutlayer.errors import ClientUnavailableError, StateLostError
from cutlayer.records.ledger import Ledger


class RayPeer(TrustedPeer):
    """The server's connection to a client that is in an actor.

    `send` starts the client's work and does not wait for it, so clients in different actors compute at the same time.
    While the server deals with a frame of an epoch of which more come, the next one is made: at most two frames of a
    client are on their way, and none is made that the server may not ask for.
    """

    def __init__(self, number: int, handle: ActorHandle, ledger: Ledger) -> None:
        super().__init__(number)
        self.handle, self.ledger = handle, ledger
        self._calls: deque[Any] = deque()
        self._waits = True
        """Whether the client is known to wait for a frame."""

    def send(self, frame: bytes) -> None:
        """Send a frame to the client. Raises ClientUnavailableError if its actor is known to have died."""
        if self.handle.dead:
            raise ClientUnavailableError(f"client {self.number} is lost")
        self._call(self.handle.actor.answer, frame)
        self._waits = False

    def receive(self) -> bytes:
        """The client's next frame. Raises ClientUnavailableError or StateLostError, as `ActorHandle.get`."""
        while True:
            if not self._calls:
                if self._waits:
                    raise RuntimeError(f"client {self.number} has nothing more to send; it waits for a frame")
                self._call(self.handle.actor.go_on)
            try:
                with self.ledger.phase("wait"):
                    frame, more = self.handle.get(self._calls.popleft())
            except (ClientUnavailableError, StateLostError):
                self.give_up()
                raise
            self._waits = not frame and not self._calls
            if frame:
                self.count_down()
                if more and not self._calls:
                    self._call(self.handle.actor.go_on)
                return frame

    def reset(self) -> None:
        """Forget what is on its way: the client begins anew."""
        self._calls.clear()
        self._waits = True

    def _call(self, method: Any, *arguments: Any) -> None:
        self.handle.calls += 1
        self._calls.append(method.options(num_returns=2).remote(self.number, self.lost_after == 0, *arguments))

    def give_up(self) -> None:
        """Have the client leave the epoch, if its actor lives."""
        self.reset()
        if not self.handle.dead:
            self.handle.actor.forget.remote(self.number)
