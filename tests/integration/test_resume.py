"""A run that is killed and resumed ends in the same bits as one that was not. Real processes, SIGKILL."""

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import ConfigError, CustomOptimizer, Drop, Halves, Method, Periodic, Training, fit
from cutlayer.runs.run import Run
from tests.helpers import started
from tests.helpers.killed_run import BATCHES, EPOCHS


def start(folder: Path, step: int, kind: str) -> int:
    return started.run("tests.helpers.killed_run", folder, step, kind).returncode


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """Final weights as bytes, and the metrics without the seconds and checksums."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in record.items() if k not in ("seconds", "checksum")} for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, tuple[dict, list[dict]]]:
    outcomes = {}
    for kind in ("disk", "loader", "memories", "few"):
        folder = tmp_path_factory.mktemp(kind)
        assert start(folder, -1, kind) == 0
        outcomes[kind] = outcome(folder)
        assert {"A", "B", "C"} == {record["exchange"] for record in outcomes[kind][1]}
    return outcomes


@pytest.mark.parametrize(
    ("kind", "state"),
    [*(("disk", s) for s in "ABC"), ("loader", "C"), ("memories", "A"), ("memories", "C"), ("few", "B"), ("few", "C")],
)
def test_killed_in_the_middle_of_an_epoch(kind: str, state: str, undisturbed, tmp_path: Path) -> None:
    # The last epoch of its state, so that there is a past to remember.
    epoch = max(record["epoch"] for record in undisturbed[kind][1] if record["exchange"] == state)
    assert start(tmp_path, epoch * BATCHES + 2, kind) == -signal.SIGKILL
    assert len(Run(tmp_path).records()) == epoch
    assert start(tmp_path, -1, kind) == 0
    assert outcome(tmp_path) == undisturbed[kind]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_a_checkpoint_is_written(moment: str, undisturbed, tmp_path: Path) -> None:
    """Before and after the renaming that makes it count; the metrics are a line ahead of it in the first case."""
    assert start(tmp_path, EPOCHS // 2, f"disk-{moment}") == -signal.SIGKILL
    lines, checkpoint = len(Run(tmp_path).records()), Run(tmp_path).checkpoints.epochs()[-1]
    assert (lines, checkpoint) == (EPOCHS // 2, EPOCHS // 2 - (moment == "before"))
    assert start(tmp_path, -1, "disk") == 0
    assert outcome(tmp_path) == undisturbed["disk"]


def test_killed_at_random_moments(undisturbed, tmp_path: Path) -> None:
    """Kills from outside, also while metrics and checkpoints are written; as a command with more of them: KILLS=100."""
    draw, kills = random.Random(1), 0
    for _ in range(int(os.environ.get("KILLS", "3"))):
        before = len(Run(tmp_path).records())
        if before == EPOCHS:
            break
        process = started.start("tests.helpers.killed_run", tmp_path, -1, "loader")
        target = before + draw.randint(1, 3)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(Run(tmp_path).records()) < target and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.06))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills > 0
    assert start(tmp_path, -1, "loader") == 0
    assert outcome(tmp_path) == undisturbed["loader"]


# --- what a run may be resumed with ---


def halves(width: int = 4) -> Halves:
    torch.manual_seed(0)
    return Halves(nn.Linear(3, width), nn.Linear(width, 2))


def data(seed: int = 0, count: int = 20) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=draw), torch.arange(count) % 2)


ONE = Training(epochs=1, batch_size=8)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_run_is_not_overwritten_nor_resumed_with_other_choices(tmp_path: Path) -> None:
    fit(halves(), data(), training=ONE, run=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        fit(halves(), data(), training=ONE, run=tmp_path)
    for changed, message in (
        ({"method": Method(Drop())}, r"method\.schedule\.kind: was Always, now Drop"),
        ({"training": dataclasses.replace(ONE, seed=2)}, r"training\.seed: was 0, now 2"),
        ({"halves": halves(5)}, "client half: was"),
        ({"train": data(seed=1)}, "first samples: was"),
        ({"train": data(count=21)}, "training samples: was 20, now 21"),
        ({"test": data()}, "test samples: was 0, now 20"),
    ):
        arguments = {"halves": halves(), "train": data(), "training": ONE, "run": tmp_path, **changed}
        with pytest.raises(ConfigError, match=message):
            fit(**arguments, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert fit(halves(), data(), training=ONE, run=tmp_path, resume=True).history == Run(tmp_path).history()


def test_choices_that_are_functions_are_known_again(tmp_path: Path) -> None:
    for _ in range(2):
        # A fresh object each time, at another address; the rate is a function without a name.
        training = dataclasses.replace(
            ONE, client=CustomOptimizer(sgd, lambda epoch, epochs: 0.5), augment=lambda x, g: x
        )
        fit(halves(), data(), training=training, run=tmp_path, resume=True)
    assert "0x" not in (tmp_path / "config.json").read_text()


def test_data_and_augmentation_that_draw_from_any_global_generator_are_exact(tmp_path: Path) -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return inputs * (random.random() < 0.5) + np.random.rand(), label

    def run(folder: Path, stop: int) -> list[float]:
        def stopping(record) -> None:
            if record.epoch == stop:
                raise KeyboardInterrupt

        training = Training(epochs=4, batch_size=8, augment=lambda x, g: x + torch.rand(()) * random.random())
        noisy = Noisy(*data().tensors)
        try:
            return fit(halves(), noisy, training=training, run=folder, resume=True, on_epoch=stopping).history.losses
        except KeyboardInterrupt:
            return run(folder, -1)

    states = random.getstate(), np.random.get_state()[1].tolist()
    assert run(tmp_path / "a", -1) == run(tmp_path / "b", 1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Run(tmp_path).locked(), pytest.raises(ConfigError, match="another process is at work on this run"):
        fit(halves(), data(), training=ONE, run=tmp_path)


def test_an_evaluation_counts_the_same_bytes_after_an_interruption(tmp_path: Path) -> None:
    """Epoch numbers grow by a byte on the way, and a resumed client knows them no less."""
    method, epochs = Method.of(Periodic(period=4), "fp16"), 140

    def run(folder: Path, stop: int) -> list[dict]:
        def stopping(record) -> None:
            if record.epoch == stop:
                raise KeyboardInterrupt

        training = Training(epochs=epochs, batch_size=8, evaluate_every=3)
        try:
            fit(halves(), data(), data(), method=method, training=training, run=folder, resume=True, on_epoch=stopping)
        except KeyboardInterrupt:
            return run(folder, -1)
        return [record.bytes for record in Run(folder).records()]

    undisturbed = run(tmp_path / "a", -1)
    assert undisturbed == run(tmp_path / "b", 130)
    assert any("evaluation" in record["up"] for record in undisturbed[131:])
