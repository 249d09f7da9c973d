"""What both ways to a client in the same trust domain share: in this process, and in an actor on a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator

from cutlayer.errors import ClientUnavailableError, RefusedError
from cutlayer.training.client import Client
from cutlayer.wire.frames import read


class Answers:
    """What a client in this process has yet to send.

    The client works when its next frame is asked for, so that no more is in memory than is on its way.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._waiting: deque[Iterator[Callable[[], bytes]]] = deque()

    def add(self, frame: bytes) -> None:
        """Give the client a frame from the server. Raises RefusedError."""
        self._waiting.append(self.client.answers(read(frame)))

    def next(self) -> Callable[[], bytes] | None:
        """A call that makes its next frame; None if it waits for one."""
        while self._waiting:
            if (make := next(self._waiting[0], None)) is not None:
                return make
            self._waiting.popleft()
        return None

    def clear(self) -> None:
        """Drop what the client has not sent yet."""
        self._waiting.clear()

    def give_up(self) -> None:
        """The same, and have the client leave the epoch."""
        self.clear()
        self.client.leave()


class TrustedPeer(ABC):
    """A connection to a client that this program runs itself, and that can be lost on purpose.

    Attributes:
        lost_after: frames that still come before the client is lost; None if it is not to be.
    """

    lost_after: int | None = None

    def __init__(self, number: int) -> None:
        self.number = number

    def refuse(self, error: RefusedError) -> None:
        """In one trust domain a frame that is refused is an error of this program, or of its user's data."""
        raise error

    def lose_after(self, frames: int | None) -> None:
        """Simulate the loss of the client: of the frames from now on only so many come; all for None."""
        self.lost_after = frames

    def count_down(self) -> None:
        """Count a frame that comes. Raises ClientUnavailableError if the client is lost before it."""
        if self.lost_after == 0:
            self.give_up()
            raise ClientUnavailableError(f"client {self.number} is lost")
        if self.lost_after is not None:
            self.lost_after -= 1

    @abstractmethod
    def send(self, frame: bytes) -> None:
        """Send a frame to the client. Raises ClientUnavailableError."""

    @abstractmethod
    def receive(self) -> bytes:
        """The client's next frame. Raises ClientUnavailableError."""

    @abstractmethod
    def give_up(self) -> None:
        """Drop what the client was about to send; it leaves the epoch."""
