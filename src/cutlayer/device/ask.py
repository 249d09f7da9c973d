"""Split inference from a device: activations up, in the codec of the export, outputs down."""

from __future__ import annotations

import grpc
import numpy as np
from numpy.typing import NDArray

from cutlayer.backends.grpc.rpc import SERVICE, Endpoint, describe, options
from cutlayer.backends.grpc.session import open_channel
from cutlayer.device.encode import DeviceCodec
from cutlayer.device.half import Data, DeviceHalf, frame
from cutlayer.errors import RefusedError
from cutlayer.wire.envelope import header_of
from cutlayer.wire.messages import Outputs, Predict

ANSWER_BYTES = 1 << 28
"""Of an answer, at most."""
SECONDS = 60.0
"""How long an answer may take."""


def ask(
    server: str | Endpoint,
    half: DeviceHalf,
    data: Data,
    *,
    codec: str | None = None,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """The outputs [N, ...] of the whole network, whose other half a server holds (`cutlayer answer`).

    Args:
        server: HOST:PORT on this machine, or an `Endpoint`, with certificates for one elsewhere.
        codec: of the activations; by default that of the export. The server must have been started with the same.

    Raises:
        RefusedError: the server does not take what is sent, or cannot be reached.
    """
    endpoint = Endpoint.of(server)
    half.check(data)
    chosen, found = DeviceCodec(codec or half.facts["evaluation_codec"]), []
    limits = options(endpoint.keepalive, receive=ANSWER_BYTES, send=-1)
    with open_channel(endpoint.address, endpoint.tls, limits) as channel:
        call = channel.unary_unary(f"/{SERVICE}/Predict")
        for number, start in enumerate(range(0, len(data), batch_size)):
            activations = half(data.inputs[start : start + batch_size])
            request = frame(Predict(number), None, None, activations, chosen)
            try:
                found.append(_outputs(call(request, timeout=SECONDS), number, len(activations)))
            except grpc.RpcError as error:
                raise RefusedError(f"{endpoint.address}: {describe(error)}") from None
    return np.concatenate(found)


def _outputs(answer: bytes, number: int, samples: int) -> NDArray[np.float32]:
    """The outputs of a batch, from the server's answer. Raises RefusedError."""
    header, start = header_of(answer)
    fields = header.fields
    if header.message != Outputs(number) or len(fields) != 1 or fields[0].codec != "fp32" or fields[0].batch != samples:
        raise RefusedError(f"expected the outputs of batch {number} in fp32, got {header}")
    size = (len(answer) - start) // 4
    values: NDArray[np.float32] = np.frombuffer(answer, np.float32, size, start)
    if values.size != samples * int(np.prod(fields[0].shape)):
        raise RefusedError(f"expected {samples} outputs of shape {list(fields[0].shape)}, got {values.size} values")
    return values.reshape(samples, *fields[0].shape).copy()
