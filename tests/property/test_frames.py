"""Frames: whatever arrives is either a frame or refused; nothing is allocated beyond what arrived."""

import struct

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer import RefusedError
from cutlayer.codecs import encode_exactly, get_float_codec
from cutlayer.wire import frames
from cutlayer.wire.frames import Frame, pack, read, unpack
from cutlayer.wire.messages import Evaluate, Plan, Step


def step_frame(codec: str = "fp8_e4m3") -> bytes:
    values = torch.arange(24.0).reshape(4, 3, 2)
    tensors = {
        "ids": encode_exactly(torch.arange(4)),
        "labels": encode_exactly(torch.tensor([300, 1, 2, 3])),
        "activations": get_float_codec(codec).encode(values),
    }
    return pack(Frame(Step(3, 5, 7), tensors))


def test_the_layout_is_the_documented_one() -> None:
    """Bytes written out by hand: a change of the format must change the version."""
    header = msgspec.msgpack.encode([{"type": "step", "client": 3, "epoch": 5, "step": 7}, [["ids", "u8", 2, [], 2]]])
    expected = b"CUTL" + bytes([2]) + struct.pack("<IQ", len(header), 2) + header + bytes([9, 8])
    assert pack(Frame(Step(3, 5, 7), {"ids": encode_exactly(torch.tensor([9, 8]))})) == expected
    assert pack(unpack(expected)) == expected


def test_sizes_add_up_and_name_what_they_are_for() -> None:
    data = step_frame()
    assert dict(read(data).sizes()) == {"activations": 28, "labels": 8, "control": len(data) - 36}
    evaluation = pack(Frame(Evaluate(0, 0, 0), {"activations": get_float_codec("fp32").encode(torch.ones(1, 2))}))
    assert dict(read(evaluation).sizes()) == {"evaluation": len(evaluation)}
    plan = pack(Frame(Plan(0, 0, "A")))
    assert dict(read(plan).sizes()) == {"control": len(plan)}


def with_header(header: object, payload: bytes = b"") -> bytes:
    encoded = msgspec.msgpack.encode(header)
    return frames.PREFIX.pack(b"CUTL", 2, len(encoded), len(payload)) + encoded + payload


STEP = {"type": "step", "client": 0, "epoch": 0, "step": 0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"CUTL", "expected at least 17 bytes, got 4"),
        (b"HTTP" + step_frame()[4:], "expected to start with b'CUTL', got b'HTTP'"),
        (b"CUTL\x01" + step_frame()[5:], "expected version 2, got 1"),
        (step_frame()[:-1], "lengths say 1.. bytes, got 1"),
        (step_frame() + b"x", "lengths say 1.. bytes, got 1"),
        (frames.PREFIX.pack(b"CUTL", 2, 2**32 - 1, 2**63), "header of 4294967295 bytes"),
        (with_header([{**STEP, "type": "exec"}, []]), "header cannot be read: Invalid value 'exec'"),
        (with_header([{**STEP, "more": 1}, []]), "header cannot be read"),
        (
            with_header([STEP, [["activations", "fp8_e4m3", 2**40, [2**20], 0]]]),
            "expected 1152921504606846980 bytes, got 0",
        ),
        (
            with_header([STEP, [["activations", "fp64", 0, [], 0]]]),
            "field 'activations': unknown codec 'fp64'; known: fp32",
        ),
        (with_header([STEP, [["activations", "fp32", 1, [-1], 0]]]), "negative size"),
        (with_header([STEP, [["activations", "fp32", 2**63, [0], 0]]]), "activations"),
        (with_header([STEP, [["labels", "u8", 4, [0, 2**63], 0]]]), "labels"),
        (with_header([STEP, [["labels", "u8", 4, [2**40, 2**40, 0], 0]]]), "labels"),
        (with_header([STEP, [["activations", "fp32", 1, [1] * 9, 4]]], b"abcd"), "more than 8 dimensions"),
        (with_header([STEP, [["ids", "u8", 1, [], 1], ["ids", "u8", 1, [], 1]]], b"ab"), "comes twice"),
        (with_header([STEP, [["ids", "u8", 1, [], 1]]], b"ab"), "declare 1 payload bytes, the frame holds 2"),
    ],
)
def test_refusals_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        unpack(data)


@given(st.data(), st.sampled_from(["fp8_e4m3", "fp32", "hfp8_e5m2"]))
@settings(max_examples=1500)
def test_mutated_frames_are_read_or_refused(data, codec: str) -> None:
    """Never another exception, never a tensor beyond what the frame holds."""
    mutated = bytearray(step_frame(codec))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "copy"]))
        place = data.draw(st.integers(0, max(0, len(mutated) - 1)))
        if kind == "flip" and mutated:
            mutated[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del mutated[place : place + data.draw(st.integers(1, 9))]
        elif kind == "insert":
            mutated[place:place] = data.draw(st.binary(max_size=9))
        else:
            mutated[place:place] = mutated[: data.draw(st.integers(0, 9))]
    try:
        frame = unpack(bytes(mutated))
    except RefusedError:
        return
    assert sum(encoded.nbytes for encoded in frame.tensors.values()) <= len(mutated)
