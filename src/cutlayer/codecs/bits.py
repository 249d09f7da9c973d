"""Packed bits: codes of fewer than eight bits, in planes of four, two and one bits.

A code of six bits is four high bits and two low ones; the high ones of all codes of a row come first, then the low
ones. So the bytes of a plane are of one kind, which an entropy coder can model, and a row of any length
wastes less than a byte in each plane.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def planes_of(width: int) -> tuple[int, ...]:
    """Widths of the planes that hold codes of `width` bits (1 to 8): 6 is 4 and 2."""
    return tuple(part for part in (8, 4, 2, 1) if width & part)


def packed_bytes(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits."""
    return sum(-(-count * plane // 8) for plane in planes_of(width))


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Codes uint8 [B, n], each below 2^width, as uint8 [B, packed_bytes(n, width)]; the first code in the low bits."""
    packed, above = [], width
    for plane in planes_of(width):
        above -= plane
        part = (codes >> above) if above else codes
        packed.append(_pack(part, plane) if plane == width else _pack(part & ((1 << plane) - 1), plane))
    return packed[0] if len(packed) == 1 else torch.cat(packed, 1)


def unpack_bits(packed: Tensor, count: int, width: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [B, count]."""
    start, codes = 0, None
    for plane in planes_of(width):
        stop = start + -(-count * plane // 8)
        part = _unpack(packed[:, start:stop], count, plane)
        codes = part if codes is None else codes.bitwise_left_shift_(plane).bitwise_or_(part)
        start = stop
    assert codes is not None, f"width must be 1 to 8, got {width}"
    return codes


def _pack(codes: Tensor, width: int) -> Tensor:
    """Codes below 2^width, width 1, 2, 4 or 8, with 8 / width codes in a byte."""
    per_byte = 8 // width
    if per_byte == 1:
        return codes
    if width == 1 and codes.device.type == "cpu":
        return torch.from_numpy(np.packbits(codes.numpy(), axis=1, bitorder="little"))
    if tail := -codes.shape[1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, tail))
    if width == 4 and codes.is_contiguous() and codes.numel():
        pairs = codes.view(torch.int16)
        return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    packed = codes[:, ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[:, place::per_byte] << (place * width)
    return packed


def _unpack(packed: Tensor, count: int, width: int) -> Tensor:
    per_byte = 8 // width
    if per_byte == 1:
        return packed.clone()
    if width == 1 and packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=count, bitorder="little"))
    if width == 4 and packed.numel():
        pairs = packed.to(torch.int16)
        return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)[:, :count]
    codes = packed.new_empty((packed.shape[0], packed.shape[1], per_byte))
    for place in range(per_byte):
        codes[..., place] = (packed >> (place * width)) & ((1 << width) - 1)
    return codes.flatten(1)[:, :count]
