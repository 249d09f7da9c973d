"""The client's end of the wire between machines: opens the only connection, and keeps a link connected.

The client may sit behind a router. If the connection is lost, it is made again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec

from cutlayer.backends.grpc.certs import SERVER_NAME, common_name, read_certificates
from cutlayer.backends.grpc.link import Connection, Link, LinkClosed
from cutlayer.backends.grpc.rpc import KEEPALIVE, SERVICE, Endpoint, options
from cutlayer.backends.grpc.trouble import Attempts
from cutlayer.errors import ConfigError, CutlayerError, RefusedError, harmless
from cutlayer.wire.envelope import header_of, seal
from cutlayer.wire.messages import Hello, Refusal, Welcome

log = logging.getLogger("cutlayer.wire")


def open_channel(address: str, tls: str | Path | None, chosen: list[tuple[str, int]] | None = None) -> grpc.Channel:
    """A channel to a server, with this client's certificates or, for None, in plain text.

    Args:
        chosen: gRPC's options, see `rpc.options`.
    """
    chosen = [*(chosen or options(KEEPALIVE)), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    if tls is None:
        return grpc.insecure_channel(address, chosen)
    authority, certificate, key = read_certificates(tls)
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, [*chosen, ("grpc.ssl_target_name_override", SERVER_NAME)])


def own_name(tls: str | Path) -> str:
    """The name that the certificate in this folder is made out to."""
    return common_name(read_certificates(tls)[1])


class Pause:
    """A wait between sessions that the server did not welcome: it doubles up to `longest` seconds."""

    def __init__(self, shortest: float = 0.1, longest: float = 10.0) -> None:
        self._shortest, self._longest, self._next = shortest, longest, shortest

    def welcomed(self) -> None:
        """Begin with the shortest again."""
        self._next = self._shortest

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait; `check` is called meanwhile, and raises what is to end this."""
        end = time.monotonic() + self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, self._longest)
        while (left := end - time.monotonic()) > 0:
            check()
            time.sleep(min(left, 0.1))

    @contextmanager
    def after(self, session: Session, said: logging.Logger, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Inside the block a session that is closed afterwards; then the wait, if the server did not welcome it.

        A link that closes ends the block alone, and is logged to `said`. Raises RefusedError if the server refused.
        """
        try:
            yield
        except LinkClosed as reason:
            if session.refusal is not None:
                raise RefusedError(str(reason)) from None
            said.warning("a new session: %s", reason)
        finally:
            session.close()
        if session.welcome is None:
            self.wait(check)


class Session:
    """A client's session: a link, and a thread that keeps it connected until it is closed.

    Args:
        hello: what to say on a connection; `session` and `received` are filled in here.
        limit: bytes of the largest frame that the server may send.
        back_off: shortest and longest wait between attempts to connect, in seconds; in between it doubles.
        known: whether there was a connection to this server before: then none is given up as hopeless.
    """

    def __init__(
        self,
        server: Endpoint,
        hello: Hello,
        limit: int,
        back_off: tuple[float, float] = (0.1, 10.0),
        known: bool = False,
    ) -> None:
        self.server, self.address, self.hello = server, server.address, hello
        self.link = Link(limit)
        self.welcome: Welcome | None = None
        self.refusal: str | None = None
        self.hopeless = False
        self.known, self.connections = known, 0
        self._call: Any = None
        self._held = False  # whether a server has the Hello and has not answered it
        self._attempts = Attempts(server.address, server.tls)
        self._back_off = back_off
        self._welcomed = threading.Event()
        self._thread = threading.Thread(target=self._keep_connected, name="cutlayer-session", daemon=True)
        self._thread.start()

    @property
    def last_error(self) -> str:
        """Why the last attempt to connect failed, or the last connection ended."""
        return self._attempts.last

    def wait_welcome(self, timeout: float) -> Welcome | None:
        """The server's Welcome, or None if there is none yet.

        Raises RefusedError for a refusal, ConfigError if there can be no connection until someone mends something.
        """
        self._welcomed.wait(timeout)
        if self.hopeless:
            raise ConfigError(f"no connection to {self.address}: {self.last_error}")
        if self.refusal is not None:
            raise RefusedError(f"{self.address} refused: {self.refusal}")
        return self.welcome

    def welcomed(self, give_up_after: float | None, check: Callable[[], None] = lambda: None) -> Welcome:
        """The server's Welcome. The time in which a server holds this client before it lets it in is not counted.

        Args:
            give_up_after: seconds without a server; None waits for ever.
            check: called meanwhile, and raises what is to end this.

        Raises:
            LinkClosed: the server was not ready.
            TimeoutError: there was no server for so long.
            ConfigError, RefusedError: as in `wait_welcome`.
        """
        waited, told = 0.0, False
        while (welcome := self.wait_welcome(0.5)) is None:
            if self.link.closed:
                raise LinkClosed("the server was not ready")
            check()
            waited = 0.0 if self._held else waited + 0.5
            self.give_up(waited, give_up_after)
            if self._held and not told:
                told = True
                log.warning("%s waits to be let in by the server at %s", self.hello.name, self.address)
        return welcome

    def give_up(self, waited: float, after: float | None) -> None:
        """Raise TimeoutError if so many seconds without a server are too many."""
        if after is not None and waited >= after:
            raise TimeoutError(f"no connection to {self.address} in {waited:.0f} s: {self.last_error or 'no answer'}")

    def close(self) -> None:
        """End the session."""
        self.link.close("this client ended the session")
        if self._call is not None and self.welcome is None:  # held by the server, it would not end by itself
            self._call.cancel()
        self._thread.join(5.0)

    def _keep_connected(self) -> None:
        wait = self._back_off[0]
        while not self.link.closed:
            before = self.connections
            try:
                with open_channel(self.address, self.server.tls, options(self.server.keepalive)) as channel:
                    self._connect(channel)
            # What came may be no frame, or break the rules; a certificate may be in the middle of being replaced.
            except (grpc.RpcError, CutlayerError, OSError) as error:
                if self._failed(error):
                    self.hopeless = True
                    self.link.close(self.last_error)
            except Exception as error:
                log.exception("the session ends")
                self.link.close(f"{type(error).__name__}: {error}")
            self.link.disconnect()
            if self.link.leaving:
                break
            wait = self._back_off[0] if self.connections > before else min(2 * wait, self._back_off[1])
            pause = wait * random.uniform(0.5, 1.0)  # so that a thousand devices do not come back at once
            self.link.wait_closed(pause)
        self._welcomed.set()

    def _connect(self, channel: grpc.Channel) -> None:
        opened: list[Connection] = []
        ready = threading.Event()

        def outgoing() -> Iterator[bytes]:
            yield seal(hello)
            ready.wait()
            if opened:
                yield from opened[0].outgoing()

        session = self.welcome.session if self.welcome is not None else ""
        hello = msgspec.structs.replace(self.hello, session=session, received=self.link.received)
        call = self._call = channel.stream_stream(f"/{SERVICE}/Exchange")(outgoing())
        try:
            call.initial_metadata()  # which a server sends once it has the Hello; or the call has failed
            self._held = call.is_active()
            for message in call:
                if opened:
                    opened[0].take(message)
                    if not opened[0].up:
                        return
                    continue
                answer = header_of(message)[0].message
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
            self._failed(RefusedError("the server ended the stream"))
        finally:
            self._held = False
            if opened:
                opened[0].close()
            ready.set()
            call.cancel()

    def _failed(self, error: Exception) -> bool:
        known = self.known or self.connections > 0
        return not (self.link.closed or self.link.leaving) and self._attempts.failed(error, known=known)

    def _end_with(self, connection: Connection, call: Any) -> None:
        connection.wait_down()
        call.cancel()

    def _refused(self, refusal: Refusal) -> None:
        reason = harmless(refusal.reason)
        if refusal.retry:
            self.link.close(reason)
        else:
            self.refusal = reason
            self.link.close(f"{self.address} refused: {reason}")
