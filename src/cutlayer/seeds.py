"""Randomness by name: every draw is seeded by what it is for, so nothing random needs to be stored or synchronized.

The order of the samples in an epoch, the augmentation of a batch, the dropout of a half: each takes its seed from the
run's seed and its own name, such as ("order", client, epoch). Two processes therefore draw what one would, and a run
that resumes draws what it would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from cutlayer.naming import derive

__all__ = ["derive", "generator", "seeded", "seeded_everywhere"]


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator for the draw of this name."""
    return torch.Generator().manual_seed(derive(seed, *name))


@contextmanager
def seeded_everywhere(seed: int, *name: str | int) -> Iterator[None]:
    """As `seeded`, and the generators of Python's `random` and `numpy.random` as well, for code of the user's own."""
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(derive(seed, *name))
        np.random.seed(derive(seed, *name) % 2**32)
        with seeded(seed, *name):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def seeded(seed: int, *name: str | int, device: torch.device | None = None) -> Iterator[None]:
    """Seed PyTorch's global generators (the CPU's, and that of `device` if it is CUDA) in the block; restore them.

    Not `torch.manual_seed`, which would also seed, and leave seeded, every other device the user works with.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    states = torch.get_rng_state(), torch.cuda.get_rng_state(cuda) if cuda is not None else None
    try:
        torch.default_generator.manual_seed(derive(seed, *name))
        if cuda is not None:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(derive(seed, *name))
        yield
    finally:
        torch.set_rng_state(states[0])
        if cuda is not None and states[1] is not None:
            torch.cuda.set_rng_state(states[1], cuda)
