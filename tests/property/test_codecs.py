"""What every codec promises, on tensors that hypothesis makes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cutlayer.codecs import FLOAT_CODECS, Encoded, encode_exactly, get_codec, get_float_codec
from cutlayer.memory.store import ReplayStore
from cutlayer.wire.frames import Frame, pack, unpack
from cutlayer.wire.messages import Step

finite = st.floats(-(2.0**100), 2.0**100, width=32)
batches = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6).map(lambda s: (max(1, s[0]), *s[1:])),
    elements=finite | st.sampled_from([0.0, -0.0, 1e-45, 448.0, 2.0**-9]),
)  # fmt: skip


def over_the_wire(encoded: Encoded) -> Encoded:
    return unpack(pack(Frame(Step(0, 0, 0), {"activations": encoded}))).tensors["activations"]


@pytest.mark.parametrize("name", FLOAT_CODECS)
@given(values=batches)
@settings(max_examples=60)
def test_the_wire_and_the_store_change_nothing(name: str, values: np.ndarray) -> None:
    codec, tensor = get_float_codec(name), torch.from_numpy(values)
    encoded = codec.encode(tensor)
    layout = codec.layout(tuple(values.shape[1:]))
    assert encoded.rows.shape == (len(values), layout.row_bytes)
    assert encoded.shared.shape == (1, layout.shared_bytes)
    decoded = codec.decode(encoded)
    assert decoded.shape == tensor.shape
    assert decoded.dtype == torch.float32
    received = over_the_wire(encoded)
    assert torch.equal(codec.decode(received), decoded)
    store = ReplayStore(len(values) + 3)
    ids = torch.randperm(len(values) + 3)[: len(values)]
    store.put(ids, received, torch.arange(len(values)))
    order = torch.randperm(len(values))
    kept, labels = store.get(ids[order])
    assert torch.equal(codec.decode(kept), decoded[order])
    assert torch.equal(labels, order)


@pytest.mark.parametrize(
    ("name", "relative"),
    [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8), ("fp8_e4m3", 2**-4), ("fp8_e5m2", 2**-3), ("hfp8_e4m3", 2**-4)],
)
@given(values=batches)
@settings(max_examples=60)
def test_the_error_is_within_half_a_step_of_the_format(name: str, relative: float, values: np.ndarray) -> None:
    values = np.clip(values, -30, 30)
    decoded = get_float_codec(name).decode(get_float_codec(name).encode(torch.from_numpy(values))).numpy()
    values = values.astype(np.float64)
    # Half the distance between subnormals. For E4M3 with a scale it is 2^-10, with a largest code of at least 2^7; a
    # tensor of float32 subnormals keeps less, because the scale stops at 2^126. bf16 is as wide as float32.
    peak = np.abs(values).max(initial=0)
    floor = {"fp32": 0, "fp16": 2**-25, "bf16": 2.0**-134, "hfp8_e4m3": 2**-14}.get(name, max(peak * 2**-17, 2.0**-136))
    assert (np.abs(decoded - values) <= np.maximum(np.abs(values) * relative, floor)).all()


# A scale that is no power of two is itself rounded, and need not come out the same again.
@pytest.mark.parametrize("name", [name for name in FLOAT_CODECS if name not in ("nvfp4", "int8", "int4")])
@given(values=batches)
@settings(max_examples=30)
def test_what_was_rounded_once_stays(name: str, values: np.ndarray) -> None:
    codec = get_float_codec(name)
    once = codec.decode(codec.encode(torch.from_numpy(values)))
    assert torch.equal(codec.decode(codec.encode(once)), once)


@given(hnp.arrays(np.int64, st.integers(1, 20), elements=st.integers(-(2**40), 2**40) | st.integers(0, 300)))
def test_whole_numbers_arrive_exactly_in_the_narrowest_type(values: np.ndarray) -> None:
    encoded = encode_exactly(torch.from_numpy(values))
    received = over_the_wire(encoded)
    assert get_codec(received.codec).decode(received).tolist() == values.tolist()
    needed = next((w for w, top in ((1, 2**8), (2, 2**16), (4, 2**32)) if values.min() >= 0 and values.max() < top), 8)
    assert encoded.rows.shape == (len(values), needed)
