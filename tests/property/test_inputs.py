"""What every codec promises of its input: any float type and memory layout, to the bytes of the float32 widening."""

import pytest
import torch
from torch import Tensor

from cutlayer.codecs import FLOAT_CODECS, get_float_codec

SPECS = [
    *FLOAT_CODECS,
    *(f"{name}:stochastic" for name in ("fp8_e4m3", "hfp8_e5m2", "mxfp4", "nvfp4", "int8", "int4")),
    "fp8_e4m3:channel",
    "fp8_e5m2:channel:stochastic+zstd",
    "mxfp6_e2m3+zstd",
    "topk0.1>bf16",
    "topk0.1>fp16",
    "topk0.9>fp32",
    "randtopk0.2,0.5>mxfp4+zstd",
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = {
    "contiguous": lambda values: values,
    "channels last": lambda values: values.to(memory_format=torch.channels_last),
    "transposed": lambda values: values.transpose(1, 3).contiguous().transpose(1, 3),
    "batch last": lambda values: values.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other": lambda values: values.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda values: values[:, :1].expand(-1, values.shape[1], -1, -1),
}


def tensor(dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Values of a type up to its largest times `scale`, its smallest and zeros among them."""
    values = torch.randn(5, 4, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    about = torch.finfo(dtype)
    values[:, 1] *= 1e-3
    values[:, 2] = values[:, 2].clamp(min=0)
    values = values.to(dtype)
    values[0, 0, 0] = torch.tensor([about.max * scale, -about.max * scale, about.smallest_normal], dtype=dtype)
    return values


def same_bytes(spec: str, a: Tensor, b: Tensor) -> bool:
    codec = get_float_codec(spec)
    return b"".join(codec.pack(codec.encode(a, 3))) == b"".join(codec.pack(codec.encode(b, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_every_float_type_is_encoded_as_its_float32_value(spec: str, dtype: torch.dtype, scale: float) -> None:
    values, codec = tensor(dtype, scale), get_float_codec(spec)
    largest = torch.finfo(torch.float32).max
    wide = values.double().clamp(-largest, largest).float()
    assert same_bytes(spec, values.requires_grad_(), wide)
    decoded = codec.decode(codec.encode(values))
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_layout_in_memory_changes_nothing(spec: str, layout: str) -> None:
    for dtype in (torch.float32, torch.float16):
        values = LAYOUTS[layout](tensor(dtype, 1e-3))
        assert same_bytes(spec, values, values.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("rand")])
def test_infinity_saturates_and_nan_stays_in_every_type(spec: str, dtype: torch.dtype) -> None:
    codec, values = get_float_codec(spec), tensor(dtype, 1e-3)
    values[1, 0, 0, 0], values[1, 0, 1, 0] = torch.inf, -torch.inf
    decoded = codec.decode(codec.encode(values))
    if spec in ("fp32", "topk0.9>fp32"):  # exact: the receiver refuses it
        assert decoded[1, 0, 0, 0] == torch.inf
    else:
        assert decoded.isfinite().all()
    values[1, 0, 0, 0] = torch.nan
    assert codec.decode(codec.encode(values))[1, 0, 0, 0].isnan()


@pytest.mark.parametrize("spec", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_bits_saturate_at_their_own_largest_value(spec: str, dtype: torch.dtype) -> None:
    own = {"fp16": torch.float16, "bf16": torch.bfloat16}[spec]
    largest = min(torch.finfo(own).max, torch.finfo(dtype).max)
    values = torch.tensor([[torch.finfo(dtype).max, -torch.finfo(dtype).max]], dtype=dtype)
    decoded = get_float_codec(spec).decode(get_float_codec(spec).encode(values))
    expected = torch.tensor([[largest, -largest]], dtype=torch.float64).to(own).float()
    assert torch.equal(decoded, expected)
