"""A server that does what it likes to a client: the real listener, and frames by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.link import Connection, Link
from cutlayer.backends.grpc.listener import Listener, Reception
from cutlayer.backends.grpc.refusals import Refusals
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.backends.grpc.slots import Slots
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Done, Hello, Message, Welcome


class BadServer:
    """Without TLS, on this machine. It lets everyone in, with the checkpoint that they begin with."""

    def __init__(self, config: str = "{}") -> None:
        self.link = Link(1 << 24)
        reception = Reception(self._admit, config, Refusals(), Slots(["client"], ClientLimits(), named=False), print)
        self.listener = Listener(Endpoint("127.0.0.1:0"), reception)
        self.address = f"127.0.0.1:{self.listener.port}"

    def _admit(self, hello: Hello, alive: object = None) -> tuple[Welcome, Connection]:
        self.hello = hello
        return Welcome(0, "session", self.link.received, "run", -1 if hello.session else 0), self.link.attach(
            hello.received
        )

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.link.send(pack(Frame(message)))

    def until_done(self) -> None:
        """Take what the client sends to the end of its epoch."""
        while not isinstance(read(self.link.receive(30)).message, Done):
            pass

    def close(self) -> None:
        self.link.close("end")
        self.listener.close()


@contextmanager
def bad_server(config: str = "{}") -> Iterator[BadServer]:
    server = BadServer(config)
    try:
        yield server
    finally:
        server.close()
