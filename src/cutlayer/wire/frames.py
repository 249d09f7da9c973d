"""Frames: the bytes that cross between client and server, and what they say: a message (`envelope`) and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field

from cutlayer.codecs import Encoded, get_codec
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.wire.envelope import (
    MAGIC,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    PREFIX,
    VERSION,
    Field,
    Header,
    frame_length,
    header_of,
    kinds,
    seal,
    total_length,
)
from cutlayer.wire.messages import Message

__all__ = [
    "MAGIC",
    "MAX_DIMENSIONS",
    "MAX_HEADER_BYTES",
    "PREFIX",
    "VERSION",
    "Field",
    "Frame",
    "Header",
    "PackedFrame",
    "Received",
    "frame_length",
    "kinds",
    "pack",
    "packed",
    "read",
    "total_length",
    "unpack",
]


@dataclass(frozen=True)
class Frame:
    """A message and its tensors, still encoded."""

    message: Message
    tensors: dict[str, Encoded] = dataclass_field(default_factory=dict)


@dataclass(frozen=True)
class PackedFrame:
    """A frame as bytes, and what is in them.

    Attributes:
        data: all of its bytes.
        message: what it says.
        fields: its tensors, in the order of the payload.
    """

    data: bytes
    message: Message
    fields: tuple[Field, ...]

    def sizes(self) -> Iterator[tuple[str, int]]:
        """What each byte is for, as `kinds` says."""
        return kinds(self.message, self.fields, len(self.data))


def pack(frame: Frame) -> bytes:
    """A frame as bytes."""
    return packed(frame).data


def packed(frame: Frame) -> PackedFrame:
    """A frame as bytes that are still to be counted."""
    fields, buffers = [], []
    for name, encoded in frame.tensors.items():
        payload = get_codec(encoded.codec).pack(encoded)
        fields.append(Field(name, encoded.codec, len(encoded), encoded.shape, sum(map(len, payload))))
        buffers += payload
    return PackedFrame(seal(frame.message, tuple(fields), buffers), frame.message, tuple(fields))


@dataclass(frozen=True)
class Received(PackedFrame):
    """A frame that came in: its header is read and checked, its tensors are not yet.

    Attributes:
        start: where the payload begins.
    """

    start: int

    def unpack(self) -> Frame:
        """The message with its tensors, which own their memory. Raises RefusedError with field, expected and got.

        A lossless or sparse codec takes many times the payload's size for what a field says of itself: what comes from
        outside is to be unpacked only once its fields are known to be those that are expected.
        """
        view, position = memoryview(self.data), self.start
        tensors = {}
        for field in self.fields:
            try:
                codec = get_codec(field.codec)
                payload = view[position : position + field.nbytes]
                tensors[field.name] = codec.unpack(payload, field.batch, field.shape)
            except (ConfigError, RefusedError, MemoryError) as error:
                raise RefusedError(f"field {field.name!r}: {error}") from None
            position += field.nbytes
        return Frame(self.message, tensors)


def read(data: bytes) -> Received:
    """The frame in these bytes, its header checked. Raises RefusedError for anything that is not a frame."""
    header, start = header_of(data)
    return Received(data, header.message, header.fields, start)


def unpack(data: bytes) -> Frame:
    """The frame in these bytes, with its tensors. Raises RefusedError, as `read` and `Received.unpack`."""
    return read(data).unpack()
