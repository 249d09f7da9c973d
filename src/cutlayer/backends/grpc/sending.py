"""Encoding and sending in a thread of its own, so that a batch is encoded while the next one is in the client half."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Sender:
    """Makes frames and sends them, in the order in which they are given, in a thread of its own.

    Args:
        send: sends a frame; what it raises comes out of `put` or `drain`.
        ahead: frames that may wait to be made before `put` waits; each holds the activations of a batch.
    """

    def __init__(self, send: Callable[[bytes], None], ahead: int = 2) -> None:
        self._send, self._ahead = send, ahead
        self._pending: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, "cutlayer-encode")

    def put(self, make: Callable[[], bytes]) -> None:
        """Have a frame made and sent."""
        self._drain_to(self._ahead)
        self._pending.append(self._thread.submit(lambda: self._send(make())))

    def drain(self) -> None:
        """Wait until all is sent."""
        self._drain_to(0)

    def _drain_to(self, count: int) -> None:
        while len(self._pending) > count:
            self._pending.popleft().result()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)
