"""FLOPs of a half, counted by PyTorch's own counter: matrix products and convolutions, 2 for a multiply-add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop

from cutlayer.errors import ConfigError
from cutlayer.models.cut import copied

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class FlopTable:
    """FLOPs of a half by batch size, counted once each.

    Passes run on a copy that holds no data (device "meta") and none of the user's hooks, so weights, running
    statistics and random states stay as they are; for a half that cannot run so a copy on the CPU is stored. Make the
    table before the half runs: a module that stores what it computed cannot be copied any more.

    Args:
        half: the half; it is left alone.
        sample_shape: shape of one of its inputs, without the batch.
        dtype: type of its inputs.

    Attributes:
        output_shape: shape of the half's outputs for one sample, without the batch.

    Raises:
        ConfigError: the half cannot be copied, or does not take such inputs.
    """

    def __init__(self, half: nn.Module, sample_shape: Sequence[int], dtype: torch.dtype) -> None:
        self.sample_shape, self.dtype = tuple(sample_shape), dtype
        self._known: dict[tuple[int, bool, bool], tuple[int, int]] = {}
        self._output_type: torch.dtype | None = None
        self._copy, without_data = copied(half).cpu(), copied(half).to("meta")
        for module in [*self._copy.modules(), *without_data.modules()]:  # the user's hooks are meant for real passes
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()
        weights = {str(p.dtype) for p in half.parameters() if p.is_floating_point()}
        unlike = weights and dtype.is_floating_point and dtype != torch.float32 and str(dtype) not in weights
        try:
            self.output_shape = self._shape(without_data, torch.device("meta"))
            if unlike:  # without data, types that do not fit each other pass
                self._shape(self._copy, torch.device("cpu"))
            self._real, self._copy, self._device = self._copy, without_data, torch.device("meta")
        except Exception:  # whatever a module of the user's own says of tensors without data
            self._device = torch.device("cpu")
            try:
                self.output_shape = self._shape(self._copy, self._device)
            except ConfigError:
                raise
            except Exception as error:
                shape = ", ".join(["batch", *map(str, self.sample_shape)])
                name = "this half" if isinstance(half, torch.fx.GraphModule) else type(half).__name__  # made by `split`
                hint = f"; convert them to {', '.join(sorted(weights))}, as its weights are" if unlike else ""
                raise ConfigError(f"{name} does not take inputs {dtype} [{shape}]{hint}: {error}") from error

    def __call__(self, batch: int, *, input_gradient: bool = False, training: bool = True) -> tuple[int, int]:
        """(forward, backward) of a batch of this size; backward is 0 if not `training`.

        `input_gradient` says whether the backward pass also computes the gradient with respect to the input: true for
        the server half in an A epoch, false for the client half and for the server half in B and C.
        """
        key = (batch, input_gradient, training)
        if key not in self._known:
            try:
                with torch.random.fork_rng(devices=[]):
                    try:
                        self._known[key] = self._count(batch, input_gradient, training)
                    except (RuntimeError, NotImplementedError):
                        if self._device.type != "meta":
                            raise
                        self._copy, self._device = self._real, torch.device("cpu")
                        self._known[key] = self._count(batch, input_gradient, training)
            except ValueError as error:
                raise ConfigError(
                    f"a batch of {batch} cannot be trained on: {error}. If the last batch of an epoch is too small for "
                    "batch norm, choose another batch_size, or drop_last"
                ) from error
        return self._known[key]

    def output_type(self, context: torch.autocast, device: torch.device) -> torch.dtype:
        """Type of the half's outputs inside this context on this device; asked for in one context only."""
        if self._output_type is None:
            half = copied(self._copy if self._device.type == "cpu" else self._real).to(device).eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]), context:
                self._output_type = half(self._inputs(2, device)).dtype
        return self._output_type

    def _inputs(self, batch: int, device: torch.device) -> torch.Tensor:
        return torch.zeros((batch, *self.sample_shape), dtype=self.dtype, device=device)

    def _shape(self, half: nn.Module, device: torch.device) -> tuple[int, ...]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = half.eval()(self._inputs(2, device))
        if not isinstance(outputs, Tensor) or outputs.dtype not in FLOATS or outputs.shape[:1] != (2,):
            got = f"{outputs.dtype} {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(
                f"expected {type(half).__name__} to return one tensor [batch, ...] of at most 32-bit floats, for a "
                f"batch of 2 it returns {got}"
            )
        return tuple(outputs.shape[1:])

    def _count(self, batch: int, input_gradient: bool, training: bool) -> tuple[int, int]:
        half, inputs = self._copy.train(training), self._inputs(batch, self._device)
        with FlopCounterMode(display=False) as forward, torch.set_grad_enabled(training):
            inputs = inputs.requires_grad_(input_gradient)
            # A clone costs no FLOPs, and lets a half begin with an operation that works in place.
            outputs = half(inputs.clone() if input_gradient else inputs)
        with FlopCounterMode(display=False, custom_mapping=COUNTED_HERE) as backward:
            if outputs.requires_grad:
                outputs.backward(torch.ones_like(outputs))
        return forward.get_total_flops(), backward.get_total_flops()


def _convolution_backward(*arguments: Any, out_shape: Any = None, **more: Any) -> int:
    """As PyTorch counts it, but that it takes the gradient of a grouped convolution's weights for that of a full one.

    Source: pull request 183405 of pytorch/pytorch.
    """
    count: Any = conv_backward_flop
    groups, (to_inputs, to_weights, *_) = arguments[9:11]
    inputs = count(*arguments[:10], (to_inputs, False, False), out_val=out_shape, **more)
    weights = count(*arguments[:10], (False, to_weights, False), out_val=out_shape, **more)
    return inputs + weights // groups


COUNTED_HERE = {torch.ops.aten.convolution_backward: _convolution_backward}
