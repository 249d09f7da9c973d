"""The short form of `fuzz`: mutants are refused and counted, the run ends in the same bits, memory stays flat."""

from pathlib import Path

from tests.integration.fuzz import fuzz


def test_mutated_frames_are_refused_and_counted_and_change_nothing(tmp_path: Path) -> None:
    found = fuzz(tmp_path, frames=3000, seed=1)
    assert found["mutants"] >= 3000
    assert found["corrupt messages"] >= 1
    assert found["refused hellos"] >= 1
    # A corrupt message ends its connection before the next one is read; the refusal may come with that end.
    assert found["refusals counted"] >= found["mutants"] + found["refused hellos"]
    assert found["same bits"]
    assert found["MiB at the end"] - found["MiB after 10 %"] < 16
