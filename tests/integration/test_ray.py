"""Clients on a Ray cluster: the bits of one process, also if actors die. Real processes, SIGKILL."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cutlayer import (
    ConfigError,
    CutlayerError,
    DivergedError,
    Fleet,
    Method,
    Periodic,
    Result,
    StoreOptions,
    Task,
    fit,
    run_experiment,
    with_choices,
)
from cutlayer.backends.local import LOCAL
from cutlayer.backends.ray import Ray
from cutlayer.runs.client_half import LocalLoss
from cutlayer.runs.recipes import digits
from cutlayer.runs.run import Run
from cutlayer.strategies import STRATEGIES
from tests.helpers.small import data, equal, halves, training

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.xdist_group("ray")]

SIZES = (16, 16, 8, 8)
BATCHES = sum(SIZES) // 8
EPOCHS = 6
METHOD = Method(Periodic(period=3), "fp8_e4m3", "fp8_e5m2")


def same(got: Result, expected: Result) -> bool:
    """Weights, and all that was counted but seconds."""

    def counted(result: Result) -> list:
        return [{k: v for k, v in record.as_dict().items() if k != "seconds"} for record in result.history.epochs]

    return equal(got.model, expected.model) and counted(got) == counted(expected)


def run(method: Method = METHOD, **more: object) -> Result:
    sets = data(SIZES)
    return fit(halves(norm=True), sets, sets, method=method, training=training(EPOCHS), **more)


@pytest.fixture(scope="module")
def expected() -> Result:
    return run()


@pytest.mark.parametrize(("mode", "actors"), [*zip(STRATEGIES, (1, 1, 2, 2), strict=True)])
def test_several_clients_as_in_process(mode: str, actors: int) -> None:
    """Four clients in one or two actors; some are left out and some lost on the way."""
    fleet = Fleet(strategy=STRATEGIES[mode](), state="own", fraction=0.7, dropout=0.3, live=1)
    method = Method(Periodic(period=4), "fp8_e4m3", "fp8_e5m2", fleet=fleet)
    assert same(run(method, backend=Ray(actors=actors)), run(method))


def test_a_run_leaves_no_files_of_its_actors(tmp_path: Path) -> None:
    method = Method(
        Periodic(period=3), "fp8_e4m3", "fp8_e5m2", fleet=Fleet(live=1), store=StoreOptions(folder=str(tmp_path))
    )
    seen = []
    run(method, backend=Ray(actors=1), on_epoch=lambda record: seen.extend(tmp_path.iterdir()))
    assert seen  # halves that are not in memory
    assert not list(tmp_path.iterdir())


def test_a_client_that_trains_by_itself_does_so_in_its_actor() -> None:
    """CSE-FSL; between machines it is refused."""
    small = {"schedule": "always", "train_samples": 100, "test_samples": 40, "epochs": 2, "threads": 1, "width": 0.5}
    config = dataclasses.replace(with_choices(digits(), **small), client_half=LocalLoss(every=2))
    here, there = (run_experiment(config, progress=False, backend=where) for where in (LOCAL, Ray(actors=1)))
    assert same(there, here)
    assert there.history.exchanges == "BB"
    assert equal(there.halves.client, here.halves.client)  # its head, too


class Hunter:
    """Cross-entropy that kills a client's actor at given training steps.

    A client's data are loaded in its actor, by a function that leaves the process's number in a file.
    """

    def __init__(self, folder: Path, victims: dict[int, int]) -> None:
        self.folder, self.victims, self.calls = folder, victims, 0

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            if (client := self.victims.pop(self.calls, None)) is not None:
                self.kill(client)
            self.calls += 1
        return cross_entropy(outputs, labels)

    def kill(self, client: int) -> None:
        os.kill(int((self.folder / str(client)).read_text()), signal.SIGKILL)

    def loaders(self) -> list[Callable[[], TensorDataset]]:
        def loader(part: TensorDataset, file: Path) -> Callable[[], TensorDataset]:
            def load() -> TensorDataset:
                file.write_text(str(os.getpid()))
                return part

            return load

        return [loader(part, self.folder / str(client)) for client, part in enumerate(data(SIZES))]

    def run(self, backend: Ray, **more: object) -> Result:
        task, chosen = Task(loss=self, classes=3), training(EPOCHS)
        sets = self.loaders()
        return fit(
            halves(norm=True), sets, data(SIZES), method=METHOD, training=chosen, task=task, backend=backend, **more
        )


def test_actors_that_are_killed_change_nothing(expected: Result, tmp_path: Path) -> None:
    """In an A epoch, in a B epoch, and between epochs; with no run folder."""
    hunter = Hunter(tmp_path, {2: 1, BATCHES + 2 + 3: 0})
    fallen = []

    def between(record) -> None:
        if record.epoch == 3 and not fallen:
            fallen.append(record.exchange)
            hunter.kill(0)

    result = hunter.run(Ray(actors=2), on_epoch=between)
    assert same(result, expected)
    assert min(result.history.given_up.values()) > 0
    assert expected.history.given_up == {}
    assert not hunter.victims
    assert fallen == ["A"]


def test_with_patience_the_epoch_goes_on_without_the_killed(tmp_path: Path) -> None:
    hunter = Hunter(tmp_path, {2: 1})
    history = hunter.run(Ray(actors=2, patience=60)).history
    samples = [record.samples for record in history.epochs]
    # Clients 1 and 3 are in the second actor; what had come from them stays learned.
    assert [record.absent for record in history.epochs] == [[1, 3]] + [[]] * (EPOCHS - 1)
    assert 24 <= samples[0] <= sum(SIZES)
    assert samples[1:] == [sum(SIZES)] * (EPOCHS - 1)


def test_restarts_are_bounded(tmp_path: Path) -> None:
    hunter = Hunter(tmp_path, {1: 0, 5: 0})
    with pytest.raises(CutlayerError, match="more than 1 restarts"):
        hunter.run(Ray(actors=1, restarts=1))


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("first", ["here", "there"])
def test_a_run_goes_on_wherever_it_was_begun(first: str, expected: Result, tmp_path: Path) -> None:
    def interrupt(record) -> None:
        if record.epoch == 3:
            raise Interrupted

    there = {"backend": Ray(actors=1)}
    before, after = ({}, there) if first == "here" else (there, {})
    with pytest.raises(Interrupted):
        run(run=tmp_path, on_epoch=interrupt, **before)
    assert len(Run(tmp_path).records()) == 4
    assert same(run(run=tmp_path, resume=True, **after), expected)


def test_what_a_client_raises_is_raised_here() -> None:
    """Without Ray's traceback, of its own kind."""
    sets = data(SIZES)
    sets[2].tensors[0][3, 0] = torch.nan
    with pytest.raises(DivergedError, match="client 2") as error:
        fit(halves(), sets, method=METHOD, training=training(2), backend=Ray(actors=1))
    assert type(error.value) is DivergedError
    sets[3] = TensorDataset(torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ConfigError, match="expected samples"):
        fit(halves(), sets, method=METHOD, training=training(2), backend=Ray(actors=1))
