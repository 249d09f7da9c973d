"""The test activations that clients sent, and how well the server half does on them; the scores of a test set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from cutlayer.codecs import evaluation_codec, get_transfer
from cutlayer.data.batches import Batches
from cutlayer.errors import RefusedError, StoreFullError
from cutlayer.memory.store import ReplayStore
from cutlayer.method import Metric, Task
from cutlayer.models.flops import FlopTable
from cutlayer.models.trace import output_tensor
from cutlayer.records.ledger import Ledger
from cutlayer.training.checks import FrameChecks, decoded
from cutlayer.training.job import Job
from cutlayer.training.loss_checks import blaming
from cutlayer.wire.frames import Received
from cutlayer.wire.messages import Evaluate


class Evaluation:
    """What is evaluated: each client's newest test activations, whose samples lie one client's after the other's."""

    def __init__(self, job: Job, checks: FrameChecks, ledger: Ledger) -> None:
        self.checks, self.task, self.job, self.ledger = checks, job.task, job, ledger
        self.codec = evaluation_codec(get_transfer(job.method.activations))
        self.device = torch.device(job.training.device)
        counts = [info.test_samples for info in checks.clients]
        self.offsets = [sum(counts[:client]) for client in range(len(counts))]
        self.store = ReplayStore(sum(counts), job.method.store)

    def add(self, received: Received, expected: Evaluate, most: int) -> int:
        """Store test activations; return of how many samples. Raises RefusedError for a frame that is not expected."""
        if received.message != expected:
            raise RefusedError(f"client {expected.client}: expected {expected}, got {received.message}")
        encoded, ids, labels, _ = self.checks.batch(received, expected.client, test=True)
        if len(ids) > most:
            raise RefusedError(f"client {expected.client}: expected the end of the evaluation, got {received.message}")
        decoded(self.codec, encoded, self.device, expected)
        try:
            self.store.put(ids + self.offsets[expected.client], encoded, labels)
        except StoreFullError as error:
            raise RefusedError(f"client {expected.client}: labels {list(labels.shape[1:])}: {error}") from None
        self.checks.remember_label_kind(labels, test=True)
        return len(ids)

    def forget(self, client: int) -> None:
        """Drop what is stored of a client."""
        self.store.clear(self.offsets[client], self.offsets[client] + self.checks.clients[client].test_samples)

    def scores(self, half: nn.Module, flops: FlopTable) -> dict[str, float]:
        """Loss and metrics of a server half over all that is stored; empty if nothing is."""
        half.eval()
        with self.ledger.phase("evaluation"), torch.no_grad():
            return scores(self.task, self._outputs(half, flops))

    def _outputs(self, half: nn.Module, flops: FlopTable) -> Iterator[tuple[Tensor, Tensor]]:
        batch_size = max(info.batch_size for info in self.checks.clients)
        for encoded, labels in self.store.batches(batch_size):
            with self.job.training.autocast():
                outputs = half(self.job.at_cut(self.codec.decode(encoded.to(self.device))))
            self.ledger.flops("server", "evaluation", flops(len(labels), training=False)[0])
            yield outputs.float(), labels.to(self.device)


def scores(task: Task, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Loss and metrics over these batches of outputs and labels; empty if there is none.

    The loss is the mean of the batches' losses, weighted by their samples. Metrics are over all batches together.
    """
    steady = {name: metric for name, metric in task.metrics.items() if isinstance(metric, Metric)}
    gathers = len(steady) < len(task.metrics)
    gathered: list[tuple[Tensor, Tensor]] = []
    loss, samples = 0.0, 0
    for metric in steady.values():
        metric.reset()
    for outputs, labels in batches:
        loss += float(task.loss(outputs, labels)) * len(labels)
        samples += len(labels)
        outputs, labels = outputs.cpu(), labels.cpu()
        for name, metric in steady.items():
            with blaming(name, outputs, labels):
                metric.update(outputs, labels)
        if gathers:
            gathered.append((outputs, labels))
    if not samples:
        return {}
    found = {"loss": loss / samples}
    if gathers:
        outputs, labels = (torch.cat(tensors) for tensors in zip(*gathered, strict=True))
    for name, metric in task.metrics.items():
        with blaming(name, outputs, labels):
            found[name] = float(metric.compute() if isinstance(metric, Metric) else metric(outputs, labels))
    return found


def scores_of(model: nn.Module, feeds: Iterable[Batches], task: Task, device: str) -> dict[str, float]:
    """Loss and metrics of an uncut network in 32 bits, in this process; it is left on the CPU and in eval mode."""
    model.to(device).eval()
    with torch.no_grad():
        batches = (batch for feed in feeds for batch in feed.epoch(0))
        found = scores(
            task,
            ((output_tensor(model(batch.inputs.to(device))).float(), batch.labels.to(device)) for batch in batches),
        )
    model.cpu()
    return found
