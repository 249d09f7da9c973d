"""A link: frames in order, each exactly once, over connections that break and come back.

Each side keeps the frames that the other has not confirmed. A connection that is lost loses nothing: on the next one
both sides say how many frames they have, and the rest is sent again. Frames travel in chunks, each behind

    kind, 1 byte | number of the frame, 8 bytes | frames that the sender of this has received, 8 bytes

What is stored is bounded on both sides, in frames and in bytes: a sender waits while its window is full, a receiver
reads no further while its inbox is, so a slow peer slows its sender down and costs no memory. All chunks of a frame but
its last are full, so that a frame is no more messages than it has to be.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterator

from cutlayer.errors import RefusedError, StateLostError
from cutlayer.wire.envelope import PREFIX, total_length

CHUNK = struct.Struct("<BQQ")
CHUNK_BYTES = 1 << 18
"""Bytes of a frame in a message, at most: what a sign of life may have to wait for, 2 s at 1 Mbit/s."""
MORE, LAST, CONFIRM = 0, 1, 2  # a chunk, a frame's last chunk, no chunk at all


class LinkClosed(StateLostError):  # noqa: N818 - a state, as in queue.ShutDown
    """The session of this link is over: the peer began anew, or this side ends."""


class Link:
    """One side of a session.

    Args:
        limit: bytes of the largest frame that is taken.
        window: frames that wait for confirmation, or to be read, before the sender waits.
        window_bytes: the same in bytes; one frame is always let through.
    """

    def __init__(self, limit: int, window: int = 32, window_bytes: int = 64 << 20) -> None:
        self.limit, self.window, self.window_bytes = limit, window, window_bytes
        self.received = 0
        self.taken = 0
        """Bytes of frames that came in. A confirmation is none: it is no sign that a frame is on its way."""
        self.leaving = False  # whether the end of the connection is the end of all
        self._condition = threading.Condition()
        self._sent: deque[bytes] = deque()
        self._sent_bytes = 0
        self._confirmed = 0  # number of the first frame in _sent
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._told = self._untold_bytes = 0
        self._connection: Connection | None = None
        self._closed: str | None = None

    def send(self, frame: bytes, timeout: float | None = None) -> None:
        """Have a frame delivered; waits while the window is full. Raises LinkClosed, TimeoutError after `timeout` s."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._closed is not None or self._room(len(frame)), timeout):
                raise TimeoutError(f"the peer confirmed none of {len(self._sent)} frames in {timeout} s")
            self._check()
            self._sent.append(frame)
            self._sent_bytes += len(frame)
            self._condition.notify_all()

    def receive(self, timeout: float | None = None) -> bytes:
        """The next frame. Raises LinkClosed, or TimeoutError after `timeout` seconds without one."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._closed is not None or self._inbox, timeout):
                raise TimeoutError(f"no frame in {timeout} s")
            self._check()
            frame = self._inbox.popleft()
            self._inbox_bytes -= len(frame)
            self._condition.notify_all()
            return frame

    def flush(self, timeout: float) -> bool:
        """Wait until the peer has confirmed all that was sent; whether it has."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed is not None or not self._sent, timeout)
            return not self._sent

    def say_goodbye(self, timeout: float) -> None:
        """Tell the peer at once what has come in, and leave it to the peer to end the connection."""
        with self._condition:
            self.leaving = True
            self._untold_bytes = self.window_bytes
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._connection is None, timeout)

    def attach(self, peer_received: int) -> Connection:
        """A new connection takes the place of the last. `peer_received`: how many frames the peer says it has."""
        with self._condition:
            self._check()
            self._confirm(peer_received)
            self._connection = Connection(self, self._confirmed)
            self._told = self.received
            self._condition.notify_all()
            return self._connection

    def close(self, reason: str) -> None:
        """End the session: whoever waits on this link gets LinkClosed with this reason."""
        with self._condition:
            self._closed = self._closed or reason
            self._connection = None
            self._condition.notify_all()

    @property
    def connected(self) -> bool:
        """Whether a connection is up, as far as this side knows."""
        return self._connection is not None

    @property
    def closed(self) -> bool:
        """Whether the session is over."""
        return self._closed is not None

    def wait_closed(self, timeout: float) -> bool:
        """Wait until the session is over; whether it is."""
        with self._condition:
            return self._condition.wait_for(lambda: self._closed is not None, timeout)

    def disconnect(self) -> None:
        """Give up the present connection, not the session."""
        with self._condition:
            self._connection = None
            self._condition.notify_all()

    # The methods below are called with the lock held.

    def _check(self) -> None:
        if self._closed is not None:
            raise LinkClosed(self._closed)

    def _room(self, size: int) -> bool:
        fits = len(self._sent) < self.window and self._sent_bytes + size <= self.window_bytes
        return fits or not self._sent

    def _inbox_room(self, size: int) -> bool:
        fits = len(self._inbox) < self.window and self._inbox_bytes + size <= self.window_bytes
        return fits or not self._inbox

    def _confirm(self, count: int) -> None:
        if not self._confirmed <= count <= self._confirmed + len(self._sent):
            raise RefusedError(
                f"confirmation: expected {self._confirmed} to {self._confirmed + len(self._sent)} frames, got {count}"
            )
        while self._confirmed < count:
            self._sent_bytes -= len(self._sent.popleft())
            self._confirmed += 1

    def _must_tell(self) -> bool:
        untold = self.received - self._told
        return untold > 0 and (untold >= self.window // 4 or self._untold_bytes >= self.window_bytes // 4)


class Connection:
    """One connection of a link: `outgoing` is what to send on it, `take` gets what comes in on it."""

    def __init__(self, link: Link, first: int) -> None:
        self._link, self._next = link, first
        self._frame = bytearray()
        self._total = 0

    @property
    def up(self) -> bool:
        """Whether this is still the connection of its link."""
        return self._link._connection is self

    def close(self) -> None:
        """The connection is lost, or given up."""
        with self._link._condition:
            if self.up:
                self._link._connection = None
            self._link._condition.notify_all()

    def wait_down(self) -> None:
        """Wait until the connection is lost, given up or replaced."""
        with self._link._condition:
            self._link._condition.wait_for(lambda: not self.up)

    def outgoing(self) -> Iterator[bytes]:
        """Messages to send, as they come up; ends with the connection."""
        link = self._link
        while True:
            with link._condition:
                link._condition.wait_for(
                    lambda: not self.up or self._next < link._confirmed + len(link._sent) or link._must_tell()
                )
                if not self.up:
                    return
                waiting = self._next < link._confirmed + len(link._sent)
                frame = link._sent[self._next - link._confirmed] if waiting else b""
                received = link._told = link.received
                link._untold_bytes = 0
            if not waiting:
                yield CHUNK.pack(CONFIRM, 0, received)
                continue
            for start in range(0, len(frame), CHUNK_BYTES):
                kind = LAST if start + CHUNK_BYTES >= len(frame) else MORE
                chunk = memoryview(frame)[start : start + CHUNK_BYTES]
                yield b"".join((CHUNK.pack(kind, self._next, received), chunk))
            self._next += 1

    def take(self, message: bytes) -> None:
        """Take a message that came in; waits while the inbox is full. Raises RefusedError if it breaks the rules."""
        if not CHUNK.size <= len(message) <= CHUNK.size + CHUNK_BYTES:
            raise RefusedError(
                f"message: expected {CHUNK.size} to {CHUNK.size + CHUNK_BYTES} bytes, got {len(message)}"
            )
        kind, number, confirmed = CHUNK.unpack_from(message)
        link = self._link
        with link._condition:
            if not self.up:
                return
            sent = link._confirmed + len(link._sent)
            if self._next + 1 < confirmed <= sent:  # the frame that is being sent may have arrived
                raise RefusedError(f"confirmation: expected at most {self._next + 1} frames, got {confirmed}")
            link._confirm(confirmed)
            link._condition.notify_all()
        if kind == CONFIRM and len(message) == CHUNK.size:
            return
        if kind not in (MORE, LAST) or number != link.received:
            raise RefusedError(f"message: expected a chunk of frame {link.received}, got kind {kind}, frame {number}")
        chunk = memoryview(message)[CHUNK.size :]
        if not self._frame:
            self._total = total_length(chunk[: PREFIX.size])
            if self._total > link.limit:
                raise RefusedError(f"frame: expected at most {link.limit} bytes, it declares {self._total}")
        size = len(self._frame) + len(chunk)
        if size > self._total or (kind == LAST) != (size == self._total) or len(chunk) == 0:
            raise RefusedError(f"frame: expected the {self._total} bytes it declares, got {size} in its chunks")
        if kind == MORE and len(chunk) < CHUNK_BYTES:
            raise RefusedError(f"message: expected {CHUNK_BYTES} bytes in all chunks but the last, got {len(chunk)}")
        self._frame += chunk
        link.taken += len(chunk)
        if kind == LAST:
            frame, self._frame = bytes(self._frame), bytearray()
            self._deliver(frame)

    def _deliver(self, frame: bytes) -> None:
        link = self._link
        with link._condition:
            link._condition.wait_for(lambda: not self.up or link._inbox_room(len(frame)))
            if self.up:
                link._inbox.append(frame)
                link._inbox_bytes += len(frame)
                link.received += 1
                link._untold_bytes += len(frame)
                link._condition.notify_all()
