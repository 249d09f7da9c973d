"""Element formats against ml_dtypes, bit for bit: all codes, and all inputs that float16 and bfloat16 can hold."""

import ml_dtypes
import numpy as np
import pytest
import torch

from cutlayer.codecs import get_float_codec
from cutlayer.codecs.elements import E2M1, E2M3, E3M2, E4M3, E4M3_HFP8, E5M2, Element, dequantize, quantize

ELEMENTS = {
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2),
    "hfp8": (E4M3_HFP8, ml_dtypes.float8_e4m3b11fnuz),
    "e2m3": (E2M3, ml_dtypes.float6_e2m3fn),
    "e3m2": (E3M2, ml_dtypes.float6_e3m2fn),
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn),
}


def inputs(element: Element) -> np.ndarray:
    """All float16 and bfloat16 numbers, and float32 just beside every tie of the format."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        halves = codes.view(np.float16).astype(np.float32)
    wide = (codes.astype(np.uint32) << 16).view(np.float32)
    values = dequantize(torch.arange(1 << (element.bits - 1), dtype=torch.uint8), element).numpy()
    values = np.unique(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))]
    return np.concatenate([halves, wide, ties, -ties, *beside, *(-b for b in beside)])


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_has_the_value_of_the_format(name: str) -> None:
    element, dtype = ELEMENTS[name]
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    got = dequantize(torch.from_numpy(codes), element).numpy()
    expected = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(expected)[number])


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_of_all_16_bit_inputs(name: str) -> None:
    element, dtype = ELEMENTS[name]
    values = inputs(element)
    got = quantize(torch.from_numpy(values), element).numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        expected = np.clip(values, -element.largest, element.largest).astype(dtype)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(got[finite], expected.view(np.uint8)[finite])
    if element.nan is not None:
        assert np.isnan(got[~finite].view(dtype).astype(np.float32)).all()


@pytest.mark.parametrize("name", ELEMENTS)
def test_what_the_bit_rule_does_is_what_the_native_cast_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats that PyTorch has are cast by it; the general rule must give the same bits."""
    element, _ = ELEMENTS[name]
    values = inputs(element)
    values = torch.from_numpy(values[~np.isnan(values)])
    native = quantize(values, element)
    monkeypatch.setattr("cutlayer.codecs.elements._NATIVE", {})
    assert torch.equal(quantize(values, element), native)


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize("special", [[], [float("inf"), -float("inf")], [float("nan")]])
@pytest.mark.parametrize("power", [-140, -30, 0, 17, 100])
def test_fast_conversion_has_the_bits_of_plain_casts(
    name: str, dtype: torch.dtype, special: list[float], power: int
) -> None:
    """The straightforward way, in PyTorch: scale, clamp, cast; cast back, unscale. Long enough for several chunks."""
    values = torch.randn(3, 100_003, generator=torch.Generator().manual_seed(power)) * 2.0**power
    values[0, : len(special)] = torch.tensor(special)
    values[1, :5] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38])
    largest = torch.finfo(dtype).max
    peak = values[values.isfinite()].abs().max().double()
    exponent = max(-126, min(126, int(torch.floor(torch.log2(largest / peak)))))
    while peak * 2.0 ** (exponent + 1) <= largest and exponent < 126:
        exponent += 1
    scaled = (values * 2.0**exponent).clamp(-largest, largest).to(dtype)
    codec = get_float_codec(name)
    encoded = codec.encode(values)
    expected = scaled.view(torch.uint8)
    nan = values.isnan()
    assert torch.equal(encoded.rows[~nan], expected[~nan])
    back = scaled.float() * torch.tensor(2.0**-exponent)
    assert torch.equal(codec.decode(encoded).nan_to_num(9e9), back.nan_to_num(9e9))
    single = codec.decode(type(encoded)(encoded.codec, encoded.shape, encoded.rows, encoded.shared.repeat(3, 1)))
    assert torch.equal(single.nan_to_num(9e9), back.nan_to_num(9e9))
