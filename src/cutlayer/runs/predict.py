"""A trained network at work: on data from a file or by name, in one piece or in halves with a codec between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from cutlayer.codecs import Codec, evaluation_codec, get_transfer
from cutlayer.errors import ConfigError
from cutlayer.models.cut import Halves
from cutlayer.models.trace import output_tensor

BATCH = 256
"""Samples that are put through a network at a time."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs [N, ...], and labels [N] if there are any."""

    inputs: Tensor
    labels: Tensor | None = None


def samples_of(file: str | Path) -> Samples:
    """The samples in a file: .npy with inputs, or .npz with `inputs` and perhaps `labels`. Raises ConfigError."""
    file = Path(file)
    if file.suffix not in (".npy", ".npz") or not file.is_file():
        raise ConfigError(f"data: expected a file .npy with inputs or .npz with inputs and labels, got {file}")
    try:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return Samples(torch.from_numpy(content))
        if "inputs" not in content:
            raise ConfigError(f"{file}: expected an array 'inputs', there are {', '.join(content) or 'none'}")
        labels = torch.from_numpy(content["labels"]) if "labels" in content else None
        return Samples(torch.from_numpy(content["inputs"]), labels)
    except (ValueError, TypeError, OSError, EOFError, BadZipFile) as error:
        raise ConfigError(f"{file}: no NumPy arrays: {error}") from None


def predict(halves: Halves, inputs: Tensor, codec: str | None = None, batch_size: int = BATCH) -> Tensor:
    """The outputs of a trained network [N, ...].

    Args:
        halves: in eval mode.
        inputs: [N, ...].
        codec: spec of what the activations at the cut are sent in, as a device would; None for the uncut network.

    Raises:
        ConfigError: the network does not take such inputs.
    """
    chosen = evaluation_codec(get_transfer(codec)) if codec is not None else None
    with torch.no_grad():
        try:
            return torch.cat(list(_outputs(halves, inputs, chosen, batch_size)))
        except RuntimeError as error:
            shape = f"{inputs.dtype} {list(inputs.shape)}".removeprefix("torch.")
            raise ConfigError(f"the network does not take inputs {shape}: {error}") from None


def _outputs(halves: Halves, inputs: Tensor, codec: Codec | None, batch_size: int) -> Iterator[Tensor]:
    whole = halves.merged() if codec is None else None
    for part in inputs.split(batch_size):
        if codec is None:
            assert whole is not None
            yield output_tensor(whole(part)).float()
        else:
            yield halves.server(codec.decode(codec.encode(halves.client(part)))).float()
