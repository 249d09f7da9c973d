"""5. The wire in one process: the same frames as between machines, moved by a function call."""

from __future__ import annotations

from collections.abc import Callable

from cutlayer.ledger import Ledger


class InProcessWire:
    """A client's connection to a server in the same process.

    Args:
        receive: the server's answer to a frame: a frame, or None.
        ledger: counts what passes.
    """

    def __init__(self, receive: Callable[[bytes], bytes | None], ledger: Ledger) -> None:
        self.receive, self.ledger = receive, ledger

    def deliver(self, data: bytes) -> bytes:
        """Pass a frame that the server sends of its own accord, and return it."""
        self.ledger.frame("down", data)
        return data

    def send(self, data: bytes) -> bytes | None:
        """Send a frame to the server and return its reply, if it has one."""
        with self.ledger.phase("wire"):
            self.ledger.frame("up", data)
            reply = self.receive(data)
            if reply is not None:
                self.ledger.frame("down", reply)
        return reply
