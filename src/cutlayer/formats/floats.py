"""Floating-point formats: fp32, fp16, bf16, the two OCP 8-bit formats with a scale, and the two of HFP8.

All conversions round to nearest, ties to even, keep subnormals, saturate what is too large (infinities included) at
the largest finite value, and keep NaN, so that the receiver can refuse it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.formats.base import Codec, Encoded, Layout, as_rows, from_rows, nothing_shared, numel


@dataclass(frozen=True)
class PlainFloat(Codec):
    """A float format that PyTorch holds natively, after multiplication by a fixed power of two (`gain`).

    Attributes:
        dtype: the element format.
        largest: largest finite value of the format divided by `gain`; larger magnitudes saturate there.
        gain: power of two that values are multiplied with before the cast, so exactly undone after it.
    """

    dtype: torch.dtype
    largest: float
    gain: float = 1.0

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(numel(shape) * self.dtype.itemsize, 0)

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        codes = values.detach()
        if self.dtype != torch.float32:
            codes = codes.clamp(-self.largest, self.largest)
            if self.gain != 1.0:
                codes = codes.mul_(self.gain)
        codes = codes.to(self.dtype)
        return Encoded(self.name, tuple(values.shape[1:]), as_rows(codes), nothing_shared(values.device))

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        values = from_rows(encoded.rows, self.dtype, encoded.shape).to(torch.float32)
        return values if self.gain == 1.0 else values.mul_(1.0 / self.gain)


@dataclass(frozen=True)
class ScaledFloat(Codec):
    """An 8-bit float format with one scale for the tensor, a power of two, as large as the format allows.

    A power of two is applied and removed without rounding, so the only error is that of the 8-bit cast; it is sent
    as one float32. Source of the formats: Micikevicius et al., "FP8 Formats for Deep Learning", 2022
    (arXiv 2209.05433), and the OCP 8-bit Floating Point Specification.
    """

    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(numel(shape), 4)

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        values = values.detach().to(torch.float32)
        largest = torch.finfo(self.dtype).max
        scale = power_of_two_scale(values, largest)
        codes = (values * scale).clamp_(-largest, largest).to(self.dtype)
        shared = scale.reciprocal().reshape(1, 1).view(torch.uint8)
        return Encoded(self.name, tuple(values.shape[1:]), as_rows(codes), shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        values = from_rows(encoded.rows, self.dtype, encoded.shape).to(torch.float32)
        scale = encoded.shared.contiguous().view(torch.float32)
        return values.mul_(scale.reshape(-1, *[1] * len(encoded.shape)))


def power_of_two_scale(values: Tensor, largest: float) -> Tensor:
    """The largest power of two s for which s * max|values| <= largest, as a float32 scalar tensor.

    Infinities and NaN are left out of the maximum; zeros and empty tensors get 1. The exponent is kept where s and
    1 / s are both normal numbers.
    """
    if values.numel() == 0:
        return torch.ones((), device=values.device)
    low, high = torch.aminmax(values)
    peak = torch.maximum(-low, high)
    if not torch.isfinite(peak):
        peak = torch.where(values.isfinite(), values.abs(), 0.0).amax()
    mantissa, exponent = torch.frexp(peak)
    top_mantissa, top_exponent = torch.frexp(torch.tensor(largest, device=values.device))
    power = (top_exponent - exponent - (mantissa > top_mantissa).int()).clamp(-126, 126)
    scale = torch.ldexp(torch.ones((), device=values.device), power)
    return torch.where(peak > 0, scale, 1.0)


FP32 = PlainFloat("fp32", torch.float32, torch.finfo(torch.float32).max)
FP16 = PlainFloat("fp16", torch.float16, torch.finfo(torch.float16).max)
BF16 = PlainFloat("bf16", torch.bfloat16, torch.finfo(torch.bfloat16).max)
FP8_E4M3 = ScaledFloat("fp8_e4m3", torch.float8_e4m3fn)
FP8_E5M2 = ScaledFloat("fp8_e5m2", torch.float8_e5m2)

# HFP8 (Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", NeurIPS
# 2019), the format the paper of the method names. Forward 1-4-3 with exponent bias 11: PyTorch's e4m3fnuz is the same
# format with bias 8 (NaN at 0x80, no negative zero, no infinity), hence the gain of 2^3. Its range needs no scale.
HFP8_E4M3 = PlainFloat("hfp8_e4m3", torch.float8_e4m3fnuz, 30.0, gain=2.0**3)
# Backward 1-5-2 with loss scaling: gradients at the cut are of the order of 1 / batch size and smaller, which would
# fall below the smallest subnormal, 2^-16. With 2^12 magnitudes from 2^-28 to 14 are kept.
HFP8_E5M2 = PlainFloat("hfp8_e5m2", torch.float8_e5m2, 57344.0 / 2.0**12, gain=2.0**12)
