"""What a device's codecs are made of: small floats, powers of two and packed bits, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cutlayer.formats import Element

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Packed:
    """An encoded batch.

    Attributes:
        rows: uint8 [B, R].
        shared: uint8 [S].
        streams: columns of the rows, each with bytes of one kind.
    """

    rows: Bytes
    shared: Bytes
    streams: tuple[slice, ...]


def quantize(values: Floats, element: Element) -> Bytes:
    """Codes (uint8) of finite float32 values within the format's range: to nearest, ties to even."""
    width = 23 - element.mantissa
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    magnitudes = bits & 0x7FFFFFFF
    powers = np.maximum(magnitudes & 0x7F800000, (127 + element.lowest) << 23) + (width << 23)
    # The sum of a magnitude and 2^width times its power of two has one quantum as its last bit: hardware rounds it.
    summed = (magnitudes.view(np.float32) + powers.astype(np.int32).view(np.float32)).view(np.int32)
    codes = summed + (summed >> width) - ((127 + width + element.lowest) << element.mantissa)
    codes |= (bits >> 31) & (1 << (element.bits - 1))
    found = codes.astype(np.uint8)
    if not element.negative_zero:
        found[found == 0x80] = 0
    return found


def powers_of_two(codes: Bytes) -> Floats:
    """The scales 2^(code - 127), of codes up to 254."""
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127).astype(np.float32)


def e4m3(codes: Bytes) -> Floats:
    """The values of codes from 0 up to the largest."""
    exponent, mantissa = codes.astype(np.int32) >> 3, (codes & 7).astype(np.int32)
    normal = np.ldexp(np.float32(1) + mantissa.astype(np.float32) / 8, exponent - 7)
    return np.where(exponent > 0, normal, mantissa.astype(np.float32) * np.float32(2.0**-9)).astype(np.float32)


def pack_bits(codes: Bytes, width: int) -> tuple[Bytes, list[int]]:
    """Codes [B, n] below 2^width, packed as planes of 8, 4, 2 and 1 bits; and the bytes of each plane."""
    planes, above = [], width
    for plane in (8, 4, 2, 1):
        if not width & plane:
            continue
        above -= plane
        part = (codes >> above) & ((1 << plane) - 1)
        per_byte = 8 // plane
        filled = np.pad(part, ((0, 0), (0, -part.shape[1] % per_byte)))
        packed = np.zeros((len(filled), filled.shape[1] // per_byte), np.uint8)
        for place in range(per_byte):
            packed |= (filled[:, place::per_byte] << (place * plane)).astype(np.uint8)
        planes.append(packed)
    return np.concatenate(planes, 1), [plane.shape[1] for plane in planes]


def columns(widths: list[int]) -> tuple[slice, ...]:
    """Slices of these widths, one after the other."""
    ends = [0]
    for width in widths:
        ends.append(ends[-1] + width)
    return tuple(slice(start, stop) for start, stop in pairwise(ends))
