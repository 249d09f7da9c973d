"""Sorted numbers as text with ranges, such as "0-4,7,9-12": short, and readable by a person."""

from __future__ import annotations

import re

import numpy as np

from cutlayer.errors import ConfigError

FORM = re.compile(r"\d{1,12}(-\d{1,12})?(,\d{1,12}(-\d{1,12})?)*", re.ASCII)


def to_text(numbers: np.ndarray) -> str:
    """Strictly increasing int64 [N] as text."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def from_text(text: str, below: int) -> np.ndarray:
    """Inverse of `to_text`: strictly increasing int64 [N], all of them less than `below`.

    Raises ConfigError for anything else, before it takes memory.
    """
    if not text:
        return np.empty(0, np.int64)
    if not FORM.fullmatch(text):
        raise ConfigError(f"expected numbers and ranges such as 0-4,7,9-12, got {text[:40]!r}")
    runs, last = [], -1
    for part in text.split(","):
        first, _, end = part.partition("-")
        run = range(int(first), int(end or first) + 1)
        if not run or run[0] <= last or run[-1] >= below:
            raise ConfigError(f"expected increasing numbers from 0 to {below - 1}, got {part} after {max(last, 0)}")
        runs.append(np.arange(run.start, run.stop, dtype=np.int64))
        last = run[-1]
    return np.concatenate(runs)
