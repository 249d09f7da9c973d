"""Integers with a scale and a zero point for each channel: int8 and int4.

value = step * (code - zero), with step and zero chosen for each channel (dimension 1 of [B, C, ...]) so that the codes
span its values and 0 is exact. Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (arXiv 1712.05877), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cutlayer.formats.base import Codec, Encoded, Layout, channels, numel, read_float32
from cutlayer.formats.bits import pack_bits, packed_bytes, planes_of, unpack_bits
from cutlayer.formats.elements import noise_for
from cutlayer.formats.floats import by_channel
from cutlayer.formats.scratch import known_false


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
        grouped = by_channel(values.detach().to(torch.float32))
        low, high = _ranges(grouped)
        # Halves before the difference, which could overflow; a step is a normal number, so that its inverse is finite.
        steps = ((high * 0.5 - low * 0.5) / (top * 0.5)).clamp_(min=2.0**-126)
        zeros = (-low / steps).round_().clamp_(0, top)
        scaled = (grouped / steps.reshape(1, -1, 1)).nan_to_num_(0.0).add_(zeros.reshape(1, -1, 1))
        if self.stochastic:
            noise = noise_for(grouped, seed).bitwise_and_((1 << 24) - 1)
            scaled = scaled.add_(noise.to(torch.float32).mul_(2.0**-24)).floor_()
        codes = scaled.round_().clamp_(0, top).to(torch.uint8).reshape(batch, numel(shape))
        steps.masked_fill_(grouped.isnan().any(2).any(0), torch.nan)
        shared = torch.cat([steps.view(torch.uint8), zeros.to(torch.uint8)]).reshape(1, -1)
        return Encoded(self.name, shape, pack_bits(codes, self.bits), shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        count, groups, shared = numel(encoded.shape), channels(encoded.shape), encoded.shared
        steps = read_float32(shared[:, : 4 * groups]).unsqueeze(2)
        zeros = shared[:, 4 * groups :].to(torch.float32).unsqueeze(2)
        codes = by_channel(unpack_bits(encoded.rows, count, self.bits).reshape(len(encoded), *encoded.shape))
        return codes.to(torch.float32).sub_(zeros).mul_(steps).reshape(len(encoded), *encoded.shape)


def _ranges(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest finite value of each channel of [B, C, n], and 0 between them."""
    if grouped.numel() == 0:
        zeros = torch.zeros(grouped.shape[1], device=grouped.device)
        return zeros, zeros
    low, high = grouped.amin((0, 2)), grouped.amax((0, 2))
    if not known_false(~(torch.isfinite(low) & torch.isfinite(high)).all()):
        finite = torch.where(grouped.isfinite(), grouped, 0.0)
        low, high = finite.amin((0, 2)), finite.amax((0, 2))
    return low.clamp_(max=0.0), high.clamp_(min=0.0)
