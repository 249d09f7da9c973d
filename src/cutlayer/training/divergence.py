"""What a checkpoint must never hold, and which client has made training diverge."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from cutlayer.codecs import isfinite
from cutlayer.errors import DivergedError

OUT_OF_LINE = 100.0
"""How many times as large as the others' a client's activations are for it to be suspected."""


def require_finite(what: str, module: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Raise DivergedError if a half or what its optimizer remembers is not finite."""
    remembered = (value for state in optimizer.state.values() for value in state.values())
    wrong = not _finite(module.state_dict().values()) or not _finite(v for v in remembered if isinstance(v, Tensor))
    if wrong:
        raise DivergedError(f"epoch {epoch}: {what} or its optimizer holds infinities or NaN; lower the learning rate")


def _finite(values: Iterable[Tensor]) -> bool:
    return all(isfinite(value) for value in values if value.is_floating_point())


def out_of_line(magnitudes: Mapping[int, float], among: Collection[int]) -> int | None:
    """The one client whose activations are far larger than the others', of those with a magnitude; None if none is.

    Training that diverges by itself, as of a learning rate that is too high, has all clients' grow alike.
    """
    known = {client: magnitudes[client] for client in among if client in magnitudes}
    if len(known) < 2:
        return None
    suspect = max(known, key=lambda client: known[client])
    others = statistics.median(value for client, value in known.items() if client != suspect)
    return suspect if known[suspect] > OUT_OF_LINE * others else None
