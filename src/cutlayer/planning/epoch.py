"""What an epoch of a planned run sends, and what its clients compute."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cutlayer.models.auxiliary import SelfTraining
from cutlayer.models.flops import FlopTable

Bytes = dict[str, dict[str, int]]
Pass = tuple[str, int, bool]


@dataclass(frozen=True)
class EpochTraffic:
    """What an epoch sends.

    Attributes:
        exchange: as `EpochRecord.exchange`.
        bytes: as `EpochRecord.bytes`.
        passes: of client halves, by kind, samples, and whether in training mode; "local" is forward and backward of a
            half and its own head.
        measured: batches on which each of its clients measures batch norm's statistics, at most.
    """

    exchange: str
    bytes: Bytes
    passes: Counter[Pass]
    measured: int

    def client_flops(self, table: FlopTable, head: FlopTable | None = None) -> dict[str, int]:
        """As `EpochRecord.flops["client"]`.

        Args:
            table: of the client half.
            head: of its own head, if it trains by itself.
        """
        found: dict[str, int] = defaultdict(int)
        for (what, samples, training), times in self.passes.items():
            forward, backward = table(samples, training=training)
            if what == "local" and head is not None:
                above = head(samples, input_gradient=True)
                found["forward"] += times * (forward + above[0])
                found["backward"] += times * (backward + above[1])
            else:
                found[what] += times * (backward if what == "backward" else forward)
        return dict(sorted(found.items()))


def own_head(half: nn.Module, table: FlopTable) -> FlopTable | None:
    """FLOPs of the head that a client half trains itself with; None if it has none.

    Args:
        table: of the half.
    """
    return FlopTable(half.head, table.output_shape, torch.float32) if isinstance(half, SelfTraining) else None


def totals(epochs: Iterable[EpochTraffic]) -> dict[str, int]:
    """Bytes up, down, and of evaluations."""
    found = {"up": 0, "down": 0, "evaluation": 0}
    for each in epochs:
        for way, sizes in each.bytes.items():
            for kind, size in sizes.items():
                found["evaluation" if kind == "evaluation" else way] += size
    return found
