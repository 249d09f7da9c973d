"""Checkpoints: safetensors, .npy and JSON in a folder that is there as a whole or not at all. No pickle.

state.json has the checksums of all the other files, and one of itself. A checkpoint is used only if all of them fit.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cutlayer.durable import flush_to_disk, make_folder, replace
from cutlayer.errors import ConfigError, CutlayerError, DamagedError, DiskError
from cutlayer.files import link, sealed
from cutlayer.records import manifest, state_dicts
from cutlayer.records.state_dicts import Stateful

log = logging.getLogger("cutlayer.checkpoint")


class Checkpoints:
    """The checkpoints in a folder, one subfolder for each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        epochs = self.epochs()
        return self.place(epochs[-1]) if epochs else None

    def epochs(self) -> list[int]:
        """The epochs after which there is a checkpoint, in order."""
        names = (place.name.removeprefix("epoch-") for place in self.folder.glob("epoch-*"))
        return sorted(int(name) for name in names if name.isdecimal())  # and not those that a person set aside

    def prune(self, wanted: Container[int]) -> None:
        """Delete all checkpoints but those of the `wanted` epochs."""
        for epoch in self.epochs():
            if epoch not in wanted:
                self._delete(epoch)

    def place(self, epoch: int) -> Path:
        """The folder of the checkpoint after this many epochs."""
        return self.folder / f"epoch-{epoch:06d}"

    def _delete(self, epoch: int) -> None:
        removed = self.folder / f"deleting-{epoch:06d}"  # out of sight at once: a kill may leave half of it
        shutil.rmtree(removed, ignore_errors=True)
        self.place(epoch).rename(removed)
        flush_to_disk(self.folder)  # before anything of it goes
        shutil.rmtree(removed)

    # --- writing ---

    def save(
        self,
        epoch: int,
        parts: Mapping[str, Stateful],
        state: dict[str, Any],
        *,
        keep: int | None = None,
        also: Collection[int] = (),
    ) -> None:
        """Write a checkpoint after this many epochs.

        Args:
            epoch: epochs done.
            parts: by name. A store that has not changed since the last checkpoint is linked, not copied.
            state: whatever else there is to know, as JSON values.
            keep: how many checkpoints stay, with this one; None leaves all of them, for `prune`.
            also: epochs whose checkpoints stay beside those.

        Raises:
            DiskError: the disk does not take it, because it is full or otherwise. Earlier checkpoints stay as they are.
        """
        new = self.folder / f"writing-{epoch:06d}"
        try:
            self._write(new, epoch, parts, state)
        except OSError as error:  # not all of them have a number: NumPy counts what it could write
            shutil.rmtree(new, ignore_errors=True)
            before = self.epochs()
            rest = f"the one after {before[-1]} epochs is whole" if before else "there is none before it"
            free = shutil.disk_usage(self.folder.parent).free / (1 << 20)
            raise DiskError(
                f"the checkpoint after {epoch} epochs cannot be written to {self.folder}: {error.strerror or error} "
                f"({free:.1f} MiB are free there); {rest}. Free some space and resume the run"
            ) from error
        if keep is not None:
            self.prune({*self.epochs()[-keep:], *also})

    def _write(self, new: Path, epoch: int, parts: Mapping[str, Stateful], state: dict[str, Any]) -> None:
        previous, before = self._previous()
        known = before["facts"]
        shutil.rmtree(new, ignore_errors=True)
        make_folder(self.folder)
        new.mkdir()
        facts, unchanged = {}, set()
        for name, part in parts.items():
            version = getattr(part, "version", None)  # which a `Store` has
            if version is not None and version == known.get(name, {}).get("version"):
                facts[name] = known[name]
                shutil.copytree(previous / name, new / name, copy_function=link)
                unchanged.add(name)
            else:
                facts[name] = state_dicts.write(part.state_dict(), new / name)
        content = {
            "format": manifest.FORMAT,
            "epoch": epoch,
            "facts": facts,
            "state": state,
            "files": manifest.digests(new, previous, before["files"], unchanged),
        }
        try:
            replace(new / "state.json", json.dumps(sealed(content)), flush=False)
        except TypeError as error:
            raise ConfigError(
                f"an optimizer's state cannot be written as tensors and JSON values ({error}); "
                "use one with a plain state"
            ) from error
        for file in [*new.rglob("*"), new]:  # before it gets its name
            flush_to_disk(file)
        if self.place(epoch).exists():  # one that was gone back behind
            self._delete(epoch)
        new.rename(self.place(epoch))
        flush_to_disk(self.folder)
        for unfinished in [*self.folder.glob("writing-*"), *self.folder.glob("deleting-*")]:
            shutil.rmtree(unfinished)

    def _previous(self) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint and what its state.json holds, to link from; without any, nothing."""
        nothing = {"facts": {}, "files": {}}
        latest = self.latest()
        if latest is None:
            return self.folder, nothing
        try:
            content = manifest.content(latest)
        except ConfigError:  # damaged meanwhile, or of an older release
            return latest, nothing
        return latest, content if content["files"] else nothing

    # --- reading ---

    def state(self) -> dict[str, Any] | None:
        """The state in the newest checkpoint that is whole, or None."""
        for _, content in self._whole(self.epochs(), []):
            return content["state"]
        return None

    def states(self) -> dict[int, dict[str, Any]]:
        """The states of all checkpoints, by epochs, of which state.json is whole; other files are not looked at."""
        found = {}
        for epoch in self.epochs():
            with suppress(ConfigError):
                found[epoch] = manifest.content(self.place(epoch))["state"]
        return found

    def load(
        self,
        parts: Mapping[str, Stateful],
        epoch: int | None = None,
    ) -> tuple[int, dict[str, Any]] | None:
        """Bring the parts to the newest checkpoint that is whole.

        What is damaged is logged, and set aside as `damaged-epoch-N`. With `epoch`, only the checkpoint after this many
        epochs will do.

        Returns (epochs done, state), or None if there is no checkpoint.

        Raises DamagedError if there are some and none is whole, and ConfigError for one that is not of these halves.
        """
        damage: list[tuple[int, str]] = []
        for place, content in self._whole(self.epochs() if epoch is None else [epoch], damage):
            self._set_aside(damage)
            if not content["files"]:
                log.warning("%s has no checksums, it was written by an older release: its files are not checked", place)
            try:
                for name, part in parts.items():
                    part.load_state_dict(state_dicts.read(place / name, content["facts"][name]))
            except CutlayerError:  # among them what was lost while it was loaded
                raise
            except Exception as error:
                why = "of other halves or data" if content["files"] else "damaged, or of other halves or data"
                raise ConfigError(f"{place} cannot be loaded: {error}. It is {why}") from error
            return content["epoch"], content["state"]
        return None

    def read(self, epoch: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or the one after this many epochs: its folder and its content."""
        return next(self._whole(self.epochs() if epoch is None else [epoch], []), None)

    def set_aside_damaged(self) -> None:
        """Log which checkpoints are damaged, and set them aside as `damaged-epoch-N`."""
        damage: list[tuple[int, str]] = []
        for epoch in self.epochs():
            with suppress(DamagedError):
                list(self._whole([epoch], damage))
        self._set_aside(damage)

    def _whole(self, epochs: Sequence[int], damage: list[tuple[int, str]]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The checkpoints that are whole, newest first, each with its content; others are added to `damage`.

        Raises DamagedError if none is, and there are some.
        """
        whole = False
        for epoch in reversed(epochs):
            place = self.place(epoch)
            try:
                content = manifest.verified(place)
            except DamagedError as error:
                damage.append((epoch, f"{place}: {error}"))
                continue
            whole = True
            yield place, content
        if damage and not whole:
            raise DamagedError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(text for _, text in damage)}. Restore one, or "
                "delete the folder: the run then begins anew"
            )

    def _set_aside(self, damage: Sequence[tuple[int, str]]) -> None:
        for epoch, text in damage:
            aside = self.folder / f"damaged-epoch-{epoch:06d}"
            shutil.rmtree(aside, ignore_errors=True)
            self.place(epoch).rename(aside)
            log.warning("%s; set aside as %s, which can be deleted", text, aside.name)
