"""What codecs write, in NumPy: the same bytes as those of `codecs`, for a device without PyTorch.

Encoding only, to nearest, and of finite values only: a device sends activations, and reads none. Not there:
sparsification, memories and random rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cutlayer.device.arrays import Bytes, Floats, Packed, columns, e4m3, pack_bits, powers_of_two, quantize
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.formats import E2M1, E2M3, E3M2, E4M3, E4M3_HFP8, E5M2, Element
from cutlayer.streams import MAX_EXPANSION, compress

LARGEST = np.float32(np.finfo(np.float32).max * (1 - 2.0**-23))


Encoder = Callable[[Floats], Packed]


class DeviceCodec:
    """The codec of a spec, as far as a device needs it. Raises ConfigError for one that needs PyTorch.

    Attributes:
        name: the spec.
    """

    def __init__(self, spec: str) -> None:
        self.name = spec
        body, plus, stage = spec.partition("+")
        name, *options = body.split(":")
        encoder = _ENCODERS.get((name, *options))
        if encoder is None or (plus and stage != "zstd"):
            known = ", ".join(":".join(each) for each in _ENCODERS)
            raise ConfigError(
                f"codec {spec!r}: a device without PyTorch knows {known}, each also with +zstd; choose one of these "
                "for the activations"
            )
        self._encode, self._compressed = encoder, bool(plus)

    def pack(self, values: Floats) -> list[bytes | memoryview]:
        """The bytes that cross the wire, of finite float32 [B, *shape]."""
        if not np.isfinite(values).all():
            raise RefusedError("activations at the cut are not finite: mend the inputs, or the half")
        packed = self._encode(np.ascontiguousarray(values, np.float32))
        shared = packed.shared.tobytes()
        if not self._compressed:
            return [shared, packed.rows.tobytes()]
        parts: list[bytes | memoryview] = [shared]
        for stream in packed.streams:
            parts += compress(np.ascontiguousarray(packed.rows[:, stream]).reshape(-1))
        short = -(-(packed.rows.size + len(shared)) // MAX_EXPANSION) - sum(map(len, parts))
        return [*parts, bytes(short)] if short > 0 else parts


def integers(values: NDArray[np.int64]) -> tuple[str, bytes]:
    """Whole numbers in the narrowest type that holds them: its name, and their bytes."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for name, kind in (("u8", np.uint8), ("u16", np.uint16), ("u32", np.uint32)):
        if low >= 0 and high <= np.iinfo(kind).max:
            return name, values.astype(kind).tobytes()
    return "i64", values.astype(np.int64).tobytes()


# --- floats ---


def _nothing() -> Bytes:
    return np.empty(0, np.uint8)


def _plain(kind: type) -> Encoder:
    def encode(values: Floats) -> Packed:
        largest = np.finfo(kind).max
        codes = (values if kind is np.float32 else values.clip(-largest, largest)).astype(kind)
        return _of_words(codes.reshape(len(values), -1))

    return encode


def _bf16(values: Floats) -> Packed:
    largest = np.array([0x7F7F0000], np.uint32).view(np.float32)[0]
    bits = values.clip(-largest, largest).reshape(len(values), -1).view(np.uint32)
    return _of_words(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def _of_words(codes: NDArray) -> Packed:
    """One stream for each byte of a number."""
    size = codes.dtype.itemsize
    rows = np.ascontiguousarray(codes).view(np.uint8).reshape(len(codes), -1)
    return Packed(rows, _nothing(), tuple(slice(place, rows.shape[1], size) for place in range(size)))


def _scaled(element: Element) -> Encoder:
    def encode(values: Floats) -> Packed:
        exponent = _fitting(float(np.abs(values).max(initial=0.0)), element)
        codes = quantize(_within(values, element) * np.float32(2.0**exponent), element)
        return _of_bytes(codes, np.array([2.0**-exponent], np.float32).view(np.uint8))

    return encode


def _scaled_by_channel(element: Element) -> Encoder:
    def encode(values: Floats) -> Packed:
        grouped = _by_channel(values)
        peaks = np.abs(grouped).max((0, 2), initial=0.0)
        exponents = np.array([_fitting(float(peak), element) for peak in peaks], np.int32)
        scales = np.ldexp(np.float32(1), exponents).astype(np.float32)
        codes = quantize(_within(grouped, element) * scales[:, None], element)
        return _of_bytes(codes.reshape(len(values), -1), (127 - exponents).astype(np.uint8))

    return encode


def _fixed(element: Element, gain: float = 1.0) -> Encoder:
    def encode(values: Floats) -> Packed:
        with np.errstate(over="ignore"):
            scaled = (values * np.float32(gain)).clip(-element.largest, element.largest)
        return _of_bytes(quantize(scaled, element), _nothing())

    return encode


def _of_bytes(codes: Bytes, shared: Bytes) -> Packed:
    rows = codes.reshape(len(codes), -1)
    return Packed(rows, shared, (slice(0, rows.shape[1]),))


def _fitting(peak: float, element: Element) -> int:
    """The largest exponent with which a peak stays within the format."""
    if peak == 0:
        return 0
    (mantissa, exponent), (top_mantissa, top_exponent) = math.frexp(peak), math.frexp(element.largest)
    return max(-126, min(126, top_exponent - exponent - (mantissa > top_mantissa)))


def _within(values: Floats, element: Element) -> Floats:
    """Values that rounding cannot take past float32's range."""
    largest = np.float32((2 - 2.0**-element.mantissa) * 2.0**127)
    return values.clip(-largest, largest)


def _by_channel(values: Floats) -> Floats:
    groups = values.shape[1] if values.ndim > 1 else 1
    return values.reshape(len(values), groups, -1)


# --- blocks ---


def _mx(element: Element) -> Encoder:
    def encode(values: Floats) -> Packed:
        flat = values.reshape(len(values), -1)
        blocks = _blocked(flat, 32)
        peaks = np.abs(blocks).max(-1)
        codes = ((peaks.view(np.int32) >> 23) - element.highest).clip(0, 254).astype(np.uint8)
        return _of_blocks(flat, blocks, codes, powers_of_two(codes), element, _nothing())

    return encode


def _nvfp4(values: Floats) -> Packed:
    flat = values.reshape(len(values), -1)
    peak = np.float32(np.abs(flat).max(initial=0.0))
    scale = np.maximum(peak / np.float32(E2M1.largest * E4M3.largest), np.float32(2.0**-126))
    blocks = _blocked(flat, 16)
    wanted = np.abs(blocks).max(-1) / np.float32(E2M1.largest) / scale
    codes = quantize(wanted.clip(0, E4M3.largest), E4M3)
    divisors = e4m3(codes) * scale
    divisors[divisors == 0] = np.inf
    return _of_blocks(flat, blocks, codes, divisors, E2M1, np.array([scale], np.float32).view(np.uint8))


def _blocked(flat: Floats, block: int) -> Floats:
    filled = np.pad(flat, ((0, 0), (0, -flat.shape[1] % block)))
    return filled.reshape(len(flat), filled.shape[1] // block, block)


def _of_blocks(
    flat: Floats, blocks: Floats, scales: Bytes, divisors: Floats, element: Element, shared: Bytes
) -> Packed:
    scaled = (blocks / divisors[..., None]).astype(np.float32).clip(-element.largest, element.largest)
    codes = quantize(scaled, element).reshape(len(flat), -1)[:, : flat.shape[1]]
    packed, widths = pack_bits(codes, element.bits)
    return Packed(np.concatenate([scales, packed], 1), shared, columns([scales.shape[1], *widths]))


# --- integers with a scale ---


def _affine(bits: int) -> Encoder:
    def encode(values: Floats) -> Packed:
        grouped, top = _by_channel(values), np.float32((1 << bits) - 1)
        low, high = grouped.min((0, 2), initial=0.0), grouped.max((0, 2), initial=0.0)
        half = np.float32(0.5)
        steps = np.maximum((high * half - low * half) / (top * half), np.float32(2.0**-126))
        zeros = np.rint(-low / steps).clip(0, top)
        steps = np.minimum(steps, LARGEST * (np.float32(1) / np.maximum(zeros, top - zeros)))
        codes = np.rint(grouped / steps[:, None] + zeros[:, None]).clip(0, top).astype(np.uint8)
        packed, widths = pack_bits(codes.reshape(len(values), -1), bits)
        shared = np.concatenate([steps.astype(np.float32).view(np.uint8), zeros.astype(np.uint8)])
        return Packed(packed, shared, columns(widths))

    return encode


_ENCODERS: dict[tuple[str, ...], Encoder] = {
    ("fp32",): _plain(np.float32),
    ("fp16",): _plain(np.float16),
    ("bf16",): _bf16,
    ("fp8_e4m3",): _scaled(E4M3),
    ("fp8_e5m2",): _scaled(E5M2),
    ("fp8_e4m3", "channel"): _scaled_by_channel(E4M3),
    ("fp8_e5m2", "channel"): _scaled_by_channel(E5M2),
    ("hfp8_e4m3",): _fixed(E4M3_HFP8),
    ("hfp8_e5m2",): _fixed(E5M2, 2.0**12),
    ("mxfp8_e4m3",): _mx(E4M3),
    ("mxfp8_e5m2",): _mx(E5M2),
    ("mxfp6_e2m3",): _mx(E2M3),
    ("mxfp6_e3m2",): _mx(E3M2),
    ("mxfp4",): _mx(E2M1),
    ("nvfp4",): _nvfp4,
    ("int8",): _affine(8),
    ("int4",): _affine(4),
}
