"""The order of a run's samples, as PyTorch draws it: so a device sends the batches that any client would."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cutlayer.naming import derive


def epoch_order(seed: int, client: int, epoch: int, samples: int, shuffle: bool) -> NDArray[np.int64]:
    """The sample ids of an epoch, in order: `torch.randperm` with the generator of `seeds`."""
    order = np.arange(samples)
    if not shuffle:
        return order
    # The same Mersenne Twister, seeded in the same way; and PyTorch's own shuffle.
    draws = np.random.RandomState(derive(seed, "order", client, epoch) & 0xFFFFFFFF)._bit_generator.random_raw
    for place in range(samples - 1):
        other = place + int(draws()) % (samples - place)
        order[place], order[other] = order[other], order[place]
    return order
