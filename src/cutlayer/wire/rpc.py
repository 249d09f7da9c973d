"""5. The wire between machines: links over gRPC bidirectional streams, with mutual TLS, on one port.

The client opens the only connection, so it may sit behind a router. Each stream begins with the client's Hello and the
server's Welcome or Refusal; what follows are the messages of a `link.Link`. The standard health service
(grpc.health.v1) answers on the same port.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cutlayer.errors import ConfigError, CutlayerError, RefusedError
from cutlayer.wire.certs import SERVER_NAME, common_name, read_certificates
from cutlayer.wire.frames import Frame, Hello, Offer, Refusal, Welcome, pack, unpack
from cutlayer.wire.link import CHUNK, CHUNK_BYTES, Connection, Link

SERVICE = "cutlayer.Wire"
HELLO_SECONDS = 10.0
"""How long a stream may stay without a Hello, and a call for the config or the health without an answer."""
OPTIONS = [
    # A chunk and some room: what is a little too large is refused here, by name, and what is far too large by gRPC.
    ("grpc.max_receive_message_length", 2 * (CHUNK.size + CHUNK_BYTES)),
    ("grpc.max_send_message_length", 2 * (CHUNK.size + CHUNK_BYTES)),
    # A connection whose other end has vanished without a word is noticed within 15 seconds.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
]
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


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is reachable from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(address: str, tls: str | Path | None, insecure_plaintext: bool) -> None:
    """Raise ConfigError for an address that is none, and for one beyond this machine without TLS."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"expected HOST:PORT, got {address!r}")
    if tls is None and not insecure_plaintext and not is_loopback(address):
        raise ConfigError(
            f"{address} is not on this machine, and there is no TLS: activations and labels would be readable on the "
            "way, and anyone could join. Give the folder with certificates (tls, --tls; see `cutlayer certs`), or say "
            "insecure_plaintext (--insecure-plaintext)"
        )


# --- the server's side --------------------------------------------------------------------------------------------


class Listener:
    """The server's end: takes connections on one port.

    Args:
        address: HOST:PORT; port 0 takes a free one, see `port`.
        tls: the server's folder of certificates, or None for plain text.
        admit: from a client's Hello to the Welcome and the connection of its link; raises RefusedError.
        config: the run's config as JSON, for clients that ask.
        workers: streams that may be open at once.
    """

    def __init__(
        self,
        address: str,
        tls: str | Path | None,
        admit: Callable[[Hello], tuple[Welcome, Connection]],
        config: str,
        refusals: Refusals,
        workers: int,
    ) -> None:
        self.admit, self.refusals = admit, refusals
        self._offer = pack(Frame(Offer(config)))
        self._server = grpc.server(
            ThreadPoolExecutor(workers, "cutlayer-stream"), options=OPTIONS, maximum_concurrent_rpcs=workers
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
            hello = unpack(first).message
            if not isinstance(hello, Hello):
                raise RefusedError(f"expected a Hello first, got {type(hello).__name__}")
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


# --- the client's side --------------------------------------------------------------------------------------------


def open_channel(address: str, tls: str | Path | None) -> grpc.Channel:
    """A channel to a server, with this client's certificates or, for None, in plain text."""
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    if tls is None:
        return grpc.insecure_channel(address, options)
    authority, certificate, key = read_certificates(tls)
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", SERVER_NAME)])


def own_name(tls: str | Path) -> str:
    """The name that the certificate in this folder is made out to."""
    return common_name(read_certificates(tls)[1])


def fetch_config(address: str, tls: str | Path | None) -> str:
    """The config of the run that a server holds, as JSON. Raises grpc.RpcError where it cannot be reached."""
    with open_channel(address, tls) as channel:
        offer = unpack(channel.unary_unary(f"/{SERVICE}/Config")(b"", timeout=HELLO_SECONDS)).message
        if not isinstance(offer, Offer):
            raise RefusedError(f"expected the server's config, got {type(offer).__name__}")
        return offer.config


def check_health(address: str, tls: str | Path | None) -> str:
    """What the health service says, such as "SERVING"; or why there is no answer."""
    with open_channel(address, tls) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=HELLO_SECONDS)
        except grpc.RpcError as error:
            return describe(error)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def describe(error: grpc.RpcError) -> str:
    """A gRPC error in one line."""
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)


class Session:
    """A client's session: a link, and a thread that keeps it connected until it is closed.

    Args:
        hello: what to say on a connection; `session` and `received` are filled in here.
        limit: bytes of the largest frame that the server may send.
        back_off: shortest and longest wait between attempts to connect, in seconds; in between it doubles.
    """

    def __init__(
        self,
        address: str,
        tls: str | Path | None,
        hello: Hello,
        limit: int,
        back_off: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        self.address, self.tls, self.hello = address, tls, hello
        self.link = Link(limit)
        self.welcome: Welcome | None = None
        self.refusal: str | None = None
        self.last_error = ""
        self.connections = 0
        self._back_off = back_off
        self._welcomed = threading.Event()
        self._thread = threading.Thread(target=self._keep_connected, name="cutlayer-session", daemon=True)
        self._thread.start()

    def wait_welcome(self, timeout: float) -> Welcome | None:
        """The server's Welcome, or None if there is none yet. Raises RefusedError for a refusal."""
        self._welcomed.wait(timeout)
        if self.refusal is not None:
            raise RefusedError(f"{self.address} refused: {self.refusal}")
        return self.welcome

    def close(self) -> None:
        """End the session."""
        self.link.close("this client ended the session")
        self._thread.join(5.0)

    def _keep_connected(self) -> None:
        wait = self._back_off[0]
        while not self.link.closed:
            before = self.connections
            try:
                with open_channel(self.address, self.tls) as channel:
                    self._connect(channel)
            except grpc.RpcError as error:
                self.last_error = describe(error)
            except CutlayerError as error:  # what the server sent is no frame, or breaks the rules
                self.last_error = str(error)
            self.link.disconnect()
            wait = self._back_off[0] if self.connections > before else min(2 * wait, self._back_off[1])
            pause = wait * random.uniform(0.5, 1.0)  # so that a thousand devices do not come back at once
            if not self.link.closed:
                log.warning("no connection to %s (%s); again in %.1f s", self.address, self.last_error, pause)
            self.link.wait_closed(pause)
        self._welcomed.set()

    def _connect(self, channel: grpc.Channel) -> None:
        opened: list[Connection] = []
        ready = threading.Event()

        def outgoing() -> Iterator[bytes]:
            yield pack(Frame(hello))
            ready.wait()
            if opened:
                yield from opened[0].outgoing()

        session = self.welcome.session if self.welcome is not None else ""
        hello = msgspec.structs.replace(self.hello, session=session, received=self.link.received)
        call = channel.stream_stream(f"/{SERVICE}/Exchange")(outgoing())
        try:
            for message in call:
                if opened:
                    opened[0].take(message)
                    if not opened[0].up:
                        return
                    continue
                answer = unpack(message).message
                if isinstance(answer, Refusal):
                    return self._refused(answer)
                if not isinstance(answer, Welcome):
                    raise RefusedError(f"expected a Welcome, got {type(answer).__name__}")
                opened.append(self.link.attach(answer.received))
                self.connections += 1
                self.welcome = self.welcome or answer
                self._welcomed.set()
                ready.set()
                threading.Thread(target=self._end_with, args=(opened[0], call), daemon=True).start()
            self.last_error = "the server ended the stream"
        finally:
            if opened:
                opened[0].close()
            ready.set()
            call.cancel()

    def _end_with(self, connection: Connection, call: Any) -> None:
        connection.wait_down()
        call.cancel()

    def _refused(self, refusal: Refusal) -> None:
        if refusal.retry:
            self.link.close(refusal.reason)
        else:
            self.refusal = refusal.reason
            self.link.close(f"{self.address} refused: {refusal.reason}")
