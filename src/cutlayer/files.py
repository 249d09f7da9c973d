"""Files whose damage is noticed when they are read (SHA-256), and a lock on a folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cutlayer.durable import make_folder, replace
from cutlayer.errors import ConfigError, DamagedError

# Workers of a data loader hold the lock of a killed run for up to 5 seconds, until they miss their parent.
LOCK_PATIENCE = 6.0


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Inside the block no other process is at work in this folder. Raises ConfigError if one is, with `what` it is."""
    make_folder(folder)
    with (folder / "lock").open("w") as file:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"{folder}: another process is at work on {what}") from None
                time.sleep(0.1)
        yield


# --- JSON ---


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a checksum over them, under "checksum". Raises TypeError for what JSON cannot hold."""
    values = json.loads(json.dumps(content))
    return {**values, "checksum": _checksum(values)}


def unsealed(text: str | bytes) -> tuple[dict[str, Any], bool]:
    """The values in a JSON text that `sealed` may have made, without the checksum, and whether there was one.

    Raises DamagedError for what is no JSON object, and for one that its checksum does not fit.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it is damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedError(f"it is damaged (expected a JSON object, got {type(content).__name__})")
    checksum = content.pop("checksum", None)
    if checksum is not None and checksum != _checksum(content):
        raise DamagedError(
            'it is damaged: its checksum does not fit. If you changed it by hand, remove its entry "checksum"'
        )
    return content, checksum is not None


def _checksum(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def digest(file: Path) -> str:
    """The checksum of a file's bytes, as `sha256sum` prints it."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# --- tensors ---


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, str] | None = None, *, flush: bool = True
) -> None:
    """Write tensors as safetensors, the file as a whole or not at all. Copies: the format knows no shared memory."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    replace(file, save(copies, dict(about) if about else None), flush=flush)


def save_sealed(tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, str] | None = None) -> None:
    """As `save_tensors`, with a checksum in the file's metadata, which `load_tensors` checks."""
    save_tensors(tensors, file, {**(about or {}), "checksum": _fingerprint(tensors)})


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a file by name, and its metadata.

    Raises DamagedError for what is no such file, and for one that its checksum, if it has one, does not fit.
    """
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            about = dict(content.metadata() or {})
    except OSError:
        raise
    except Exception as error:
        raise DamagedError(f"{file} is damaged: {error}") from None
    checksum = about.pop("checksum", None)
    if checksum is not None and checksum != _fingerprint(tensors):
        raise DamagedError(f"{file} is damaged: its checksum does not fit")
    return tensors, about


class TensorFile(Mapping[str, Tensor]):
    """The tensors in a file, by name, read each time they are asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """As `load_tensors`."""
        return load_tensors(self._file)

    def link(self, target: Path) -> None:
        """Give the file a second name; whoever changes one of the two must write a new file."""
        link(self._file, target)

    def __getitem__(self, name: str) -> Tensor:
        return self.read()[0][name]

    def __iter__(self) -> Iterator[str]:
        yield from self.read()[0]

    def __len__(self) -> int:
        return len(self.read()[0])


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode("utf-8", "surrogatepass"))
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; copy it if the file system has no hard links, or it is another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
