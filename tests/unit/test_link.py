"""Links: frames in order, exactly once, whatever happens to connections; bounded queues; refusals."""

import random
import threading

import pytest

from cutlayer.backends.grpc import link as module
from cutlayer.backends.grpc.link import CHUNK, CONFIRM, LAST, MORE, Link, LinkClosed
from cutlayer.errors import RefusedError
from cutlayer.wire.frames import MAGIC, PREFIX, VERSION


def frame(size: int, fill: int = 0) -> bytes:
    return PREFIX.pack(MAGIC, VERSION, 0, size) + bytes([fill]) * size


def pump(sender: module.Connection, receiver: module.Connection, lose_after: int | None) -> None:
    """Carry messages one way; the connection ends after so many."""
    for count, message in enumerate(sender.outgoing()):
        if count == lose_after:
            break
        receiver.take(message)
    sender.close()
    receiver.close()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_doubled_or_reordered_by_lost_connections(seed: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 50)
    draw = random.Random(seed)
    frames = [frame(draw.randint(0, 200), index % 251) for index in range(200)]
    left, right = Link(300, window=8), Link(300, window=8)
    received: list[bytes] = []

    def produce() -> None:
        for data in frames:
            left.send(data)

    def consume() -> None:
        while len(received) < len(frames):
            received.append(right.receive())

    def connect() -> None:
        while not right.closed:
            a, b = left.attach(right.received), right.attach(left.received)
            ways = [threading.Thread(target=pump, args=(*pair, draw.randint(0, 20))) for pair in ((a, b), (b, a))]
            for way in ways:
                way.start()
            for way in ways:
                way.join()

    connector = threading.Thread(target=connect)
    workers = [threading.Thread(target=produce), threading.Thread(target=consume)]
    for thread in (connector, *workers):
        thread.start()
    for thread in workers:
        thread.join(20)
    right.close("end")
    left.close("end")
    connector.join(20)
    assert received == frames


def test_a_full_window_stops_the_sender_and_a_full_inbox_the_reader() -> None:
    left, right = Link(100, window=4), Link(100, window=4)
    for _ in range(4):
        left.send(frame(10))
    with pytest.raises(TimeoutError, match="confirmed none of 4"):
        left.send(frame(10), timeout=0.05)
    a, b = left.attach(0), right.attach(0)
    messages = a.outgoing()
    for _ in range(4):
        b.take(next(messages))
    reader = threading.Thread(target=b.take, args=(CHUNK.pack(LAST, 4, 0) + frame(10),), daemon=True)
    reader.start()
    reader.join(0.1)
    assert reader.is_alive()
    right.receive()
    reader.join(5)
    assert not reader.is_alive()
    assert right.received == 5


def test_the_window_is_bounded_in_bytes_too() -> None:
    left = Link(1000, window=100, window_bytes=250)
    left.send(frame(500))  # a single frame is always let through
    with pytest.raises(TimeoutError):
        left.send(frame(10), timeout=0.01)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "expected 17 to"),
        (CHUNK.pack(LAST, 1, 0) + frame(1), "expected a chunk of frame 0, got kind 1, frame 1"),
        (CHUNK.pack(7, 0, 0) + frame(1), "got kind 7"),
        (CHUNK.pack(CONFIRM, 0, 3), "confirmation: expected 0 to 0 frames, got 3"),
        (CHUNK.pack(CONFIRM, 0, 0) + b"x", "got kind 2"),
        (CHUNK.pack(LAST, 0, 0) + b"CUT", "at least 17 bytes"),
        (CHUNK.pack(MORE, 0, 0) + frame(2**40 % 97)[:4] + b"\x63" + frame(1)[5:], "version"),
        (CHUNK.pack(MORE, 0, 0) + PREFIX.pack(MAGIC, VERSION, 0, 1 << 50), "at most 1000 bytes"),
        (CHUNK.pack(LAST, 0, 0) + frame(50)[:-1], "the 67 bytes it declares, got 66"),
        (CHUNK.pack(LAST, 0, 0) + frame(50) + b"x", "the 67 bytes it declares, got 68"),
        (CHUNK.pack(MORE, 0, 0) + frame(50), "got 67"),
    ],
)
def test_what_breaks_the_rules_is_refused_and_named(message: bytes, reason: str) -> None:
    link = Link(1000)
    with pytest.raises(RefusedError, match=reason):
        link.attach(0).take(message)
    assert link.received == 0


def test_a_closed_link_says_why() -> None:
    link = Link(1000)
    link.close("the server began anew")
    with pytest.raises(LinkClosed, match="began anew"):
        link.receive()
    with pytest.raises(LinkClosed, match="began anew"):
        link.send(frame(1))
