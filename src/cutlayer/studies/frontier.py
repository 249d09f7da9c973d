"""Accuracy against bytes and against the client's compute: the method beside its rivals, on the same preset.

Rows that the paper's experiments have, too, are the same runs: results of `cutlayer reproduce` count here.

Sources: top-k of activations and gradients, and its randomized form: Zheng et al. (RandTopk, arXiv 2305.18469). A
client half with a local head, and activations that go up once: see `LocalHead`; the first such row sends 32 bits, as
published. A client that trains by itself while it sends: see `LocalLoss`. A client half that is not trained at all: see
`Untrained`. A bottleneck: see `models.narrow`; bound samples: see `models.bound`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cutlayer.runs.client_half import LocalHead, LocalLoss, Untrained
from cutlayer.schedule import Always, Once
from cutlayer.studies.few_exchanges import FEW, FOUR_BITS
from cutlayer.studies.rows import Row
from cutlayer.studies.sips2021 import ALWAYS_4, BEST, PAPER, PLAIN, SHALLOW, fixed

SPARSE = [
    Row("topk", "top-k, 10 % in 8 bits", fixed(Always(), "topk0.1>fp8_e4m3/topk0.1>fp8_e5m2")),
    Row("randtopk", "randomized top-k, 10 % in 8 bits", fixed(Always(), "randtopk0.1>fp8_e4m3/topk0.1>fp8_e5m2")),
]

SMALLER = [
    Row("narrow4", "bottleneck, a quarter of the channels", fixed(Always(), "fp32"), changes={"narrow": 4}),
    Row("bind4", "4 samples bound as one", fixed(Always(), "fp32"), changes={"bind": 4}),
    Row("bind16", "16 samples bound as one", fixed(Always(), "fp32"), changes={"bind": 16}),
]

LOCAL_LOSS = [
    Row("cse5", "local loss, every 5th batch, 32 bits", fixed(Always(), "fp32"), client_half=LocalLoss(5)),
    Row("cse50", "local loss, every 50th batch, 4 bits", fixed(Always(), FOUR_BITS), client_half=LocalLoss(50)),
]
"""The client trains all through the run."""

ONE_UPLOAD = [
    Row("local20", "local head, 20 epochs, one upload in 32 bits", fixed(Once(), "fp32"), client_half=LocalHead(20)),
    Row("local5", "local head, 5 epochs, one upload, 4 bits", fixed(Once(), FOUR_BITS), client_half=LocalHead(5)),
    Row("local20few", "local head, 20 epochs, then as 5 A + 14 B", FEW["few250"][1], client_half=LocalHead(20)),
    Row("random", "random client half, one upload, 4 bits", fixed(Once(), FOUR_BITS), client_half=Untrained()),
    Row("randomfew", "random client half, as 5 A + 14 B", FEW["few250"][1], client_half=Untrained()),
]
"""With a frozen client half A epochs are B epochs."""

PADDED = [replace(row, against="plain") for row in SHALLOW if row.name in ("shallow-pad500", "shallow-pad250")]
"""Held against plain split learning at the usual cut: bytes count here, not a ratio at a cut that more values cross."""

NOTES = [
    "Yardsticks: *uncut training* of the same network gives the weights of plain split learning in 32 bits, bit for "
    "bit (`tests/parity`), so its accuracy is that of the first row, merged; whoever may upload the images sends 1 "
    "time the images, once, and computes nothing on the client.",
]

GROUPS: Sequence[Sequence[Row]] = [
    [PLAIN, PAPER],
    [*(BEST[name] for name in FEW), *PADDED],
    [*ONE_UPLOAD, *LOCAL_LOSS, ALWAYS_4, *SMALLER, *SPARSE],
]
