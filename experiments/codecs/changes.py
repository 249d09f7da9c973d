"""How far activations move from epoch to epoch, and how closely references follow them.

    CUTLAYER_DATA=<folder with CIFAR-10> python experiments/codecs/changes.py    # five minutes on one core

A short run of plain split learning for each spec, gradients in 32 bits. By epoch: *change*, the distance between
activations and the references that were there; *error*, the distance that is left after sending; both are Frobenius
norms relative to the activations'. Writes results/changes.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from cutlayer import Always, DataConfig, Method, ModelConfig, RunConfig, Training, run_experiment
from cutlayer.codecs import Encoded
from cutlayer.codecs.base import numel
from cutlayer.memory.delta import DeltaSender, references
from cutlayer.records.environment import environment
from cutlayer.records.history import EpochRecord
from cutlayer.runs.fit import client

RESULTS = Path(__file__).parent / "results"
SPECS = ["delta>mxfp4+zstd", "delta0.3>mxfp4+zstd", "delta>topk0.1>fp8_e4m3+zstd"]
SAMPLES, EPOCHS = 1500, 8


class Watched(DeltaSender):
    """A sender that adds up squared distances over an epoch."""

    change = error = size = sent = 0.0
    values = 0

    def encode(self, ids: Tensor, activations: Tensor, seed: int = 0) -> tuple[Tensor, Encoded]:
        """As `DeltaSender.encode`."""
        exact = activations.detach()
        before = references(self.store, ids, exact)
        sent, encoded = super().encode(ids, activations, seed)
        after = references(self.store, ids, exact)
        Watched.change += float((exact - before).double().pow(2).sum())
        Watched.error += float((exact - after).double().pow(2).sum())
        Watched.size += float(exact.double().pow(2).sum())
        Watched.sent += float(sent.double().mean()) * len(ids)
        Watched.values = numel(tuple(exact.shape[1:]))
        return sent, encoded

    @classmethod
    def row(cls, spec: str, record: EpochRecord) -> str:
        """A line of the table; what was added up begins again."""
        bits = 8 * record.bytes["up"]["activations"] / SAMPLES / cls.values
        change, error = (cls.change / cls.size) ** 0.5, (cls.error / cls.size) ** 0.5
        line = f"| {spec} | {record.epoch + 1} | {change:.3f} | {error:.3f} | {cls.sent / SAMPLES:.0%} | {bits:.2f} |"
        cls.change = cls.error = cls.size = cls.sent = 0.0
        return line


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    client.DeltaSender = Watched  # type: ignore[misc]
    rows = ["| spec | epoch | change | error | samples sent | bits a value |", "|---|---|---|---|---|---|"]
    for spec in SPECS:
        config = RunConfig(
            DataConfig("cifar10", train_samples=SAMPLES, test_samples=1000),
            ModelConfig("vgg11", width=0.25, cut="layer4"),
            Method.of(Always(), f"{spec}/fp32"),
            Training(epochs=EPOCHS, evaluate_every=EPOCHS, batch_size=64),
            threads=1,
        )
        run_experiment(config, on_epoch=lambda record, spec=spec: rows.append(Watched.row(spec, record)))
        print("\n".join(rows[-EPOCHS:]), flush=True)
    where = environment()
    about = (
        f"`python experiments/codecs/changes.py`: VGG11 of width 0.25 on {SAMPLES} images of CIFAR-10, cut after "
        f"layer4, {EPOCHS} epochs, one seed; the learning rate falls 5x after epochs 2, 4 and 6. torch "
        f"{where['torch']}, {where['processor']}, one thread. Change and error are relative to the activations' "
        "norm.\n\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "changes.md").write_text(about + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
