"""Parties that are gone for good, and refusals in the midst of an epoch: no side waits for ever."""

import threading
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from cutlayer import Task
from cutlayer.data.images import Images
from cutlayer.errors import RefusedError
from cutlayer.runs.choices import with_choices
from cutlayer.runs.join import join
from cutlayer.runs.recipes import digits
from cutlayer.runs.serve import Waits
from cutlayer.training.calibration import CALIBRATION_BATCHES
from tests.helpers.processes import port_of, serve
from tests.helpers.threads import Together, in_process, shares


class Cut(Exception):  # noqa: N818
    """The end of a client's process."""


class Turning(torch.utils.data.Dataset):
    """Images that after so many reads are of another kind: they raise, or their labels are classes that there are not.

    Args:
        good: reads that give what is there.
        label: given after them; None raises.
    """

    def __init__(self, images: Images, good: int, label: int | None = None) -> None:
        self.images, self.good, self.label = images, good, label

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.good -= 1
        image, label = self.images[index]
        if self.good >= 0:
            return image, label
        if self.label is None:
            raise Cut
        return image, torch.tensor(self.label)


def test_a_client_that_never_comes_back_holds_up_neither_the_epochs_nor_the_end(tmp_path: Path) -> None:
    config = with_choices(digits(), epochs=4, batch_size=32, test_samples=40, schedule="always", threads=1)
    data = shares(config, ("alice", "bob"))
    together = Together(config, tmp_path, tuple(data), waits=Waits(patience=1.0, linger=2.0))
    halves = []

    def alice() -> None:
        halves.append(together.join("alice", *data["alice"]))

    threads = [threading.Thread(target=alice, daemon=True)]
    threads[0].start()
    images = data["bob"][0]
    with pytest.raises(Cut):  # in its second epoch
        together.join("bob", Turning(images, len(images) + 40), None)
    for thread in (*threads, together.thread):
        thread.join(60)
    assert together.served is not None
    assert [record.absent for record in together.served.history.epochs][1:] == [[1]] * 3
    assert len(halves) == 1  # alice has heard of the end


@pytest.mark.parametrize("epoch", [0, 1], ids=["A", "B"])
def test_a_refusal_ends_the_client_with_its_reason_and_a_better_one_goes_on(epoch: int, tmp_path: Path) -> None:
    """In a B epoch the client sends without reading, more than fits what is under way."""
    config = with_choices(digits(), epochs=3, batch_size=4, test_samples=40, schedule="periodic", period=3, threads=1)
    data = shares(config, ("alice",))
    together = Together(config, tmp_path, ("alice",))
    images, test = data["alice"]
    measured = 4 * CALIBRATION_BATCHES  # samples that are read before a B epoch
    with pytest.raises(RefusedError, match=r"labels: expected classes from 0 to 9, one a sample"):
        together.join("alice", Turning(images, epoch * (len(images) + measured) + 10, 99), test)
    half = together.join("alice", images, test)
    together.thread.join(60)
    assert together.served is not None
    assert sum(together.served.refusals.values()) > 0
    assert together.served.history.given_up["up"] > 0  # what the first client sent
    expected = in_process(config, data).halves
    assert all(torch.equal(value, half.state_dict()[name]) for name, value in expected.client.state_dict().items())
    server = together.served.half.state_dict()
    assert all(torch.equal(value, server[name]) for name, value in expected.server.state_dict().items())


def test_probabilities_are_evaluated_and_a_metric_that_fails_does_not_end_the_run(tmp_path: Path, caplog) -> None:
    config = with_choices(digits(), epochs=2, batch_size=32, schedule="always", threads=1)
    images, test = shares(config, ("alice",))["alice"]
    soft = [TensorDataset(part.inputs, one_hot(part.labels, 10).float()) for part in (images, test)]
    scores = []
    for number, task in enumerate((Task(), Task(metrics={"broken": lambda outputs, labels: outputs @ labels}))):
        together = Together(config, tmp_path / str(number), ("alice",), task=task)
        together.join("alice", *soft)
        together.thread.join(60)
        assert together.served is not None
        scores.append([record.test for record in together.served.history.epochs])
    assert all(0 < epoch["accuracy"] <= 1 for epoch in scores[0])
    assert scores[1] == [{}, {}]
    assert "epoch 0 is not evaluated: metric 'broken' failed on outputs" in caplog.text


def test_a_client_gives_up_when_the_server_has_been_gone_for_long_enough(tmp_path: Path) -> None:
    config = with_choices(digits(), epochs=1000, schedule="always", codec="fp8", batch_size=32, threads=1)
    ((train, _),) = shares(config, ("client",)).values()
    with serve(tmp_path, epochs=1000, schedule="always", batch_size=32, codec="fp8") as server:
        port = port_of(server)
        began: list[float] = []

        def kill_the_server(exchange: str, epoch: int) -> None:
            if epoch == 1:
                server.kill()
                began.append(time.monotonic())

        with pytest.raises(TimeoutError, match="no connection to"):
            join(
                f"127.0.0.1:{port}",
                config.halves(train).client,
                train,
                folder=tmp_path / "client",
                method=config.method,
                training=config.training,
                on_epoch=kill_the_server,
                give_up_after=2.0,
            )
    assert 2.0 <= time.monotonic() - began[0] < 30.0
