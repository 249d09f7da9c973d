"""Streams of bytes of one kind, each compressed by itself, near its entropy: a byte that tells how, then

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

import numpy as np
import zstandard

from cutlayer.errors import RefusedError

STORED, WHOLE, SPLIT = 0, 1, 2
SMALLEST_SPLIT = 64  # bytes; a mask is an eighth of that, so that streams nest only a few times
LENGTH = struct.Struct("<Q")
# A payload may stand for at most this many times its size, so that a small message cannot claim a large memory; the
# writer fills up with zero bytes in the rare case.
MAX_EXPANSION = 1024
WINDOW_LOG = 17

_thread = threading.local()


def compression_parameters() -> zstandard.ZstdCompressionParameters:
    """Zstandard with its search for repetitions all but switched off."""
    return zstandard.ZstdCompressionParameters(
        window_log=WINDOW_LOG, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, strategy=1
    )


def compress(stream: np.ndarray, may_split: bool = True) -> list[memoryview]:
    """A stream (uint8 [n]) as how-byte and body."""
    if stream.size == 0:
        return [memoryview(bytes([STORED]))]
    present = stream != 0
    if may_split and stream.size >= SMALLEST_SPLIT and 5 * int(np.count_nonzero(present)) < 3 * stream.size:
        mask = compress(np.packbits(present, bitorder="little"))
        packed = [memoryview(bytes([SPLIT])), *mask, *compress(stream[present], may_split=False)]
    else:
        whole = _compressor().compress(stream.data)
        packed = [memoryview(bytes([WHOLE]) + LENGTH.pack(len(whole))), memoryview(whole)]
    stored = [memoryview(bytes([STORED])), stream.data]
    return min(packed, stored, key=lambda parts: sum(map(len, parts)))


def expand(payload: memoryview, position: int, size: int, name: str, may_split: bool = True) -> tuple[np.ndarray, int]:
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
    mask, position = expand(payload, position, -(-size // 8), name)
    present = np.unpackbits(mask, count=size, bitorder="little").view(bool)
    rest, position = expand(payload, position, int(np.count_nonzero(present)), name, may_split=False)
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
