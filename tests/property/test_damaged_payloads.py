"""Damaged payloads: the short form of fuzz_codecs.py. CUTLAYER_FUZZ sets the count (10^6 takes a minute)."""

import os

from tests.helpers.fuzz_codecs import fuzz

SECONDS = 20
"""Within which a test ends on a slow machine, too."""


def test_decoders_survive_damaged_payloads() -> None:
    asked = os.environ.get("CUTLAYER_FUZZ")
    count = int(asked or 20_000)
    outcomes = fuzz(count, seed=count, seconds=float("inf") if asked else SECONDS)
    assert sum(outcomes.values()) == count or not asked
    assert (
        min(outcomes[what] for what in ("refused", "decoded", "frame refused", "frame read"))
        > sum(outcomes.values()) / 100
    )
