"""A disk that has what was flushed to it, and of the rest as much as chance will have.

What a file holds is on the disk once it is fsynced; that a name stands for it, once its folder is. Until then the disk
may have any part of it: a block of a file or not, a name or not, a later change and not an earlier one. One thing is
taken for granted, as all file systems in use do it: a file that is renamed has one of its two names, at least.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from tests.helpers.recorded_writes import Event

BLOCK = 512


class File:
    """What it holds, and what of it the disk is sure to have."""

    def __init__(self) -> None:
        self.content = self.synced = b""

    def after(self, draw: random.Random | None) -> bytes:
        """What is left of it after a loss of power."""
        if draw is None or self.content == self.synced:
            return self.synced
        shorter, longer = sorted((len(self.content), len(self.synced)))
        length = draw.choice([shorter, longer, draw.randint(shorter, longer)])
        left = bytearray(length)  # a block that never came is zeros
        for start in range(0, length, BLOCK):
            source = draw.choice([self.content, self.synced])
            piece = source[start : min(start + BLOCK, length)]
            left[start : start + len(piece)] = piece
        return bytes(left)


class Folder:
    """Its entries, which of them the disk is sure to have, and the changes since, each a removed and a new name."""

    def __init__(self) -> None:
        self.entries: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}
        self.changes: list[tuple[str, str, File | Folder]] = []

    def change(self, old: str, new: str, node: File | Folder) -> None:
        """Take one name away and give another; either may be empty."""
        self.changes.append((old, new, node))
        _apply(self.entries, old, new, node)

    def after(self, draw: random.Random | None) -> dict[str, File | Folder]:
        """The entries that are left after a loss of power."""
        left = dict(self.synced)
        for change in self.changes if draw is not None else ():
            if draw.random() < 0.5:
                _apply(left, *change)
        return left


def _apply(entries: dict[str, File | Folder], old: str, new: str, node: File | Folder) -> None:
    if old and entries.get(old) is node:
        del entries[old]
    if new:
        entries[new] = node


class Disk:
    """A disk with what a recorder recorded, up to some point."""

    def __init__(self) -> None:
        self.root = Folder()
        self.said: dict[str, list[object]] = {}

    def replay(self, events: Iterable[Event]) -> Disk:
        """Do all of this; returns itself."""
        for what, *arguments in events:
            getattr(self, f"_{what.replace(' ', '_')}")(*arguments)
        return self

    def write(self, place: Path, draw: random.Random | None = None, *, all_of_it: bool = False) -> Path:
        """Make the folder that is left after a loss of power at this point.

        Args:
            draw: decides what is left of what was not flushed; None: nothing of it is.
            all_of_it: as if nothing were lost.
        """

        def write(folder: Folder, place: Path) -> None:
            place.mkdir()
            for name, node in (folder.entries if all_of_it else folder.after(draw)).items():
                if isinstance(node, Folder):
                    write(node, place / name)
                else:
                    (place / name).write_bytes(node.content if all_of_it else node.after(draw))

        write(self.root, place)
        return place

    # --- events ---

    def _create(self, path: str) -> None:
        folder, name = self._parent(path)
        folder.change("", name, File())

    def _folder(self, path: str) -> None:
        folder, name = self._parent(path)
        folder.change("", name, Folder())

    def _content(self, path: str, content: bytes) -> None:
        folder, name = self._parent(path)
        folder.entries[name].content = content

    def _sync(self, path: str) -> None:
        if path == ".":
            node = self.root
        else:
            folder, name = self._parent(path)
            if name not in folder.entries:  # removed while it was open
                return
            node = folder.entries[name]
        if isinstance(node, File):
            node.synced = node.content
        else:
            node.synced, node.changes = dict(node.entries), []

    def _rename(self, source: str, target: str) -> None:
        (folder, old), (other, new) = self._parent(source), self._parent(target)
        assert folder is other, "a file system may lose a file that goes from one folder to another"
        folder.change(old, new, folder.entries[old])

    def _link(self, source: str, target: str) -> None:
        (folder, old), (other, new) = self._parent(source), self._parent(target)
        other.change("", new, folder.entries[old])

    def _remove(self, path: str) -> None:
        folder, name = self._parent(path)
        folder.change(name, "", folder.entries[name])

    _no_folder = _remove

    def _said(self, who: str, what: object) -> None:
        self.said.setdefault(who, []).append(what)

    def _parent(self, path: str) -> tuple[Folder, str]:
        *folders, name = path.split("/")
        node = self.root
        for each in folders:
            node = node.entries[each]
        return node, name
