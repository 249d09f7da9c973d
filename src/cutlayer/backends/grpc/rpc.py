"""The wire between machines: links over gRPC bidirectional streams, with mutual TLS, on one port.

What both ends share; `listener` is the server's, `session` the client's. Each stream begins with the client's Hello
and the server's Welcome or Refusal; what follows are the messages of a `link.Link`.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from cutlayer.backends.grpc.link import CHUNK, CHUNK_BYTES
from cutlayer.errors import ConfigError

SERVICE = "cutlayer.Wire"
HELLO_SECONDS = 10.0
"""How long a stream may stay without a Hello, and a call for the config or the health without an answer."""
KEEPALIVE = 15.0
"""Seconds within which a connection whose other end has vanished without a word is given up, unless told otherwise."""
NOT_UP = "nothing listens there, so the server is not up"


# A chunk and some room: what is a little too large is refused by name, and what is far too large by gRPC.
MESSAGE_BYTES = 2 * (CHUNK.size + CHUNK_BYTES)


def options(keepalive: float, receive: int = MESSAGE_BYTES, send: int = MESSAGE_BYTES) -> list[tuple[str, int]]:
    """gRPC's options, for either end. A connection that is silent, even when asked, is given up after `keepalive` s.

    Args:
        receive, send: bytes of the largest message; -1 for any.
    """
    third = round(1000 * keepalive / 3)
    return [
        ("grpc.max_receive_message_length", receive),
        ("grpc.max_send_message_length", send),
        # A ping is sent when nothing has come in for a third of the time. On a slow link its answer waits behind data
        # for seconds, so it has the other two thirds. (The second timeout is the one that gRPC 1.85 keeps to.)
        ("grpc.keepalive_time_ms", third),
        ("grpc.keepalive_timeout_ms", 2 * third),
        ("grpc.http2.ping_timeout_ms", 2 * third),
        # gRPC would measure a busy link with pings of its own, which have the same timeout, and keep the keepalive's
        # back. So the window is fixed: enough for 100 Mbit/s over 300 ms, or 1 Gbit/s over 30.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4 << 20),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Peers that have shown a certificate may ask as often as they like: each end has a keepalive of its own.
        ("grpc.http2.max_ping_strikes", 0),
        # An attempt to connect that gets no answer is given up as soon.
        ("grpc.min_reconnect_backoff_ms", 3 * third),
        ("grpc.server_handshake_timeout_ms", round(1000 * HELLO_SECONDS)),
        ("grpc.so_reuseport", 0),
    ]


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is reachable from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and how a connection with it is secured.

    Attributes:
        address: HOST:PORT.
        tls: this machine's folder of certificates (`cutlayer certs`), or None for plain text.
        insecure_plaintext: allow an address beyond this machine without TLS.
        keepalive: seconds within which a connection whose other end has vanished without a word is given up.

    Raises:
        ConfigError: the address is none, or is beyond this machine and there is no TLS.
    """

    address: str
    tls: str | Path | None = None
    insecure_plaintext: bool = False
    keepalive: float = KEEPALIVE

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"expected HOST:PORT, got {self.address!r}")
        if self.tls is None and not self.insecure_plaintext and not is_loopback(self.address):
            raise ConfigError(
                f"{self.address} is not on this machine, and there is no TLS: activations and labels would be readable "
                "on the way, and anyone could join. Give the folder with certificates (tls, --tls; see `cutlayer "
                "certs`), or say insecure_plaintext (--insecure-plaintext)"
            )
        if not self.keepalive >= 0.1:
            raise ConfigError(f"keepalive: expected at least 0.1 seconds, got {self.keepalive}")

    @classmethod
    def of(cls, place: str | Self) -> Self:
        """The endpoint at HOST:PORT, which is on this machine; an endpoint is returned as it is."""
        return cls(place) if isinstance(place, str) else place


def certified_name(context: Any) -> str:
    """The name in the certificate of who calls, over TLS."""
    names = [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", [])]
    return names[0] if len(names) == 1 else repr(names)


def describe(error: Exception) -> str:
    """An error of a call in one line."""
    if not isinstance(error, grpc.Call):
        return str(error)
    details = str(error.details()).removeprefix("failed to connect to all addresses; last error: ")
    if "Connection refused" in details:
        return NOT_UP
    return f"{error.code().name}: {details}"
