"""int8 and int4 against their definition (docs/formats.md), in whole numbers and exact fractions, a value at a time.

Of a channel with least value l <= 0 and largest h >= 0: step = (h - l) / top in float32, top = 2^bits - 1; zero point =
-l / step and code = v / step + zero point, each to the nearest whole number, ties to even, from 0 to top; the value of
a code is step * (code - zero point).
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cutlayer.codecs import Encoded, get_float_codec

# Quotients of up to 255 are taken in float32, and a zero point is added: half of its last place, twice.
FLOAT32 = Fraction(1, 2**15)


def parts(encoded: Encoded, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps [C], zero points [C] and codes [B, C, n] as the bytes have them."""
    channels = encoded.shape[0]
    shared = encoded.shared.numpy()[0]
    steps, zeros = shared[: 4 * channels].copy().view("<f4"), shared[4 * channels :]
    codes = encoded.rows.numpy()
    if bits == 4:  # the first code of a byte in its low bits
        codes = np.stack([codes & 15, codes >> 4], 2).reshape(len(codes), -1)
    return steps, zeros, codes[:, : int(np.prod(encoded.shape))].reshape(len(codes), channels, -1)


def nearest(exact: Fraction, top: int) -> set[int]:
    """Whole numbers from 0 to top that are nearest: one, or two if float32 may see a tie there."""
    return {min(top, max(0, round(exact + about))) for about in (-FLOAT32, 0, FLOAT32)}


def channel_range(values: np.ndarray) -> tuple[Fraction, Fraction]:
    numbers = [Fraction(float(v)) for v in values.ravel()]
    return min([*numbers, Fraction(0)]), max([*numbers, Fraction(0)])


def check(values: np.ndarray, bits: int) -> None:
    codec, top = get_float_codec(f"int{bits}"), 2**bits - 1
    encoded = codec.encode(torch.from_numpy(values))
    steps, zeros, codes = parts(encoded, bits)
    decoded = codec.decode(encoded).numpy().reshape(codes.shape)
    for channel in range(values.shape[1]):
        own = values[:, channel].reshape(len(values), -1)
        low, high = channel_range(own)
        step, zero = Fraction(float(steps[channel])), int(zeros[channel])
        wanted = max((high - low) / top, Fraction(2) ** -126)
        assert abs(step - wanted) <= wanted / 2**23
        assert zero in nearest(-low / step, top)
        for v, code, back in zip(own.ravel(), codes[:, channel].ravel(), decoded[:, channel].ravel(), strict=True):
            assert int(code) in nearest(Fraction(float(v)) / step + zero, top)
            assert back == np.float32(float(step * (int(code) - zero)))


@pytest.mark.parametrize("bits", [8, 4])
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=5),
        elements=st.floats(-(2.0**40), 2.0**40, width=32)
        | st.floats(-3, 3, width=32)
        | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0]),
    )
)
@settings(max_examples=150)
def test_codes_follow_the_definition(bits: int, values: np.ndarray) -> None:
    check(values, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("power", [-120, -20, 0, 30, 100])
def test_ranges_of_every_size_and_place(bits: int, power: int) -> None:
    values = np.random.default_rng(bits).standard_normal((4, 9, 20)) * 2.0**power
    values += np.linspace(-4, 4, 9)[:, None] * 2.0**power  # from all negative to all positive
    check(values.astype(np.float32), bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("eighths", range(8))
def test_zero_points_and_codes_round_to_nearest_ties_to_even(bits: int, eighths: int) -> None:
    """With a step of 1/4 all is exact in float32, so that every bit follows from the definition, ties included."""
    top, step = 2**bits - 1, Fraction(1, 4)
    for start in range(0, top, 1 if bits == 4 else 11):
        below = start + Fraction(eighths, 8)
        ends = [float(-below * step), float((top - below) * step)]
        between = np.arange(np.ceil(ends[0] * 8), ends[1] * 8) / 8  # codes in halves
        values = np.float32([*ends, *between]).reshape(1, 1, -1)
        codec = get_float_codec(f"int{bits}")
        encoded = codec.encode(torch.from_numpy(values))
        steps, zeros, codes = parts(encoded, bits)
        zero = round(below)
        assert steps[0] == float(step)
        assert zeros[0] == zero
        expected = [min(top, max(0, round(Fraction(float(v)) / step + zero))) for v in values.ravel()]
        assert codes.ravel().tolist() == expected
        assert codec.decode(encoded).numpy().ravel().tolist() == [float(step * (code - zero)) for code in expected]


@pytest.mark.parametrize("bits", [8, 4])
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6),
        elements=st.floats(-(2.0**40), 2.0**40, width=32) | st.sampled_from([0.0, 1.0, -1e-3]),
    ),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=100)
def test_stochastic_codes_are_the_two_beside_the_value_and_none_saturates(
    bits: int, values: np.ndarray, seed: int
) -> None:
    codec, top = get_float_codec(f"int{bits}:stochastic"), 2**bits - 1
    steps, zeros, codes = parts(codec.encode(torch.from_numpy(values), seed), bits)
    for channel in range(values.shape[1]):
        own = values[:, channel]
        low, high = channel_range(own)
        step, zero = Fraction(float(steps[channel])), int(zeros[channel])
        # As small as it can be: the smallest, over all zero points, that covers both ends.
        reach = [
            max(-low / z if low else Fraction(0), high / (top - z) if high else Fraction(0))
            for z in range(top + 1)
            if (z or not low) and (z < top or not high)
        ]
        wanted = max(min(reach), Fraction(2) ** -126)
        assert abs(step - wanted) <= wanted / 2**23
        for v, code in zip(own.ravel(), codes[:, channel].ravel(), strict=True):
            exact = Fraction(float(v)) / step + zero
            assert -FLOAT32 <= exact <= top + FLOAT32
            assert abs(int(code) - exact) < 1 + FLOAT32
