"""FLOPs of a half, counted by PyTorch's own counter: matrix products and convolutions, 2 for a multiply-add."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(
    half: nn.Module, batch_shape: Sequence[int], dtype: torch.dtype, *, input_gradient: bool
) -> tuple[int, int]:
    """FLOPs of a forward and of a backward pass of a half, for an input of this shape (batch dimension included).

    `input_gradient` says whether the backward pass also computes the gradient with respect to the input: true for the
    server half in an A epoch, false for the client half and for the server half in B and C.

    The passes run on a copy that holds no data (device "meta"), so neither weights, running statistics nor random
    states change; a half that cannot run so is counted on a copy on the CPU.
    """
    half = copy.deepcopy(half)
    for module in half.modules():  # a user's hooks are meant for real passes
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    try:
        inputs = torch.empty(batch_shape, dtype=dtype, device="meta")
        return _count(copy.deepcopy(half).to("meta"), inputs, input_gradient)
    except (NotImplementedError, RuntimeError):
        with torch.random.fork_rng(devices=[]):
            return _count(half.cpu(), torch.zeros(batch_shape, dtype=dtype), input_gradient)


def _count(half: nn.Module, inputs: torch.Tensor, input_gradient: bool) -> tuple[int, int]:
    half.train()
    with FlopCounterMode(display=False) as forward, torch.enable_grad():
        inputs = inputs.requires_grad_(input_gradient)
        # An operation that is exact and free, so that a half may begin with one that works in place.
        outputs = half(inputs.clone() if input_gradient else inputs)
    with FlopCounterMode(display=False) as backward:
        if outputs.requires_grad:
            outputs.backward(torch.ones_like(outputs))
    return forward.get_total_flops(), backward.get_total_flops()


class FlopTable:
    """FLOPs of a half by batch size, counted once each."""

    def __init__(self, half: nn.Module, sample_shape: Sequence[int], dtype: torch.dtype) -> None:
        self.half, self.sample_shape, self.dtype = half, tuple(sample_shape), dtype
        self._known: dict[tuple[int, bool], tuple[int, int]] = {}

    def __call__(self, batch: int, *, input_gradient: bool = False) -> tuple[int, int]:
        """(forward, backward) for a batch of this size."""
        key = (batch, input_gradient)
        if key not in self._known:
            self._known[key] = count_flops(
                self.half, (batch, *self.sample_shape), self.dtype, input_gradient=input_gradient
            )
        return self._known[key]
