"""Floats without blocks: fp32, fp16, bf16, the two OCP 8-bit formats with a scale, and the two of HFP8.

All conversions keep subnormals, saturate what is too large (infinities included) at the largest finite value, and keep
NaN, so that the receiver can refuse it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.codecs.base import (
    Codec,
    Encoded,
    Layout,
    as_float32,
    as_rows,
    channels,
    from_rows,
    nothing_shared,
    numel,
    read_float32,
)
from cutlayer.codecs.elements import Element, dequantize, noise_for, powers_of_two, quantize
from cutlayer.codecs.scratch import known_false


@dataclass(frozen=True)
class PlainFloat(Codec):
    """A float format of PyTorch with two bytes or more."""

    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(numel(shape) * self.dtype.itemsize, 0)

    def streams(self, shape: tuple[int, ...]) -> list[slice]:
        """One for each byte of a number: the exponents compress, the low bits of the mantissa do not."""
        size = self.dtype.itemsize
        return [slice(place, self.layout(shape).row_bytes, size) for place in range(size)]

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        codes = as_float32(values)  # before it is clamped: float16 and bfloat16 do not hold each other's largest value
        if self.dtype != torch.float32:
            largest = torch.finfo(self.dtype).max
            codes = codes.clamp(-largest, largest)
        codes = codes.to(self.dtype)
        return Encoded(self.name, tuple(values.shape[1:]), as_rows(codes), nothing_shared(values.device))

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        return from_rows(encoded.rows, self.dtype, encoded.shape).to(torch.float32)


@dataclass(frozen=True)
class FixedFloat8(Codec):
    """An 8-bit float format after multiplication by a fixed power of two, `gain`, so exactly undone."""

    element: Element
    gain: float = 1.0
    stochastic: bool = False

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(numel(shape), 0)

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        values = as_float32(values)
        noise = noise_for(values, seed) if self.stochastic else None
        codes = quantize(values, self.element, self.gain, noise)
        return Encoded(self.name, tuple(values.shape[1:]), as_rows(codes), nothing_shared(values.device))

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        values = dequantize(encoded.rows, self.element, 1.0 / self.gain)
        return values.reshape(len(encoded), *encoded.shape)


@dataclass(frozen=True)
class ScaledFloat8(Codec):
    """An 8-bit float format with a scale, a power of two, as large as the format allows: one, or one for each channel.

    A power of two is applied and removed without rounding, so the only error is that of the 8-bit cast. `shared` holds
    its inverse: float32 for the tensor, a byte e for each channel (dimension 1 of [B, C, ...]), meaning 2^(e - 127).
    Source of the formats: Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (arXiv 2209.05433).
    """

    element: Element
    by_channel: bool = False
    stochastic: bool = False

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(numel(shape), channels(shape) if self.by_channel else 4)

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        values = as_float32(values)
        shape = tuple(values.shape[1:])
        noise = noise_for(values, seed) if self.stochastic else None
        if self.by_channel:
            grouped = by_channel(values)
            peaks, finite = channel_peaks(grouped)
            grouped = self._within_float32(grouped, peaks, finite)
            scales = power_of_two_scale(peaks, self.element.largest)
            codes = quantize(grouped * scales.unsqueeze(1), self.element, noise=noise, bounded=finite)
            shared = (128 - torch.frexp(scales)[1]).to(torch.uint8).reshape(1, -1)
        else:
            peak, finite = tensor_peak(values)
            values = self._within_float32(values, peak, finite)
            if values.device.type == "cpu":  # plain numbers: a call of PyTorch costs more than the arithmetic here
                number = 2.0 ** _exponent_that_fits(float(peak), self.element.largest)
                scale, shared = number, torch.tensor([[1 / number]]).view(torch.uint8)
            else:
                scale = power_of_two_scale(peak, self.element.largest)
                shared = scale.reciprocal().reshape(1, 1).view(torch.uint8)
            codes = quantize(values, self.element, scale, noise, bounded=finite)
        return Encoded(self.name, shape, as_rows(codes.reshape(values.shape)), shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        rows, shared = encoded.rows, encoded.shared
        if self.by_channel:
            values = dequantize(rows, self.element).reshape(len(rows), *encoded.shape)
            values = by_channel(values).mul_(powers_of_two(shared).unsqueeze(2))
        elif len(shared) == 1 and rows.device.type == "cpu":
            values = dequantize(rows, self.element, float(read_float32(shared)))
        else:
            values = dequantize(rows, self.element).mul_(read_float32(shared))
        return values.reshape(len(rows), *encoded.shape)

    def _within_float32(self, values: Tensor, peaks: Tensor, finite: bool) -> Tensor:
        """Values that rounding cannot take past float32's range: the topmost saturate at the largest of few bits."""
        largest = (2 - 2.0**-self.element.mantissa) * 2.0**127
        if finite and not bool((peaks > largest).any()):
            return values
        return values.clamp(-largest, largest)


def by_channel(values: Tensor) -> Tensor:
    """[B, C, ...] as [B, C, n], without a copy if it is contiguous; [B] has one channel."""
    shape = tuple(values.shape[1:])
    groups = channels(shape)
    return values.reshape(len(values), groups, numel(shape) // groups if groups else 0)


def tensor_peak(values: Tensor) -> tuple[Tensor, bool]:
    """Largest finite magnitude (float32 scalar; 0 if there is none), and whether all values are known to be finite."""
    if values.numel() == 0:
        return torch.zeros((), device=values.device), True
    low, high = torch.aminmax(values)
    peak = torch.maximum(low.neg(), high)
    if values.device.type == "cpu" and math.isfinite(peak):
        return peak, True
    return torch.where(values.isfinite(), values.abs(), 0.0).amax(), False


def channel_peaks(grouped: Tensor) -> tuple[Tensor, bool]:
    """Largest finite magnitude of each channel of float32 [B, C, n], as [C]; and as in `tensor_peak`."""
    if grouped.numel() == 0:
        return torch.zeros(grouped.shape[1], device=grouped.device), True
    peaks = torch.maximum(-grouped.amin((0, 2)), grouped.amax((0, 2)))
    if known_false(~torch.isfinite(peaks).all()):
        return peaks, True
    return torch.where(grouped.isfinite(), grouped.abs(), 0.0).amax((0, 2)), False


def power_of_two_scale(peaks: Tensor, largest: float) -> Tensor:
    """The largest powers of two s for which s * peak <= largest; 1 for a peak of 0.

    The exponent stays as it is if s and 1 / s are both normal numbers.
    """
    mantissa, exponent = torch.frexp(peaks)
    top_mantissa, top_exponent = math.frexp(largest)
    power = (top_exponent - exponent - (mantissa > top_mantissa).int()).clamp(-126, 126)
    return torch.where(peaks > 0, powers_of_two(power + 127), 1.0)


def _exponent_that_fits(peak: float, largest: float) -> int:
    """The exponent of `power_of_two_scale` for one number."""
    if peak == 0:
        return 0
    (mantissa, exponent), (top_mantissa, top_exponent) = math.frexp(peak), math.frexp(largest)
    return max(-126, min(126, top_exponent - exponent - (mantissa > top_mantissa)))
