"""The weights of the client half on their way: as frames, checked when they come, averaged by the samples trained on.

Source of the average: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(AISTATS 2017, arXiv 1602.05629), FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.codecs import INTEGER_CODECS, Encoded, encode_exactly, get_codec, isfinite
from cutlayer.errors import RefusedError
from cutlayer.training.calibration import check_statistics, pooled, statistics
from cutlayer.wire.frames import Frame, PackedFrame, Received, packed
from cutlayer.wire.messages import Weights


class Average:
    """The average of modules' tensors, weighted, in the order in which they are added.

    Floating-point tensors are summed in float64; of integer ones (batch norm's counters) the largest is taken. The
    average of one is that one, bit for bit.
    """

    def __init__(self) -> None:
        self.weight = 0
        self._sums: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        """Add tensors with a weight, such as the samples trained on, that is above 0."""
        for name, value in tensors.items():
            self._types[name] = value.dtype
            value = value.detach().cpu()
            if value.is_floating_point():
                wanted = value.double() * weight
                self._sums[name] = self._sums[name] + wanted if name in self._sums else wanted
            else:
                self._sums[name] = torch.maximum(self._sums[name], value) if name in self._sums else value.clone()
        self.weight += weight

    def clear(self) -> None:
        """Forget what was added."""
        self.weight, self._sums, self._types = 0, {}, {}

    def take(self) -> dict[str, Tensor]:
        """The average of what was added, which is forgotten; empty if nothing was."""
        tensors = {
            name: (total / self.weight if total.is_floating_point() else total).to(self._types[name])
            for name, total in self._sums.items()
        }
        self.clear()
        return tensors


class SharedHalf:
    """The client half that clients share, as the server has it: the average of what came in last.

    Args:
        like: tensors whose names, shapes and kinds uploads must have; empty to take the first upload's.

    Attributes:
        tensors: the newest; empty before the first upload, while every client has its own initial half.
    """

    def __init__(self, like: Mapping[str, Tensor] | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._kinds: dict[str, Any] = {name: _kind(value) for name, value in (like or {}).items()}
        self._average = Average()
        self._statistics: list[tuple[int, dict[str, Tensor]]] = []
        self.version = 0

    def add(self, client: int, received: Received, samples: int) -> None:
        """A client's upload, to be averaged with the others' by the samples it was trained on."""
        kinds = _kinds_in(received)
        strange = [name for name, (floats, _) in kinds.items() if floats is None]
        if strange:
            raise RefusedError(f"client {client}: weights: expected them in fp32 or as whole numbers, not {strange}")
        if kinds != (self._kinds or kinds) or any(field.batch != 1 for field in received.fields):
            different = sorted({name for name, _ in kinds.items() ^ (self._kinds or kinds).items()})
            raise RefusedError(f"client {client}: weights: expected those of the client half, {different} differ")
        self._average.add(decode_weights(received.unpack().tensors, f"client {client}"), samples)
        self._kinds = kinds

    def average(self) -> None:
        """Replace the shared half by the average of what was added since the last call, if anything was."""
        if self._average.weight:
            self.tensors = self._average.take()
            self.version += 1

    def add_statistics(self, client: int, received: Received, samples: int) -> None:
        """A client's running statistics of batch norm, to be pooled; none if its half has no batch norm to measure."""
        whose = f"client {client}"
        _require_kinds(received, self._kinds, f"{whose}: statistics", some=True)
        decoded = decode_weights(received.unpack().tensors, whose)
        check_statistics(decoded, whose)
        if decoded:
            self._statistics.append((samples, decoded))

    def pool_statistics(self) -> dict[str, Tensor]:
        """Replace the shared half's statistics by the pooled ones, if any came; return them."""
        found = pooled(self._statistics) if self._statistics else {}
        self._statistics = []
        if found:
            self.tensors = {**self.tensors, **found}
            self.version += 1
        return found

    def forget(self) -> None:
        """Drop what was added since the last `average`."""
        self._average.clear()
        self._statistics = []

    def frame(self, message: Weights) -> PackedFrame:
        """The shared half as a frame."""
        return packed_weights(message, self.tensors)

    def frames(self, message: Weights) -> list[PackedFrame]:
        """What a client is sent before it goes on: the shared half, or nothing if each has its own."""
        return [self.frame(message)] if self.tensors else []

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """The newest tensors, as "shared"."""
        return {"version": self.version, "shared": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.tensors, self.version = dict(state["shared"]), state["version"]
        self._kinds = self._kinds or {name: _kind(value) for name, value in self.tensors.items()}
        self.forget()


def weights_frame(message: Weights, tensors: Mapping[str, Tensor]) -> bytes:
    """Weights by name as the bytes of a frame, floating-point ones in 32 bits."""
    return packed_weights(message, tensors).data


def packed_weights(message: Weights, tensors: Mapping[str, Tensor]) -> PackedFrame:
    """Weights by name as a frame, floating-point ones in 32 bits."""
    encoded = {name: encode_exactly(value.detach().cpu().unsqueeze(0)) for name, value in tensors.items()}
    return packed(Frame(message, encoded))


def largest_weights(half: nn.Module) -> int:
    """Bytes of the largest frame that `weights_frame` can make of this half, whose counters may grow."""
    state = half.state_dict()
    return (1 << 12) + sum(8 * value.numel() + len(name) + 128 for name, value in state.items())


def decode_weights(tensors: Mapping[str, Encoded], whose: str) -> dict[str, Tensor]:
    """The weights of a frame by name. Raises RefusedError for values that are not finite."""
    decoded = {name: get_codec(encoded.codec).decode(encoded)[0] for name, encoded in tensors.items()}
    wrong = [name for name, value in decoded.items() if value.is_floating_point() and not isfinite(value)]
    if wrong:
        raise RefusedError(f"{whose}: weights: expected finite values, got infinities or NaN in {wrong}")
    return decoded


def load_weights(half: nn.Module, received: Received, whose: str) -> None:
    """Load the weights of a frame into a half. Raises RefusedError, with nothing loaded, if they do not fit."""
    _require_kinds(received, {name: _kind(value) for name, value in half.state_dict().items()}, f"{whose}: weights")
    half.load_state_dict(decode_weights(received.unpack().tensors, whose))


def load_statistics(half: nn.Module, received: Received, whose: str) -> None:
    """Load running statistics into a half. Raises RefusedError, with nothing loaded, if they are not of its layers."""
    own = {name: _kind(value) for name, value in statistics(half).items()}
    _require_kinds(received, own, f"{whose}: statistics", some=True)
    decoded = decode_weights(received.unpack().tensors, whose)
    check_statistics(decoded, whose)
    half.load_state_dict({**half.state_dict(), **decoded})


def _kinds_in(received: Received) -> dict[str, Any]:
    """Whether tensors of a frame are floats, and their shapes, as its header states them."""
    return {field.name: (_is_float(field.codec), field.shape) for field in received.fields}


def _require_kinds(received: Received, expected: Mapping[str, Any], what: str, *, some: bool = False) -> None:
    """Raise RefusedError for a frame whose tensors are not those of the half, or `some` of them."""
    kinds, alone = _kinds_in(received), {field.name: field.batch == 1 for field in received.fields}
    names = kinds if some else {**expected, **kinds}
    different = [name for name in names if kinds.get(name) != expected.get(name) or not alone.get(name)]
    if different:
        raise RefusedError(f"{what}: expected those of the client half, {sorted(different)} differ")


def _is_float(codec: str) -> bool | None:
    return True if codec == "fp32" else False if codec in INTEGER_CODECS else None


def _kind(value: Tensor | None) -> tuple[bool, tuple[int, ...]] | None:
    """Whether a tensor holds floats, and its shape."""
    return None if value is None else (value.is_floating_point(), tuple(value.shape))
