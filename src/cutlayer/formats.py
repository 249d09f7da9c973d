"""Element formats: small floats of four to eight bits. Their conversions are in `codecs.elements`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Element:
    """A float format of one sign bit, some exponent bits and `mantissa` bits, in the low `bits` bits of a byte.

    Attributes:
        bits: width of a code.
        mantissa: explicit mantissa bits.
        lowest: exponent of the smallest normal number, 1 - bias.
        largest: largest finite value.
        nan: code written for NaN; None if the format has no NaN.
        negative_zero: whether the code with only the sign bit is -0; if not, it is the one NaN.
    """

    bits: int
    mantissa: int
    lowest: int
    largest: float
    nan: int | None = None
    negative_zero: bool = True

    @property
    def highest(self) -> int:
        """Exponent of the largest value (`emax` of the MX specification)."""
        return int(np.floor(np.log2(self.largest)))


E4M3 = Element(8, 3, -6, 448.0, nan=0x7F)
E5M2 = Element(8, 2, -14, 57344.0, nan=0x7F)
E4M3_HFP8 = Element(8, 3, -10, 30.0, nan=0x80, negative_zero=False)
E2M3 = Element(6, 3, 0, 7.5)
E3M2 = Element(6, 2, -2, 28.0)
E2M1 = Element(4, 1, 0, 6.0)
