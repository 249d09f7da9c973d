"""The name of a random draw as a seed; see `seeds`."""

from __future__ import annotations

import hashlib


def derive(seed: int, *name: str | int) -> int:
    """A seed in [0, 2^63) for the draw of this name."""
    digest = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
