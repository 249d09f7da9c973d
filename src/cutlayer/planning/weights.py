"""How long frames of weights are, and who has which: what a plan must know of client halves that are handed on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.models.cut import is_frozen
from cutlayer.training.calibration import norm_layers, statistics
from cutlayer.wire.frames import Field


class HalfSizes:
    """Frames of a client half's weights, whose counters of batches take more bytes as they grow."""

    def __init__(self, half: nn.Module) -> None:
        state = half.state_dict()
        counters = {
            f"{name}.num_batches_tracked" if name else "num_batches_tracked"
            for name, module in half.named_modules()
            if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None
        }
        self._fixed = {name: None if name in counters else _field(name, value) for name, value in state.items()}
        measured = norm_layers(half) and not is_frozen(half)
        self.statistics = tuple(_field(n, value) for n, value in statistics(half).items()) if measured else ()

    def weights(self, counter: int) -> tuple[Field, ...]:
        """The fields of all weights after so many batches."""
        codec = encode_exactly(torch.tensor([counter])).codec
        size = get_codec(codec).layout(()).row_bytes
        return tuple(each or Field(name, codec, 1, (), size) for name, each in self._fixed.items())


def _field(name: str, value: Tensor) -> Field:
    encoded = encode_exactly(value.detach().cpu().unsqueeze(0))
    return Field(name, encoded.codec, 1, encoded.shape, encoded.nbytes)


@dataclass
class ClientCounter:
    """What decides the length of a client's weights: the batches that its batch norm has counted."""

    counter: int = 0


@dataclass
class SharedCounter:
    """What decides the length of the shared half, and which of it clients are sent."""

    counter: int | None = None  # None before the first upload
    version: int = 0
    pooled: int = -1  # the version at which statistics were pooled last
    statistics: bool = False  # whether any were then
    uploads: list[int] = field(default_factory=list)

    def average(self) -> None:
        """The newest half is the average of what was uploaded, if anything was."""
        if self.uploads:
            self.counter, self.version, self.uploads = max(self.uploads), self.version + 1, []

    def pool(self, found: bool) -> None:
        """Statistics were pooled into it, if any came."""
        self.version += found
