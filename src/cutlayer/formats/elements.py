"""Element formats: small floats of four to eight bits, and their conversion to and from codes.

One rule serves all of them. A magnitude with exponent e is a multiple of 2^(e - mantissa bits), e being no less than
the exponent of the smallest normal number; so it is rounded to that quantum, and the count of quanta plus the exponent
is the code. Rounding is to nearest, ties to even, or stochastic; magnitudes past the largest saturate; NaN stays NaN
where the format has one.

Sources: OCP 8-bit Floating Point Specification; OCP Microscaling Formats (MX) Specification v1.0; Sun et al., "Hybrid
8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Values converted at a time on the CPU: a chunk and its scratch stay in the second-level cache, while the cost of the
# calls stays small beside the work (measured from 2^12 to 2^18).
CHUNK = 1 << 17


@dataclass(frozen=True)
class Element:
    """A float format of one sign bit, some exponent bits and `mantissa` bits, in the low `bits` bits of a byte.

    Attributes:
        bits: width of a code.
        mantissa: explicit mantissa bits.
        lowest: exponent of the smallest normal number, 1 - bias.
        largest: largest finite value.
        nan: code written for NaN; None where the format has no NaN.
        negative_zero: whether the code with only the sign bit is -0; if not, it is the one NaN.
    """

    bits: int
    mantissa: int
    lowest: int
    largest: float
    nan: int | None = None
    negative_zero: bool = True

    @property
    def highest(self) -> int:
        """Exponent of the largest value (`emax` of the MX specification)."""
        return int(np.floor(np.log2(self.largest)))


E4M3 = Element(8, 3, -6, 448.0, nan=0x7F)
E5M2 = Element(8, 2, -14, 57344.0, nan=0x7F)
E4M3_HFP8 = Element(8, 3, -10, 30.0, nan=0x80, negative_zero=False)
E2M3 = Element(6, 3, 0, 7.5)
E3M2 = Element(6, 2, -2, 28.0)
E2M1 = Element(4, 1, 0, 6.0)

# PyTorch's own casts and the power of two that goes before; its e4m3fnuz is HFP8's format with bias 8 in place of 11.
_NATIVE = {
    E4M3: (torch.float8_e4m3fn, 1.0),
    E5M2: (torch.float8_e5m2, 1.0),
    E4M3_HFP8: (torch.float8_e4m3fnuz, 8.0),
}


def quantize(
    values: Tensor,
    element: Element,
    gain: float | Tensor = 1.0,
    noise: Tensor | None = None,
    bounded: bool = False,
) -> Tensor:
    """Codes (uint8) of float32 `values` times `gain`, a power of two (a tensor of no dimensions, or a number).

    Args:
        values: float32 of any shape; the codes have the same.
        element: the format.
        gain: power of two.
        noise: int32 of the shape of `values` with uniform bits asks for stochastic rounding: up with a probability
            equal to the fraction of the quantum that is cut off, so unbiased.
        bounded: the caller knows that values times gain are finite and in range, so that nothing saturates.
    """
    values = values.contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    dtype, native_gain = _NATIVE.get(element, (None, 1.0)) if noise is None else (None, 1.0)
    limit = element.largest * native_gain
    draws = _flat_split(noise.contiguous()) if noise is not None else None
    with torch.no_grad():
        for number, (part, out, scratch) in enumerate(_chunks(values, codes, dtype=torch.float32)):
            scaled = torch.mul(part, gain, out=scratch)
            if native_gain != 1.0:
                scaled.mul_(native_gain)
            if not bounded:
                scaled.clamp_(-limit, limit)
            if dtype is not None:
                out.view(dtype).copy_(scaled)
            else:
                out.copy_(_nearest(scaled, element) if draws is None else _stochastic(scaled, element, draws[number]))
        if not element.negative_zero:
            codes.masked_fill_(codes == 0x80, 0)
        if element.nan is not None and not bounded:
            codes.masked_fill_(values.isnan(), element.nan)
    return codes


def dequantize(codes: Tensor, element: Element, gain: float = 1.0) -> Tensor:
    """Float32 values of `codes` (uint8) times `gain`, in the shape of `codes`.

    The bits of a code, moved to the place they have in float16, are that value times a power of two, subnormals
    included; so the hardware's float16 conversion does the work.
    """
    codes = codes.contiguous()
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    to_top = 8 - element.bits
    shift = 10 - element.mantissa - to_top
    keep = ((1 << (element.bits - 1)) - 1) << (10 - element.mantissa) | 0x8000
    factors = [2.0 ** (element.lowest + 14), gain]
    if 2.0**-126 <= abs(factors[0] * gain) < 2.0**128:  # one multiplication, where that rounds as two do
        factors = [factors[0] * gain]
    with torch.no_grad():
        for part, out, half in _chunks(codes, values, dtype=torch.int16):
            # Sign extension puts the sign bit where float16 has it; the copies of it in between are cut out.
            half.copy_((part << to_top if to_top else part).view(torch.int8))
            half.mul_(1 << shift)
            if shift < 8:
                half.bitwise_and_(keep - 0x10000)
            out.copy_(half.view(torch.float16))
            for factor in factors:
                if factor != 1.0:
                    out.mul_(factor)
        if (nans := _nan_codes(codes, element)) is not None:
            values.masked_fill_(nans, torch.nan)
    return values


def powers_of_two(codes: Tensor) -> Tensor:
    """2^(code - 127) as float32, of codes 0 to 255 in any integer type; 255 is NaN. E8M0 of the MX specification."""
    bits = codes.to(torch.int32)
    powers = (bits << 23).masked_fill_(bits == 0, 1 << 22).view(torch.float32)  # 2^-127 is subnormal
    return powers.masked_fill_(bits == 0xFF, torch.nan)


def uniform_bits(seed: int, draw: int, count: int) -> np.ndarray:
    """int32 [count] of uniform bits named by `seed` and `draw`: the same on every machine (Philox)."""
    stream = np.random.Philox(key=np.array([seed & (2**64 - 1), draw], dtype=np.uint64))
    return stream.random_raw(-(-count // 2)).view(np.int32)[:count]


def noise_for(values: Tensor, seed: int, draw: int = 0) -> Tensor:
    """Uniform bits for the stochastic rounding of `values`: int32 in its shape and on its device."""
    return torch.from_numpy(uniform_bits(seed, draw, values.numel())).reshape(values.shape).to(values.device)


def _nearest(values: Tensor, element: Element) -> Tensor:
    """Codes of values within the range, to nearest even, as int32 of which the low 8 bits count."""
    width = 23 - element.mantissa
    magnitudes = values.abs()
    magic = _exponents(magnitudes, element)
    magic += width << 23
    # The sum of a magnitude and 2^width times its power of two has one quantum as its last bit: hardware rounds it.
    sums = magnitudes.add_(magic.view(torch.float32)).view(torch.int32)
    codes = (sums >> width).add_(sums).sub_((127 + width + element.lowest) << element.mantissa)
    return codes.bitwise_and_((1 << (element.bits - 1)) - 1).bitwise_or_(_signs(values, element))


def _stochastic(values: Tensor, element: Element, noise: Tensor) -> Tensor:
    """Codes of values within the range, rounded up where noise exceeds what is missing to the next code."""
    width = 23 - element.mantissa
    magnitudes = values.abs()
    exponents = _exponents(magnitudes, element)
    # Fixed point with `width` bits after the point, the point standing at the quantum.
    fixed = magnitudes.mul_(((277 << 23) - exponents).view(torch.float32)).to(torch.int32)
    quanta = (fixed + (noise & ((1 << width) - 1))) >> width
    codes = quanta.add_((exponents >> width).sub_((127 + element.lowest) << element.mantissa))
    return codes.bitwise_and_((1 << (element.bits - 1)) - 1).bitwise_or_(_signs(values, element))


def _exponents(magnitudes: Tensor, element: Element) -> Tensor:
    """The exponent bits of float32 magnitudes, as int32, no lower than those of the smallest normal number."""
    return (magnitudes.view(torch.int32) & 0x7F800000).clamp_(min=(127 + element.lowest) << 23)


def _signs(values: Tensor, element: Element) -> Tensor:
    return (values.view(torch.int32) >> 31).bitwise_and_(1 << (element.bits - 1))


def _nan_codes(codes: Tensor, element: Element) -> Tensor | None:
    """Where codes mean NaN though their bits, read as float16, do not; None where it is known that none does."""
    if element.nan is None or element.mantissa == 2 or codes.numel() == 0:
        return None
    if element.negative_zero:
        quick = (codes.max() == 0xFF) | (codes.view(torch.int8).max() == 0x7F)
        return None if known_false(quick) else (codes & 0x7F) == 0x7F
    return None if known_false(codes.view(torch.int8).min() == -0x80) else codes == 0x80


def known_false(condition: Tensor) -> bool:
    """Whether a condition is known to be false without waiting for a device: on the CPU, where it is."""
    return condition.device.type == "cpu" and not bool(condition)


def _flat_split(values: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor in chunks that fit the cache; on other devices in one."""
    flat = values.reshape(-1)
    return flat.split(CHUNK) if values.device.type == "cpu" else (flat,)


def _chunks(source: Tensor, target: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(source, target, scratch) chunk by chunk; the scratch, of `dtype`, is one buffer for all."""
    scratch = torch.empty(
        min(CHUNK, source.numel()) if source.device.type == "cpu" else source.numel(), dtype=dtype, device=source.device
    )
    for part, out in zip(_flat_split(source), _flat_split(target), strict=True):
        yield part, out, scratch[: part.numel()]
