"""The lossless stage: on the wire only, the bytes of a codec's rows in fewer bytes, near the entropy of the codes.

Each kind of bytes in the rows (`Codec.streams`) is a stream, coded for itself (`streams`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutlayer.codecs.base import Codec, Encoded, Layout, as_buffer, copy_of, refuse_absurd
from cutlayer.errors import RefusedError
from cutlayer.streams import MAX_EXPANSION, compress, expand


@dataclass(frozen=True)
class Lossless(Codec):
    """Another codec, its rows compressed on the wire; in memory and in the replay store they are that codec's rows."""

    inner: Codec

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape, unpacked."""
        return self.inner.layout(shape)

    def streams(self, shape: tuple[int, ...]) -> list[slice]:
        """Those of the inner codec."""
        return self.inner.streams(shape)

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode as the inner codec does."""
        inner = self.inner.encode(values, seed)
        return Encoded(self.name, inner.shape, inner.rows, inner.shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode as the inner codec does."""
        return self.inner.decode(Encoded(self.inner.name, encoded.shape, encoded.rows, encoded.shared))

    def check(self, encoded: Encoded) -> None:
        """Check as the inner codec does."""
        self.inner.check(encoded)

    def pack(self, encoded: Encoded) -> list[memoryview]:
        """What is shared by the batch, then the streams of the rows, compressed."""
        rows = encoded.rows.cpu().numpy()
        shared = as_buffer(encoded.shared)
        packed = [memoryview(shared)]
        for columns in self.streams(encoded.shape):
            packed += compress(np.ascontiguousarray(rows[:, columns]).reshape(-1))
        short = -(-(rows.size + len(shared)) // MAX_EXPANSION) - sum(map(len, packed))
        return [*packed, memoryview(bytes(short))] if short > 0 else packed

    def unpack(self, payload: memoryview, batch: int, shape: tuple[int, ...]) -> Encoded:
        """Inverse of `pack`. Raises RefusedError if the payload does not hold exactly what the layout says."""
        row_bytes, shared_bytes = self.layout(shape)
        declared = shared_bytes + batch * row_bytes
        if len(payload) < shared_bytes or declared > MAX_EXPANSION * len(payload):
            raise RefusedError(
                f"{self.name} payload of {batch} samples of shape {list(shape)}: {declared} bytes can come from no "
                f"fewer than {max(shared_bytes, -(-declared // MAX_EXPANSION))}, got {len(payload)}"
            )
        refuse_absurd(batch, shape, len(payload))
        shared, position = copy_of(payload[:shared_bytes]).reshape(1, shared_bytes), shared_bytes
        rows = np.empty((batch, row_bytes), np.uint8)
        for columns in self.streams(shape):
            part = rows[:, columns]
            stream, position = expand(payload, position, part.size, self.name)
            part[...] = stream.reshape(part.shape)
        if bytes(payload[position:]).strip(b"\0") or (
            position < len(payload) and len(payload) > -(-declared // MAX_EXPANSION)
        ):
            raise RefusedError(f"{self.name} payload: expected {position} bytes, got {len(payload)}")
        encoded = Encoded(self.name, shape, torch.from_numpy(rows), shared)
        self.check(encoded)
        return encoded
