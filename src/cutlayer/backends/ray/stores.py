"""What checkpoints hold of clients that are in actors: the same files as of clients in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cutlayer.backends.ray.handle import ActorHandle
from cutlayer.errors import ClientUnavailableError
from cutlayer.files import TensorFile
from cutlayer.records.state_dicts import plain_arrays
from cutlayer.temporary import TemporaryFolder


class ClusterHalves:
    """All clients' halves and optimizers, as a `HalfPool` of them has them in checkpoints: a file for each client.

    The files of the last checkpoint are stored here, for an actor that is made anew.
    """

    def __init__(self, handles: Sequence[ActorHandle]) -> None:
        self.handles, self._base = handles, 0
        self._stored = TemporaryFolder("halves")

    @property
    def version(self) -> int:
        """Counts the calls that change clients."""
        return self._base + sum(handle.calls for handle in self.handles)

    def _file(self, name: str) -> Path:
        return self._stored.path / name

    def close(self) -> None:
        """Remove the files."""
        self._stored.close()

    def state_dict(self) -> dict[str, Any]:
        """Every client's half and optimizer; of those whose actor died, what it had before."""
        for handle in self.handles:
            try:
                for name, content in () if handle.dead else handle.files():
                    self._file(name).unlink(missing_ok=True)  # a checkpoint may share the old one
                    self._file(name).write_bytes(content)
            except ClientUnavailableError:
                continue
        files = {file.stem: TensorFile(file) for file in self._stored.path.iterdir()}
        return {"version": self.version, **files}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict`, or that of a `HalfPool`, returned, and have the clients begin from there."""
        for file in self._stored.path.iterdir():
            file.unlink()
        for name, value in state.items():
            if isinstance(value, TensorFile):
                value.link(self._file(f"{name}.safetensors"))
        for handle in self.handles:
            self.load_actor(handle)
        self._base = state["version"] - sum(handle.calls for handle in self.handles)

    def load_actor(self, handle: ActorHandle) -> None:
        """Bring one actor's clients to what is stored of them."""
        handle.load_files(self._files(handle))

    def _files(self, handle: ActorHandle) -> Iterator[tuple[str, bytes]]:
        for number in handle.clients:
            if (file := self._file(f"{number}.safetensors")).exists():
                yield file.name, file.read_bytes()


class ClusterStore:
    """A client's own store, such as its references (`delta`), if the client is in an actor."""

    def __init__(self, handle: ActorHandle, number: int, name: str) -> None:
        self.handle, self.number, self.name = handle, number, name
        self._known = -1

    @property
    def version(self) -> int:
        """Counts the changes; as before if the actor died, for the files of before."""
        if not self.handle.dead:
            with suppress(ClientUnavailableError):
                self._known = self.handle.get(self.handle.actor.store_version.remote(self.number, self.name))
        return self._known

    def state_dict(self) -> dict[str, Any]:
        """The client's."""
        return self.handle.get(self.handle.actor.store_state_dict.remote(self.number, self.name))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it to the client; if it cannot be read, its version alone."""
        try:
            sent = plain_arrays(state)
        except (OSError, EOFError, ValueError):  # what that means is the client's to say
            sent = {"version": state["version"]}
        call = self.handle.actor.load_store_state_dict.remote(self.number, self.name, sent)
        self.handle.get(call, patient=True)
        self._known = state["version"]
