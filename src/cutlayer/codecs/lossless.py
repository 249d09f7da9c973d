"""The lossless stage: on the wire only, the bytes of a codec's rows in fewer bytes, near the entropy of the codes.

Each kind of bytes in the rows (`Codec.streams`) is a stream, coded for itself: a byte that tells how, then

    0  the bytes as they are: coding did not pay
    1  compressed length, 8 bytes | Zstandard frame of the bytes
    2  stream of a bit mask of the bytes that are not 0 | stream of these bytes, which is not of kind 2

Zstandard's Huffman stage does the work; looking for repetitions takes several times as long for few bits
(`benchmarks/lossless.py` compares coders). A Huffman code spends a whole bit on a 0, so that streams with many
zeros, the masks of others among them, are better cut in two.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from torch import Tensor

from cutlayer.codecs.base import Codec, Encoded, Layout, as_buffer, copy_of, refuse_absurd
from cutlayer.errors import RefusedError

STORED, WHOLE, SPLIT = 0, 1, 2
SMALLEST_SPLIT = 64  # bytes; a mask is an eighth of that, so that streams nest only a few times
LENGTH = struct.Struct("<Q")
# A payload may stand for at most this many times its size, so that a small message cannot claim a large memory; the
# writer fills up with zero bytes in the rare case.
MAX_EXPANSION = 1024
WINDOW_LOG = 17

_thread = threading.local()


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
            packed += _compress(np.ascontiguousarray(rows[:, columns]).reshape(-1))
        short = -(-(rows.size + len(shared)) // MAX_EXPANSION) - sum(map(len, packed))
        return [*packed, memoryview(bytes(short))] if short > 0 else packed

    def unpack(self, payload: memoryview, batch: int, shape: tuple[int, ...]) -> Encoded:
        """Inverse of `pack`. Raises RefusedError where the payload does not hold exactly what the layout says."""
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
            stream, position = _expand(payload, position, part.size, self.name)
            part[...] = stream.reshape(part.shape)
        if bytes(payload[position:]).strip(b"\0") or (
            position < len(payload) and len(payload) > -(-declared // MAX_EXPANSION)
        ):
            raise RefusedError(f"{self.name} payload: expected {position} bytes, got {len(payload)}")
        encoded = Encoded(self.name, shape, torch.from_numpy(rows), shared)
        self.check(encoded)
        return encoded


def compression_parameters() -> zstandard.ZstdCompressionParameters:
    """Zstandard with its search for repetitions all but switched off."""
    return zstandard.ZstdCompressionParameters(
        window_log=WINDOW_LOG, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, strategy=1
    )


def _compress(stream: np.ndarray, may_split: bool = True) -> list[memoryview]:
    """A stream (uint8 [n]) as how-byte and body."""
    if stream.size == 0:
        return [memoryview(bytes([STORED]))]
    present = stream != 0
    if may_split and stream.size >= SMALLEST_SPLIT and 5 * int(np.count_nonzero(present)) < 3 * stream.size:
        mask = _compress(np.packbits(present, bitorder="little"))
        packed = [memoryview(bytes([SPLIT])), *mask, *_compress(stream[present], may_split=False)]
    else:
        whole = _compressor().compress(stream.data)
        packed = [memoryview(bytes([WHOLE]) + LENGTH.pack(len(whole))), memoryview(whole)]
    stored = [memoryview(bytes([STORED])), stream.data]
    return min(packed, stored, key=lambda parts: sum(map(len, parts)))


def _expand(payload: memoryview, position: int, size: int, name: str, may_split: bool = True) -> tuple[np.ndarray, int]:
    """The stream of `size` bytes that begins at `position` of the payload, and where the next begins."""
    how = _take(payload, position, 1, name)[0]
    position += 1
    if how == STORED:
        return np.frombuffer(_take(payload, position, size, name), np.uint8), position + size
    if how == WHOLE:
        (length,) = LENGTH.unpack(_take(payload, position, LENGTH.size, name))
        position += LENGTH.size
        return _inflate(_take(payload, position, length, name), size, name), position + length
    if how != SPLIT or not may_split or size < SMALLEST_SPLIT:
        raise RefusedError(f"{name} payload: expected a stream of kind {STORED}, {WHOLE} or {SPLIT}, got {how}")
    mask, position = _expand(payload, position, -(-size // 8), name)
    present = np.unpackbits(mask, count=size, bitorder="little").view(bool)
    rest, position = _expand(payload, position, int(np.count_nonzero(present)), name, may_split=False)
    stream = np.zeros(size, np.uint8)
    stream[present] = rest
    return stream, position


def _inflate(frame: memoryview, size: int, name: str) -> np.ndarray:
    """The `size` bytes of a Zstandard frame; its own claim is checked before it is believed."""
    try:
        claimed = zstandard.frame_content_size(frame)
        if claimed != size:
            raise RefusedError(f"{name} payload: expected a stream of {size} bytes, its frame claims {claimed}")
        content = _decompressor().decompress(frame, max_output_size=size)
    except zstandard.ZstdError as error:
        raise RefusedError(f"{name} payload: compressed bytes cannot be read: {error}") from None
    if len(content) != size:
        raise RefusedError(f"{name} payload: expected a stream of {size} bytes, got {len(content)}")
    return np.frombuffer(content, np.uint8)


def _take(payload: memoryview, position: int, size: int, name: str) -> memoryview:
    """`size` bytes of the payload at `position`, or RefusedError."""
    if position + size > len(payload):
        raise RefusedError(f"{name} payload: expected at least {position + size} bytes, got {len(payload)}")
    return payload[position : position + size]


def _compressor() -> zstandard.ZstdCompressor:
    """This thread's compressor: costly to make, and not to be shared by threads."""
    if not hasattr(_thread, "compressor"):
        _thread.compressor = zstandard.ZstdCompressor(compression_params=compression_parameters())
    return _thread.compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor."""
    if not hasattr(_thread, "decompressor"):
        _thread.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW_LOG)
    return _thread.decompressor
