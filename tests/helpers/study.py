"""A study of small runs, as a script that can be killed: python -m tests.helpers.study FILE RUNS JOBS."""

from __future__ import annotations

import sys
from pathlib import Path

from cutlayer import RunConfig, with_choices
from cutlayer.runs.fit import Result
from cutlayer.runs.recipes import digits
from cutlayer.studies import Study

SMALL = with_choices(
    digits(), train_samples=64, test_samples=32, width=0.25, epochs=2, batch_size=32, schedule="always", threads=1
)


def measure(config: RunConfig, result: Result) -> dict[str, object]:
    return {"seed": config.training.seed, "losses": result.history.losses}


def study(file: Path, runs: int) -> Study:
    return Study(file, [with_choices(SMALL, seed=seed) for seed in range(runs)], measure)


if __name__ == "__main__":
    study(Path(sys.argv[1]), int(sys.argv[2])).run(int(sys.argv[3]))
