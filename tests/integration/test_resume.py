"""A run that is killed and resumed ends in the same bits as one that was not. Real processes, SIGKILL."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cutlayer import ConfigError
from cutlayer.run import Run
from tests.integration.killed_run import BATCHES, EPOCHS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(folder: Path, step: int) -> int:
    command = [sys.executable, "-m", "tests.integration.killed_run", str(folder), str(step)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, timeout=120).returncode


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """Final weights as bytes, and the metrics without the seconds."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict, list[dict]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder, -1) == 0
    weights, records = outcome(folder)
    assert [record["exchange"] for record in records] == list("ABCCABCC")
    return weights, records


@pytest.mark.parametrize(("state", "epoch"), [("A", 0), ("A", 4), ("B", 5), ("C", 6), ("C", 7)])
def test_killed_in_the_middle_of_an_epoch(state: str, epoch: int, undisturbed, tmp_path: Path) -> None:
    assert undisturbed[1][epoch]["exchange"] == state
    assert start(tmp_path, epoch * BATCHES + 2) == -signal.SIGKILL
    assert len(Run(tmp_path).records()) == epoch
    assert start(tmp_path, -1) == 0
    assert outcome(tmp_path) == undisturbed


def test_killed_at_random_moments(undisturbed, tmp_path: Path) -> None:
    """Kills from outside, also while metrics and checkpoints are written; as a command with more of them: KILLS=100."""
    draw, kills = random.Random(1), 0
    command = [sys.executable, "-m", "tests.integration.killed_run", str(tmp_path), "-1"]
    for _ in range(int(os.environ.get("KILLS", "4"))):
        before = len(Run(tmp_path).records())
        if before == EPOCHS:
            break
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
        target = before + draw.randint(0, 2)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(Run(tmp_path).records()) < target and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.06))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills > 0
    assert start(tmp_path, -1) == 0
    assert outcome(tmp_path) == undisturbed


def test_a_run_is_not_overwritten_nor_resumed_with_other_choices(tmp_path: Path) -> None:
    from cutlayer import Drop, Method, Training, fit
    from cutlayer.data import digits
    from cutlayer.recipes import RECIPES

    train, test = digits()
    config = RECIPES["digits"]()
    arguments = (train.first(128), test.first(64))
    fit(config.halves(train), *arguments, training=Training(epochs=1), run=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        fit(config.halves(train), *arguments, training=Training(epochs=1), run=tmp_path)
    with pytest.raises(ConfigError, match=r"method\.schedule\.kind: was Always, now Drop"):
        fit(
            config.halves(train),
            *arguments,
            method=Method(Drop()),
            training=Training(epochs=1),
            run=tmp_path,
            resume=True,
        )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
