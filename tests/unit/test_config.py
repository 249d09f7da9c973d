"""A run's config: nested values, the JSON they are written as, and configs of version 0.1."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer import (
    Best,
    ConfigError,
    CropFlip,
    CustomOptimizer,
    DataConfig,
    Drift,
    Drop,
    EarlyStopping,
    Fleet,
    Method,
    ModelConfig,
    Optimizer,
    Periodic,
    Run,
    RunConfig,
    StoreOptions,
    Training,
    run_experiment,
    with_choices,
)
from cutlayer.cli import main
from cutlayer.describe import describe
from cutlayer.runs.choices import Choices
from cutlayer.runs.flat import read_config
from cutlayer.runs.recipes import RECIPES, digits
from cutlayer.strategies import ParallelSplit, SplitFedV1

RICH = RunConfig(
    DataConfig("cifar10", "/data", 100, 50),
    ModelConfig("vgg11", 0.25, "layer4"),
    Method(
        Periodic(warmup=2, period=5),
        "delta0.3>mxfp4+zstd",
        "ef>mxfp4",
        "eval",
        StoreOptions("disk", 10, 20),
        Fleet(
            strategy=SplitFedV1(average_every=3), state="own", fraction=0.5, dropout=0.1, replay_absent=False, live=2
        ),
    ),
    Training(
        epochs=7,
        client=Optimizer("adam", 1e-3),
        server=Optimizer(milestones=(0.5,)),
        augment=CropFlip(1, flip=False),
        drop_last=True,
        keep_best=Best("loss"),
        early_stopping=EarlyStopping(patience=3),
        seed=5,
    ),
    4,
    "dirichlet:0.5",
    1,
)
FLAT = {
    "data": "digits", "data_dir": None, "train_samples": 64, "test_samples": 32, "model": "cnn", "width": 0.25,
    "cut": "layer3", "schedule": "periodic", "threshold": 0.05, "warmup": 1, "period": 3, "codec": "fp8",
    "activations": None, "gradients": None, "norm_in_b": "calibrated", "clients": 2, "partition": "iid",
    "mode": "parallel", "average_every": 2, "state": "shared", "fraction": 1.0, "dropout": 0.0, "live_clients": 16,
    "epochs": 4, "batch_size": 16, "augment": True, "client": {"name": "adam", "lr": 0.01},
    "server": {"name": "sgd", "milestones": [0.5]}, "precision": "fp32", "store": {"placement": "disk"},
    "evaluate_every": 1, "checkpoint_every": 1, "microbatches": 1, "seed": 3, "device": "cpu", "threads": 1,
}  # fmt: skip
"""As version 0.1 wrote it; fields that it gained later are left out."""


@pytest.mark.parametrize("config", [RICH, *(recipe() for recipe in RECIPES.values())])
def test_a_config_survives_json(config: RunConfig) -> None:
    assert RunConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_method_and_training_are_written_as_those_of_fit_are() -> None:
    """But for the names of kinds that go without saying."""

    def bare(values: Any) -> Any:
        kinds = {"Method", "Training", "StoreOptions", "Fleet", "Defence", "EarlyStopping", "Best", "Regularize"}
        if not isinstance(values, dict):
            return values
        return {k: bare(v) for k, v in values.items() if k != "kind" or v not in kinds}

    written = RICH.as_dict()
    assert (written["method"], written["training"]) == (bare(describe(RICH.method)), bare(describe(RICH.training)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, "unknown config field 'colour'; known: data"),
        ({"training": {"rate": 1}}, r"unknown config field 'training\.rate'; known: training\.epochs"),
        (
            {"training": {"client": {"kind": "Optimizer", "rate": 1}}},
            r"unknown config field 'training\.client\.rate'; known: training\.client\.name",
        ),
        ({"training": {"epochs": "many"}}, r"training\.epochs: Expected `int`, got `str`"),
        ({"training": {"epochs": 0}}, "epochs must be a whole number of at least 1"),
        ({"training": {"client": {"name": "sgd"}}}, r"training\.client: unknown kind None; known: Optimizer"),
        ({"method": {"schedule": {"kind": "Weekly"}}}, r"method\.schedule: unknown kind 'Weekly'; known: Always"),
        ({"method": {"norm_in_b": "never"}}, r"method\.norm_in_b: Invalid enum value 'never'"),
        ({"data": "digits"}, "data: expected an object, got 'digits'"),
        ({"data": {"name": "dogs"}}, "unknown data set 'dogs'; known: digits"),
        ({"model": {"name": "gpt"}}, "unknown model 'gpt'; known: cnn"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_what_a_config_does_not_know_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_a_part_of_the_users_own_is_not_written() -> None:
    own = dataclasses.replace(RICH, training=Training(client=CustomOptimizer(lambda parameters: None)))  # type: ignore
    with pytest.raises(ConfigError, match=r"training\.client: CustomOptimizer.* cannot be written to a config"):
        own.as_dict()


def test_a_flat_config_of_version_0_1() -> None:
    expected = RunConfig(
        DataConfig(train_samples=64, test_samples=32),
        ModelConfig(width=0.25),
        Method(
            Periodic(period=3),
            "fp8_e4m3",
            "fp8_e5m2",
            store=StoreOptions("disk"),
            fleet=Fleet(strategy=ParallelSplit(average_every=2)),
        ),
        Training(
            epochs=4,
            batch_size=16,
            client=Optimizer("adam", 0.01),
            server=Optimizer(milestones=(0.5,)),
            augment=CropFlip(),
            seed=3,
        ),
        clients=2,
        threads=1,
    )
    assert read_config(FLAT) == expected
    with pytest.raises(ConfigError, match="unknown config field 'colour'"):
        read_config({**FLAT, "colour": 1})


def test_a_run_of_version_0_1_is_resumed_compared_and_merged(tmp_path: Path, capsys) -> None:
    config = read_config(FLAT)
    expected = run_experiment(config, tmp_path / "whole").model

    def stop(record) -> None:
        if record.epoch == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run_experiment(config, tmp_path / "old", on_epoch=stop)
    file = tmp_path / "old" / "config.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    file.write_text(json.dumps({**content, "config": FLAT}))
    assert main(["train", "--resume", str(tmp_path / "old"), "--data-dir", str(tmp_path)]) == 0
    model = Run(tmp_path / "old").model()
    assert all(model.state_dict()[name].equal(value) for name, value in expected.state_dict().items())
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    assert "data.folder" in shown
    assert "method.schedule" not in shown  # which both chose alike


def test_choices_by_the_names_of_the_command_line() -> None:
    base = digits()
    assert with_choices(base) == base
    drift = with_choices(base, schedule="drift", epochs=3, codec="int8", gradients="fp32", augment=True)
    assert drift.method == Method(Drift(threshold=0.05), "int8", "fp32")  # the recipe's threshold
    assert drift.training == dataclasses.replace(base.training, epochs=3, augment=CropFlip())
    assert with_choices(base, schedule="periodic", threshold=0.3).method.schedule == Periodic()
    assert with_choices(base, threshold=0.3).method.schedule == Drop(threshold=0.3)
    assert with_choices(base, strategy="parallel").method.fleet.strategy == ParallelSplit(average_every=1)
    assert with_choices(RICH, average_every=9).method.fleet.strategy == SplitFedV1(average_every=9)
    assert with_choices(RICH, augment=True).training.augment == CropFlip(1, flip=False)  # as it is
    assert with_choices(RICH, seed=6, width=1.0).model == ModelConfig("vgg11", 1.0, "layer4")
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: with_choices(base, mode="parallel"), "unknown choice 'mode'; known: data"),
        (lambda: with_choices(base, schedule="weekly"), "unknown schedule 'weekly'; known: always"),
        (lambda: with_choices(base, strategy="alone"), "unknown strategy 'alone'; known: sequential"),
    ]
    for call, message in wrong:
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize("config", [RICH, *(recipe() for recipe in RECIPES.values())])
def test_choices_that_change_nothing(config: RunConfig) -> None:
    assert Choices.of(config).applied_to(config) == config
