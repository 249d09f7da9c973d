"""Feed damaged payloads to the decoders and watch for anything but a tensor or a RefusedError.

    python -m tests.helpers.fuzz_codecs [--count 1000000] [--seed 0]

Every payload starts as a right one and is then, but for some of the frames, damaged: bits turned, bytes overwritten,
cut short, lengthened, pieces moved; or its batch, shape or codec is misstated, to the decoder or in the header of a
frame. A call must return within seconds and raise nothing but RefusedError; at the end the peak of the process's
memory must not have grown by more than GROWTH, whatever sizes were claimed. This is the long form of
test_damaged_payloads.py.
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import time

import msgspec
import torch

from cutlayer.codecs import FLOAT_CODECS, Codec, get_codec, get_float_codec
from cutlayer.errors import RefusedError
from cutlayer.wire.frames import MAGIC, PREFIX, VERSION, Field, Header, unpack
from cutlayer.wire.messages import Step

SPECS = [
    *FLOAT_CODECS,
    *(f"{name}+zstd" for name in FLOAT_CODECS),
    "fp8_e4m3:channel+zstd",
    "topk0.1>fp16",
    "topk0.4>mxfp4+zstd",
    "topk0.02>int8+zstd",
    "u8",
    "u16",
    "i64",
]
SHAPES = [(), (0,), (1,), (5,), (33,), (4, 3, 3), (2, 64), (16, 4, 4)]
GROWTH = 256  # MiB
FORGED_SHAPES = [*SHAPES, (2**20,), (2**20, 2**20), (0, 2**40), (0, 2**62), (0, -1)]
FORGED_SPECS = [
    *SPECS,
    "int8:stochastic",
    "delta>fp8_e4m3",
    "ef>fp8_e4m3",
    "fp8_e4m3+zstd+zstd",
    "topk0.1>topk0.1>fp16",
    "topk1e-300>fp16",
    "topk0.99>fp32",
    "topknan>fp16",
    "randtopk0.5>u8",
    "fp32/fp32",
    "",
]


def payloads(draw: random.Random) -> list[tuple[Codec, int, tuple[int, ...], bytes]]:
    """Right payloads of every codec, several shapes, and contents from zeros to noise."""
    out = []
    for number, spec in enumerate(SPECS):
        codec = get_codec(spec)
        for shape in SHAPES:
            batch = draw.choice([0, 1, 3, 8])
            values = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(number))
            values = draw.choice([values, values.relu(), values * 0])
            encoded = codec.encode(values.abs().mul(50).long() if spec[0] in "ui" and spec[1].isdigit() else values)
            out.append((codec, batch, shape, b"".join(codec.pack(encoded))))
    return out


def damage(payload: bytes, draw: random.Random) -> bytes:
    """A payload with one to four changes."""
    data = bytearray(payload)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        kind = draw.randrange(6)
        place = draw.randrange(len(data) + 1)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1 and data:
            data[place % len(data)] = draw.choice([0, 1, 2, 3, 127, 128, 255, draw.randrange(256)])
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:place] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 4:
            size = draw.randrange(1, 9)
            data[place : place + size] = draw.choice([b"\xff" * size, bytes(size), draw.randbytes(size)])
        else:
            other = draw.randrange(len(data) + 1)
            data[place : place + 4] = data[other : other + 4]
    return bytes(data)


def attempt(codec: Codec, payload: bytes, batch: int, shape: tuple[int, ...]) -> str:
    """What became of a payload; any exception but a refusal goes through."""
    try:
        encoded = codec.unpack(memoryview(payload), batch, shape)
    except RefusedError:
        return "refused"
    layout = codec.layout(shape)
    assert encoded.rows.shape == (batch, layout.row_bytes)
    assert encoded.shared.shape == (1, layout.shared_bytes)
    assert codec.decode(encoded).shape == (batch, *shape)
    return "decoded"


def fuzz(count: int, seed: int = 0, seconds: float = float("inf")) -> collections.Counter[str]:
    """Try `count` damaged payloads and, one in eight, damaged frames, or as many as these seconds allow.

    Returns what became of them.
    """
    draw = random.Random(seed)
    right = payloads(draw)
    outcomes: collections.Counter[str] = collections.Counter()
    end = time.perf_counter() + seconds
    for number in range(count):
        if time.perf_counter() > end:
            break
        codec, batch, shape, payload = draw.choice(right)
        start = time.perf_counter()
        if number % 8 == 0:
            outcome = _frame(codec, batch, shape, payload, draw)
        else:
            damaged = damage(payload, draw)
            if number % 8 == 1:
                batch = draw.choice([-1, 0, 1, batch + 1, 2**20, 2**40, 2**70])
            elif number % 8 == 2:
                shape = draw.choice([*FORGED_SHAPES, (0, 2**70)])
            elif number % 8 == 3:
                codec = draw.choice(right)[0]
            outcome = attempt(codec, damaged, batch, shape)
        outcomes[outcome] += 1
        took = time.perf_counter() - start
        assert took < 5, f"payload {number} of seed {seed}, once {batch} samples of {codec.name}, took {took:.1f} s"
    return outcomes


def _frame(codec: Codec, batch: int, shape: tuple[int, ...], payload: bytes, draw: random.Random) -> str:
    """A frame whose header misstates codec, batch, shape or nothing, and whose bytes are damaged, or not."""
    spec = codec.name
    forged = draw.randrange(5)
    if forged == 0:
        spec = draw.choice(FORGED_SPECS)
    elif forged == 1:
        batch = draw.choice([-1, 0, 1, batch + 1, 2**20, 2**40, 2**62])
    elif forged == 2:
        shape = draw.choice(FORGED_SHAPES)
    elif forged == 3:
        spec, batch, shape = draw.choice(FORGED_SPECS), draw.choice([0, 1, 2**10]), draw.choice(FORGED_SHAPES)
    header = msgspec.msgpack.encode(Header(Step(0, 0, 0), (Field("activations", spec, batch, shape, len(payload)),)))
    data = PREFIX.pack(MAGIC, VERSION, len(header), len(payload)) + header + payload
    if draw.randrange(4):
        data = damage(data, draw)
    try:
        received = unpack(data).tensors
    except RefusedError:
        return "frame refused"
    for tensor in received.values():
        get_codec(tensor.codec).decode(tensor)
    return "frame read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    get_float_codec("fp32")
    fuzz(2000, chosen.seed + 1)  # so that what is allocated once is there
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    outcomes = fuzz(chosen.count, chosen.seed)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{chosen.count} damaged payloads in {seconds:.0f} s: {dict(outcomes)}; peak memory grew by {grown:.0f} MiB")
    assert grown < GROWTH, f"memory grew by more than {GROWTH} MiB"


if __name__ == "__main__":
    main()
