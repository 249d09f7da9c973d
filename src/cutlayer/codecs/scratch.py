"""Work in pieces that fit the cache, in memory that is taken once.

Memory fresh from the system costs as much to touch as a conversion costs to do. So the passes of a conversion go over
a chunk at a time, in buffers that each thread has for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Values converted at a time on the CPU: a chunk and its buffers stay in the cache, second or third level, and the cost
# of the calls is small beside the work. Of 2^12 to 2^20 the best, or close to it, for every codec.
CHUNK = 1 << 18

_thread = threading.local()


def scratch(slot: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer of `count` values; on the CPU, up to a chunk, the same memory for the same slot of a thread."""
    if device.type != "cpu" or count > CHUNK:
        return torch.empty(count, dtype=dtype, device=device)
    if not hasattr(_thread, "buffers"):
        _thread.buffers = {}
    if slot not in _thread.buffers:
        with torch.inference_mode(False):  # such tensors could not be written to outside that mode
            _thread.buffers[slot] = torch.empty(CHUNK, dtype=torch.int32)
    return _thread.buffers[slot].view(dtype)[:count]


def chunks(values: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor, flat, in chunks that fit the cache; on other devices in one."""
    flat = values.view(-1)
    return flat.split(CHUNK) if values.device.type == "cpu" else (flat,)


def batch_parts(values: Tensor) -> Iterator[slice]:
    """Slices of the batch of [B, ...] with about a chunk of values each; on other devices one."""
    if values.numel() == 0:
        return
    step = max(1, CHUNK // values[0].numel()) if values.device.type == "cpu" else len(values)
    for start in range(0, len(values), step):
        yield slice(start, start + step)


def known_false(condition: Tensor) -> bool:
    """Whether a condition is known to be false without waiting for a device: on the CPU, if it is."""
    return condition.device.type == "cpu" and not bool(condition)
