"""A run that kills its own process (SIGKILL) at a given training step; started by test_resume.py as a process.

    python -m tests.helpers.killed_run RUN_FOLDER STEP KIND      # STEP -1: not at all

KIND "disk": a store on disk and augmentation; "disk-before" and "disk-after" end it around the naming of the checkpoint
after STEP epochs. KIND "loader": a store in memory, a shuffled DataLoader, evaluation and checkpoints at odd intervals.
KIND "memories": the same with changes of activations, and error feedback. KIND "few": as "disk", with a budget, a
client half that settles, several views, mixed activations and dropout at the cut.
"""

import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cutlayer import (
    Budget,
    CropFlip,
    CustomOptimizer,
    Drift,
    Method,
    Optimizer,
    StoreOptions,
    Task,
    Training,
    fit,
    split,
)
from cutlayer.data.datasets import digits
from cutlayer.regularize import Regularize
from cutlayer.seeds import seeded

BATCHES, EPOCHS = 4, 10


class Deadly:
    """Cross-entropy that ends the process when it is called for this training step."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            if self.calls == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
        return cross_entropy(outputs, labels)


def kill_at_rename(epoch: int, moment: str) -> None:
    """End the process when the checkpoint after this many epochs gets its name, before or after it has."""
    rename = Path.rename

    def deadly(self: Path, target: Path) -> Path:
        now = Path(target).name == f"epoch-{epoch:06d}"
        if now and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = rename(self, target)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Path.rename = deadly  # type: ignore[method-assign]


def main(folder: str, step: int, kind: str) -> None:
    kind, _, moment = kind.partition("-")
    if moment:
        kill_at_rename(step, moment)
        step = -1
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
    train = train.first(200)
    loader = DataLoader(train, batch_size=50, shuffle=True)
    disk = kind in ("disk", "few")
    codecs = ("fp8_e4m3", "fp8_e5m2")
    if kind == "memories":
        codecs = ("delta0.3>mxfp4:stochastic", "ef>topk0.2>fp8_e5m2")
    # The loss decides, so a run that forgot where its schedule was would take another way.
    method = Method(Drift(threshold=0.35), *codecs, store=StoreOptions(placement="disk" if disk else "memory"))
    few = {"schedule": Budget(megabytes=0.06, threshold=0.2, last=1), "views": 2, "views_from": 0}
    fit(
        split(wrapped, "net.cut"),
        train if disk else loader,
        test.first(60),
        method=replace(method, **few) if kind == "few" else method,
        training=Training(
            epochs=EPOCHS,
            batch_size=50,
            client=Optimizer(name="adam", lr=0.01) if disk else CustomOptimizer(sgd),
            server=Optimizer(lr=0.02),
            augment=CropFlip(padding=1, flip=False) if disk else None,
            regularize=Regularize(mixup=0.3, dropout=0.1) if kind == "few" else Regularize(),
            evaluate_every=1 if disk else 3,
            checkpoint_every=1 if disk else 2,
        ),
        # Mixup asks for the loss twice in a step, with the labels of either sample.
        task=Task(loss=Deadly(2 * step if kind == "few" else step)),
        run=folder,
        resume=True,
    )


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Momentum without weight decay."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


class Cast(nn.Module):
    """Bytes to floats."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
