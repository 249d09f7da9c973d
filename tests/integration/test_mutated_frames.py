"""The short form of fuzz_server.py: mutants are refused, counted and harmless, memory stays flat."""

from pathlib import Path

import pytest

from tests.helpers.fuzz_server import fuzz


@pytest.mark.parametrize(("codec", "frames"), [("fp8", 3000), ("delta0.2>mxfp4+zstd/ef>topk0.2>fp8_e5m2", 1000)])
def test_mutated_frames_are_refused_and_counted_and_change_nothing(codec: str, frames: int, tmp_path: Path) -> None:
    found = fuzz(tmp_path, frames, seed=1, codec=codec)
    assert found["mutants"] >= frames
    assert found["corrupt messages"] >= 1
    assert found["refused hellos"] >= 1
    # A corrupt message ends its connection before the next one is read; the refusal may come with that end.
    assert found["refusals counted"] >= found["mutants"] + found["refused hellos"]
    assert found["same bits"]
    assert found["MiB at the end"] - found["MiB after 10 %"] < 16
