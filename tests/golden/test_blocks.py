"""Block formats against a plain, slow reference written from the specifications, one value at a time."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cutlayer.codecs import Encoded, get_float_codec

# name: element type of ml_dtypes, bits, emax, largest.
MX = {
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 8, 448.0),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 8, 15, 57344.0),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 6, 2, 7.5),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 6, 4, 28.0),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 4, 2, 6.0),
}
BITS = {**{name: bits for name, (_, bits, _, _) in MX.items()}, "nvfp4": 4}


def element(value: float, dtype, largest: float) -> tuple[int, float]:
    """Code and value of a number in an element format: to nearest even, saturating."""
    stored = np.clip(np.float32(value), -largest, largest).astype(dtype)
    return int(np.asarray(stored).view(np.uint8)), float(stored)


def finite_peak(block: list[float]) -> float:
    return max((abs(v) for v in block if math.isfinite(v)), default=0.0)


def mx_block(block: list[float], name: str) -> tuple[int, list[int], list[float]]:
    """Scale code, element codes and values of a block (OCP MX v1.0, 6.3), with our choices for NaN and infinity."""
    dtype, _, emax, largest = MX[name]
    peak = finite_peak(block)
    exponent = -127 if peak == 0 else max(-127, min(127, math.frexp(peak)[1] - 1 - emax))
    if any(math.isnan(v) for v in block):
        return 0xFF, [], [math.nan] * len(block)
    pairs = [element(v / 2.0**exponent, dtype, largest) for v in block]
    return exponent + 127, [code for code, _ in pairs], [float(np.float32(v * 2.0**exponent)) for _, v in pairs]


def nvfp4_block(block: list[float], tensor_scale: np.float32) -> tuple[int, list[int], list[float]]:
    if any(math.isnan(v) for v in block):
        return 0x7F, [], [math.nan] * len(block)
    wanted = np.float32(finite_peak(block)) / np.float32(6) / tensor_scale
    code, scale = element(wanted, ml_dtypes.float8_e4m3fn, 448.0)
    divisor = np.float32(scale) * tensor_scale
    pairs = [
        element(np.float32(v) / divisor if divisor else math.copysign(0, v), ml_dtypes.float4_e2m1fn, 6.0)
        for v in block
    ]
    return code, [c for c, _ in pairs], [float(np.float32(v) * divisor) for _, v in pairs]


def read_codes(packed: np.ndarray, count: int, bits: int) -> list[int]:
    """The codes of a row: high four bits of all, then low two, the first in the low bits of a byte."""
    bit = np.unpackbits(packed, bitorder="little")
    codes, start = [0] * count, 0
    for plane in {8: (8,), 6: (4, 2), 4: (4,)}[bits]:
        for i in range(count):
            part = bit[start + i * plane : start + (i + 1) * plane]
            codes[i] = codes[i] << plane | int((part << np.arange(plane)).sum())
        start += -(-count * plane // 8) * 8
    assert start == 8 * len(packed)
    return codes


def check(name: str, values: np.ndarray) -> None:
    size = 16 if name == "nvfp4" else 32
    codec = get_float_codec(name)
    encoded = codec.encode(torch.from_numpy(values))
    decoded = codec.decode(encoded).numpy().reshape(len(values), -1)
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    count = flat.shape[1]
    blocks = -(-count // size)
    with np.errstate(all="ignore"):
        tensor_scale = np.float32(max(np.float32(finite_peak(flat.ravel().tolist())) / np.float32(6 * 448), 2.0**-126))
        for sample, row, back in zip(flat, encoded.rows.numpy(), decoded, strict=True):
            codes = read_codes(row[blocks:], count, BITS[name])
            for number in range(blocks):
                part = slice(number * size, min(count, (number + 1) * size))
                block = [float(v) for v in sample[part]]
                expected = nvfp4_block(block, tensor_scale) if name == "nvfp4" else mx_block(block, name)
                assert int(row[number]) == expected[0]
                if not any(math.isnan(v) for v in block):
                    assert codes[part] == expected[1]
                np.testing.assert_array_equal(back[part], np.float32(expected[2]))
    if name == "nvfp4":
        assert encoded.shared.view(torch.float32).item() == tensor_scale


@pytest.mark.parametrize("name", BITS)
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7).map(lambda s: (max(1, s[0] % 3), *s[1:])),
        elements=st.floats(width=32)
        | st.sampled_from(
            [0.0, -0.0, 1.0, 2.5, -3.5, 5.0, 0.25, 448.0, 464.0, 1e-45, 2.0**-126, 3e38, math.inf, math.nan]
        ),
    )
)
@settings(max_examples=40)
def test_blocks_follow_the_specification(name: str, values: np.ndarray) -> None:
    check(name, values)


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("power", [-146, -128, -20, 0, 60, 127])
def test_blocks_of_every_magnitude(name: str, power: int) -> None:
    values = np.random.default_rng(power + 200).standard_normal((2, 70)).astype(np.float64) * 2.0**power
    values[0, :40] = np.round(values[0, :40] / 2.0**power * 4) / 4 * 2.0**power  # many ties
    with np.errstate(over="ignore"):
        check(name, values.astype(np.float32))


@pytest.mark.parametrize("name", BITS)
def test_a_constant_tensor_keeps_its_value_where_the_element_has_it(name: str) -> None:
    values = torch.full((2, 3, 50), 1.5)
    codec = get_float_codec(name)
    assert torch.allclose(codec.decode(codec.encode(values)), values, rtol=0.04)
    assert not codec.decode(codec.encode(values * 0)).any()


@pytest.mark.parametrize(
    ("name", "bits"), [("mxfp8_e4m3", 8.25), ("mxfp6_e2m3", 6.25), ("mxfp4", 4.25), ("nvfp4", 4.5)]
)
def test_bits_a_value_on_the_wire(name: str, bits: float) -> None:
    codec = get_float_codec(name)
    encoded = codec.encode(torch.randn(4, 64, 8, 8))
    payload = sum(map(len, codec.pack(encoded)))
    assert 8 * (payload - (4 if name == "nvfp4" else 0)) == bits * 4 * 64 * 64


@pytest.mark.parametrize("name", BITS)
def test_every_scale_code_decodes(name: str) -> None:
    """All 256 scales beside all element codes of the format, as a receiver may get them."""
    bits = BITS[name]
    size = 16 if name == "nvfp4" else 32
    codec = get_float_codec(name)
    rows = torch.randint(0, 256, (256, codec.layout((size,)).row_bytes), dtype=torch.uint8)
    rows[:, 0] = torch.arange(256)
    shared = torch.tensor([[0.5]]).view(torch.uint8) if name == "nvfp4" else torch.empty(1, 0, dtype=torch.uint8)
    got = codec.decode(Encoded(name, (size,), rows, shared)).numpy()
    scale_type = ml_dtypes.float8_e4m3fn if name == "nvfp4" else ml_dtypes.float8_e8m0fnu
    scales = np.arange(256, dtype=np.uint8).view(scale_type).astype(np.float32) * np.float32(
        0.5 if name == "nvfp4" else 1
    )
    dtype = ml_dtypes.float4_e2m1fn if name == "nvfp4" else MX[name][0]
    with np.errstate(all="ignore"):
        for row, scale, back in zip(rows.numpy(), scales, got, strict=True):
            codes = np.uint8(read_codes(row[1:], size, bits))
            np.testing.assert_array_equal(back, codes.view(dtype).astype(np.float32) * scale)
