"""Block formats: small floats that share a scale with the few values beside them.

A sample is flattened and cut into blocks; the last block may be short. A row is the scales of its blocks, a byte
each, then the elements, tightly packed. Sources: OCP Microscaling Formats (MX) Specification v1.0 (2023), section 6.3;
NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix on quantization.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cutlayer.codecs.base import Codec, Encoded, Layout, as_float32, nothing_shared, numel, read_float32
from cutlayer.codecs.bits import pack_bits, packed_bytes, planes_of, unpack_bits
from cutlayer.codecs.elements import E4M3, Element, dequantize, noise_for, powers_of_two, quantize, round_into
from cutlayer.codecs.floats import tensor_peak
from cutlayer.codecs.scratch import batch_parts, known_false, scratch

E8M0_NAN = 0xFF


@dataclass(frozen=True)
class BlockFloat(Codec):
    """Blocks of `block` elements with a scale of one byte. What a scale means is up to the subclass."""

    element: Element
    block: int
    stochastic: bool = False

    def blocks(self, shape: tuple[int, ...]) -> int:
        """Blocks in a sample of this shape."""
        return -(-numel(shape) // self.block)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(self.blocks(shape) + packed_bytes(numel(shape), self.element.bits), 0)

    def streams(self, shape: tuple[int, ...]) -> list[slice]:
        """The scales, then the elements plane by plane."""
        ends = [0, self.blocks(shape)]
        for plane in planes_of(self.element.bits):
            ends.append(ends[-1] + -(-numel(shape) * plane // 8))
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        shape = tuple(values.shape[1:])
        flat = as_float32(values).reshape(values.shape[0], numel(shape))
        tensor_scale, shared = self.tensor_scale(flat)
        rows = torch.empty((len(flat), self.layout(shape).row_bytes), dtype=torch.uint8, device=flat.device)
        noise = noise_for(flat, seed) if self.stochastic else None
        count, blocks = flat.shape[1], self.blocks(shape)
        for part in batch_parts(flat):
            cut = self._blocked(flat[part])
            scales, divisors, finite = self.scales(cut, tensor_scale)
            scaled = scratch(0, cut.numel(), torch.float32, cut.device).view(cut.shape)
            torch.div(cut if finite else cut.nan_to_num(0.0), divisors.unsqueeze(2), out=scaled)
            scaled.clamp_(-self.element.largest, self.element.largest)
            codes = scratch(3, cut.numel(), torch.uint8, cut.device)
            draw = None if noise is None else self._blocked(noise[part]).reshape(-1)
            round_into(codes, scaled.view(-1), self.element, draw)
            rows[part, :blocks] = scales
            rows[part, blocks:] = pack_bits(codes.view(len(cut), -1)[:, :count], self.element.bits)
        return Encoded(self.name, shape, rows, shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        count, blocks = numel(encoded.shape), self.blocks(encoded.shape)
        rows = encoded.rows
        values = torch.empty((len(rows), count), dtype=torch.float32, device=rows.device)
        for part in batch_parts(values):
            shared = encoded.shared if len(encoded.shared) == 1 else encoded.shared[part]
            codes = unpack_bits(rows[part, blocks:], count, self.element.bits)
            scales = self.multipliers(rows[part, :blocks], shared).unsqueeze(2)
            if count % self.block == 0:
                dequantize(codes, self.element, out=values[part])
                self._blocked(values[part]).mul_(scales)
            else:
                values[part] = self._blocked(dequantize(codes, self.element)).mul_(scales).flatten(1)[:, :count]
        return values.reshape(len(rows), *encoded.shape)

    def tensor_scale(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """The scale of the whole tensor, if the format has one, and it as `shared` bytes."""
        return None, nothing_shared(values.device)

    @abstractmethod
    def scales(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Of float32 [B, blocks, block]: the scale codes (uint8 [B, blocks]), what the values of each block are divided
        by (inf: they become 0), and whether all values are known to be finite.
        """

    @abstractmethod
    def multipliers(self, scales: Tensor, shared: Tensor) -> Tensor:
        """What elements are multiplied with: float32 [B, blocks] from the scale codes and `shared`."""

    def _blocked(self, flat: Tensor) -> Tensor:
        """[b, n] as [b, blocks, block], the last block filled up with zeros."""
        if tail := -flat.shape[1] % self.block:
            flat = torch.nn.functional.pad(flat, (0, tail))
        return flat.reshape(len(flat), flat.shape[1] // self.block, self.block)


@dataclass(frozen=True)
class MX(BlockFloat):
    """OCP MX: the scale is a power of two, E8M0: 2^(code - 127), the code 0xFF being NaN.

    Its exponent is floor(log2(max |v|)) - emax of the element format, and elements saturate. What the specification
    leaves open: a block with a NaN gets a NaN scale, so that all of it decodes to NaN and is refused by the receiver;
    infinities saturate and are left out of the maximum; a block of zeros has the smallest scale.
    """

    def scales(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Scale codes and the powers of two they stand for."""
        peaks, nan, finite = _peaks(blocks)
        # The exponent bits of a float32 are floor(log2) + 127, or 0 for subnormals, far below the smallest scale.
        exponents = (peaks.view(torch.int32) >> 23).sub_(self.element.highest).clamp_(0, 254)
        codes = exponents.to(torch.uint8).masked_fill_(nan, E8M0_NAN)
        return codes, powers_of_two(codes).masked_fill_(nan, torch.inf), finite

    def multipliers(self, scales: Tensor, shared: Tensor) -> Tensor:
        """Powers of two; NaN for the code 0xFF."""
        return powers_of_two(scales)


@dataclass(frozen=True)
class NVFP4(BlockFloat):
    """NVFP4: E4M3 scales of 16 values each, and one float32 for the tensor that brings them into E4M3's range.

    tensor scale t = max |x| / (6 * 448); block scale s = E4M3(max |block| / 6 / t); element = E2M1(x / (s t)). NaN and
    infinities as in `MX`.
    """

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(super().layout(shape).row_bytes, 4)

    def tensor_scale(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """float32 scalar, and its four bytes."""
        peak, _ = tensor_peak(values)
        # No smaller than the smallest normal number: divisors stay normal, and zeros divide to zeros.
        scale = (peak / (self.element.largest * E4M3.largest)).clamp_(min=2.0**-126)
        return scale, scale.reshape(1, 1).view(torch.uint8)

    def scales(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Scale codes, and the product of the scales of block and tensor."""
        assert tensor_scale is not None
        peaks, nan, finite = _peaks(blocks)
        codes = quantize(peaks / self.element.largest / tensor_scale, E4M3).masked_fill_(nan, 0x7F)
        divisors = dequantize(codes, E4M3) * tensor_scale
        return codes, divisors.masked_fill_((divisors == 0) | nan, torch.inf), finite

    def multipliers(self, scales: Tensor, shared: Tensor) -> Tensor:
        """Product of the scales of block and tensor."""
        return dequantize(scales, E4M3) * read_float32(shared)


def _peaks(blocks: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Largest finite magnitude of each block, whether it has a NaN, and whether all values are known to be finite."""
    if blocks.numel() == 0:
        nothing = blocks.new_zeros(blocks.shape[:-1])
        return nothing, nothing.bool(), True
    magnitudes = scratch(0, blocks.numel(), torch.float32, blocks.device).view(blocks.shape)
    peaks = torch.abs(blocks, out=magnitudes).amax(-1)
    if known_false(~torch.isfinite(peaks.amax())):
        return peaks, torch.zeros_like(peaks, dtype=torch.bool), True
    return magnitudes.masked_fill(~blocks.isfinite(), 0.0).amax(-1), blocks.isnan().any(-1), False
