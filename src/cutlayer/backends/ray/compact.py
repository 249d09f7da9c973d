"""A client's data as it is sent to its actor: its own samples, not the memory that they lie in beside others'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from cutlayer.backends.client_data import ClientData
from cutlayer.data.images import Images


def compact(holding: ClientData) -> ClientData:
    """The same data, with tensors of their own. Data sets of other kinds, and functions, go as they are."""
    return ClientData(_compact(holding.train), _compact(holding.test))


def _compact(data: Any) -> Any:
    if isinstance(data, Subset):
        whole, indices = data.dataset, torch.as_tensor(data.indices)
        if type(whole) is Images:
            return _compact(whole.take(indices))
        if type(whole) is TensorDataset:
            return TensorDataset(*(tensor[indices] for tensor in whole.tensors))
        return data
    if type(data) is Images:
        return Images(_own(data.inputs), _own(data.labels), data.mean, data.std, data.classes)
    if type(data) is TensorDataset:
        return TensorDataset(*map(_own, data.tensors))
    return data


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a view of a larger one: what is pickled is all of the memory behind it."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
