"""What one does with a run afterwards: its network, its best epoch, more epochs, and runs that begin from it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cutlayer import (
    Best,
    ConfigError,
    EarlyStopping,
    Fleet,
    Halves,
    Method,
    Optimizer,
    Periodic,
    Run,
    Training,
    fit,
    split,
)
from cutlayer.cli import main
from cutlayer.files import load_tensors
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.runs.choices import with_choices
from cutlayer.runs.recipes import digits
from tests.helpers.processes import CONFIG, join, port_of, serve

SGD = Optimizer(lr=0.1, schedule="constant")
TRAINING = Training(epochs=6, batch_size=8, client=SGD, server=SGD)
METHOD = Method(Periodic(period=3))


class Net(nn.Module):
    """A network whose cut has a name."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(3, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.second = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def net(seed: int = 0, hidden: int = 8) -> Net:
    torch.manual_seed(seed)
    return Net(hidden)


def apart() -> Halves:
    """Two halves that never were one network."""
    torch.manual_seed(0)
    return Halves(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), nn.Linear(8, 2))


def cut(seed: int = 0) -> Halves:
    return split(net(seed), "norm")


def data(seed: int = 0, count: int = 24) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=draw)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


class StopHereError(Exception):
    """What ends a run early here."""


def train(folder: Path, stop: int | None = None, training: Training = TRAINING, halves: Halves | None = None, **more):
    """Train, or go on; with `stop`, an error after so many epochs."""

    def stopping(record) -> None:
        if record.epoch + 1 == stop:
            raise StopHereError

    arguments = {"method": METHOD, "training": training, "run": folder, "resume": True, "on_epoch": stopping, **more}
    parts = [data(), data(1)] if arguments["method"].fleet.state == "own" else data()
    return fit(halves or cut(), parts, data(9, 40), **arguments)


SEVERAL = Method(Periodic(period=3), fleet=Fleet(state="own"))


@pytest.mark.parametrize("method", [METHOD, SEVERAL], ids=["one client", "several clients"])
@pytest.mark.parametrize("halves", [cut, apart], ids=["split", "apart"])
def test_the_model_of_a_run_that_is_interrupted_and_finished(method: Method, halves, tmp_path: Path) -> None:
    short = dataclasses.replace(TRAINING, epochs=3)
    expected = train(tmp_path / "short", training=short, halves=halves(), method=method).model
    with pytest.raises(StopHereError):
        train(tmp_path / "run", 3, halves=halves(), method=method)
    run = Run(tmp_path / "run")
    for structure in (halves(), halves().whole):
        assert same(run.model(structure), expected)
    with pytest.raises(
        ConfigError, match=r"no model\.safetensors: .*3 epochs are done\. Run\(folder\)\.model\(\) gives"
    ):
        run.load_weights(expected)
    with pytest.raises(
        ConfigError,
        match=r"begun from Python: expected its network or its halves, as in cutlayer\.Run\(.*\)\.model\(net",
    ):
        run.model()
    with pytest.raises(ConfigError, match=r"not of a network such as this|hold what this network does not"):
        run.model(net(hidden=9))
    result = train(tmp_path / "run", halves=halves(), method=method)
    assert same(run.model(halves()), result.model)
    assert not run.model(halves()).training


def test_a_run_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        Run(tmp_path).model(net())


def test_the_best_epoch(tmp_path: Path) -> None:
    training = dataclasses.replace(TRAINING, epochs=8, checkpoint_every=5, keep_best=Best("loss"), keep_checkpoints=1)
    steep = dataclasses.replace(
        training, server=dataclasses.replace(SGD, lr=1.5), client=dataclasses.replace(SGD, lr=1.5)
    )
    train(tmp_path / "run", training=steep)
    run = Run(tmp_path / "run")
    losses = [record.test["loss"] for record in run.records()]
    best = losses.index(min(losses)) + 1
    assert best < 8  # otherwise this shows nothing
    assert run.checkpoints.epochs() == [best, 8]
    upto = dataclasses.replace(steep, epochs=best, keep_best=None)
    assert same(run.model(net(), best=True), train(tmp_path / "upto", training=upto).model)
    with pytest.raises(ConfigError, match=r"which epoch is the best was not asked for; give best=Best"):
        Run(tmp_path / "upto").model(net(), best=True)
    for metric, wrong in (("acc", "unknown metric 'acc'; known: accuracy, loss"), ("accuracy", "needs test data")):
        choice = dataclasses.replace(TRAINING, keep_best=metric)
        with pytest.raises(ConfigError, match=wrong):
            fit(cut(), data(), data(9) if metric == "acc" else None, training=choice, run=tmp_path / "wrong")


def test_early_stopping_is_the_same_after_an_interruption(tmp_path: Path) -> None:
    slow = dataclasses.replace(SGD, lr=1e-9)
    early = dataclasses.replace(
        TRAINING, epochs=50, client=slow, server=slow, checkpoint_every=7, early_stopping=EarlyStopping(patience=3)
    )
    # Batch norm's statistics move in the first epochs, the weights do not.
    result = train(tmp_path / "run", training=early)
    values = [record.test["accuracy"] for record in result.history.epochs]
    best = values.index(max(values))
    assert len(values) == best + 4 < 50
    assert Run(tmp_path / "run").checkpoints.epochs()[-1] == len(values)
    assert Run(tmp_path / "run").history().merged == result.history.merged != {}
    with pytest.raises(StopHereError):
        train(tmp_path / "other", best + 2, training=early)
    assert same(train(tmp_path / "other", training=early).model, result.model)
    again = train(tmp_path / "other", training=early).history
    assert [r.test for r in again.epochs] == [r.test for r in result.history.epochs]
    # The run goes on if its patience is longer.
    longer = dataclasses.replace(early, early_stopping=EarlyStopping(patience=5))
    assert len(train(tmp_path / "run", training=longer).history.epochs) > len(values)
    with pytest.raises(ConfigError, match="patience of at least 1 epoch"):
        EarlyStopping(patience=0)


def test_more_epochs(tmp_path: Path, caplog) -> None:
    short, long = dataclasses.replace(TRAINING, epochs=3), TRAINING
    whole = train(tmp_path / "whole", training=long).model
    train(tmp_path / "run", training=short)
    with pytest.raises(StopHereError):
        train(tmp_path / "run", 4, training=long)
    assert not (tmp_path / "run" / "model.safetensors").exists()  # that of 3 epochs would be taken for the run's
    assert same(train(tmp_path / "run", training=long).model, whole)  # the learning rate is constant
    assert (
        "goes on after 3 epochs with another length: it was 3, now 6. From here on learning rates follow the new length"
        in caplog.text
    )
    content = Run(tmp_path / "run").read_config()
    assert content["changes"] == ["after 3 epochs: training.epochs was 3, now 6"]
    assert content["config"]["training"]["epochs"] == 6
    with pytest.raises(ConfigError, match="has 6 epochs already, and cannot end after 3"):
        train(tmp_path / "run", training=short)
    assert Run(tmp_path / "run").read_config() == content
    with pytest.raises(ConfigError, match=r"training\.batch_size: was 8, now 4"):
        train(tmp_path / "run", training=dataclasses.replace(long, batch_size=4))


def test_a_resume_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    """Its checkpoint is after 4 epochs; a fifth is in the metrics, which a resumed run trains again."""
    with pytest.raises(StopHereError):
        train(tmp_path, 5, training=dataclasses.replace(TRAINING, checkpoint_every=2))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="has 4 epochs already, and cannot end after 3"):
        train(tmp_path, training=dataclasses.replace(TRAINING, checkpoint_every=2, epochs=3))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_the_model_of_a_run_that_deletes_the_checkpoint_meanwhile(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(StopHereError):
        train(tmp_path, 5, training=dataclasses.replace(TRAINING, checkpoint_every=1, keep_checkpoints=2))
    run, read = Run(tmp_path), Checkpoints.read
    places = []

    def pruned(self, epoch=None):
        found = read(self, epoch)
        assert found is not None
        places.append(found[0])
        if len(places) == 1:
            found[0].rename(tmp_path / "aside")
        return found

    monkeypatch.setattr(Checkpoints, "read", pruned)
    model = run.model(cut())
    assert [place.name for place in places] == ["epoch-000005", "epoch-000004"]
    assert isinstance(model, nn.Module)
    (places[1] / "server.safetensors").unlink()  # of one that is still there it is damage
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole: .*server\.safetensors is missing"):
        run.model(cut())


def test_beginning_from_another_runs_weights(tmp_path: Path) -> None:
    begun = train(tmp_path / "pretrained").model
    tiny = dataclasses.replace(SGD, lr=1e-30, weight_decay=0.0)
    frozen = dataclasses.replace(TRAINING, client=tiny, server=tiny)
    weights = {name for name, _ in begun.named_parameters()}
    tuned = train(tmp_path / "tuned", training=frozen, halves=cut(5), init=tmp_path / "pretrained").model
    assert all(torch.equal(tuned.state_dict()[name], begun.state_dict()[name]) for name in weights)
    assert Run(tmp_path / "tuned").read_config()["init"] == {"run": str(tmp_path / "pretrained"), "epochs": 6}

    whole = train(tmp_path / "whole", halves=cut(5), init=tmp_path / "pretrained", method=SEVERAL).model
    with pytest.raises(StopHereError):
        train(tmp_path / "run", 1, halves=cut(5), init=tmp_path / "pretrained", method=SEVERAL)
    (tmp_path / "pretrained").rename(tmp_path / "elsewhere")  # the run does not need it any more
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():  # as if killed in the first epoch
        checkpoint.rename(tmp_path / checkpoint.name)
    assert same(train(tmp_path / "run", halves=cut(5), method=SEVERAL).model, whole)
    same_run = tmp_path / "run" / ".." / "elsewhere"  # by another path, and moved meanwhile
    assert same(train(tmp_path / "run", halves=cut(5), init=same_run, method=SEVERAL).model, whole)
    with pytest.raises(ConfigError, match=r"was begun with the weights of .*pretrained, and cannot be resumed with"):
        train(tmp_path / "run", halves=cut(5), init=tmp_path / "tuned", method=SEVERAL)
    with pytest.raises(ConfigError, match="was begun with weights of its own"):
        train(tmp_path / "elsewhere", init=tmp_path / "run")
    with pytest.raises(ConfigError, match="is not of a network such as this"):
        fit(apart(), data(), training=TRAINING, init=tmp_path / "elsewhere")


def test_from_the_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--train-samples", "64", "--test-samples", "32", "--width", "0.25", "--threads", "1"]
    first = ["train", "digits", *small, "--epochs", "2", "--run-dir", "one", "--keep-best", "accuracy"]
    assert main([*first, "--early-stopping.patience", "9"]) == 0
    assert main(["train", "--resume", "one", "--epochs", "4", "--early-stopping.patience", "8"]) == 0
    content = Run("one").read_config()
    assert (content["config"]["training"]["epochs"], content["config"]["training"]["early_stopping"]["patience"]) == (
        4,
        8,
    )
    assert "after 2 epochs: training.epochs was 2, now 4" in content["changes"]
    assert len(Run("one").records()) == 4
    assert same(Run("one").model(), Run("one").load_weights(Run("one").model()))
    assert main(["merge", "one", "--best", "--output", "best.safetensors"]) == 0
    best = load_tensors(tmp_path / "best.safetensors")[0]
    assert all(torch.equal(best[name], value) for name, value in Run("one").model(best=True).state_dict().items())
    assert main(["train", "digits", *small, "--epochs", "1", "--run-dir", "two", "--init", "one"]) == 0
    assert json.loads((tmp_path / "two" / "config.json").read_text())["init"] == {"run": "one", "epochs": 4}
    wide = [*small[:4], "--width", "0.5", "--epochs", "1", "--run-dir", "three", "--init", "one"]
    assert main(["train", "digits", *wide]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "one/model.safetensors is not of a network such as this: " in said
    assert re.search(r"\.weight is \[.*\], expected \[.*\] and \d+ more$", said)


def test_the_model_of_a_run_that_was_served(tmp_path: Path) -> None:
    """To one client, whose half the server never sees, and to two, whose shared half it has."""
    options = {"epochs": 3, "checkpoint_every": 1, "keep_best": "loss"}
    with serve(tmp_path, **options) as server, join(tmp_path, port_of(server)) as client:
        assert client.wait() == 0, client.output
        assert server.wait() == 0, server.output
    assert "cutlayer merge" in server.output
    assert "--client CLIENT_RUN" in server.output
    config = with_choices(digits(), **{**CONFIG, **options})
    images, test = config.datasets()
    training = config.training
    fit(config.halves(images), images, test, method=config.method, training=training, run=tmp_path / "here")
    run, here = Run(tmp_path / "server"), Run(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"server has seen its own half only\. Give the client's folder"):
        run.model()
    for choice in ({}, {"best": True}):
        assert same(run.model(client=tmp_path / "client", **choice), here.model(config.halves(images), **choice))
    (tmp_path / "server" / "server.safetensors").unlink()  # as if it had not come to its end
    assert same(run.model(client=tmp_path / "client"), here.model(config.halves(images)))
    with pytest.raises(ConfigError, match="expected a checkpoint after 2 epochs, there are"):
        run.model(client=tmp_path / "nowhere")

    names = ["alice", "bob"]
    with (
        serve(tmp_path / "two", "--client", *names, **{**options, "epochs": 2}) as server,
        join(tmp_path / "two", port_of(server), name="alice") as alice,
        join(tmp_path / "two", port_of(server), name="bob") as bob,
    ):
        assert [process.wait() for process in (alice, bob, server)] == [0, 0, 0], server.output
    two = Run(tmp_path / "two" / "server")
    model = two.model()
    shared = load_tensors(tmp_path / "two" / "alice" / "client.safetensors")[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in shared.items())
    two.model_file.unlink()
    assert same(two.model(), model)
