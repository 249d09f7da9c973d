"""What a client asks a server without a session: the run's config, how it is, and to be let go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cutlayer.backends.grpc.health import LIVENESS, WAITING
from cutlayer.backends.grpc.rpc import HELLO_SECONDS, SERVICE, Endpoint
from cutlayer.backends.grpc.session import open_channel, own_name
from cutlayer.backends.grpc.trouble import Attempts, explain
from cutlayer.errors import ConfigError, RefusedError, harmless
from cutlayer.wire.envelope import header_of, seal
from cutlayer.wire.messages import Finished, Leave, Offer

T = TypeVar("T")
REFUSALS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION)


def fetch_config(address: str, tls: str | Path | None) -> str:
    """The config of the run that a server holds, as JSON. Raises grpc.RpcError if it cannot be reached."""
    with open_channel(address, tls) as channel:
        offer = header_of(channel.unary_unary(f"/{SERVICE}/Config")(b"", timeout=HELLO_SECONDS))[0].message
        if not isinstance(offer, Offer):
            raise RefusedError(f"expected the server's config, got {type(offer).__name__}")
        return offer.config


def wait_for_config(
    address: str, tls: str | Path | None, give_up_after: float | None = None, check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The config of the run that a server holds, once it can be reached.

    Args:
        give_up_after: seconds without a server after which this raises RefusedError; None tries for ever.
        check: called between attempts; raises what is to end this.

    Raises:
        ConfigError: there can be no connection until someone mends something.
        RefusedError: what came is no config, or this client takes part no more.
    """
    offered = _answered(Attempts(address, tls), lambda: fetch_config(address, tls), give_up_after, check)
    try:
        config = json.loads(offered)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"expected the server's config, got something else: {error}") from None
    if not isinstance(config, dict):
        raise RefusedError(f"expected the server's config, got a {type(config).__name__}")
    return config


def leave(
    server: str | Endpoint, *, give_up_after: float | None = None, check: Callable[[], None] = lambda: None
) -> None:
    """Leave a run for good: the server goes on without this client, and drops what it stores of it.

    To leave again changes nothing. What the halves have learned from the client's data stays in them.

    Args:
        server: an `Endpoint` with this client's certificates, which say who leaves.
        give_up_after: seconds without a server after which this raises RefusedError; None tries for ever.
        check: called between attempts; raises what is to end this.

    Raises:
        ConfigError: there are no certificates, or there can be no connection until someone mends something.
        RefusedError: the client is not of the run, or the last one in it.
    """
    endpoint = Endpoint.of(server)
    if endpoint.tls is None:
        raise ConfigError(
            "leave: expected this client's folder of certificates (--tls), got none. Without TLS anyone could say that "
            "a client leaves; the server's operator goes on without it: cutlayer forget RUN --client NAME"
        )
    said = seal(Leave(own_name(endpoint.tls)))

    def call() -> bytes:
        with open_channel(endpoint.address, endpoint.tls) as channel:
            return channel.unary_unary(f"/{SERVICE}/Leave")(said, timeout=HELLO_SECONDS)

    message = header_of(_answered(Attempts(endpoint.address, endpoint.tls), call, give_up_after, check))[0].message
    if not isinstance(message, Finished):
        raise RefusedError(f"expected the server to say that this client has left, got {type(message).__name__}")


def _answered(attempts: Attempts, call: Callable[[], T], give_up_after: float | None, check: Callable[[], None]) -> T:
    """What a call gives, once the server can be reached."""
    started, wait = time.monotonic(), 0.2
    while True:
        check()
        try:
            return call()
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() in REFUSALS:
                raise RefusedError(f"{attempts.address} refused: {harmless(error.details())}") from None
            reason = f"no connection to {attempts.address}: "
            if attempts.failed(error):
                raise ConfigError(reason + attempts.last) from None
            if give_up_after is not None and time.monotonic() - started > give_up_after:
                raise RefusedError(reason + attempts.last) from None
            check()
            time.sleep(wait)
            wait = min(2 * wait, 5.0)


def check_health(address: str, tls: str | Path | None, service: str = LIVENESS) -> str:
    """What the health service says of "liveness" or "readiness", such as "SERVING", with whom a run waits for; or why
    there is no answer."""
    with open_channel(address, tls) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            reply, call = stub.Check.with_call(request, timeout=HELLO_SECONDS)
        except grpc.RpcError as error:
            return explain(address, tls, error).reason
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
        missing = [harmless(value) for key, value in call.trailing_metadata() or () if key == WAITING]
        return f"{status}, waiting for {', '.join(missing)}" if missing else status
