"""Why there is no connection, in words, and whether there can ever be one: a client looks for itself.

gRPC tells little of what went wrong: a certificate that is refused and a server that is going down look alike. So after
a failed attempt the client opens a plain connection of its own and looks at what comes.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import grpc

from cutlayer.backends.grpc.certs import SERVER_NAME
from cutlayer.backends.grpc.rpc import NOT_UP, describe

log = logging.getLogger("cutlayer.wire")

LOOK_SECONDS = 5.0
REMIND_SECONDS = 30.0
# How long something must last to be hopeless if it may as well be a server on its way up or down: a name may be that of
# a service that is not up yet (Docker Compose, Kubernetes), and a server that goes down ends connections, too.
PATIENCE_SECONDS = 30.0
# The beginning of HTTP/2 from a client, with empty settings; the server's settings are to come first.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = 4
NOT_OURS = "what answers there is no cutlayer server; look at the address and the port"


@dataclass(frozen=True)
class Trouble:
    """Why an attempt to connect failed.

    Attributes:
        reason: in words.
        hopeless: whether the next one cannot do better until someone mends something.
        after: seconds that this must last before it is taken to be hopeless.
    """

    reason: str
    hopeless: bool = False
    after: float = 0.0


class Attempts:
    """The attempts to connect to a server that failed in a row.

    Logs why, when that changes and now and then.

    Attributes:
        last: why the last one failed.
    """

    def __init__(self, address: str, tls: str | Path | None) -> None:
        self.address, self.tls, self.last = address, tls, ""
        self._in_vain, self._since, self._told = 0, 0.0, -REMIND_SECONDS

    def failed(self, error: Exception, *, known: bool = False) -> bool:
        """Take note of a failure; whether further attempts are in vain.

        That is so if two in a row say so, and for as long as it takes to be sure: `PATIENCE_SECONDS` for a host name
        that is not known, and for a server that ends connections without a word of why.

        With a server that is `known` none is in vain, and no time is lost with looking.
        """
        trouble = Trouble(describe(error)) if known else explain(self.address, self.tls, error)
        changed = trouble.reason != self.last
        now = time.monotonic()
        if changed or not trouble.hopeless:
            self._in_vain, self._since = 0, now
        self._in_vain += trouble.hopeless
        self.last = trouble.reason
        if (trouble.after or not trouble.hopeless) and (changed or now - self._told >= REMIND_SECONDS):
            self._told = now
            how_long = f"for {trouble.after:.0f} s" if trouble.hopeless else "until there is one"
            log.warning("no connection to %s: %s; trying again %s", self.address, self.last, how_long)
        return self._in_vain >= 2 and now - self._since >= trouble.after


def explain(address: str, tls: str | Path | None, error: Exception) -> Trouble:
    """Why a call to a server failed."""
    if not isinstance(error, grpc.Call):
        return Trouble(describe(error))
    if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED):
        return Trouble(NOT_OURS, hopeless=True)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    proxied = any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy"))
    if error.code() == grpc.StatusCode.CANCELLED or (proxied and not urllib.request.proxy_bypass(host)):
        return Trouble(describe(error))
    try:
        return _look(host, int(port), tls) or Trouble(describe(error))
    except OSError as seen:
        return Trouble(f"{seen.strerror or seen}")


def _look(host: str, port: int, tls: str | Path | None) -> Trouble | None:
    """What is to be seen from outside; None if nothing is wrong. Raises OSError for what may pass."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            return Trouble(f"the name {host} cannot be looked up at the moment")
        return Trouble(f"there is no machine of the name {host}; look at the address", True, PATIENCE_SECONDS)
    try:
        with socket.create_connection((host, port), LOOK_SECONDS) as connection:
            return _look_closer(connection, tls, found[0][4][0])
    except ConnectionRefusedError:
        return Trouble(NOT_UP)
    except TimeoutError:
        return Trouble(f"no answer in {LOOK_SECONDS:.0f} s")


def _look_closer(connection: socket.socket, tls: str | Path | None, ip: str | int) -> Trouble | None:
    port = connection.getpeername()[1]
    if tls is None:
        seen = _settings(connection)
        if seen is None or seen:
            return None if seen is None else Trouble(NOT_OURS, hopeless=True)
        if _speaks_tls((str(ip), port)):
            return Trouble("the server wants TLS; give this machine's folder of certificates (--tls)", hopeless=True)
        return Trouble("the connection is closed as soon as it is made")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which asks for a certificate, and for its name
    context.load_verify_locations(Path(tls) / "ca.crt")
    context.load_cert_chain(Path(tls) / "own.crt", Path(tls) / "own.key")
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=SERVER_NAME) as secured:
            if secured.selected_alpn_protocol() != "h2":
                return Trouble(NOT_OURS, hopeless=True)
            return None if secured.recv(9) else _ended(tls)
    except ssl.SSLCertVerificationError as error:
        return Trouble(_distrusted(error.verify_message, tls), hopeless=True)
    except ssl.SSLEOFError:
        return Trouble("the connection is closed in the midst of the TLS handshake")
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or "").upper() and "HANDSHAKE" not in (error.reason or "").upper():
            return _refused(tls)
        with socket.create_connection((str(ip), port), LOOK_SECONDS) as again:
            if _settings(again) is None:
                return Trouble("the server is without TLS: leave out --tls, or start it with --tls", hopeless=True)
        return Trouble(NOT_OURS, hopeless=True)
    except ConnectionResetError:
        return _ended(tls)


def _refused(tls: str | Path) -> Trouble:
    return Trouble(
        f"the server refuses the certificate {Path(tls) / 'own.crt'}: it is of another authority than the server's, or "
        "not valid by the server's clock. Both machines need folders from the same `cutlayer certs`",
        hopeless=True,
    )


def _ended(tls: str | Path) -> Trouble:
    """The connection ends without an alert, which is all that gRPC gives to one whose certificate it refuses."""
    return Trouble(
        f"the server ends the connection. If it is not going down, it refuses the certificate {Path(tls) / 'own.crt'}: "
        "it is of another authority than the server's, or not valid by the server's clock. Both machines need folders "
        "from the same `cutlayer certs`",
        hopeless=True,
        after=PATIENCE_SECONDS,
    )


def _distrusted(why: str, tls: str | Path) -> str:
    if "expired" in why or "not yet valid" in why:
        return f"the server's certificate does not hold by this machine's clock ({why}); renew it, or set the clock"
    if "purpose" in why:
        return f"what answers there shows a client's certificate, not a server's ({why}); look at the address"
    if "mismatch" in why.lower():
        return f"what answers there shows a certificate that is not of a cutlayer server ({why}); look at the address"
    return (
        f"the server's certificate is not of the authority in {Path(tls) / 'ca.crt'} ({why}). Both machines need "
        "folders from the same `cutlayer certs`"
    )


def _settings(connection: socket.socket) -> bytes | None:
    """Nothing if HTTP/2 answers; else what does, empty if the connection ends. Raises TimeoutError."""
    connection.sendall(PREFACE)
    try:
        seen = connection.recv(9)
    except ConnectionResetError:
        seen = b""
    return None if len(seen) >= 4 and seen[3] == SETTINGS else seen


def _speaks_tls(address: tuple[str, int]) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is said, it is only looked at
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(address, LOOK_SECONDS) as connection, context.wrap_socket(connection):
            return True
    except OSError:
        return False
