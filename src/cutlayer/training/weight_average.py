"""The mean of a half's weights after its last updates, which then takes their place.

Sources: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (SWA, UAI 2018, arXiv
1803.05407); Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging"
(LAWA, arXiv 2209.14981). As they say, batch norm's statistics must be measured anew with the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "average."


class WeightAverage:
    """A mean over updates. While there are any, it takes the room of the half's weights once more.

    Attributes:
        updates: over so many.
        means: by the parameters' names.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.means: dict[str, Tensor] = {}

    def add(self, half: nn.Module) -> None:
        """Count the weights that the half has now."""
        self.updates += 1
        for name, parameter in half.named_parameters():
            if parameter.requires_grad:
                value = parameter.detach()
                if name not in self.means:
                    self.means[name] = torch.zeros_like(value)
                self.means[name] += (value - self.means[name]) / self.updates

    def take(self, half: nn.Module) -> None:
        """Put the mean in the place of the half's weights, if there is one, and begin anew."""
        with torch.no_grad():
            for name, parameter in half.named_parameters():
                if name in self.means:
                    parameter.copy_(self.means[name])
        self.updates, self.means = 0, {}

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """The means, as "average.NAME", and "averaged", over how many updates; nothing if there are none."""
        if not self.updates:
            return {}
        return {"averaged": self.updates, **{f"{PREFIX}{name}": value for name, value in self.means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; other names are left alone."""
        self.updates = state.get("averaged", 0)
        self.means = {name.removeprefix(PREFIX): state[name].clone() for name in state if name.startswith(PREFIX)}
