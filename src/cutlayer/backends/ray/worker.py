"""What runs in an actor that trains the server half: one of several equal copies, and its shard of the store."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cutlayer.codecs import Encoded, get_transfer
from cutlayer.errors import ConfigError, RefusedBatchError, StateLostError
from cutlayer.memory.store import ReplayStore
from cutlayer.records.state_dicts import on_cpu
from cutlayer.strategies.protocols import StepBatch
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import Job
from cutlayer.training.step import EpochCounts, TrainingStep

Samples = tuple[Tensor, Encoded, Tensor]
"""Ids int64 [B], encoded activations, and labels [B, ...]."""


class Worker:
    """Data-parallel training: each worker does its samples of a batch, gradients are summed, all make the same update.

    Sample `id` belongs to worker `id % world`, where it is number `id // world`. A batch's loss is the mean over all
    its samples, so a worker weights its own mean by its share of them; one without any only takes part in the sum.

    Source of the scheme: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (VLDB
    2020, arXiv 2006.15704).
    """

    def build(self, rank: int, world: int, rows: int, job: Job, threads: int) -> None:
        """Build the copy of the half, and an empty shard of a store of so many rows."""
        training, method = job.training, job.method
        torch.set_num_threads(threads)
        self.rank, self.world, self.device = rank, world, torch.device(training.device)
        self.step = TrainingStep(job, self._sum_gradients)
        self.trained = TrainedHalf(job.half, training.server, training)
        self.codec = get_transfer(method.activations).codec
        self.store = ReplayStore(math.ceil(rows / world), method.store)
        self.epoch = 0
        self.counts = EpochCounts.empty(self.device)

    def meet(self, place: tuple[str, int] | None) -> tuple[str, int]:
        """Take part in the group, which meets where the first worker says: host and port. That one is given None."""
        if place is None:
            # Not the host's name, which need not be known to the others, but the address that leads to them.
            host = _own_address()
            self._meeting = dist.TCPStore(host, 0, self.world, is_master=True, wait_for_workers=False)
            return host, self._meeting.port
        if self.rank:
            self._meeting = dist.TCPStore(*place, self.world, is_master=False)
        kind = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(kind, store=self._meeting, rank=self.rank, world_size=self.world)
        return place

    # --- an epoch ---

    def begin(self, epoch: int, state: dict[str, Any] | None) -> None:
        """Begin an epoch, from this state of half and optimizer unless it is the one here."""
        if state is not None:
            self.trained.load_state_dict(state)
        self.epoch = epoch
        self.trained.half.train()
        self.trained.optimizer.begin(epoch)
        self.counts = EpochCounts.empty(self.device)

    def train(self, step: int, sent: Samples | None, stored: Tensor, total: int) -> None:
        """A step of a B epoch.

        Args:
            sent: this worker's samples of what came in, which it stores; None for none.
            stored: ids of its samples that it has already, int64 [B].
            total: samples of the step with all workers.
        """
        pieces = [self.store.get(stored)] if len(stored) else []
        if sent is not None:
            pieces.insert(0, sent[1:])
        self._train(step, pieces, total)
        if sent is not None:
            self.store.put(*sent)

    def replay(self, batches: Sequence[Tensor]) -> None:
        """A C epoch: batches of ids of all samples, int64 [B], of which each worker takes its own from its shard."""
        for step, ids in enumerate(batches):
            mine = ids[ids % self.world == self.rank] // self.world
            self._train(step, [self.store.get(mine)] if len(mine) else [], len(ids))

    def finish(self) -> float:
        """End the epoch: the sum of the losses of this worker's samples."""
        self._average_buffers()
        return self.counts.loss_sum.item()

    def state_dict(self) -> dict[str, Any]:
        """Half and optimizer, their tensors on the CPU."""
        return on_cpu(self.trained.state_dict())

    def _train(self, step: int, pieces: Sequence[tuple[Encoded, Tensor]], total: int) -> None:
        """Train on this worker's samples of a step, if it has any: encoded activations, and labels."""
        batches = []
        if pieces:
            activations = torch.cat([self.codec.decode(encoded.to(self.device)) for encoded, _ in pieces])
            labels = torch.cat([labels for _, labels in pieces]).to(self.device)
            batches.append(StepBatch(None, activations, labels))
        name = (self.epoch, step, *((f"worker {self.rank}",) if self.rank else ()))
        try:
            losses = self.step(self.trained, batches, name, total=total, check_loss=False)
        except RefusedBatchError as error:  # too late to have its client send another
            raise ConfigError(str(error)) from error
        for batch, loss in zip(batches, losses, strict=True):
            self.counts.add(None, loss, len(batch))

    # --- what workers do together ---

    def _sum_gradients(self, half: nn.Module) -> None:
        parameters = [parameter for parameter in half.parameters() if parameter.requires_grad]
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        together = torch.cat([*(gradient.flatten() for gradient in gradients), used])
        self._sum(together)
        *summed, used = together.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, summed, used.tolist(), strict=True):
            # One that no worker used has no gradient, as with one process, and is left alone by the optimizer.
            parameter.grad = gradient.view_as(parameter) if count else None

    def _average_buffers(self) -> None:
        """Running statistics, which each worker has of its own samples."""
        for buffer in self.trained.half.buffers():
            if buffer.is_floating_point():
                self._sum(buffer)
                buffer /= self.world

    def _sum(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise StateLostError(
                f"worker {self.rank} of the server lost the others: {str(error).splitlines()[0]}"
            ) from error

    # --- the shard ---

    def put(self, samples: Samples) -> None:
        """Store samples, by their numbers in this shard."""
        self.store.put(*samples)

    def get(self, ids: Tensor) -> tuple[Encoded, Tensor]:
        """Samples by their numbers in this shard."""
        return self.store.get(ids)


def _own_address() -> str:
    """The address of this machine that others on the cluster reach it by."""
    import ray

    try:
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:
        return "127.0.0.1"
    return address
