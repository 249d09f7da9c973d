"""Whole numbers (labels, sample ids), sent in the narrowest type that holds a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.codecs.base import Codec, Encoded, Layout, as_rows, from_rows, nothing_shared, numel


@dataclass(frozen=True)
class Integers(Codec):
    """Whole numbers of one width; decodes to int64."""

    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        return Layout(numel(shape) * self.dtype.itemsize, 0)

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode whole numbers [B, *shape] that fit the type; `narrowest` picks one that does."""
        codes = values.to(self.dtype)
        return Encoded(self.name, tuple(values.shape[1:]), as_rows(codes), nothing_shared(values.device))

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to int64 [B, *shape]."""
        return from_rows(encoded.rows, self.dtype, encoded.shape).to(torch.int64)


U8 = Integers("u8", torch.uint8)
U16 = Integers("u16", torch.uint16)
U32 = Integers("u32", torch.uint32)
I64 = Integers("i64", torch.int64)


def narrowest(values: Tensor) -> Integers:
    """The narrowest integer codec that holds every value of the tensor."""
    if values.numel() == 0:
        return U8
    low, high = (int(v) for v in torch.aminmax(values))
    for codec in (U8, U16, U32):
        if low >= 0 and high <= torch.iinfo(codec.dtype).max:
            return codec
    return I64
