"""Checkpoints: safetensors, .npy and JSON in a folder that is there as a whole or not at all. No pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cutlayer.errors import ConfigError
from cutlayer.optim import load_optimizer, optimizer_state
from cutlayer.pool import link

FORMAT = 2


class Store(Protocol):
    """Something large that a checkpoint keeps in a folder of its own."""

    def about(self) -> dict[str, Any]:
        """What `load` must know beside the folder; equal only where nothing has changed."""
        ...

    def save(self, folder: Path) -> None:
        """Write it into a new folder."""
        ...

    def load(self, folder: Path, about: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        ...


class Checkpoints:
    """The checkpoints in a folder, one subfolder for each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        epochs = self.epochs()
        return self._place(epochs[-1]) if epochs else None

    def epochs(self) -> list[int]:
        """The epochs after which there is a checkpoint, in order."""
        return sorted(int(place.name.removeprefix("epoch-")) for place in self.folder.glob("epoch-*"))

    def prune(self, first: int, last: int) -> None:
        """Delete all checkpoints but those of the epochs from `first` to `last`."""
        for epoch in self.epochs():
            if not first <= epoch <= last:  # out of sight at once: a kill may leave half of it
                gone = self.folder / f"deleting-{epoch:06d}"
                shutil.rmtree(gone, ignore_errors=True)
                self._place(epoch).rename(gone)
                shutil.rmtree(gone)

    def _place(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:06d}"

    def save(
        self,
        epoch: int,
        modules: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
        stores: Mapping[str, Store],
        state: dict[str, Any],
        *,
        keep: bool = False,
    ) -> None:
        """Write a checkpoint after this many epochs.

        Args:
            epoch: epochs done.
            modules: each half and its optimizer, by name.
            stores: by name. One that has not changed since the last checkpoint is linked, not copied.
            state: whatever else there is to know, as JSON values.
            keep: leave older checkpoints where they are, for `prune`; otherwise they are deleted.
        """
        previous = self.latest()
        known = self._state(previous)["stores"] if previous is not None else {}
        new = self.folder / f"writing-{epoch:06d}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        optimizers = {}
        for name, (module, optimizer) in modules.items():
            tensors, optimizers[name] = optimizer_state(optimizer)
            tensors |= {f"model.{key}": value for key, value in module.state_dict().items()}
            save_tensors(tensors, new / f"{name}.safetensors")
        written = {}
        for name, store in stores.items():
            written[name] = store.about()
            if previous is not None and written[name] == known.get(name):
                shutil.copytree(previous / name, new / name, copy_function=link)
            else:
                store.save(new / name)
        content = {
            "format": FORMAT,
            "epoch": epoch,
            "optimizers": optimizers,
            "stores": written,
            "state": state,
        }
        try:
            (new / "state.json").write_text(json.dumps(content))
        except TypeError as error:
            raise ConfigError(
                f"an optimizer's state cannot be written as tensors and JSON values ({error}); "
                "use one with a plain state"
            ) from error
        for file in [*new.rglob("*"), new]:
            _flush(file)
        new.rename(self._place(epoch))
        _flush(self.folder)
        for unfinished in [*self.folder.glob("writing-*"), *self.folder.glob("deleting-*")]:
            shutil.rmtree(unfinished)
        if not keep:
            self.prune(epoch, epoch)

    def state(self) -> dict[str, Any] | None:
        """The state in the newest checkpoint, or None."""
        latest = self.latest()
        return None if latest is None else self._state(latest)["state"]

    def load(
        self,
        modules: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
        stores: Mapping[str, Store],
        epoch: int | None = None,
    ) -> tuple[int, dict[str, Any]] | None:
        """Bring modules, optimizers and stores to the newest checkpoint; return (epochs done, state), or None.

        With `epoch`, to the checkpoint after this many epochs.
        """
        latest = self.latest() if epoch is None else self._place(epoch)
        if latest is None:
            return None
        try:
            content = self._state(latest)
            self._restore(latest, content, modules, stores)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{latest} cannot be loaded: {error}. It is damaged, or of other halves; without it the run begins anew"
            ) from error
        return content["epoch"], content["state"]

    @staticmethod
    def _restore(
        latest: Path,
        content: dict[str, Any],
        modules: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
        stores: Mapping[str, Store],
    ) -> None:
        for name, (module, optimizer) in modules.items():
            tensors = load_file(latest / f"{name}.safetensors")
            load_optimizer(optimizer, tensors, content["optimizers"][name])
            weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            module.load_state_dict(weights)
        for name, store in stores.items():
            store.load(latest / name, content["stores"][name])

    def _state(self, checkpoint: Path) -> dict[str, Any]:
        content = json.loads((checkpoint / "state.json").read_text())
        if content.get("format") != FORMAT:
            raise ConfigError(
                f"{checkpoint}: expected a checkpoint of format {FORMAT}, got {content.get('format')}; it was "
                "written by another release"
            )
        return content


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors, the file as a whole or not at all. Copies: the format knows no shared memory."""
    temporary = file.with_suffix(".tmp")
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary)
    temporary.rename(file)


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk, so that a loss of power leaves it whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
