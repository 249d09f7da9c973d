"""Stopping on request: after SIGINT or SIGTERM the epoch under way finishes; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from cutlayer.errors import CutlayerError


class Stopped(CutlayerError):  # noqa: N818 - not an error
    """The run was asked to stop; the same call goes on with it."""


class Stop:
    """Whether the run is to stop: at the end of the epoch, or as soon as it waits for a peer that is not there.

    Attributes:
        saved: how many epochs are on the disk, from which the run goes on; None before it has begun.
    """

    def __init__(self) -> None:
        self.requested = False
        self.saved: int | None = None

    def request(self) -> None:
        """Ask for the end; asked again, it comes at once."""
        if self.requested:
            raise self._stopped("stopped at once")
        self.requested = True

    def check(self) -> None:
        """Raise Stopped if the end was asked for."""
        if self.requested:
            raise self._stopped("stopped")

    def _stopped(self, how: str) -> Stopped:
        if self.saved is None:
            return Stopped(f"{how} before the run began here")
        if self.saved == 0:
            return Stopped(f"{how} before an epoch was complete and saved")
        return Stopped(f"{how}; {'epochs 1 to ' if self.saved > 1 else 'epoch '}{self.saved} complete and saved")

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        """Inside the block, SIGINT and SIGTERM ask for the end. For a process's main thread."""
        before = {
            number: signal.signal(number, lambda *_: self.request()) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
