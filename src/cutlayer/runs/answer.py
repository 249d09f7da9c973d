"""Split inference: a process that holds a trained server half, for devices that hold the client half."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import torch
from torch import nn

from cutlayer.backends.grpc.certs import read_certificates
from cutlayer.backends.grpc.name_files import REVOKED, Revocations
from cutlayer.backends.grpc.rpc import SERVICE, Endpoint, certified_name, options
from cutlayer.backends.grpc.slots import Deadlines
from cutlayer.codecs import encode_exactly, evaluation_codec, get_transfer, isfinite
from cutlayer.errors import ConfigError, RefusedError, harmless
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Outputs, Predict

REQUESTS = 16
"""Requests at a time that may be on their way."""
REQUESTS_OF_ONE = 4
"""Of them those with one certificate; without TLS there is no telling whose they are."""
MOST_SAMPLES = 1024
"""Samples of a request, at most."""


class Answers:
    """Answers activations with outputs, on one port.

    Args:
        half: the trained server half, in eval mode.
        cut_shape: of one sample's activations.
        codec: spec of what the activations come in; others are refused.
        listen: HOST:PORT on this machine, or an `Endpoint`, with certificates for what comes from others; port 0 takes
            a free one.
        revoked: names whose certificates do not count any more.

    Attributes:
        request_seconds: how long a request may be on its way; whoever sends nothing is cut off.
        port: where it listens.

    Raises:
        ConfigError: the address, or the certificates, cannot be used.
    """

    request_seconds = 30.0

    def __init__(
        self,
        half: nn.Module,
        cut_shape: tuple[int, ...],
        codec: str,
        listen: str | Endpoint,
        revoked: Revocations | None = None,
    ) -> None:
        endpoint = Endpoint.of(listen)
        self.half, self.cut_shape = half.eval(), cut_shape
        self.codec = evaluation_codec(get_transfer(codec))
        self._revoked, self._open, self._lock = revoked, Counter[str](), threading.Lock()
        self._tls = endpoint.tls is not None
        self._alone = threading.Lock()  # one batch at a time: more would only share the processor
        layout = self.codec.layout(cut_shape)
        largest = (1 << 16) + layout.shared_bytes + MOST_SAMPLES * 2 * layout.row_bytes
        self._deadlines = Deadlines()
        self._server = grpc.server(
            ThreadPoolExecutor(REQUESTS, "cutlayer-answer"),
            options=options(endpoint.keepalive, receive=largest, send=-1),
            maximum_concurrent_rpcs=4 * REQUESTS,
        )
        # A stream of one request, as only the wait for a stream's request can be ended.
        handlers = {"Predict": grpc.stream_unary_rpc_method_handler(self._predict)}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        try:
            if endpoint.tls is None:
                self.port = self._server.add_insecure_port(endpoint.address)
            else:
                authority, certificate, key = read_certificates(endpoint.tls)
                credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
                self.port = self._server.add_secure_port(endpoint.address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {endpoint.address}: {error}") from None
        self._server.start()

    def wait(self) -> None:
        """Until it is closed."""
        self._server.wait_for_termination()

    def close(self) -> None:
        """Stop."""
        self._server.stop(grace=1.0).wait()
        self._deadlines.close()

    def _predict(self, requests: Iterator[bytes], context: Any) -> bytes:
        who = certified_name(context) if self._tls else ""
        if self._revoked is not None and who in self._revoked.names:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, REVOKED)
        with self._place(who, context):
            with self._deadlines.within(self.request_seconds, context.cancel):
                request = next(requests, b"")
            try:
                return self.answer(request)
            except RefusedError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, harmless(error, 500))
                raise

    @contextmanager
    def _place(self, who: str, context: Any) -> Iterator[None]:
        """Inside the block one of the requests that this name may have open at a time; refused if there is none."""
        with self._lock:
            taken = who != "" and self._open[who] >= REQUESTS_OF_ONE
            self._open[who] += not taken
        if taken:
            text = f"{harmless(who, 80)}: expected at most {REQUESTS_OF_ONE} requests at a time"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        try:
            yield
        finally:
            with self._lock:
                self._open[who] -= 1
                self._open += Counter()  # names without any go

    def answer(self, request: bytes) -> bytes:
        """The frame with the outputs, from the frame with the activations. Raises RefusedError for another frame."""
        received = read(request)
        message, fields = received.message, received.fields
        if not isinstance(message, Predict) or [field.name for field in fields] != ["activations"]:
            raise RefusedError(f"expected activations to be answered, got {message}")
        got = fields[0]
        if (got.codec, got.shape) != (self.codec.name, self.cut_shape) or not 1 <= got.batch <= MOST_SAMPLES:
            raise RefusedError(
                f"expected 1 to {MOST_SAMPLES} samples in {self.codec.name} of shape {list(self.cut_shape)}, got "
                f"{got.batch} in {got.codec} of shape {list(got.shape)}"
            )
        with torch.no_grad(), self._alone:
            activations = self.codec.decode(received.unpack().tensors["activations"])
            if not isfinite(activations):
                raise RefusedError("activations: expected finite values, got infinities or NaN")
            outputs = self.half(activations).float()
        return pack(Frame(Outputs(message.number), {"outputs": encode_exactly(outputs)}))
