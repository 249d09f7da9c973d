"""What a run was begun with, as JSON values that are the same in every process: to write down, and to compare."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.errors import some


def describe(value: Any) -> Any:
    """A value as JSON values. Functions and objects go by their names, never by an address in memory."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.device, torch.dtype, Enum)):
        return str(value)
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(describe(item)) for item in value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__qualname__, **fields}
    if isinstance(value, nn.Module):
        # Constants such as label_smoothing; not counters that move, nor the mode.
        named: list[str] = list(getattr(value, "__constants__", []))
        constants = {name: describe(getattr(value, name)) for name in named if hasattr(value, name)}
        tensors = {name: fingerprint(tensor) for name, tensor in value.state_dict().items()}
        return {"kind": _name(type(value)), **constants, **tensors}
    return _name(value if hasattr(value, "__qualname__") else type(value))


def fingerprint(*tensors: Tensor) -> str:
    """A short digest of tensors' types, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def structure(half: nn.Module, *, classes: bool = True) -> str:
    """A short digest of a half's parameters and buffers: names, shapes and types, not values; and of its `classes`.

    It says so if nothing of the half is trained.
    """
    digest = hashlib.sha256()
    for name, module in half.named_modules() if classes else ():
        digest.update(f"{name} {type(module).__name__};".encode())
    for name, tensor in half.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    learns = any(parameter.requires_grad for parameter in half.parameters())
    return digest.hexdigest()[:16] + ("" if learns else " (frozen)")


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Which tensors are not those of a module, in a line; empty if names and shapes are the same."""
    own = module.state_dict()
    wrong = [
        *(f"{name} is missing" for name in own if name not in tensors),
        *(f"{name} is not expected" for name in tensors if name not in own),
        *(
            f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ),
    ]
    return some(wrong, 3)


def differences(before: Any, now: Any, path: str = "") -> dict[str, str]:
    """Where two descriptions differ, such as {"training.epochs": "was 5, now 6"}."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*before, *now]):
            found |= differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if before == now else {path: f"was {before}, now {now}"}


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
