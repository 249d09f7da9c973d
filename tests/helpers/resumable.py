"""A short run that goes on where it was left; started by test_damage.py as a process, too.

python -m tests.helpers.resumable RUN_FOLDER EPOCHS
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Fleet, Halves, Method, Optimizer, Periodic, Training, fit
from cutlayer.errors import DiskError
from cutlayer.records.history import EpochRecord
from cutlayer.runs.run import Run

ADAM = Optimizer("adam", lr=0.01, schedule="constant")
ONE_CLIENT = Method(Periodic(period=3))
SEVERAL = Method.of(Periodic(period=3), "delta0.3>mxfp4/ef>topk0.5>fp8_e5m2", fleet=Fleet())


def halves() -> Halves:
    torch.manual_seed(0)
    return Halves(nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32)), nn.Linear(32, 2))


def data(seed: int = 0, count: int = 20) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=draw), torch.arange(count) % 2)


def train(
    folder: Path,
    method: Method = ONE_CLIENT,
    epochs: int = 5,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> None:
    """Begin, or go on."""
    parts = data() if method is ONE_CLIENT else [data(), data(1), data(2)]
    training = Training(epochs=epochs, batch_size=8, client=ADAM, server=ADAM)
    fit(halves(), parts, data(9), method=method, training=training, run=folder, resume=True, on_epoch=on_epoch)


def outcome(folder: Path) -> tuple[dict, list[dict], Mapping[str, float]]:
    """Weights, metrics and the merged model's scores, without what differs from run to run."""
    weights = Run(folder).load_weights(halves().whole).state_dict()
    records = [record.as_dict() for record in Run(folder).records()]
    return (
        {k: v.numpy().tobytes() for k, v in weights.items()},
        [{k: v for k, v in record.items() if k != "seconds"} for record in records],
        Run(folder).history().merged,
    )


if __name__ == "__main__":
    try:
        train(Path(sys.argv[1]), epochs=int(sys.argv[2]))
    except DiskError as error:
        sys.exit(f"error: {error}")
