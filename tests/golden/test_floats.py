"""Number formats against ml_dtypes, bit for bit: every code, every tie, subnormals, infinities and NaN."""

import ml_dtypes
import numpy as np
import pytest
import torch

from cutlayer.codecs import Encoded, get_float_codec
from cutlayer.codecs.floats import power_of_two_scale, tensor_peak

# codec: reference element type, largest finite value, power of two that the values are multiplied with before.
FIXED = {
    "hfp8_e4m3": (ml_dtypes.float8_e4m3b11fnuz, 30.0, 1.0),
    "hfp8_e5m2": (ml_dtypes.float8_e5m2, 57344.0, 2.0**12),
    "bf16": (ml_dtypes.bfloat16, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 1.0),
    "fp16": (np.float16, 65504.0, 1.0),
}
SCALED = {"fp8_e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "fp8_e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def every_value_and_every_tie(dtype) -> np.ndarray:
    """All finite values of a format, the midpoints between neighbours, and the float32 next to each midpoint."""
    codes = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        values = codes.astype(f"u{np.dtype(dtype).itemsize}").view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    with np.errstate(over="ignore"):
        beyond = np.float32([values[-1] * 1.03, values[-1] * 1.5, values[-1] * 4, np.inf])
    special = np.float32([0.0, -0.0, np.nan, 1e-45, -1e-45, 1e-38])
    return np.concatenate([values.astype(np.float32), ties, *around, beyond, -beyond, special])


def reference_codes(values: np.ndarray, dtype, largest: float) -> np.ndarray:
    """ml_dtypes' conversion, saturating: what is too large becomes the largest value, NaN stays."""
    return np.clip(values, -largest, largest).astype(dtype)


@pytest.mark.parametrize("name", FIXED)
def test_conversions_without_scale(name: str) -> None:
    dtype, largest, gain = FIXED[name]
    values = every_value_and_every_tie(dtype) / np.float32(gain)
    codec = get_float_codec(name)
    with np.errstate(over="ignore"):
        expected = reference_codes(values * np.float32(gain), dtype, largest)
    encoded = codec.encode(torch.from_numpy(values).unsqueeze(0))
    got = encoded.rows.numpy().reshape(-1).view(f"u{np.dtype(dtype).itemsize}")
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], expected.view(got.dtype)[~nan])
    assert np.isnan(got.view(dtype)[nan].astype(np.float32)).all()
    decoded = codec.decode(encoded).numpy()[0]
    np.testing.assert_array_equal(decoded, expected.astype(np.float32) / np.float32(gain))


@pytest.mark.parametrize("name", SCALED)
def test_conversions_with_scale(name: str) -> None:
    dtype, largest = SCALED[name]
    values = every_value_and_every_tie(dtype)
    codec = get_float_codec(name)
    # With the largest finite value of the format in the tensor the scale is 1 and the codes are the format's own.
    values = values[(np.abs(values) <= largest) | ~np.isfinite(values)]
    encoded = codec.encode(torch.from_numpy(values).unsqueeze(0))
    got = encoded.rows.numpy().reshape(-1)
    expected = reference_codes(values, dtype, largest)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], expected.view(np.uint8)[~nan])
    assert np.isnan(got.view(dtype)[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(codec.decode(encoded).numpy()[0], expected.astype(np.float32))


@pytest.mark.parametrize("name", [*SCALED, "hfp8_e4m3", "hfp8_e5m2"])
def test_every_code_decodes_to_the_value_of_the_format(name: str) -> None:
    dtype, gain = (SCALED[name][0], 1.0) if name in SCALED else (FIXED[name][0], FIXED[name][2])
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    shared = torch.ones(1, 1).view(torch.uint8) if name in SCALED else torch.empty(1, 0, dtype=torch.uint8)
    got = get_float_codec(name).decode(Encoded(name, (256,), codes, shared)).numpy()[0]
    np.testing.assert_array_equal(got, codes.numpy()[0].view(dtype).astype(np.float32) / np.float32(gain))


@pytest.mark.parametrize("largest", [448.0, 57344.0])
@pytest.mark.parametrize("peak", [1e-45, 1e-38, 3.3e-7, 0.4375, 0.43751, 1.0, 448.0, 449.0, 57344.0, 3.4e38])
def test_the_scale_is_the_largest_power_of_two_that_fits(largest: float, peak: float) -> None:
    scale = power_of_two_scale(tensor_peak(torch.tensor([0.0, -peak, peak / 3]))[0], largest).item()
    stored = np.float64(np.float32(peak))
    assert np.log2(scale) == round(np.log2(scale))
    assert stored * scale <= largest
    assert stored * scale * 2 > largest or scale == 2.0**126
