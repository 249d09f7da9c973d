"""The server's end of the wire between machines: takes connections, asks who is there, and connects links."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from cutlayer.backends.grpc.health import Health
from cutlayer.backends.grpc.link import Connection
from cutlayer.backends.grpc.refusals import Refusals, SessionUnknown
from cutlayer.backends.grpc.renewal import server_credentials
from cutlayer.backends.grpc.rpc import HELLO_SECONDS, SERVICE, Endpoint, certified_name, options
from cutlayer.backends.grpc.slots import Busy, Deadlines, Slots, descriptors_for_strangers
from cutlayer.errors import ConfigError, RefusedError, harmless
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Finished, Hello, Leave, Offer, Refusal, Welcome

log = logging.getLogger("cutlayer.wire")


@dataclass(frozen=True, eq=False)
class Reception:
    """Who is let in, and what is told to those that ask.

    Attributes:
        admit: from a client's Hello, and whether it is still connected, to the Welcome and the connection of its link;
            raises RefusedError.
        config: the run's config as JSON, for clients that ask.
        barred: why one of this name is told nothing; None for the others.
        leave: called with the name of a client that leaves for good; raises RefusedError.
        missing: whom the run waits for at the moment, by name; none if it is ready.
    """

    admit: Callable[[Hello, Callable[[], bool]], tuple[Welcome, Connection]]
    config: str
    refusals: Refusals
    slots: Slots
    leave: Callable[[str], None]
    missing: Callable[[], list[str]] = list
    barred: Callable[[str], str | None] = lambda name: None


class Listener:
    """The server's end: takes connections on one port.

    Args:
        endpoint: where; port 0 takes a free one, see `port`.
    """

    def __init__(self, endpoint: Endpoint, reception: Reception) -> None:
        self.reception, self._deadlines = reception, Deadlines()
        self._offer = pack(Frame(Offer(reception.config)))
        slots = reception.slots
        most = ("grpc.max_allowed_incoming_connections", descriptors_for_strangers(slots.most))
        streams = ("grpc.max_concurrent_streams", 2 * slots.limits.streams + 4)  # of a connection
        self._server = grpc.server(
            ThreadPoolExecutor(slots.threads, "cutlayer-stream"), options=[*options(endpoint.keepalive), most, streams]
        )
        handlers = {
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            "Config": grpc.unary_unary_rpc_method_handler(self._config),
            "Leave": grpc.unary_unary_rpc_method_handler(self._leave),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        self._health = Health(reception.missing)
        self._server.add_generic_rpc_handlers([self._health.handler()])
        try:
            if endpoint.tls is None:
                self.port = self._server.add_insecure_port(endpoint.address)
            else:
                self.port = self._server.add_secure_port(endpoint.address, server_credentials(endpoint.tls))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {endpoint.address}: {error}") from None
        self._tls = endpoint.tls is not None
        self._server.start()

    def close(self) -> None:
        """Stop taking connections and end those that are open."""
        self._health.shut_down()
        self._server.stop(grace=1.0).wait()
        self._deadlines.close()

    def _exchange(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        peer = context.peer()
        who = self._identity(context) or peer.rpartition(":")[0]
        try:
            with self.reception.slots.slot(who):
                name, welcome, connection = self._meet(requests, context, who)
        except Busy as error:  # which says nothing of a session: the client tries again
            self.reception.refusals.add(who, error, peer)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, harmless(error, 500))
            return
        except RefusedError as error:
            retry = isinstance(error, SessionUnknown)
            if not retry:
                self.reception.refusals.add(who, error, peer)
            yield pack(Frame(Refusal(harmless(error, 4000), retry)))
            return
        log.info("%s: connected from %s", name, peer)
        if not context.add_callback(connection.close):
            connection.close()
        refused: list[RefusedError] = []
        reader = (requests, connection, refused)
        threading.Thread(target=self._read, args=reader, name="cutlayer-read", daemon=True).start()
        yield pack(Frame(welcome))
        yield from connection.outgoing()
        for error in refused:
            self.reception.refusals.add(name, error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, harmless(error, 500))
        log.info("%s: disconnected", name)

    def _config(self, request: bytes, context: Any) -> bytes:
        who = self._identity(context)
        if (why := self.reception.barred(who)) is not None:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"client {harmless(who, 80)} takes part no more: {why}")
        return self._offer

    def _leave(self, request: bytes, context: Any) -> bytes:
        who = self._identity(context) or context.peer().rpartition(":")[0]
        try:
            with self.reception.slots.slot(who):
                message = read(request).message
                if not isinstance(message, Leave):
                    raise RefusedError(f"expected a client to leave, got {type(message).__name__}")
                if not self._tls:  # anyone could say this of anyone, and it is for good
                    raise RefusedError("leave: expected a certificate (--tls) that says who leaves, got none")
                self._require_own(message.name, who)
                self.reception.leave(message.name)
        except RefusedError as error:
            self.reception.refusals.add(who, error, context.peer())
            busy = isinstance(error, Busy)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if busy else grpc.StatusCode.FAILED_PRECONDITION
            context.abort(code, harmless(error, 500))
        return pack(Frame(Finished()))

    def _require_own(self, name: str, who: str) -> None:
        if self._tls and who != name:
            raise RefusedError(f"name: the certificate is made out to {who!r}, the client says {name!r}")

    def _identity(self, context: Any) -> str:
        """The name in the certificate; empty without TLS."""
        return certified_name(context) if self._tls else ""

    def _meet(self, requests: Iterator[bytes], context: Any, who: str) -> tuple[str, Welcome, Connection]:
        """The Hello with which a stream is to begin, and what admission says to it."""
        with self._deadlines.within(HELLO_SECONDS, context.cancel):
            first = next(requests, b"")
        hello = read(first).message
        if not isinstance(hello, Hello):
            raise RefusedError(f"expected a Hello first, and nothing else, got {type(hello).__name__}")
        self._require_own(hello.name, who)
        context.send_initial_metadata(())  # so that a client that is held knows that it has reached a server
        return hello.name, *self.reception.admit(hello, context.is_active)

    def _read(self, requests: Iterator[bytes], connection: Connection, refused: list[RefusedError]) -> None:
        try:
            for message in requests:
                connection.take(message)
        except RefusedError as error:
            refused.append(error)
        except Exception as error:  # grpc raises a bare Exception if the stream ended early
            log.debug("stream ended: %s", error)
        finally:
            connection.close()
