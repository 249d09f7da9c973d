"""The end on demand: SIGINT and SIGTERM let the epoch under way finish, a second one does not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from cutlayer.errors import CutlayerError


class Stopped(CutlayerError):  # noqa: N818 - not an error
    """The run was asked to stop; the same call goes on with it."""


class Stop:
    """Whether the run is to stop: at the end of the epoch, or as soon as it waits for a peer that is not there."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Ask for the end; asked again, it comes at once."""
        if self.requested:
            raise Stopped("stopped in the middle of an epoch, which is trained again when the run goes on")
        self.requested = True

    def check(self) -> None:
        """Raise Stopped if the end was asked for."""
        if self.requested:
            raise Stopped("stopped after the last complete epoch")

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
