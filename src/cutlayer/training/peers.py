"""The server's connections to clients, and their word that they are done."""

from __future__ import annotations

from typing import Protocol

import msgspec

from cutlayer.errors import RefusedError
from cutlayer.records.ledger import Ledger
from cutlayer.training.server import Server
from cutlayer.wire.frames import PackedFrame, Received
from cutlayer.wire.messages import Done


class Peer(Protocol):
    """A connection to one client, wherever it is."""

    number: int

    def send(self, frame: bytes) -> None:
        """Send a frame. Raises ClientUnavailableError."""
        ...

    def receive(self) -> bytes:
        """The client's next frame. Raises ClientUnavailableError."""
        ...

    def refuse(self, error: RefusedError) -> None:
        """Deal with a frame that was refused; if this returns, the next frame is read."""
        ...


def send(ledger: Ledger, peer: Peer, frame: PackedFrame) -> None:
    """Send a frame to a client, and count it. Raises ClientUnavailableError."""
    peer.send(frame.data)
    ledger.frame("down", frame)


def check_done(server: Server, received: Received, expected: Done) -> None:
    """Check a client's word that it is at its end, and count it and the FLOPs that it tells of."""
    message = received.message
    if not isinstance(message, Done) or msgspec.structs.replace(message, flops={}) != expected:
        raise RefusedError(
            f"expected client {expected.client} to be done after {expected.steps} steps of epoch {expected.epoch}, "
            f"got {message}"
        )
    known = {"forward", "backward", "evaluation"}
    if not set(message.flops) <= known or any(not 0 <= count < 1 << 62 for count in message.flops.values()):
        raise RefusedError(f"flops: expected counts of {sorted(known)}, got {message.flops}")
    server.ledger.frame("up", received)
    for what, count in message.flops.items():
        server.ledger.flops("client", what, count)
