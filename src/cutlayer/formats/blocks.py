"""Block formats: small floats that share a scale with the few values beside them.

A sample is flattened and cut into blocks; the last block may be short. A row is the scales of its blocks, a byte
each, then the elements, tightly packed. Sources: OCP Microscaling Formats (MX) Specification v1.0 (2023), section 6.3;
NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix on quantization.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cutlayer.formats.base import Codec, Encoded, Layout, nothing_shared, numel, read_float32
from cutlayer.formats.bits import pack_bits, packed_bytes, planes_of, unpack_bits
from cutlayer.formats.elements import CHUNK, E4M3, Element, dequantize, known_false, noise_for, powers_of_two, quantize
from cutlayer.formats.floats import tensor_peak

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
        flat = values.detach().to(torch.float32).reshape(values.shape[0], numel(shape))
        tensor_scale, shared = self.tensor_scale(flat)
        rows = torch.empty((len(flat), self.layout(shape).row_bytes), dtype=torch.uint8, device=flat.device)
        noise = noise_for(flat, seed) if self.stochastic else None
        count, blocks = flat.shape[1], self.blocks(shape)
        for part in self._parts(flat):
            samples = flat[part]
            cut = self._blocked(samples)
            scales, divisors = self.scales(cut, tensor_scale)
            scaled = cut.nan_to_num(0.0).div_(divisors.unsqueeze(2)).flatten(1)[:, :count]
            codes = quantize(scaled, self.element, noise=None if noise is None else noise[part])
            rows[part, :blocks] = scales
            rows[part, blocks:] = pack_bits(codes, self.element.bits)
        return Encoded(self.name, shape, rows, shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]."""
        count, blocks = numel(encoded.shape), self.blocks(encoded.shape)
        rows = encoded.rows
        values = torch.empty((len(rows), count), dtype=torch.float32, device=rows.device)
        for part in self._parts(values):
            shared = encoded.shared if len(encoded.shared) == 1 else encoded.shared[part]
            codes = unpack_bits(rows[part, blocks:], count, self.element.bits)
            scaled = self._blocked(dequantize(codes, self.element))
            scales = self.multipliers(rows[part, :blocks], shared)
            values[part] = scaled.mul_(scales.unsqueeze(2)).flatten(1)[:, :count]
        return values.reshape(len(rows), *encoded.shape)

    def tensor_scale(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """The scale of the whole tensor, if the format has one, and it as `shared` bytes."""
        return None, nothing_shared(values.device)

    @abstractmethod
    def scales(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale codes (uint8 [B, blocks]) of float32 [B, blocks, block], and what values are divided by (or inf)."""

    @abstractmethod
    def multipliers(self, scales: Tensor, shared: Tensor) -> Tensor:
        """What elements are multiplied with: float32 [B, blocks] from the scale codes and `shared`."""

    def _blocked(self, flat: Tensor) -> Tensor:
        """[b, n] as [b, blocks, block], the last block filled up with zeros."""
        if tail := -flat.shape[1] % self.block:
            flat = torch.nn.functional.pad(flat, (0, tail))
        return flat.reshape(len(flat), flat.shape[1] // self.block, self.block)

    def _parts(self, flat: Tensor) -> Iterator[slice]:
        """Slices of the batch of about a chunk of values each, so that the work stays in the cache."""
        step = max(1, CHUNK // max(1, flat.shape[1])) if flat.device.type == "cpu" else max(1, len(flat))
        for start in range(0, len(flat) if flat.numel() else 0, step):
            yield slice(start, start + step)


@dataclass(frozen=True)
class MX(BlockFloat):
    """OCP MX: the scale is a power of two, E8M0: 2^(code - 127), the code 0xFF being NaN.

    Its exponent is floor(log2(max |v|)) - emax of the element format, and elements saturate. What the specification
    leaves open: a block with a NaN gets a NaN scale, so that all of it decodes to NaN and is refused by the receiver;
    infinities saturate and are left out of the maximum; a block of zeros has the smallest scale.
    """

    def scales(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale codes and the powers of two they stand for."""
        peaks, nan = _peaks(blocks)
        _, exponents = torch.frexp(peaks)  # peak = mantissa in [1/2, 1) times 2^exponent
        exponents = (exponents - 1 - self.element.highest).clamp_(-127, 127)
        exponents.masked_fill_(peaks == 0, -127)
        codes = (exponents + 127).to(torch.uint8).masked_fill_(nan, E8M0_NAN)
        return codes, powers_of_two(codes).masked_fill_(nan, torch.inf)

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

    def scales(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale codes, and the product of the scales of block and tensor."""
        assert tensor_scale is not None
        peaks, nan = _peaks(blocks)
        codes = quantize(peaks / self.element.largest / tensor_scale, E4M3).masked_fill_(nan, 0x7F)
        divisors = dequantize(codes, E4M3) * tensor_scale
        return codes, divisors.masked_fill_((divisors == 0) | nan, torch.inf)

    def multipliers(self, scales: Tensor, shared: Tensor) -> Tensor:
        """Product of the scales of block and tensor."""
        return dequantize(scales, E4M3) * read_float32(shared)


def _peaks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Largest finite magnitude along the last dimension, and whether there is a NaN."""
    if blocks.shape[-1] == 0:
        return blocks.new_zeros(blocks.shape[:-1]), torch.zeros(
            blocks.shape[:-1], dtype=torch.bool, device=blocks.device
        )
    low, high = torch.aminmax(blocks, dim=-1)
    peaks = torch.maximum(-low, high).abs_()  # no -0
    if known_false(~torch.isfinite(peaks).all()):
        return peaks, torch.zeros_like(peaks, dtype=torch.bool)
    return blocks.abs().masked_fill(~blocks.isfinite(), 0.0).amax(-1), blocks.isnan().any(-1)
