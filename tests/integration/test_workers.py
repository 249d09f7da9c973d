"""The server half trained by several workers: what one does, up to float addition; also if one of them dies."""

import os
import signal
from pathlib import Path

import pytest
from torch import Tensor
from torch.nn.functional import cross_entropy

from cutlayer import ConfigError, Fleet, Method, Periodic, Result, Task, fit
from cutlayer.backends.ray import Ray
from cutlayer.strategies import STRATEGIES
from tests.helpers.small import close, data, halves, training

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.xdist_group("ray")]

SIZES = (20, 13, 8)
SHARE = {"cpus_per_actor": 0.5, "cpus_per_worker": 0.5, "actors": 1}


def run(mode: str, codec: str, epochs: int, views: int = 1, **more: object) -> Result:
    """A B C C A B C C; some clients are left out, so that the store takes their place in A and B epochs."""
    fleet = Fleet(strategy=STRATEGIES[mode](), fraction=0.6)
    method = Method(Periodic(period=4), codec, "fp32", fleet=fleet, views=views)
    sets = data(SIZES)
    return fit(halves(), sets, sets, method=method, training=training(epochs), **more)


def alike(got: Result, expected: Result) -> None:
    close(got.model, expected.model)
    for here, there in zip(got.history.epochs, expected.history.epochs, strict=True):
        assert here.loss == pytest.approx(there.loss, rel=1e-4)
        assert (here.bytes, here.flops, here.samples) == (there.bytes, there.flops, there.samples)


def test_several_workers_do_what_one_does() -> None:
    """With fewer samples in a batch than would give every worker one, and a scale for each batch."""
    # No second A epoch: there the last bit of a float may decide between two codes of 8 bits.
    chosen = ("splitfed_v2", "fp8_e4m3", 4)
    alike(run(*chosen, backend=Ray(workers=3, **SHARE)), run(*chosen))


class Deadly:
    """Cross-entropy that ends a worker of the server at its nth call there, once."""

    def __init__(self, folder: Path, call: int) -> None:
        self.done, self.call, self.calls, self.server = folder / "done", call, 0, os.getpid()

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if os.getpid() != self.server:
            self.calls += 1
            if self.calls == self.call and not self.done.exists():
                self.done.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(outputs, labels)


def test_a_worker_is_killed_and_the_run_goes_on_in_process(tmp_path: Path) -> None:
    """Killed in a C epoch. A checkpoint of the shards is as one of a store in one process."""

    class Interrupted(Exception):  # noqa: N818
        pass

    def interrupt(record) -> None:
        if record.epoch == 6:
            raise Interrupted

    chosen = ("parallel", "fp32", 8, 2)
    loss, folder = Deadly(tmp_path, 10), tmp_path / "run"
    task = Task(loss=loss, classes=3)
    with pytest.raises(Interrupted):
        run(*chosen, backend=Ray(workers=2, **SHARE), run=folder, task=task, on_epoch=interrupt)
    assert loss.done.exists()
    alike(run(*chosen, run=folder, task=task, resume=True), run(*chosen))


def test_what_needs_the_store_or_several_halves_in_one_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="workers=1"):
        run("splitfed_v1", "fp32", 1, backend=Ray(workers=2, **SHARE))
    with pytest.raises(ConfigError, match="delta"):
        run("splitfed_v2", "delta>fp8_e4m3", 1, backend=Ray(workers=2, **SHARE))
