"""The server's end of the wire between machines: takes connections, asks who is there, and connects links."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cutlayer.backends.grpc.certs import read_certificates
from cutlayer.backends.grpc.link import Connection
from cutlayer.backends.grpc.rpc import HELLO_SECONDS, KEEPALIVE, SERVICE, options
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Hello, Offer, Refusal, Welcome

log = logging.getLogger("cutlayer.wire")


class Refusals:
    """Counts what was refused, by who sent it, and logs the first few of each and then ever fewer."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, who: str, reason: object) -> None:
        """Count and log one refusal."""
        self.counts[who] += 1
        count = self.counts[who]
        if count <= 10 or count == 10 ** (len(str(count)) - 1):
            log.warning("refused (%d of %s): %s", count, who, str(reason)[:500])


class Listener:
    """The server's end: takes connections on one port.

    Args:
        address: HOST:PORT; port 0 takes a free one, see `port`.
        tls: the server's folder of certificates, or None for plain text.
        admit: from a client's Hello to the Welcome and the connection of its link; raises RefusedError.
        config: the run's config as JSON, for clients that ask.
        workers: streams that may be open at once.
        keepalive: seconds within which a connection that has gone silent is given up.
    """

    def __init__(
        self,
        address: str,
        tls: str | Path | None,
        admit: Callable[[Hello], tuple[Welcome, Connection]],
        config: str,
        refusals: Refusals,
        workers: int,
        keepalive: float = KEEPALIVE,
    ) -> None:
        self.admit, self.refusals = admit, refusals
        self._offer = pack(Frame(Offer(config)))
        self._server = grpc.server(
            ThreadPoolExecutor(workers, "cutlayer-stream"),
            options=options(keepalive),
            maximum_concurrent_rpcs=workers,
        )
        handlers = {
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            "Config": grpc.unary_unary_rpc_method_handler(lambda request, context: self._offer),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                authority, certificate, key = read_certificates(tls)
                credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from None
        self._tls = tls is not None
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Stop taking connections and end those that are open."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace=1.0).wait()

    def _exchange(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        peer = context.peer()
        patience = threading.Timer(HELLO_SECONDS, context.cancel)
        patience.daemon = True
        patience.start()
        first = next(requests, b"")
        patience.cancel()
        who = peer.rpartition(":")[0]
        try:
            received = read(first)
            hello = received.message
            if not isinstance(hello, Hello) or received.fields:
                raise RefusedError(f"expected a Hello first, and nothing else, got {type(hello).__name__}")
            who = hello.name
            if self._tls:
                names = [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", [])]
                who = names[0] if names else who
                if names != [hello.name]:
                    raise RefusedError(f"name: the certificate is made out to {names}, the client says {hello.name!r}")
            welcome, connection = self.admit(hello)
        except RefusedError as error:
            retry = isinstance(error, SessionUnknown)
            if not retry:
                self.refusals.add(who, f"{peer}: {error}")
            yield pack(Frame(Refusal(str(error), retry)))
            return
        log.info("%s: connected from %s", who, peer)
        if not context.add_callback(connection.close):
            connection.close()
        refused: list[RefusedError] = []
        threading.Thread(target=self._read, args=(requests, connection, refused), daemon=True).start()
        yield pack(Frame(welcome))
        yield from connection.outgoing()
        for error in refused:
            self.refusals.add(who, error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:500])
        log.info("%s: disconnected", who)

    def _read(self, requests: Iterator[bytes], connection: Connection, refused: list[RefusedError]) -> None:
        try:
            for message in requests:
                connection.take(message)
        except RefusedError as error:
            refused.append(error)
        except Exception as error:  # grpc raises a bare Exception where the stream ended early
            log.debug("stream ended: %s", error)
        finally:
            connection.close()


class SessionUnknown(RefusedError):  # noqa: N818
    """A client wants to go on with a session that this server does not hold; it may begin a new one."""
