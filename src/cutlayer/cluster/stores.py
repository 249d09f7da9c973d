"""What checkpoints hold of clients that are in actors: the same files as of clients in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cutlayer.cluster.seat import Seat
from cutlayer.errors import Gone
from cutlayer.pool import link


class ClusterHalves:
    """All clients' halves and optimizers, as a `pool.Pool` of them has them in checkpoints: a file for each client.

    The files of the last checkpoint are kept here, for an actor that is made anew.
    """

    def __init__(self, seats: Sequence[Seat]) -> None:
        self.seats, self._base = seats, 0
        self._kept = tempfile.TemporaryDirectory(prefix="cutlayer-halves-")

    @property
    def _version(self) -> int:
        return self._base + sum(seat.calls for seat in self.seats)

    def _file(self, name: str) -> Path:
        return Path(self._kept.name) / name

    def about(self) -> dict[str, Any]:
        """What a checkpoint must know beside the files."""
        return {"version": self._version}

    def save(self, folder: Path) -> None:
        """Write what every client holds into a folder; of those whose actor died, what it held before."""
        folder.mkdir(parents=True, exist_ok=True)
        for seat in self.seats:
            try:
                for name, content in () if seat.dead else seat.saved("saved"):
                    self._file(name).unlink(missing_ok=True)  # a checkpoint may share the old one
                    self._file(name).write_bytes(content)
            except Gone:
                continue
        for file in Path(self._kept.name).iterdir():
            link(file, folder / file.name)

    def load(self, folder: Path, about: dict[str, Any]) -> None:
        """Read back what `save` wrote, and have the clients begin from there."""
        for file in Path(self._kept.name).iterdir():
            file.unlink()
        for file in folder.glob("*.safetensors"):
            link(file, self._file(file.name))
        for seat in self.seats:
            self.load_seat(seat)
        self._base = about["version"] - sum(seat.calls for seat in self.seats)

    def load_seat(self, seat: Seat) -> None:
        """Bring one actor's clients to what is kept of them."""
        seat.load(self._files(seat), "load")

    def _files(self, seat: Seat) -> Iterator[tuple[str, bytes]]:
        for number in seat.clients:
            if (file := self._file(f"{number}.safetensors")).exists():
                yield file.name, file.read_bytes()


class ClusterStore:
    """A client's own store, such as its references (`delta`), where the client is in an actor."""

    def __init__(self, seat: Seat, number: int, name: str) -> None:
        self.seat, self.number, self.name = seat, number, name
        self._about: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        """What a checkpoint must know beside the files; as before where the actor died, for the files of before."""
        if not self.seat.dead:
            with suppress(Gone):
                self._about = self.seat.get(self.seat.actor.about.remote(self.number, self.name))
        return self._about

    def save(self, folder: Path) -> None:
        """Write the store into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.seat.saved("saved_store", self.number, self.name):
            (folder / name).write_bytes(content)

    def load(self, folder: Path, about: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        files = ((file.name, file.read_bytes()) for file in folder.iterdir())
        self.seat.load(files, "load_store", self.number, self.name, about)
        self._about = about
