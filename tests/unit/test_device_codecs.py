"""A device's NumPy codecs write the bytes that PyTorch's write, and its order is PyTorch's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer import ConfigError, RefusedError
from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.data.batches import Batches
from cutlayer.device.encode import _ENCODERS, DeviceCodec, integers
from cutlayer.device.order import epoch_order
from cutlayer.planning.load import Outline

SPECS = [":".join(each) for each in _ENCODERS]
SHAPES = [(16, 4, 4), (3, 5, 7), (32,), (1,), (2, 33)]


def tensors(shape: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(shape))
    normal = torch.randn(6, *shape, generator=draw)
    spread = normal * 2.0 ** torch.randint(-140, 120, normal.shape, generator=draw)
    ties = torch.randint(-300, 300, normal.shape, generator=draw) / 16
    return [normal, normal.relu(), spread, ties, normal * 3e38, normal * 1e-40, torch.zeros_like(normal)]


@pytest.mark.parametrize("stage", ["", "+zstd"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_bytes_are_those_of_the_codec(spec: str, stage: str) -> None:
    codec, device = get_codec(spec + stage), DeviceCodec(spec + stage)
    for shape in SHAPES:
        for values in tensors(shape):
            values = values.clamp(-3.4e38, 3.4e38)
            expected = b"".join(codec.pack(codec.encode(values)))
            assert b"".join(device.pack(values.numpy())) == expected, (spec, shape)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70))
def test_whatever_the_values(values: list[float]) -> None:
    batch = torch.tensor([values])
    for spec in SPECS:
        codec = get_codec(spec)
        assert b"".join(DeviceCodec(spec).pack(batch.numpy())) == b"".join(codec.pack(codec.encode(batch))), spec


@pytest.mark.parametrize("values", [[0, 255], [256], [70_000], [-1], [1 << 40], []])
def test_whole_numbers(values: list[int]) -> None:
    encoded = encode_exactly(torch.tensor(values, dtype=torch.int64))
    name, content = integers(np.array(values, np.int64))
    assert (name, content) == (encoded.codec, b"".join(get_codec(name).pack(encoded)))


@pytest.mark.parametrize("samples", [1, 2, 37, 1437])
def test_the_order_is_pytorchs(samples: int) -> None:
    for seed, client, epoch in ((0, 0, 0), (3, 2, 17), (2**40, 1, 200)):
        data = Outline(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), samples)
        (order,) = Batches(data, batch_size=samples, seed=seed, client=client).order(epoch)
        assert epoch_order(seed, client, epoch, samples, True).tolist() == order


def test_what_needs_pytorch_is_said() -> None:
    for spec in ("topk0.1>fp16", "delta>mxfp4", "fp8_e4m3:stochastic", "fp9"):
        with pytest.raises(ConfigError, match="a device without PyTorch knows"):
            DeviceCodec(spec)
    with pytest.raises(RefusedError, match="not finite"):
        DeviceCodec("fp8_e4m3").pack(np.array([[np.nan]], np.float32))
