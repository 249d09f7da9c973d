"""What a process really does to the files below a folder, in order, so that it can be replayed up to each point.

A hook of the interpreter (`sys.addaudithook`) sees every file that is created, renamed, linked and removed, also by
libraries; `os.fsync` is wrapped. What a file holds is read from the file itself each time something happens. The hook
cannot be taken out again: this is for a process of its own.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

Event = tuple
"""What happened, and to what, with paths relative to the root: ("content", path, bytes), ("create", "remove", "folder",
"no folder" or "sync", path), ("rename" or "link", from, to), ("said", who, what)."""


class Recorder:
    """Records from `begin` on.

    Args:
        root: the folder below which is recorded. It is empty.

    Attributes:
        events: what happened, in order.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.events: list[Event] = []
        self._contents: dict[str, bytes] = {}  # of files opened for writing, as last seen
        self._lock, self._inside = threading.RLock(), threading.local()

    def begin(self) -> None:
        """Install the hook."""
        assert not list(self.root.iterdir()), "expected an empty folder"
        sys.addaudithook(self._hook)
        fsync = os.fsync

        def synced(file: object) -> None:
            number = file if isinstance(file, int) else file.fileno()
            with self._lock:
                path = self._path(os.readlink(f"/proc/self/fd/{number}"))
                if path is not None:
                    self._look()
                fsync(number)
                if path is not None:
                    self.events.append(("sync", path))

        os.fsync = synced

    def say(self, who: str, what: object) -> None:
        """Someone outside has been told something that they may rely on from now on."""
        with self._lock:
            self._look()
            self.events.append(("said", who, what))

    # --- the hook ---

    def _hook(self, event: str, arguments: tuple) -> None:
        if getattr(self._inside, "hook", False) or event not in HANDLED:
            return
        self._inside.hook = True
        try:
            with self._lock:
                getattr(self, HANDLED[event])(*arguments)
        finally:
            self._inside.hook = False

    def _open(self, path: object, mode: object, flags: int) -> None:
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        name = self._path(path)
        if name is None:
            return
        self._look()
        if not (self.root / name).exists():
            if not flags & os.O_CREAT or not (self.root / name).parent.is_dir():
                return
            self.events.append(("create", name))
            self._contents[name] = b""
        elif name not in self._contents:
            self._contents[name] = (self.root / name).read_bytes()

    def _rename(self, source: object, target: object, source_folder: int, target_folder: int) -> None:
        old, new = self._path(source, source_folder), self._path(target, target_folder)
        if old is None and new is None:
            return
        assert old is not None, f"{target} comes from outside"
        assert new is not None, f"{source} goes outside"
        if (self.root / old).exists():
            self._look()
            self.events.append(("rename", old, new))
            renamed = {path: _moved(path, old, new) for path in self._contents}
            self._contents = {renamed[path]: content for path, content in self._contents.items()}

    def _link(self, source: object, target: object, source_folder: int, target_folder: int) -> None:
        new = self._path(target, target_folder)
        if new is None or not Path(os.fsdecode(source)).exists():
            return
        self._look()
        old = self._path(source, source_folder)
        if old is None:  # as good as a new file: no one flushed it for this run
            self.events += [("create", new), ("content", new, Path(os.fsdecode(source)).read_bytes())]
        else:
            self.events.append(("link", old, new))

    def _removed(self, path: object, folder: int) -> None:
        name = self._path(path, folder)
        if name is not None and os.path.lexists(self.root / name):
            self._look()
            self.events.append(("remove", name))
            self._contents.pop(name, None)

    def _made(self, path: object, mode: int, folder: int) -> None:
        name = self._path(path, folder)
        if name is not None and (self.root / name).parent.is_dir() and not (self.root / name).exists():
            self._look()
            self.events.append(("folder", name))

    def _unmade(self, path: object, folder: int) -> None:
        name = self._path(path, folder)
        if name is not None and (self.root / name).is_dir() and not any((self.root / name).iterdir()):
            self._look()
            self.events.append(("no folder", name))

    def _look(self) -> None:
        """What has been written since the last look."""
        before = getattr(self._inside, "hook", False)
        self._inside.hook = True
        for name, known in list(self._contents.items()):
            file = self.root / name
            content = file.read_bytes() if file.exists() else known
            if content != known:
                self.events.append(("content", name, content))
                self._contents[name] = content
        self._inside.hook = before

    def _path(self, path: object, folder: int = -1) -> str | None:
        """Relative to the root; None outside it."""
        place = os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd(), os.fsdecode(path))
        parent = os.path.realpath(os.path.dirname(place))
        found = os.path.relpath(os.path.join(parent, os.path.basename(place)), self.root)
        return None if found.startswith("..") else found


HANDLED = {
    "open": "_open",
    "os.rename": "_rename",
    "os.link": "_link",
    "os.remove": "_removed",
    "os.mkdir": "_made",
    "os.rmdir": "_unmade",
}


def _moved(path: str, old: str, new: str) -> str:
    if path == old or path.startswith(f"{old}/"):
        return new + path[len(old) :]
    return path
