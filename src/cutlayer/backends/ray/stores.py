"""What checkpoints hold of clients that are in actors: the same files as of clients in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cutlayer.backends.ray.handle import ActorHandle
from cutlayer.errors import ClientUnavailableError
from cutlayer.files import link


class ClusterHalves:
    """All clients' halves and optimizers, as a `HalfPool` of them has them in checkpoints: a file for each client.

    The files of the last checkpoint are kept here, for an actor that is made anew.
    """

    def __init__(self, handles: Sequence[ActorHandle]) -> None:
        self.handles, self._base = handles, 0
        self._kept = tempfile.TemporaryDirectory(prefix="cutlayer-halves-")

    @property
    def _version(self) -> int:
        return self._base + sum(handle.calls for handle in self.handles)

    def _file(self, name: str) -> Path:
        return Path(self._kept.name) / name

    def about(self) -> dict[str, Any]:
        """What a checkpoint must know beside the files."""
        return {"version": self._version}

    def save(self, folder: Path) -> None:
        """Write what every client holds into a folder; of those whose actor died, what it held before."""
        folder.mkdir(parents=True, exist_ok=True)
        for handle in self.handles:
            try:
                for name, content in () if handle.dead else handle.saved("saved"):
                    self._file(name).unlink(missing_ok=True)  # a checkpoint may share the old one
                    self._file(name).write_bytes(content)
            except ClientUnavailableError:
                continue
        for file in Path(self._kept.name).iterdir():
            link(file, folder / file.name)

    def load(self, folder: Path, about: dict[str, Any]) -> None:
        """Read back what `save` wrote, and have the clients begin from there."""
        for file in Path(self._kept.name).iterdir():
            file.unlink()
        for file in folder.glob("*.safetensors"):
            link(file, self._file(file.name))
        for handle in self.handles:
            self.load_seat(handle)
        self._base = about["version"] - sum(handle.calls for handle in self.handles)

    def load_seat(self, handle: ActorHandle) -> None:
        """Bring one actor's clients to what is kept of them."""
        handle.load(self._files(handle), "load")

    def _files(self, handle: ActorHandle) -> Iterator[tuple[str, bytes]]:
        for number in handle.clients:
            if (file := self._file(f"{number}.safetensors")).exists():
                yield file.name, file.read_bytes()


class ClusterStore:
    """A client's own store, such as its references (`delta`), where the client is in an actor."""

    def __init__(self, handle: ActorHandle, number: int, name: str) -> None:
        self.handle, self.number, self.name = handle, number, name
        self._about: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        """What a checkpoint must know beside the files; as before where the actor died, for the files of before."""
        if not self.handle.dead:
            with suppress(ClientUnavailableError):
                self._about = self.handle.get(self.handle.actor.about.remote(self.number, self.name))
        return self._about

    def save(self, folder: Path) -> None:
        """Write the store into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.handle.saved("saved_store", self.number, self.name):
            (folder / name).write_bytes(content)

    def load(self, folder: Path, about: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        files = ((file.name, file.read_bytes()) for file in folder.iterdir())
        self.handle.load(files, "load_store", self.number, self.name, about)
        self._about = about
