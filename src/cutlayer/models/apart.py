"""Whether two halves are apart: no tensor of one is in the memory of the other's."""

from __future__ import annotations

from torch import Tensor, nn

from cutlayer.errors import ConfigError


def check_apart(client: nn.Module, server: nn.Module) -> None:
    """Raise ConfigError if the halves share a tensor, which in one process would cross the cut unseen."""

    def tensors(half: nn.Module) -> list[tuple[str, Tensor]]:
        return [*half.named_parameters(remove_duplicate=False), *half.named_buffers(remove_duplicate=False)]

    theirs: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors(server):
        theirs.setdefault(_storage(tensor), []).append((name, tensor))
    shared = []
    for name, tensor in tensors(client):
        overlapping = [other for other, held in theirs.get(_storage(tensor), []) if _overlap(tensor, held)]
        shared += [f"{name} (server: {other})" for other in overlapping[:1]]
    if shared:
        raise ConfigError(
            f"the halves share {', '.join(shared)}; no training could keep them equal without sending them. Untie "
            "them, with copy.deepcopy of one, or move the modules that share them to one side."
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have bytes in common; parts of one flat buffer may have none."""
    spans = []
    for tensor in (one, other):
        begin = tensor.storage_offset() * tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((begin, begin + (last + 1) * tensor.element_size() if tensor.numel() else begin))
    return one is other or max(begin for begin, _ in spans) < min(end for _, end in spans)
