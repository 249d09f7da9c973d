"""The test activations that clients sent, and how well the server half does on them."""

from __future__ import annotations

import torch
from torch import nn

from cutlayer.errors import RefusedError
from cutlayer.flops import FlopTable
from cutlayer.formats import Codec
from cutlayer.intake import Intake, decoded
from cutlayer.ledger import Ledger
from cutlayer.losses import score
from cutlayer.method import StoreOptions, Task, Training
from cutlayer.replay import ReplayStore
from cutlayer.wire.frames import Evaluate, Frame


class Evaluation:
    """What is evaluated: each client's newest test activations, whose samples lie one client's after the other's."""

    def __init__(
        self, intake: Intake, codec: Codec, store: StoreOptions, task: Task, training: Training, ledger: Ledger
    ) -> None:
        self.intake, self.codec, self.task, self.training, self.ledger = intake, codec, task, training, ledger
        self.device = torch.device(training.device)
        counts = [info.test_samples for info in intake.clients]
        self.offsets = [sum(counts[:client]) for client in range(len(counts))]
        self.store = ReplayStore(sum(counts), store)

    def keep(self, frame: Frame, expected: Evaluate, most: int) -> int:
        """Keep test activations; return of how many samples. Raises RefusedError for a frame that is not expected."""
        if frame.message != expected:
            raise RefusedError(f"client {expected.client}: expected {expected}, got {frame.message}")
        encoded, ids, labels, _ = self.intake.batch(frame, expected.client, test=True)
        if len(ids) > most:
            raise RefusedError(f"client {expected.client}: expected the end of the evaluation, got {frame.message}")
        decoded(self.codec, encoded, self.device, expected)
        self.store.put(ids + self.offsets[expected.client], encoded, labels)
        return len(ids)

    def scores(self, half: nn.Module, flops: FlopTable) -> dict[str, float]:
        """Mean loss and metrics of a server half over all that is kept; nothing where nothing is."""
        half.eval()
        functions = {"loss": self.task.loss, **self.task.metrics}
        sums: dict[str, float] = dict.fromkeys(functions, 0.0)
        batch_size = max(info.batch_size for info in self.intake.clients)
        with self.ledger.phase("evaluation"), torch.no_grad():
            for encoded, labels in self.store.batches(batch_size):
                labels = labels.to(self.device)
                with self.training.autocast():
                    outputs = half(self.codec.decode(encoded.to(self.device)))
                outputs = outputs.float()
                for name, function in functions.items():
                    sums[name] += score(name, function, outputs, labels) * len(labels)
                self.ledger.flops("server", "evaluation", flops(len(labels), training=False)[0])
        return {name: value / len(self.store) for name, value in sums.items()} if len(self.store) else {}
