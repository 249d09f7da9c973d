"""A run that kills its own process (SIGKILL) at a given training step; started by test_resume.py as a process.

python -m tests.integration.killed_run RUN_FOLDER STEP       # STEP -1: not at all
"""

import os
import signal
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cutlayer import Method, Optimizer, Periodic, StoreOptions, Task, Training, fit, split
from cutlayer.data import digits
from cutlayer.seeds import seeded

BATCHES, EPOCHS = 4, 8


class Deadly:
    """Cross-entropy that ends the process when it is called for this training step."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def __repr__(self) -> str:
        return "cross_entropy"

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            if self.calls == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
        return cross_entropy(outputs, labels)


def main(folder: str, step: int) -> None:
    torch.set_num_threads(1)
    train, test = digits()
    with seeded(0, "model"):
        model = nn.Sequential()
        for name, layer in {
            "flatten": nn.Flatten(),
            "scale": nn.BatchNorm1d(64, affine=True),
            "first": nn.Linear(64, 32),
            "norm": nn.BatchNorm1d(32),
            "relu": nn.ReLU(),
            "dropout": nn.Dropout(0.3),
            "cut": nn.Identity(),
            "second": nn.Linear(32, 10),
            "dropout2": nn.Dropout(0.1),
        }.items():
            model.add_module(name, layer)
    wrapped = nn.Sequential()
    wrapped.add_module("cast", Cast())
    wrapped.add_module("net", model)
    fit(
        split(wrapped, "net.cut"),
        train.first(200),
        test.first(60),
        method=Method(Periodic(period=4), "fp8_e4m3", "fp8_e5m2", store=StoreOptions(placement="disk")),
        training=Training(
            epochs=EPOCHS, batch_size=50, client=Optimizer(name="adam", lr=0.01), server=Optimizer(), evaluate_every=2
        ),
        task=Task(loss=Deadly(step)),
        run=folder,
        resume=True,
    )


class Cast(nn.Module):
    """Bytes to floats."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
