"""Integers with a scale and a zero point for each channel: int8 and int4.

value = step * (code - zero), with step and zero chosen for each channel (dimension 1 of [B, C, ...]) so that the codes
span its values and 0 is exact. The zero point is rounded, so one end of a channel may lie up to half a step outside the
codes. To nearest, saturating it costs no more than rounding does elsewhere; stochastic rounding would be biased there,
so its step is widened (by 1 / 14 at most for int4, 1 / 254 for int8) until all values lie within the codes.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(arXiv 1712.05877), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cutlayer.codecs.base import Codec, Encoded, Layout, as_float32, channels, numel, read_float32
from cutlayer.codecs.bits import pack_bits, packed_bytes, planes_of, unpack_bits
from cutlayer.codecs.elements import noise_for
from cutlayer.codecs.floats import by_channel
from cutlayer.codecs.scratch import batch_parts, known_false, scratch

# Just below float32's largest number, so that a quotient of it, rounded up, times the divisor is still finite.
LARGEST = torch.finfo(torch.float32).max * (1 - 2.0**-23)


@dataclass(frozen=True)
class AffineInteger(Codec):
    """Codes of `bits` bits; `shared` holds the float32 steps of all channels, then their zero points, a byte each.

    Infinities saturate and are left out of the range; a channel with a NaN has a NaN step, so that it decodes to NaN
    and the receiver refuses it.
    """

    bits: int
    stochastic: bool = False

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(packed_bytes(numel(shape), self.bits), 5 * channels(shape))

    def streams(self, shape: tuple[int, ...]) -> list[slice]:
        """The planes of the codes."""
        ends = [0]
        for plane in planes_of(self.bits):
            ends.append(ends[-1] + -(-numel(shape) * plane // 8))
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        shape = tuple(values.shape[1:])
        batch, top = values.shape[0], (1 << self.bits) - 1
        grouped = by_channel(as_float32(values))
        low, high, nan, finite = _ranges(grouped)
        steps, zeros = _covering(low, high, top) if self.stochastic else _nearest(low, high, top)
        # So that no code decodes to infinity; only a range beyond that of float32 itself has such a step.
        steps = torch.minimum(steps, LARGEST / torch.maximum(zeros, top - zeros))
        rows = torch.empty((batch, self.layout(shape).row_bytes), dtype=torch.uint8, device=values.device)
        noise = noise_for(grouped, seed) if self.stochastic else None
        for part in batch_parts(grouped):
            cut = grouped[part]
            scaled = scratch(0, cut.numel(), torch.float32, cut.device).view(cut.shape)
            torch.div(cut, steps.unsqueeze(1), out=scaled)
            if not finite:
                scaled.nan_to_num_(0.0)
            scaled.add_(zeros.unsqueeze(1))
            if noise is not None:  # 16 bits, so that the sum of them and a code of 8 is exact, and whole codes stay
                scaled.add_((noise[part] & 0xFFFF).to(torch.float32).mul_(2.0**-16)).floor_()
            codes = scratch(3, cut.numel(), torch.uint8, cut.device).copy_(scaled.round_().clamp_(0, top).view(-1))
            rows[part] = pack_bits(codes.view(len(cut), numel(shape)), self.bits)
        steps.masked_fill_(nan, torch.nan)
        shared = torch.cat([steps.view(torch.uint8), zeros.to(torch.uint8)]).reshape(1, -1)
        return Encoded(self.name, shape, rows, shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        count, groups, shared = numel(encoded.shape), channels(encoded.shape), encoded.shared
        steps = read_float32(shared[:, : 4 * groups]).unsqueeze(2)
        zeros = shared[:, 4 * groups :].to(torch.float32).unsqueeze(2)
        codes = by_channel(unpack_bits(encoded.rows, count, self.bits).reshape(len(encoded), *encoded.shape))
        return codes.to(torch.float32).sub_(zeros).mul_(steps).reshape(len(encoded), *encoded.shape)


def _nearest(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Steps of ranges (each [C], low <= 0 <= high) cut into `top` parts, and the zero points nearest to theirs."""
    # Halves before the difference, which could overflow; a step is a normal number, so that its inverse is finite.
    steps = ((high * 0.5 - low * 0.5) / (top * 0.5)).clamp_(min=2.0**-126)
    return steps, (-low / steps).round_().clamp_(0, top)


def _covering(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The smallest steps with which a whole zero point has codes for all of each range, and those zero points."""
    steps, _ = _nearest(low, high, top)
    below = (-low / steps).floor_().clamp_(0, top - 1)
    above = below + 1
    needed = [
        torch.maximum(torch.where(low < 0, -low / zeros, 0.0), torch.where(high > 0, high / (top - zeros), 0.0))
        for zeros in (below, above)
    ]
    return torch.minimum(*needed).clamp_(min=2.0**-126), torch.where(needed[0] <= needed[1], below, above)


def _ranges(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Of each channel of [B, C, n]: least and largest finite value and 0 between them, and whether it has a NaN; at
    last, whether all values are known to be finite.
    """
    zeros = torch.zeros(grouped.shape[1], device=grouped.device)
    if grouped.numel() == 0:
        return zeros, zeros, zeros.bool(), True
    low, high = grouped.amin((0, 2)), grouped.amax((0, 2))
    finite = known_false(~(torch.isfinite(low) & torch.isfinite(high)).all())
    nan = zeros.bool() if finite else grouped.isnan().any(2).any(0)
    if not finite:
        values = torch.where(grouped.isfinite(), grouped, 0.0)
        low, high = values.amin((0, 2)), values.amax((0, 2))
    return low.clamp_(max=0.0), high.clamp_(min=0.0), nan, finite
