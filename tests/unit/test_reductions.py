"""What savings are measured against: plain split learning of the samples that were trained on, in the same mode."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Always, Fleet, Halves, History, Method, Periodic, Run, Training, fit
from cutlayer.records.history import Baseline, EpochRecord
from cutlayer.strategies import STRATEGIES, ParallelSplit, SplitFedV2


def halves() -> Halves:
    torch.manual_seed(0)
    return Halves(nn.Linear(6, 32), nn.Linear(32, 3))


def data(*sizes: int) -> list[TensorDataset]:
    draw = torch.Generator().manual_seed(1)
    return [TensorDataset(torch.randn(n, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in sizes]


def history(fleet: Fleet, sizes: tuple[int, ...] = (24, 16, 16, 12), epochs: int = 6, schedule=None, **more) -> History:
    method = Method(schedule or Always(), fleet=fleet)
    return fit(halves(), data(*sizes), method=method, training=Training(epochs=epochs, batch_size=8), **more).history


@pytest.mark.parametrize("mode", [*STRATEGIES])
@pytest.mark.parametrize("more", [{}, {"fraction": 0.25}, {"fraction": 0.5}, {"dropout": 0.5}], ids=str)
def test_plain_split_learning_saves_nothing_whoever_takes_part(mode: str, more: dict) -> None:
    plain = history(Fleet(strategy=STRATEGIES[mode](), **more))
    assert plain.traffic_reduction == pytest.approx(1)
    if "dropout" not in more:  # a client that is lost has worked on a batch, or not, that does not count
        assert plain.client_flops_reduction == pytest.approx(1)
    # By all bytes, what weights cost depends on how many clients with how many samples were drawn.
    assert plain.all_bytes_reduction == pytest.approx(1, rel=0.005 if not more else 0.2)


def test_plain_split_learning_of_one_client_saves_nothing_and_averaging_within_epochs_neither() -> None:
    one = history(Fleet(), (50,))
    assert (one.traffic_reduction, one.client_flops_reduction) == (1, 1)
    assert one.all_bytes_reduction == pytest.approx(1, rel=0.005)
    often = history(Fleet(strategy=SplitFedV2(average_every=2)))
    assert often.all_bytes_reduction == pytest.approx(1, rel=0.005)


def test_what_the_store_speaks_for_is_saved_and_weights_are_not() -> None:
    """A B C C A B in 32 bits: 12 parts of activations and gradients become 6, whoever took part in A and B."""
    everyone = history(Fleet(), schedule=Periodic(period=4))
    assert everyone.traffic_reduction == pytest.approx(12 / 6)
    some = history(Fleet(fraction=0.5, replay_absent=False), schedule=Periodic(period=4))
    sent = sum(r.samples * {"A": 2, "B": 1, "C": 0}[r.exchange] for r in some.epochs)
    assert some.traffic_reduction == pytest.approx(2 * sum(r.samples for r in some.epochs) / sent)
    parallel = history(Fleet(strategy=ParallelSplit()), schedule=Periodic(period=4))
    assert parallel.traffic_reduction == pytest.approx(2)
    frames = sum(sum(way.values()) for record in parallel.epochs for way in record.bytes.values())
    plain = history(Fleet(strategy=ParallelSplit()))
    assert parallel.bytes() == frames
    assert parallel.all_bytes_reduction == pytest.approx(plain.bytes() / frames, rel=0.01)


def test_a_run_of_an_older_version_is_read_as_it_was(tmp_path: Path) -> None:
    fit(halves(), data(16), training=Training(epochs=2, batch_size=8), run=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("samples", "all_bytes", "first_bytes"):
        del config["baseline"][name]
    del config["checksum"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = Run(tmp_path).history()
    assert (old.traffic_reduction, old.client_flops_reduction) == (1, 1)
    assert old.all_bytes_reduction != old.all_bytes_reduction  # not known


def test_nothing_is_reduced_before_anything_was_sent() -> None:
    for epochs in ([], [EpochRecord(0, "A", 1.0, 8, flops={"client": {}, "server": {}})]):
        found = History(epochs, Baseline(80, 8, 8, 100, 90))
        ratios = (found.traffic_reduction, found.all_bytes_reduction, found.client_flops_reduction)
        assert all(ratio != ratio for ratio in ratios)
