"""Element formats: small floats of four to eight bits, and their conversion to and from codes.

One rule serves all of them. A magnitude with exponent e is a multiple of 2^(e - mantissa bits), e being no less than
the exponent of the smallest normal number; so it is rounded to that quantum, and the count of quanta plus the exponent
is the code. Rounding is to nearest, ties to even, or stochastic; magnitudes past the largest saturate; NaN stays NaN
if the format has one.

Sources: OCP 8-bit Floating Point Specification; OCP Microscaling Formats (MX) Specification v1.0; Sun et al., "Hybrid
8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", NeurIPS 2019.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cutlayer.codecs.scratch import chunks, known_false, scratch
from cutlayer.formats import E2M1, E2M3, E3M2, E4M3, E4M3_HFP8, E5M2, Element

__all__ = ["E2M1", "E2M3", "E3M2", "E4M3", "E4M3_HFP8", "E5M2", "Element"]


# PyTorch's own casts and the power of two that goes before; its e4m3fnuz is HFP8's format with bias 8 in place of 11.
_NATIVE = {
    E4M3: (torch.float8_e4m3fn, 1.0),
    E5M2: (torch.float8_e5m2, 1.0),
    E4M3_HFP8: (torch.float8_e4m3fnuz, 8.0),
}


def quantize(
    values: Tensor, element: Element, gain: float | Tensor = 1.0, noise: Tensor | None = None, bounded: bool = False
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
    values = values.detach().contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    draws = chunks(noise.contiguous()) if noise is not None else None
    for number, (part, out) in enumerate(zip(chunks(values), chunks(codes), strict=True)):
        scaled = torch.mul(part, gain, out=scratch(0, part.numel(), torch.float32, part.device))
        if not bounded:
            scaled.clamp_(-element.largest, element.largest)
        round_into(out, scaled, element, draws[number] if draws is not None else None)
    if element.nan is not None and not bounded and not (values.numel() and known_false(values.max().isnan())):
        codes.masked_fill_(values.isnan(), element.nan)
    return codes


def round_into(codes: Tensor, values: Tensor, element: Element, noise: Tensor | None = None) -> None:
    """Write the codes of a flat chunk of values within the range; the chunk and slots 1 and 2 serve as scratch."""
    if noise is not None:
        _stochastic(codes, values, element, noise)
    elif element in _NATIVE:
        dtype, gain = _NATIVE[element]
        codes.view(dtype).copy_(values if gain == 1.0 else values.mul_(gain))
    else:
        _nearest(codes, values, element)


def dequantize(codes: Tensor, element: Element, gain: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Float32 values of `codes` (uint8) times `gain`, in the shape of `codes`; written to `out` (contiguous) if given.

    The bits of a code, moved to the place they have in float16, are that value times a power of two, subnormals
    included; so the hardware's float16 conversion does the work.
    """
    codes = codes.contiguous()
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device) if out is None else out
    to_top = 8 - element.bits
    shift = 10 - element.mantissa - to_top
    keep = ((1 << (element.bits - 1)) - 1) << (10 - element.mantissa) | 0x8000
    factors = [2.0 ** (element.lowest + 14), gain]
    if 2.0**-126 <= abs(factors[0] * gain) < 2.0**128:  # one multiplication, if that rounds as two do
        factors = [factors[0] * gain]
    for part, target in zip(chunks(codes), chunks(values), strict=True):
        half = scratch(0, part.numel(), torch.int16, part.device)
        # Sign extension puts the sign bit where float16 has it; the copies of it in between are cut out.
        signed = (part << to_top if to_top else part).view(torch.int8)
        if part.device.type == "cpu":  # NumPy widens and multiplies in one pass
            bits = half.numpy()
            np.multiply(signed.numpy(), np.int16(1 << shift), out=bits)
            if shift < 8:
                np.bitwise_and(bits, np.int16(keep - 0x10000), out=bits)
        else:
            half.copy_(signed).mul_(1 << shift).bitwise_and_(keep - 0x10000)
        target.copy_(half.view(torch.float16))
        for factor in factors:
            if factor != 1.0:
                target.mul_(factor)
    if (nans := _nan_codes(codes, element)) is not None:
        values.masked_fill_(nans, torch.nan)
    return values


def powers_of_two(codes: Tensor) -> Tensor:
    """The scales 2^(code - 127) as float32, of codes 0 to 255 in any integer type; 255 is NaN (E8M0 of MX)."""
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


def _nearest(codes: Tensor, values: Tensor, element: Element) -> None:
    """To nearest, ties to even."""
    width = 23 - element.mantissa
    magnitudes, powers = _parts(values, element)
    powers.add_(width << 23)
    # The sum of a magnitude and 2^width times its power of two has one quantum as its last bit: hardware rounds it.
    magnitudes.view(torch.float32).add_(powers.view(torch.float32))
    torch.bitwise_right_shift(magnitudes, width, out=powers)
    magnitudes.add_(powers).sub_((127 + width + element.lowest) << element.mantissa)
    _write(codes, magnitudes, values, element)


def _stochastic(codes: Tensor, values: Tensor, element: Element, noise: Tensor) -> None:
    """Up if noise exceeds what is missing to the next code."""
    width = 23 - element.mantissa
    magnitudes, powers = _parts(values, element)
    # Fixed point with `width` bits after the point, the point standing at the quantum.
    units = torch.sub(150 << 23, powers).add_(127 << 23).view(torch.float32)
    fixed = magnitudes.view(torch.float32).mul_(units).to(torch.int32)
    quanta = fixed.add_(noise & ((1 << width) - 1)).bitwise_right_shift_(width)
    quanta.add_(powers.bitwise_right_shift_(width)).sub_((127 + element.lowest) << element.mantissa)
    _write(codes, quanta, values, element)


def _parts(values: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """Bits of the magnitudes, and of their powers of two, none below the smallest normal number; both as int32."""
    bits, count = values.view(torch.int32), values.numel()
    magnitudes = torch.bitwise_and(bits, 0x7FFFFFFF, out=scratch(1, count, torch.int32, values.device))
    powers = torch.bitwise_and(magnitudes, 0x7F800000, out=scratch(2, count, torch.int32, values.device))
    return magnitudes, powers.clamp_(min=(127 + element.lowest) << 23)


def _write(codes: Tensor, magnitudes: Tensor, values: Tensor, element: Element) -> None:
    """Codes from the low bits of those of the magnitudes, and the signs of the values."""
    signs = values.view(torch.int32).bitwise_right_shift_(31).bitwise_and_(1 << (element.bits - 1))
    codes.copy_(magnitudes.bitwise_or_(signs))
    if not element.negative_zero:
        codes.masked_fill_(codes == 0x80, 0)


def _nan_codes(codes: Tensor, element: Element) -> Tensor | None:
    """Where codes mean NaN though their bits, read as float16, do not; None if it is known that none does."""
    if element.nan is None or element.mantissa == 2 or codes.numel() == 0:
        return None
    if codes.device.type == "cpu":
        signed = codes.view(torch.int8)
        if int(codes.max()) < 0xFF and int(signed.max()) < 0x7F if element.negative_zero else int(signed.min()) > -0x80:
            return None
    return (codes & 0x7F) == 0x7F if element.negative_zero else codes == 0x80
