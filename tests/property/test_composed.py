"""What codecs promise when they are composed, round at random, or keep only some values; on hypothesis' tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cutlayer.codecs import FLOAT_CODECS, Encoded, get_codec, get_float_codec
from cutlayer.codecs.bits import pack_bits, packed_bytes, unpack_bits
from cutlayer.codecs.sparse import pack_positions, position_bytes, unpack_positions

SPECS = [
    *(f"{name}+zstd" for name in FLOAT_CODECS),
    "fp8_e4m3:channel",
    "fp8_e5m2:channel:stochastic+zstd",
    "mxfp4:stochastic",
    "nvfp4:stochastic",
    "int4:stochastic",
    "hfp8_e4m3:stochastic",
    "topk0.1>fp16",
    "topk0.3>fp8_e4m3+zstd",
    "topk0.02>int8",
    "topk0.9>bf16",
    "randtopk0.2,0.5>mxfp4+zstd",
]
numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-45, 448.0, math.inf, -math.inf, math.nan])
batches = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6), elements=numbers)
finite = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9),
    elements=st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, 1.0, 2.0**-40]),
)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("spec", SPECS)
@given(values=batches, seed=st.integers(0, 2**64 - 1))
@settings(max_examples=30)
def test_bytes_and_single_samples_decode_to_the_same_bits(spec: str, values: np.ndarray, seed: int) -> None:
    codec, tensor = get_float_codec(spec), torch.from_numpy(values)
    shape = tuple(values.shape[1:])
    encoded = codec.encode(tensor, seed)
    assert encoded.codec == codec.name == spec
    assert encoded.rows.shape == (len(values), codec.layout(shape).row_bytes)
    assert encoded.shared.shape == (1, codec.layout(shape).shared_bytes)
    payload = b"".join(codec.pack(encoded))
    assert payload == b"".join(codec.pack(codec.encode(tensor, seed)))
    received = codec.unpack(memoryview(payload), len(values), shape)
    assert torch.equal(received.rows, encoded.rows)
    assert torch.equal(received.shared, encoded.shared)
    decoded = codec.decode(received)
    assert decoded.dtype == torch.float32
    assert decoded.shape == tensor.shape
    # Samples as the replay store gives them back: in another order, the shared bytes beside each.
    order = torch.randperm(len(values))
    shared = encoded.shared.expand(len(values), -1)[order]
    drawn = codec.decode(Encoded(spec, shape, encoded.rows[order], shared))
    assert same(drawn, decoded[order])


@pytest.mark.parametrize("spec", ["fp8_e4m3:channel", "mxfp8_e5m2", "mxfp4", "nvfp4", "int8", "int4", "fp8_e4m3"])
@given(values=finite)
@settings(max_examples=30)
def test_nan_shows_and_infinity_saturates(spec: str, values: np.ndarray) -> None:
    codec = get_float_codec(spec)
    broken = torch.from_numpy(values.copy())
    broken.view(-1)[0] = math.nan
    assert codec.decode(codec.encode(broken)).view(-1)[0].isnan()
    broken.view(-1)[0] = math.inf
    assert codec.decode(codec.encode(broken)).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
@given(values=finite)
@settings(max_examples=50)
def test_affine_integers_are_within_half_a_step_and_keep_zero(bits: int, values: np.ndarray) -> None:
    codec = get_float_codec(f"int{bits}")
    decoded = codec.decode(codec.encode(torch.from_numpy(values))).numpy()
    grouped = values.reshape(len(values), values.shape[1], -1).astype(np.float64)
    reach = np.maximum(grouped.max((0, 2)), 0) - np.minimum(grouped.min((0, 2)), 0)
    # Half a step for the rounding of the value, half for that of the zero point, at the ends of the range.
    step = (reach / (2**bits - 1))[None, :, None] * (1 + 1e-5)
    assert (np.abs(decoded.reshape(grouped.shape) - grouped) <= step + 1e-37).all()
    assert (decoded[values == 0] == 0).all()


@given(codes=hnp.arrays(np.uint8, st.tuples(st.integers(0, 4), st.integers(0, 41))), width=st.integers(1, 8))
@settings(max_examples=200)
def test_bits_pack_tightly(codes: np.ndarray, width: int) -> None:
    masked = torch.from_numpy(codes & ((1 << width) - 1))
    packed = pack_bits(masked, width)
    assert packed.shape == (len(codes), packed_bytes(codes.shape[1], width))
    assert packed_bytes(codes.shape[1], width) <= -(-codes.shape[1] * width // 8) + 2
    assert torch.equal(unpack_bits(packed, codes.shape[1], width), masked)


@given(data=st.data(), count=st.integers(1, 300), batch=st.integers(1, 3))
@settings(max_examples=200)
def test_positions_pack_tightly(data: st.DataObject, count: int, batch: int) -> None:
    k = data.draw(st.integers(1, count))
    mask = torch.zeros(batch, count, dtype=torch.bool)
    for row in range(batch):
        mask[row, data.draw(st.permutations(range(count)))[:k]] = True
    packed = pack_positions(mask, k)
    assert packed.shape == (batch, position_bytes(count, k))
    assert torch.equal(unpack_positions(packed, count, k), mask)
    assert position_bytes(count, k) <= -(-count // 8)
    assert 8 * position_bytes(count, k) <= k * (3 + math.log2(count / k)) + 24


@pytest.mark.parametrize("fraction", [0.05, 0.3])
@given(values=hnp.arrays(np.float32, (3, 90), elements=st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 0.5, 7.0])))
@settings(max_examples=60)
def test_top_k_keeps_the_largest(fraction: float, values: np.ndarray) -> None:
    codec = get_float_codec(f"topk{fraction}>fp16")
    decoded = codec.decode(codec.encode(torch.from_numpy(values))).numpy()
    k = math.ceil(fraction * 90)
    for before, after in zip(values, decoded, strict=True):
        order = np.argsort(-np.abs(before), kind="stable")  # of equal ones the first
        expected = np.zeros_like(before)
        expected[order[:k]] = before[order[:k]]
        np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("inner", [*FLOAT_CODECS, "mxfp4:stochastic"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (40,), (16, 2, 2), (32, 8, 8)])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.35, 0.8, 1.0])
def test_sparse_rows_are_never_larger_than_dense_ones(inner: str, shape: tuple[int, ...], fraction: float) -> None:
    sparse, dense = get_codec(f"topk{fraction}>{inner}").layout(shape), get_codec(inner).layout(shape)
    assert sparse.row_bytes <= dense.row_bytes
    assert sparse.shared_bytes <= dense.shared_bytes
