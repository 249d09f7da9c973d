"""Sparsification: the k largest values of each sample, or k of them at random, in another codec's form.

A row says which values are there, in as few bits as a layout of fixed size allows, then holds them. Sources: top-k in
Aji and Heafield, "Sparse Communication for Distributed Gradient Descent" (arXiv 1704.05021); randomized top-k in Zheng
et al., "Reducing Communication for Split Learning by Randomized Top-k Sparsification" (arXiv 2305.18469); the coding of
positions in Elias, "Efficient storage and retrieval by content and address of static files" (J. ACM 21, 1974).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutlayer.codecs.base import Codec, Encoded, Layout, as_float32, isfinite, numel
from cutlayer.codecs.bits import pack_bits, packed_bytes, unpack_bits
from cutlayer.codecs.elements import uniform_bits
from cutlayer.errors import RefusedError


@dataclass(frozen=True)
class TopK(Codec):
    """Sends a fraction of each sample's values, at least one, in the form of `inner`; the others decode to 0.

    Attributes:
        inner: codec of the values that are sent, one channel [B, 1, k] in the order of their positions.
        fraction: share of the values that is sent; k is rounded up.
        chance: 0 sends the k largest magnitudes (of equal ones the first). Above 0, each of the k places goes, with
            this chance, to one of the others instead, drawn evenly (`randtopk`), so that these go on learning, too.

    If the sparse form would not be smaller than `inner` alone, the rows are those of `inner`.
    """

    inner: Codec
    fraction: float
    chance: float = 0.0

    def sent(self, shape: tuple[int, ...]) -> int | None:
        """Values sent of a sample of this shape; None if the dense form is sent because it is no larger."""
        count = numel(shape)
        k = min(count, math.ceil(self.fraction * count))
        sparse, dense = self.inner.layout((1, k)), self.inner.layout(shape)
        smaller = position_bytes(count, k) + sparse.row_bytes < dense.row_bytes
        return k if smaller and sparse.shared_bytes <= dense.shared_bytes else None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape."""
        if (k := self.sent(shape)) is None:
            return self.inner.layout(shape)
        inner = self.inner.layout((1, k))
        return Layout(position_bytes(numel(shape), k) + inner.row_bytes, inner.shared_bytes)

    def streams(self, shape: tuple[int, ...]) -> list[slice]:
        """The positions, then what the inner codec has."""
        if (k := self.sent(shape)) is None:
            return self.inner.streams(shape)
        start = position_bytes(numel(shape), k)
        moved = [slice(s.start + start, s.stop + start, s.step) for s in self.inner.streams((1, k))]
        return [slice(0, start), *moved]

    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode float [B, *shape]."""
        shape = tuple(values.shape[1:])
        if (k := self.sent(shape)) is None:
            dense = self.inner.encode(values, seed)
            return Encoded(self.name, shape, dense.rows, dense.shared)
        flat = as_float32(values).reshape(len(values), numel(shape))
        mask = largest(flat.abs(), k)
        if self.chance > 0:
            mask = _exchanged(mask, k, self.chance, seed)
        inner = self.inner.encode(flat.reshape(-1)[_places(mask)].reshape(len(flat), 1, k), seed)
        return Encoded(self.name, shape, torch.cat([pack_positions(mask, k), inner.rows], 1), inner.shared)

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape]. Raises RefusedError if the rows do not hold k positions each."""
        shape, rows = encoded.shape, encoded.rows
        if (k := self.sent(shape)) is None:
            return self.inner.decode(Encoded(self.inner.name, shape, rows, encoded.shared))
        start = position_bytes(numel(shape), k)
        values = rows[:, start:].clone(memory_format=torch.contiguous_format)  # aligned for any element type
        inner = self.inner.decode(Encoded(self.inner.name, (1, k), values, encoded.shared))
        mask = unpack_positions(rows[:, :start], numel(shape), k)
        values = torch.zeros((len(rows), numel(shape)), dtype=torch.float32, device=rows.device)
        return values.masked_scatter_(mask, inner).reshape(len(rows), *shape)

    def check(self, encoded: Encoded) -> None:
        """Raises RefusedError if the positions of a row are not k in number."""
        self.inner.check(encoded)
        if (k := self.sent(encoded.shape)) is not None:
            unpack_positions(encoded.rows[:, : position_bytes(numel(encoded.shape), k)], numel(encoded.shape), k)


def largest(magnitudes: Tensor, k: int) -> Tensor:
    """Mask of the k largest in each row of [B, n], of equal ones the first: the same on all devices. NaN is largest."""
    if not (magnitudes.device.type == "cpu" and isfinite(magnitudes)):
        magnitudes = magnitudes.masked_fill(magnitudes.isnan(), torch.inf)
    if magnitudes.device.type == "cpu":  # NumPy's selection is vectorized
        place = magnitudes.shape[1] - k
        threshold = torch.from_numpy(np.partition(magnitudes.numpy(), place, axis=1)[:, place : place + 1])
    else:
        threshold = magnitudes.topk(k, dim=1).values[:, -1:]
    mask = magnitudes >= threshold
    tied = (mask.sum(1) > k).nonzero()[:, 0]
    equal = magnitudes[tied] == threshold[tied]
    spare = k - (mask[tied] & ~equal).sum(1, keepdim=True)
    mask[tied] &= ~equal | (equal.cumsum(1) <= spare)
    return mask


def _exchanged(mask: Tensor, k: int, chance: float, seed: int) -> Tensor:
    """The mask with about chance * k of its entries, drawn evenly, given to others, drawn evenly."""
    batch, count = mask.shape
    draws = torch.from_numpy(uniform_bits(seed, 1, batch * count + batch * k)).to(mask.device)
    coins = draws[batch * count :].reshape(batch, k)
    moved = (coins < round((2 * chance - 1) * 2**31)).sum(1, keepdim=True).clamp_(max=count - k)
    most = int(moved.max()) if batch else 0
    if most == 0:
        return mask
    # Everyone draws a number, all different; of the chosen the `moved` lowest leave, of the others as many come in.
    lots = (draws[: batch * count].reshape(batch, count).long() << 31) + torch.arange(count, device=mask.device)
    never = torch.iinfo(torch.int64).max
    leaving = lots.masked_fill(~mask, never).topk(most, largest=False).indices
    coming = lots.masked_fill_(mask, never).topk(most, largest=False).indices
    taken = torch.arange(most, device=mask.device) < moved
    mask = mask.scatter(1, leaving, mask.gather(1, leaving) & ~taken)
    return mask.scatter_(1, coming, mask.gather(1, coming) | taken)


def low_bits(count: int, k: int) -> int | None:
    """Low bits of a position in the Elias-Fano form of k of `count` positions; None if a mask is no larger."""
    if k == 0:
        return None
    low = max(0, math.floor(math.log2(count / k)))
    return low if _elias_fano_bytes(count, k, low) < -(-count // 8) else None


def position_bytes(count: int, k: int) -> int:
    """Bytes that say which k of `count` values are there."""
    low = low_bits(count, k)
    return -(-count // 8) if low is None else _elias_fano_bytes(count, k, low)


def pack_positions(mask: Tensor, k: int) -> Tensor:
    """A mask [B, n] with k entries set in each row, as uint8 [B, position_bytes(n, k)].

    Either the mask, or the positions in Elias-Fano form: the low bits of each, and the differences of the high parts in
    unary, which together are a string of n / 2^low + k bits in which bit (high part + rank) is set.
    """
    batch, count = mask.shape
    if (low := low_bits(count, k)) is None:
        return pack_bits(mask.to(torch.uint8), 1)
    positions = (_places(mask) % count).reshape(batch, k)
    unary = torch.zeros((batch, (count >> low) + k + 1), dtype=torch.uint8, device=mask.device)
    unary.scatter_(1, (positions >> low) + torch.arange(k, device=mask.device), 1)
    lows = ((positions.unsqueeze(2) >> torch.arange(low, device=mask.device)) & 1).to(torch.uint8).flatten(1)
    return torch.cat([pack_bits(lows, 1), pack_bits(unary, 1)], 1)


def unpack_positions(packed: Tensor, count: int, k: int) -> Tensor:
    """Inverse of `pack_positions`: bool [B, count] with k entries set in each row, or RefusedError."""
    batch = len(packed)
    if (low := low_bits(count, k)) is None:
        mask = unpack_bits(packed, count, 1).bool()
    else:
        split = packed_bytes(k * low, 1)
        unary = unpack_bits(packed[:, split:], (count >> low) + k + 1, 1).bool()
        _refuse_unless(bool((unary.sum(1) == k).all()), k)
        ranks = torch.arange(batch * k, device=packed.device) % k
        highs = (_places(unary) % unary.shape[1] - ranks).reshape(batch, k)
        bits = unpack_bits(packed[:, :split], k * low, 1).reshape(batch, k, low).long()
        positions = (highs << low) + (bits << torch.arange(low, device=packed.device)).sum(2)
        _refuse_unless(bool((positions < count).all()), k)
        mask = torch.zeros((batch, count), dtype=torch.bool, device=packed.device).scatter_(1, positions, True)
    _refuse_unless(bool((mask.sum(1) == k).all()), k)
    return mask


def _places(mask: Tensor) -> Tensor:
    """Where a mask is set, as int64 places of the flat tensor."""
    if mask.device.type == "cpu":  # NumPy is several times as fast
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero()[:, 0]


def _elias_fano_bytes(count: int, k: int, low: int) -> int:
    return packed_bytes(k * low, 1) + packed_bytes((count >> low) + k + 1, 1)


def _refuse_unless(good: bool, k: int) -> None:
    if not good:
        raise RefusedError(f"sparse rows: expected {k} different positions inside each sample, got others")
