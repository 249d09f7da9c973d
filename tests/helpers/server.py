"""A server that is fed by hand."""

from cutlayer.training.server import Server
from cutlayer.wire.frames import read, unpack
from cutlayer.wire.messages import Evaluate


def receive(server: Server, data: bytes) -> bytes | None:
    """What the server does with a step that comes in, or with test activations after epoch -1."""
    if data and isinstance(unpack(data).message, Evaluate):
        return server.evaluation.add(read(data), Evaluate(0, -1, 0), 4)
    (reply,) = server.train([server.take(read(data))])
    return None if reply is None else reply.data
