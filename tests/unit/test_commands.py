"""The call of `cutlayer train` for a config gives that config."""

import shlex
from dataclasses import replace

import pytest

from cutlayer import EarlyStopping, Optimizer, Regularize, RunConfig, StoreOptions, with_choices
from cutlayer.cli import train as command
from cutlayer.privacy import Defence
from cutlayer.records.history import Baseline, EpochRecord, History
from cutlayer.runs.client_half import LocalLoss
from cutlayer.runs.commands import command_of, plain_command
from cutlayer.runs.recipes import RECIPES, cifar10_small, digits

CHOICES = {
    "nothing": {},
    "a schedule": {"schedule": "settle", "both_epochs": 3, "averaged_updates": 0.25, "codec": "int4+zstd"},
    "a budget": {"schedule": "budget", "megabytes": 3.5, "both_share": 0.4},
    "two specs": {"activations": "topk0.1>fp16", "gradients": "ef>int8"},
    "nested": {
        "client": Optimizer("adam", 1e-3, nesterov=True, milestones=(0.5, 0.75)),
        "regularize": Regularize(mixup=0.2),
        "defence": Defence(noise=0.5, clip=1.0),
        "early_stopping": EarlyStopping("loss", patience=3),
        "store": StoreOptions("disk", folder="/tmp"),
    },
    "clients": {"clients": 4, "strategy": "parallel", "average_every": 2, "partition": "dirichlet:0.5", "dropout": 0.1},
    "no augmentation": {"augment": False, "train_samples": None, "channels_last": True, "keep_best": "accuracy"},
}


def parsed(line: str, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The config that a call would carry out."""
    found = []
    monkeypatch.setattr(command, "carry_out", lambda config, *more, **others: found.append(config))
    program, name, *arguments = shlex.split(line)
    assert (program, name) == ("cutlayer", "train")
    command._begin(arguments, None)
    return found[0]


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_what_is_typed_makes_the_config(choices: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_choices(cifar10_small() if "augment" in choices else digits(), **choices)
    assert parsed(command_of(config), monkeypatch) == config


def test_recipes_are_called_by_their_names() -> None:
    assert [command_of(recipe()) for recipe in RECIPES.values()] == [f"cutlayer train {name}" for name in RECIPES]


def history(*accuracies: float) -> History:
    records = [EpochRecord(epoch, "A", 1.0, 8, {"accuracy": each}) for epoch, each in enumerate(accuracies)]
    return History(records, Baseline(0, 0))


def test_plain_split_learning_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data, network and training, with nothing that saves or defends."""
    chosen = {"schedule": "settle", "codec": "mxfp4", "epochs": 7, "seed": 3, "norm_in_b": "eval", "views": 3}
    for special in ({}, {"narrow": 2}, {"padding": 2}, {"defence": Defence(noise=1.0)}):
        config = with_choices(cifar10_small(), **chosen, **special)
        plain = parsed(plain_command(config.as_dict(), history()) or "", monkeypatch)
        assert plain == with_choices(cifar10_small(), schedule="always", codec="fp32", warmup=1, epochs=7, seed=3)
    config = with_choices(digits(), schedule="always", bind=4, batch_size=8)
    assert (
        plain_command(config.as_dict(), history())
        == "cutlayer train digits --schedule always --codec fp32 --batch-size 8"
    )
    config = replace(with_choices(digits(), schedule="always", codec="fp8"), client_half=LocalLoss(every=5))
    assert plain_command(config.as_dict(), history()) == "cutlayer train digits --schedule always --codec fp32"
    served = {**with_choices(digits(), clients=2).as_dict(), "clients": ["alice", "bob"]}
    assert plain_command(served, history()) == "cutlayer train digits --schedule always --codec fp32 --clients 2"
    assert plain_command({"method": {}, "training": {}}, history()) is None


def test_plain_split_learning_is_as_long_as_a_run_that_may_end_early() -> None:
    config = with_choices(digits(), epochs=9, codec="fp8", early_stopping=EarlyStopping(patience=2)).as_dict()
    plain = "cutlayer train digits --schedule always --codec fp32 --epochs"
    for accuracies in ((), (0.1, 0.2), (0.1,) * 2 + (0.2,) * 2):  # not begun, under way, and it gets no better
        assert plain_command(config, history(*accuracies)) == f"{plain} 9"
    assert plain_command(config, history(0.1, 0.2, 0.2, 0.2)) == f"{plain} 4"
