"""The standard gRPC health service (grpc.health.v1): whether the process lives, and whether the run is ready.

`Check` of "" or "liveness" says SERVING while the process takes connections. `Check` of "readiness" says NOT_SERVING
while the run waits for a client. There is no `Watch`, which would hold a stream for as long as the caller likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from cutlayer.errors import harmless

SERVICE = "grpc.health.v1.Health"
LIVENESS, READINESS = "liveness", "readiness"
WAITING = "cutlayer-waiting-for"
"""The entry of the answer's trailing metadata that names whom a run waits for."""


class Health:
    """Answers for a server.

    Args:
        missing: whom the run waits for at the moment, by name.
    """

    def __init__(self, missing: Callable[[], list[str]]) -> None:
        self._missing, self._going_down = missing, False

    def handler(self) -> grpc.GenericRpcHandler:
        """For `grpc.Server.add_generic_rpc_handlers`."""
        check = grpc.unary_unary_rpc_method_handler(
            self._check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": check})

    def shut_down(self) -> None:
        """From now on say NOT_SERVING."""
        self._going_down = True

    def _check(self, request: Any, context: Any) -> Any:
        status = health_pb2.HealthCheckResponse
        if request.service not in ("", LIVENESS, READINESS):
            context.abort(grpc.StatusCode.NOT_FOUND, f"expected '', {LIVENESS!r} or {READINESS!r}")
        missing = self._missing() if request.service == READINESS else []
        if missing:
            context.set_trailing_metadata(((WAITING, harmless(",".join(missing)).encode("ascii", "replace").decode()),))
        return status(status=status.NOT_SERVING if self._going_down or missing else status.SERVING)
