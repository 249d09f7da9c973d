"""Several views of a sample: where in a store the last ones are, and which one an epoch learns from.

An augmentation is drawn anew whenever a sample is sent. With one view, the server learns from the newest alone until
the next exchange; with k it learns from the last k, of which one is drawn for each sample and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.codecs import get_transfer
from cutlayer.errors import ConfigError


class Views:
    """The last `count` views of each sample, in rows of a store: view v of sample i is row v * samples + i.

    With one view a sample's row is its number, and the store alone knows which are there.

    Args:
        samples: how many there are.
        count: views of each that are stored, at least 1; a new one takes the place of the oldest.
    """

    def __init__(self, samples: int, count: int) -> None:
        self.samples, self.count = samples, count
        self._written = np.zeros(samples, np.int64)

    @property
    def rows(self) -> int:
        """Rows of the store."""
        return self.samples * self.count

    def written(self, ids: Tensor) -> Tensor:
        """The rows that the next views of these samples go to, int64 [B]; counts them as stored."""
        if self.count == 1:
            return ids
        index = ids.numpy()
        rows = self._written[index] % self.count * self.samples + index
        self._written[index] += 1
        return torch.from_numpy(rows)

    def drawn(self, ids: Tensor, draw: torch.Generator) -> Tensor:
        """A row of each of these samples, which must be there, drawn among the views that are stored: int64 [B]."""
        if self.count == 1:
            return ids
        stored = torch.from_numpy(self._written[ids.numpy()]).clamp(max=self.count)
        return torch.randint(1 << 31, (len(ids),), generator=draw) % stored * self.samples + ids

    def present(self, start: int, stop: int) -> Tensor:
        """The samples from `start` to before `stop` that have a view, int64."""
        return torch.from_numpy(np.flatnonzero(self._written[start:stop]) + start)

    def forget(self, start: int, stop: int) -> None:
        """Know of no view of the samples from `start` to before `stop` any more."""
        self._written[start:stop] = 0

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The rows of all views of the samples from `start` to before `stop`: the first, and the one after the last."""
        return [(view * self.samples + start, view * self.samples + stop) for view in range(self.count)]

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """How many views of each sample have come."""
        return {"written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        written = state["written"]  # of fewer samples, if clients were admitted since
        self._written[: len(written)], self._written[len(written) :] = written, 0


def check_views(views: int, views_from: int | None, activations: str) -> None:
    """Raise ConfigError for a number of views that cannot be, or not with this codec of the activations."""
    if not isinstance(views, int) or views < 1:
        raise ConfigError(f"views must be a whole number of at least 1, got {views!r}")
    if views_from is not None and (not isinstance(views_from, int) or views_from < 0):
        raise ConfigError(f"views_from: expected an epoch from 0, or None, got {views_from!r}")
    if views > 1 and get_transfer(activations).delta is not None:
        raise ConfigError(
            f"activations {activations!r} with views={views}: 'delta>' sends the change against the one view that both "
            "sides have, and gains if that is small; several views gain if they differ. Choose one"
        )
