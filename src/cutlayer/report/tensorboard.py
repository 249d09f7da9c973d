"""A run's epochs for TensorBoard, in its usual layout: a group of charts for loss, each metric, bytes and FLOPs."""

from __future__ import annotations

from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.records.history import EpochRecord


class TensorBoard:
    """Writes each epoch as it ends; pass it as `on_epoch`, and use it as a context manager.

    Args:
        folder: for the event files, such as RUN/tensorboard.
        done: epochs that a resumed run goes on from; what was written of later ones is hidden.

    Raises:
        ConfigError: the package tensorboard is not there.
    """

    def __init__(self, folder: str | Path, done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ConfigError("--tensorboard needs tensorboard: pip install 'cutlayer[report]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.close()

    def __call__(self, record: EpochRecord) -> None:
        """Write this epoch."""
        epoch = record.epoch + 1
        scalars = {"loss/train": record.loss, "exchange/sent": {"A": 2, "B": 1}.get(record.exchange, 0)}
        scalars |= {f"{name}/test": value for name, value in record.test.items()}
        scalars |= {
            f"bytes/{way}": sum(n for kind, n in kinds.items() if kind != "evaluation")
            for way, kinds in record.bytes.items()
        }
        scalars |= {f"flops/{party}": sum(passes.values()) for party, passes in record.flops.items()}
        scalars["seconds/epoch"] = sum(record.seconds.values())
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()
