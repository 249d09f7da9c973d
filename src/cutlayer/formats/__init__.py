"""Number formats: how tensors become bytes. One registry, one interface (`Codec`), a file for each family.

This package knows nothing of training, clients or servers.
"""

from __future__ import annotations

from torch import Tensor

from cutlayer.errors import ConfigError, unknown
from cutlayer.formats import floats, integers
from cutlayer.formats.base import Codec, Encoded, Layout, isfinite

FLOAT_CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        floats.FP32,
        floats.FP16,
        floats.BF16,
        floats.FP8_E4M3,
        floats.FP8_E5M2,
        floats.HFP8_E4M3,
        floats.HFP8_E5M2,
    )
}
INTEGER_CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (integers.U8, integers.U16, integers.U32, integers.I64)
}

# Names for both directions at once: (activations, gradients).
PAIRS: dict[str, tuple[str, str]] = {
    **{name: (name, name) for name in FLOAT_CODECS},
    "fp8": ("fp8_e4m3", "fp8_e5m2"),
    "hfp8": ("hfp8_e4m3", "hfp8_e5m2"),
}


def get_codec(name: str) -> Codec:
    """The codec of this name, as it stands in configs and in frames. Raises ConfigError with the known names."""
    codec = FLOAT_CODECS.get(name) or INTEGER_CODECS.get(name)
    if codec is None:
        raise ConfigError(unknown("codec", name, [*FLOAT_CODECS, *INTEGER_CODECS]))
    return codec


def get_float_codec(name: str) -> Codec:
    """The codec of this name for activations or gradients."""
    if name not in FLOAT_CODECS:
        raise ConfigError(unknown("codec for activations and gradients", name, FLOAT_CODECS))
    return FLOAT_CODECS[name]


def encode_exactly(values: Tensor) -> Encoded:
    """Encode labels or ids without loss: whole numbers in the narrowest type that holds them, floats as fp32."""
    if values.is_floating_point():
        return floats.FP32.encode(values)
    return integers.narrowest(values).encode(values)


__all__ = [
    "FLOAT_CODECS",
    "INTEGER_CODECS",
    "PAIRS",
    "Codec",
    "Encoded",
    "Layout",
    "encode_exactly",
    "get_codec",
    "get_float_codec",
    "isfinite",
]
