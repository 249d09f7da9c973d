"""The envelope of a frame: its lengths, its message, and where its tensors lie. What tensors are is in `frames`.

    magic "CUTL" | version, 1 byte | header length, 4 bytes | payload length, 8 bytes | header | payload

The header (msgpack) holds one message and a description of each tensor in the payload. Every length is checked against
the bytes that are there before anything is allocated, and unknown names are refused. Needs no PyTorch: a device without
it speaks with these functions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

import msgspec

from cutlayer.errors import RefusedError
from cutlayer.wire.messages import (
    Calibrate,
    Done,
    Evaluate,
    EvaluationRequest,
    Message,
    Outputs,
    Predict,
    Step,
    Update,
    Weights,
)

MAGIC = b"CUTL"
VERSION = 2
PREFIX = struct.Struct("<4sBIQ")
MAX_HEADER_BYTES = 1 << 20
MAX_DIMENSIONS = 8
WITH_TENSORS = (Step, Update, Weights, Evaluate, Predict, Outputs)
"""The messages that have tensors with them."""


class Field(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where and how a tensor lies in the payload."""

    name: str
    codec: str
    batch: int
    shape: tuple[int, ...]
    nbytes: int


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The message and its tensors, in the order of the payload."""

    message: Message
    fields: tuple[Field, ...] = ()


_header_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)


def seal(message: Message, fields: tuple[Field, ...] = (), buffers: Iterable[bytes | memoryview] = ()) -> bytes:
    """A frame of a message and of tensors that are bytes already, in the order of their fields."""
    header = _header_encoder.encode(Header(message, fields))
    payload_bytes = sum(field.nbytes for field in fields)
    return b"".join([PREFIX.pack(MAGIC, VERSION, len(header), payload_bytes), header, *buffers])


def total_length(beginning: bytes | memoryview) -> int:
    """The length that a frame declares in its first bytes, for a receiver to check before it gathers the rest."""
    return sum(_lengths(beginning))


def _lengths(beginning: bytes | memoryview) -> tuple[int, int]:
    """Where the payload starts, and how long it is, from a frame's first bytes."""
    if len(beginning) < PREFIX.size:
        raise RefusedError(f"frame: expected at least {PREFIX.size} bytes, got {len(beginning)}")
    magic, version, header_bytes, payload_bytes = PREFIX.unpack_from(beginning)
    if magic != MAGIC:
        raise RefusedError(f"frame: expected to start with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise RefusedError(f"frame: expected version {VERSION}, got {version}; both sides need the same release")
    if header_bytes > MAX_HEADER_BYTES:
        raise RefusedError(f"frame: header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return PREFIX.size + header_bytes, payload_bytes


def header_of(data: bytes) -> tuple[Header, int]:
    """The header of a frame, checked, and where its payload begins. Raises RefusedError for what is not a frame."""
    start, payload_bytes = _lengths(data)
    if len(data) != start + payload_bytes:
        raise RefusedError(f"frame: its lengths say {start + payload_bytes} bytes, got {len(data)}")
    try:
        header = _header_decoder.decode(memoryview(data)[PREFIX.size : start])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(f"frame: header cannot be read: {error}") from None
    if header.fields and not isinstance(header.message, WITH_TENSORS):
        kind = type(header.message).__name__
        raise RefusedError(f"frame: expected no tensors with a {kind}, got {len(header.fields)}")
    if any(min(f.nbytes, f.batch, *f.shape, 0) < 0 or len(f.shape) > MAX_DIMENSIONS for f in header.fields):
        raise RefusedError(f"frame: negative size or more than {MAX_DIMENSIONS} dimensions in {header.fields}")
    if (declared := sum(f.nbytes for f in header.fields)) != payload_bytes:
        raise RefusedError(f"frame: fields declare {declared} payload bytes, the frame holds {payload_bytes}")
    if len({f.name for f in header.fields}) != len(header.fields):
        raise RefusedError(f"frame: a field comes twice in {[f.name for f in header.fields]}")
    return header, start


def kinds(message: Message, fields: tuple[Field, ...], length: int) -> Iterator[tuple[str, int]]:
    """What each byte of a frame of this length is for, as (kind, bytes) pairs that sum to its length.

    Kinds are "activations" (with "sent"), "gradients" and "labels" for these tensors, "weights" and "evaluation" for
    whole frames of weights and of an evaluation, and "control" for the rest: prefix, header, sample ids, plans.
    """
    asked = isinstance(message, Weights | Calibrate | Done) and message.evaluation
    if asked or isinstance(message, Evaluate | EvaluationRequest):
        yield "evaluation", length
        return
    if isinstance(message, Weights):
        yield "weights", length
        return
    counted = 0
    for field in fields:
        kind = "activations" if field.name == "sent" else field.name
        if kind in ("activations", "gradients", "labels"):
            counted += field.nbytes
            yield kind, field.nbytes
    yield "control", length - counted


def frame_length(message: Message, fields: tuple[Field, ...] = ()) -> int:
    """The length of the frame that `pack` would make of a message and tensors of these sizes."""
    header = _header_encoder.encode(Header(message, fields))
    return PREFIX.size + len(header) + sum(field.nbytes for field in fields)
