"""State: one way to save and restore all that outlives a process, PyTorch's `state_dict` and `load_state_dict`.

A state dict is flat, from names to values. How it is split into files:

| value | where |
|---|---|
| tensor | `PART.safetensors`, all of a part together |
| NumPy array | `PART/NAME.npy` |
| tensors by name, in memory or as a `TensorFile` | `PART/NAME.safetensors` |
| a small fact (what JSON holds) | beside all other parts' facts, in the checkpoint's `state.json` |

Pure values, such as `schedule.State`, have `as_dict` and `from_dict` instead, and are facts of whoever has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from cutlayer.files import TensorFile, load_tensors, save_tensors


class Stateful(Protocol):
    """What is part of a checkpoint."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that training has changed. It may share memory and files with this object, until that changes again."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; it stays as it is."""
        ...


class Store(Stateful, Protocol):
    """A part that is large and seldom changes: a checkpoint shares its files with the one before, if they are equal.

    Its state dict has `version` among the facts.
    """

    @property
    def version(self) -> int:
        """Counts the changes; cheap to ask for."""
        ...


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state dict, and what else there is in it."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with its tensors on the CPU, to be sent elsewhere."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def plain_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with its arrays and tensors apart from files, to be sent elsewhere."""
    plain = {name: np.asarray(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}
    return {name: value.read()[0] if isinstance(value, TensorFile) else value for name, value in plain.items()}


def write(state: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Write what is no fact into the file or the folder of the part, whose path without an ending is `place`.

    Nothing is flushed to the disk. Returns the facts.
    """
    tensors, rest = split(state)
    if tensors:
        save_tensors(tensors, _file(place), flush=False)
        return rest
    place.mkdir(parents=True, exist_ok=True)
    facts = {}
    for name, value in rest.items():
        if isinstance(value, np.ndarray):
            np.save(place / f"{name}.npy", value, allow_pickle=False)
        elif isinstance(value, TensorFile):
            value.link(place / f"{name}.safetensors")
        elif isinstance(value, Mapping) and all(isinstance(each, Tensor) for each in value.values()):
            save_tensors(value, place / f"{name}.safetensors", flush=False)
        else:
            facts[name] = value
    return facts


def read(place: Path, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a part that `write` wrote. Arrays and files of tensors are read once they are asked for."""
    file = _file(place)
    return {**facts, **load_tensors(file)[0]} if file.exists() else _Written(place, facts)


def _file(place: Path) -> Path:
    return place.with_name(f"{place.name}.safetensors")


class _Written(Mapping[str, Any]):
    """A part in a folder. What cannot be read raises OSError, EOFError or ValueError when it is asked for."""

    def __init__(self, place: Path, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._files = {file.stem: file for file in sorted(place.glob("*.*"))}

    def __getitem__(self, name: str) -> Any:
        if name in self._facts:
            return self._facts[name]
        file = self._files[name]
        return TensorFile(file) if file.suffix == ".safetensors" else np.load(file, mmap_mode="r", allow_pickle=False)

    def __contains__(self, name: object) -> bool:
        return name in self._facts or name in self._files

    def __iter__(self) -> Iterator[str]:
        yield from {**self._facts, **self._files}

    def __len__(self) -> int:
        return len({**self._facts, **self._files})
