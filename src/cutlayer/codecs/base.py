"""What a codec is: a batch of tensors to rows of bytes and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import RefusedError

MAX_VALUES = 1 << 48
# The sparsest forms need a few bits for a value that is sent, and nothing for the thousands that are not.
MAX_VALUES_PER_BYTE = 1 << 14


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch in a codec's form: one row of bytes for each sample, so that samples can be stored and drawn singly.

    Attributes:
        codec: name of the codec that wrote it, and that reads it.
        shape: shape of one sample, without the batch dimension.
        rows: uint8 [B, R], the codes of sample b in row b.
        shared: uint8 [1, S] (one for the batch) or [B, S] (one for each sample): what the codec needs beside
            the codes, such as a scale. S may be 0.
    """

    codec: str
    shape: tuple[int, ...]
    rows: Tensor
    shared: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and of what is shared."""
        return self.rows.numel() + self.shared.numel()

    def to(self, device: torch.device) -> Encoded:
        """The same on another device, so that decoding happens there and only codes travel."""
        return Encoded(self.codec, self.shape, self.rows.to(device), self.shared.to(device))


class Layout(NamedTuple):
    """Sizes of an encoded batch, known before it is read: bytes a row (R) and bytes shared by a batch (S)."""

    row_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Codec(ABC):
    """Writes float tensors [B, *shape] as `Encoded`, and reads them back.

    A codec holds no state: the same tensor and seed give the same bytes on every party. Reading is elementwise in
    the batch, so a sample decodes to the same bits from the wire and, later, from the replay store.
    """

    name: str

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Sizes of an encoded batch of samples of this shape; the receiver checks them before it reads."""

    @abstractmethod
    def encode(self, values: Tensor, seed: int = 0) -> Encoded:
        """Encode a tensor [B, *shape] of any float type and memory layout, to the bytes of `as_float32` of it.

        `seed` names the draw of codecs that round at random.
        """

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to float32 [B, *shape], on the device of `encoded.rows`."""

    def streams(self, shape: tuple[int, ...]) -> list[slice]:
        """Columns of the rows, taken apart by the lossless stage: each holds bytes of one kind, each byte is in one."""
        return [slice(0, self.layout(shape).row_bytes)]

    def check(self, encoded: Encoded) -> None:  # noqa: B027 (most codecs give every row a meaning)
        """Refuse rows that came from outside, have the right size, and yet are none that `encode` can have written."""

    def pack(self, encoded: Encoded) -> list[memoryview]:
        """The bytes that cross the wire: what is shared by the batch, then the rows. Lossless codecs override it."""
        return [as_buffer(encoded.shared), as_buffer(encoded.rows)]

    def unpack(self, payload: memoryview, batch: int, shape: tuple[int, ...]) -> Encoded:
        """Inverse of `pack`, on the CPU, for `batch` samples of `shape`.

        Raises RefusedError, before anything is allocated, if the length is not the one of the layout, and if
        the rows do not pass `check`.
        """
        row_bytes, shared_bytes = self.layout(shape)
        expected = shared_bytes + batch * row_bytes
        if len(payload) != expected:
            raise RefusedError(
                f"{self.name} payload of {batch} samples of shape {list(shape)}: expected {expected} bytes, "
                f"got {len(payload)}"
            )
        refuse_absurd(batch, shape, len(payload))
        shared = copy_of(payload[:shared_bytes]).reshape(1, shared_bytes)
        rows = copy_of(payload[shared_bytes:]).reshape(batch, row_bytes)
        encoded = Encoded(self.name, shape, rows, shared)
        self.check(encoded)
        return encoded


def refuse_absurd(batch: int, shape: tuple[int, ...], payload_bytes: int) -> None:
    """Refuse sizes that no tensor has, even one with no values, and more values than a payload can stand for.

    Sizes come from outside: the first would overflow, the others would have a small message claim a large memory.
    """
    sizes = (batch, *shape)
    if min(sizes) < 0 or math.prod(max(1, size) for size in sizes) > MAX_VALUES:
        raise RefusedError(f"tensor of shape {list(sizes)}: expected at most 2^48 values and no negative size")
    if (most := MAX_VALUES_PER_BYTE * payload_bytes) < math.prod(sizes):
        raise RefusedError(
            f"tensor of shape {list(sizes)}: expected at most {most} values in {payload_bytes} bytes of payload"
        )


def as_buffer(codes: Tensor) -> memoryview:
    """The bytes of a uint8 tensor, without a copy if it is contiguous and on the CPU."""
    return codes.cpu().contiguous().numpy().data.cast("B") if codes.numel() else memoryview(b"")


def copy_of(payload: memoryview) -> Tensor:
    """A uint8 tensor that owns a copy of the bytes: aligned for any element type, and writable."""
    out = np.empty(len(payload), np.uint8)
    out[:] = np.frombuffer(payload, np.uint8)
    return torch.from_numpy(out)


def as_rows(codes: Tensor) -> Tensor:
    """The bytes of a contiguous tensor [B, ...] as uint8 [B, R], without a copy."""
    rows = codes.shape[0]
    if codes.numel() == 0:
        row_bytes = numel(tuple(codes.shape[1:])) * codes.dtype.itemsize
        return torch.empty((rows, row_bytes), dtype=torch.uint8, device=codes.device)
    return codes.contiguous().reshape(rows, -1).view(torch.uint8)


def from_rows(rows: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `as_rows`: uint8 [B, R] as a tensor [B, *shape] of `dtype`, without a copy."""
    if rows.numel() == 0:
        return torch.empty((rows.shape[0], *shape), dtype=dtype, device=rows.device)
    return rows.view(dtype).reshape(rows.shape[0], *shape)


def nothing_shared(device: torch.device) -> Tensor:
    """The `shared` of a codec that needs nothing beside the codes."""
    return torch.empty((1, 0), dtype=torch.uint8, device=device)


def read_float32(shared: Tensor) -> Tensor:
    """Columns of `shared`, uint8 [B, 4 n], as float32 [B, n]."""
    return shared.reshape(-1).view(torch.float32).reshape(len(shared), shared.shape[1] // 4)


def as_float32(values: Tensor) -> Tensor:
    """A float tensor of any type as float32, without its graph: what every codec encodes.

    A float64 past the range of float32 becomes the largest float32; infinities and NaN stay.
    """
    values = values.detach()
    if values.dtype == torch.float64:
        largest = torch.finfo(torch.float32).max
        values = torch.where(values.isinf(), values, values.clamp(-largest, largest))
    return values.to(torch.float32)


def channels(shape: tuple[int, ...]) -> int:
    """Channels of a sample of this shape: its first dimension, which is dimension 1 of a batch."""
    return shape[0] if shape else 1


def numel(shape: tuple[int, ...]) -> int:
    """Values in a sample of this shape."""
    return math.prod(shape)


def magnitude(values: Tensor) -> float:
    """The largest of the absolute values of a tensor; NaN or infinite if one is."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values.detach())
    return torch.maximum(-low, high).item()


def isfinite(values: Tensor) -> bool:
    """Whether a tensor holds neither infinities nor NaN; faster than `torch.isfinite(values).all()`."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))
