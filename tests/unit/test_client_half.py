"""Client halves that are made before the run, and stand still in it: by a local head, or not trained at all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cutlayer import ConfigError, EarlyStopping, Method, Optimizer, Regularize, Run, RunConfig, with_choices
from cutlayer.records.history import EpochRecord
from cutlayer.runs.client_half import LocalHead, Untrained
from cutlayer.runs.experiment import run_experiment
from cutlayer.runs.recipes import digits
from cutlayer.schedule import Once

BASE = with_choices(digits(), train_samples=256, test_samples=64, width=0.5, epochs=8, batch_size=16, threads=1)
ONCE = replace(BASE, method=Method.of(Once(), "fp8"))
LOCAL = replace(ONCE, client_half=LocalHead(epochs=3))


def client_half(config: RunConfig) -> dict[str, torch.Tensor]:
    return run_experiment(config, progress=False).halves.client.state_dict()


def test_a_local_head_trains_the_client_half_and_activations_go_up_once() -> None:
    result = run_experiment(LOCAL, progress=False)
    history, plain = result.history, run_experiment(ONCE, progress=False).history
    assert history.exchanges == "BCCCCCCC"
    assert history.bytes(kinds=("gradients",)) == 0
    assert history.bytes(kinds=("activations",)) == plain.bytes(kinds=("activations",)) / 2  # which is A, then B
    start = BASE.halves(BASE.datasets()[0]).client.state_dict()
    assert not torch.equal(result.halves.client.state_dict()["layer1.0.weight"], start["layer1.0.weight"])
    # Three epochs of local training, head included, cost more than three forward passes of the client half alone.
    assert history.flops("client") > 3 * 3 * sum(history.epochs[0].flops["client"].values())
    assert history.test("accuracy") > 0.5


def test_a_client_half_left_as_it_was_drawn_has_measured_statistics_only() -> None:
    start = BASE.halves(BASE.datasets()[0]).client.state_dict()
    half = client_half(replace(ONCE, client_half=Untrained()))
    for name, value in half.items():
        measured = name.endswith(("running_mean", "running_var"))
        assert torch.equal(value, start[name]) is not measured, name


def test_such_a_run_is_resumed_to_the_same_bits_from_its_local_training_too(tmp_path: Path) -> None:
    def end(record: EpochRecord) -> None:
        raise KeyboardInterrupt

    for _ in range(2):  # after each of the first two epochs of local training
        with pytest.raises(KeyboardInterrupt):
            run_experiment(LOCAL, tmp_path, resume=True, on_epoch=end, progress=False)
    resumed = run_experiment(LOCAL, tmp_path, resume=True, progress=False)
    whole = run_experiment(LOCAL, progress=False)
    assert resumed.history.losses == whole.history.losses
    assert resumed.history.flops("client") == whole.history.flops("client")
    assert Run(tmp_path).history().beforehand == whole.history.beforehand > 0
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_choices_for_the_server_and_for_evaluation_do_not_reach_the_local_training() -> None:
    server = Optimizer("adam", lr=1e-3, weight_decay=0.0)
    chosen = {"keep_best": "accuracy", "early_stopping": EarlyStopping(patience=9), "server": server}
    more = replace(LOCAL, training=replace(BASE.training, **chosen, regularize=Regularize(cutmix=1.0)))
    expected, found = client_half(LOCAL), client_half(more)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_its_config_is_written_and_read_and_is_for_one_client() -> None:
    assert RunConfig.from_dict(LOCAL.as_dict()) == LOCAL
    with pytest.raises(ConfigError, match="expected one client, got 2"):
        replace(LOCAL, clients=2)
    with pytest.raises(ConfigError, match="at least 1 epoch"):
        LocalHead(epochs=0)


def test_a_run_that_is_refused_leaves_the_one_that_is_there_as_it_was(tmp_path: Path) -> None:
    run_experiment(with_choices(BASE, epochs=1), tmp_path, progress=False)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="holds a run already"):
        run_experiment(replace(BASE, client_half=LocalHead(1)), tmp_path, progress=False)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
