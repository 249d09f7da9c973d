"""The memory that a client needs for its half: followed tensor by tensor, on a copy without data."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cutlayer.method import Training
from cutlayer.models.auxiliary import SelfTraining
from cutlayer.models.cut import copied, is_frozen
from cutlayer.training.halves import TrainedHalf


class LiveTensors(TorchDispatchMode):
    """Inside the block, counts the bytes of the tensors that are alive.

    Attributes:
        live: bytes now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor until it is let go of; views of the same memory count once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def released() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, released)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self.add(each)
        return out


def client_memory(half: nn.Module, inputs: Tensor, training: Training, *, averaged: bool = False) -> tuple[int, int]:
    """Peak bytes of a client half with its optimizer, for a batch: in an A epoch, and in a B epoch.

    Weights, gradients, optimizer state, inputs and all tensors in between are counted; what Python and PyTorch take
    themselves (a few hundred MB) and the data set are not.

    Args:
        inputs: a batch [B, ...]; only its shape and type matter.
        averaged: whether the mean of the weights is made, too, after the updates of A epochs.
    """
    if training.precision != "fp32":  # tensors without data do not follow autocast
        return _peaks(half, inputs, training, averaged, "cpu")
    try:
        return _peaks(half, inputs, training, averaged, "meta")
    except (RuntimeError, NotImplementedError):  # a module that cannot do without data
        return _peaks(half, inputs, training, averaged, "cpu")


def _peaks(half: nn.Module, inputs: Tensor, training: Training, averaged: bool, device: str) -> tuple[int, int]:
    trained = TrainedHalf(copied(half), training.client, replace(training, device=device))
    batch = torch.zeros(inputs.shape, dtype=inputs.dtype, device=device)
    # Of a device of the same kind as those that plans are for; "meta" has none.
    autocast = replace(training, device="cpu").autocast
    parameters = [*trained.half.parameters(), *trained.half.buffers(), batch]
    with torch.random.fork_rng(devices=[]), LiveTensors() as forward, torch.no_grad(), autocast():
        for tensor in parameters:
            forward.add(tensor)
        trained.half.train()(batch)
    if is_frozen(half) and not isinstance(half, SelfTraining):
        return forward.peak, forward.peak
    with torch.random.fork_rng(devices=[]), LiveTensors() as both:
        for tensor in parameters:
            both.add(tensor)
        for _ in range(2):  # the optimizer's state is there from the first step on
            trained.optimizer.zero_grad()
            with autocast():
                outputs = trained.half(batch)
                if isinstance(trained.half, SelfTraining):
                    outputs = trained.half.head(outputs)
            outputs.backward(torch.ones_like(outputs))
            del outputs
            trained.optimizer.step()
            if averaged:
                trained.average.add(trained.half)
    # A client that trains by itself does so in B epochs; it has no others.
    return both.peak, both.peak if isinstance(half, SelfTraining) else forward.peak
