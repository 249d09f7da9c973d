"""Accuracy against bytes and against the client's compute: the method beside its rivals, on the same preset.

Rows that the paper's experiments have, too, are the same runs: results of `cutlayer reproduce` count here.

Sources: top-k of activations and gradients, and its randomized form: Zheng et al. (RandTopk, arXiv 2305.18469).
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlayer.schedule import Always
from cutlayer.studies.few_exchanges import FEW
from cutlayer.studies.rows import Row
from cutlayer.studies.sips2021 import ALWAYS_4, BEST, PAPER, PLAIN, fixed

SPARSE = [
    Row("topk", "top-k, 10 % in 8 bits", fixed(Always(), "topk0.1>fp8_e4m3/topk0.1>fp8_e5m2")),
    Row("randtopk", "randomized top-k, 10 % in 8 bits", fixed(Always(), "randtopk0.1>fp8_e4m3/topk0.1>fp8_e5m2")),
]

GROUPS: Sequence[Sequence[Row]] = [[PLAIN, PAPER], [BEST[name] for name in FEW], [ALWAYS_4, *SPARSE]]
