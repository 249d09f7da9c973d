"""Number formats: how tensors become bytes. One registry, one interface (`Codec`), a file for each family.

This package knows nothing of training, clients or servers. docs/formats.md defines every format.
"""

from __future__ import annotations

from torch import Tensor

from cutlayer.codecs.base import Codec, Encoded, Layout, isfinite, magnitude
from cutlayer.codecs.integers import narrowest
from cutlayer.codecs.specs import (
    FLOAT_FORMATS,
    INTEGER_CODECS,
    PAIRS,
    Transfer,
    evaluation_codec,
    get_codec,
    get_float_codec,
    get_pair,
    get_transfer,
)

FLOAT_CODECS: dict[str, Codec] = {name: get_float_codec(name) for name in FLOAT_FORMATS}


def encode_exactly(values: Tensor) -> Encoded:
    """Encode labels or ids without loss: whole numbers in the narrowest type that holds them, floats as fp32."""
    if values.is_floating_point():
        return FLOAT_CODECS["fp32"].encode(values)
    return narrowest(values).encode(values)


__all__ = [
    "FLOAT_CODECS",
    "INTEGER_CODECS",
    "PAIRS",
    "Codec",
    "Encoded",
    "Layout",
    "Transfer",
    "encode_exactly",
    "evaluation_codec",
    "get_codec",
    "get_float_codec",
    "get_pair",
    "get_transfer",
    "isfinite",
    "magnitude",
]
