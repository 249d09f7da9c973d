"""The lossless stage: near the entropy if it pays, one byte if it does not, and no bombs."""

import struct

import numpy as np
import pytest
import torch
import zstandard

from cutlayer.codecs import get_codec
from cutlayer.errors import RefusedError
from cutlayer.streams import MAX_EXPANSION, SPLIT, STORED, WHOLE

CODEC = get_codec("fp8_e4m3+zstd")


def packed(codec, values: torch.Tensor) -> bytes:
    return b"".join(codec.pack(codec.encode(values)))


def order_zero_entropy(rows: torch.Tensor) -> float:
    share = np.bincount(rows.reshape(-1).numpy(), minlength=256) / rows.numel()
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


@pytest.mark.parametrize("threshold", [-9.0, 0.0, 1.0, 2.0, 3.0])
def test_bits_are_near_the_entropy_of_the_codes(threshold: float) -> None:
    """From no zeros to nearly all; Zstandard's Huffman codes and headers may cost 3 % and 0.02 bits."""
    values = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    values = torch.where(values > threshold, values.abs(), 0.0)
    bits = 8 * len(packed(CODEC, values)) / values.numel()
    assert bits <= 1.03 * order_zero_entropy(CODEC.encode(values).rows) + 0.02


def test_what_does_not_compress_costs_one_byte() -> None:
    codec = get_codec("fp32+zstd")
    values = torch.randint(0, 2**31, (16, 100), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    values = (values & 0x3FFFFFFF).view(torch.float32)  # exponents and mantissas at random
    assert len(packed(codec, values)) <= values.numel() * 4 + 4
    payload = packed(CODEC, torch.randn(1, 3))
    assert payload[4] == STORED
    assert len(payload) == 4 + 1 + 3
    assert len(packed(CODEC, torch.empty(2, 0))) == 4 + 1


def test_zeros_do_not_shrink_past_what_a_receiver_believes() -> None:
    values = torch.zeros(64, 32768)
    payload = packed(CODEC, values)
    assert len(payload) == -(-(64 * 32768 + 4) // MAX_EXPANSION)
    received = CODEC.unpack(memoryview(payload), 64, (32768,))
    assert torch.equal(CODEC.decode(received), values)
    with pytest.raises(RefusedError, match="can come from no fewer than"):
        CODEC.unpack(memoryview(payload), 65, (32768,))
    with pytest.raises(RefusedError):
        CODEC.unpack(memoryview(payload + b"\0"), 64, (32768,))
    with pytest.raises(RefusedError):
        CODEC.unpack(memoryview(payload[:-1] + b"\1"), 64, (32768,))


def frame(how: int, body: bytes, *lengths: int) -> memoryview:
    return memoryview(bytes(4) + bytes([how]) + b"".join(struct.pack("<Q", n) for n in lengths) + body)


def test_what_a_frame_claims_is_not_believed() -> None:
    bomb = zstandard.compress(bytes(1 << 30))
    with pytest.raises(RefusedError, match="expected a stream of 1000 bytes, its frame claims 1073741824"):
        CODEC.unpack(frame(WHOLE, bomb, len(bomb)), 10, (100,))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(RefusedError, match="claims"):
        CODEC.unpack(frame(WHOLE, unsized, len(unsized)), 10, (100,))
    small = zstandard.compress(bytes(999))
    with pytest.raises(RefusedError, match="claims 999"):
        CODEC.unpack(frame(WHOLE, small, len(small)), 10, (100,))
    right = zstandard.compress(bytes(1000))
    assert not CODEC.unpack(frame(WHOLE, right, len(right)), 10, (100,)).rows.any()
    with pytest.raises(RefusedError, match="expected at least"):
        CODEC.unpack(frame(WHOLE, right, 2**63), 10, (100,))
    ones = bytes([STORED]) + b"\xff" * 125
    with pytest.raises(RefusedError, match="expected at least"):
        CODEC.unpack(frame(SPLIT, ones + bytes([STORED]) + bytes(999)), 10, (100,))
    nested = ones + bytes([SPLIT]) + ones + bytes([STORED]) + bytes(1000)
    with pytest.raises(RefusedError, match="got 2"):
        CODEC.unpack(frame(SPLIT, nested), 10, (100,))
    with pytest.raises(RefusedError, match="got 2"):
        CODEC.unpack(frame(SPLIT, bytes([SPLIT]) * 5000), 10, (100,))
    assert CODEC.unpack(frame(SPLIT, ones + bytes([STORED]) + b"\1" * 1000), 10, (100,)).rows.all()
    with pytest.raises(RefusedError, match="of kind 0, 1 or 2, got 7"):
        CODEC.unpack(frame(7, bytes(1000)), 10, (100,))
    with pytest.raises(RefusedError, match="cannot be read"):
        CODEC.unpack(frame(WHOLE, right[:-3] + b"xyz", len(right)), 10, (100,))


def test_large_streams_are_read_back() -> None:
    """Frames larger than the decoder's window limit: one-shot frames are read without a window."""
    values = torch.randn(8, 1 << 20).relu()
    received = CODEC.unpack(memoryview(packed(CODEC, values)), 8, (1 << 20,))
    assert torch.equal(received.rows, CODEC.encode(values).rows)
