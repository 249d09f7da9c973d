"""What runs in an actor: some of the clients, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.backends.answers import Answers
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.description import ClientDescription
from cutlayer.backends.group import build_clients
from cutlayer.method import Method, Training
from cutlayer.records import state_dicts
from cutlayer.records.ledger import EpochCosts, Ledger
from cutlayer.records.state_dicts import on_cpu, plain_arrays
from cutlayer.temporary import TemporaryFolder


class ClientActor:
    """Clients by number. It does what it is called for, one call at a time, and no call waits for another."""

    def build(
        self, data: dict[int, ClientData], half: nn.Module, method: Method, training: Training, threads: int
    ) -> dict[int, ClientDescription]:
        """Build the clients; what can be said of them, by number.

        Args:
            threads: PyTorch's on the CPU, which the bits of a result depend on.
        """
        torch.set_num_threads(threads)
        folder = method.store.folder  # of the server's machine, which need not be this one
        folder = folder if folder is not None and Path(folder).is_dir() else None
        self.ledger, self.microbatches = Ledger(), training.microbatches
        built = build_clients(half, data, method, training, self.ledger, folder)
        self.pool, self.clients = built.pool, built.by_number
        self._answers = {number: Answers(client) for number, client in self.clients.items()}
        self._staged = TemporaryFolder("staged")
        return {number: ClientDescription.of(client) for number, client in self.clients.items()}

    def answer(self, number: int, lost: bool, frame: bytes) -> tuple[bytes, bool]:
        """Give a client a frame; then as `go_on`."""
        self._answers[number].add(frame)
        return self.go_on(number, lost)

    def go_on(self, number: int, lost: bool) -> tuple[bytes, bool]:
        """A client's next frame, empty if it waits for one; and whether there may be more, so that asking pays.

        If it is `lost` on purpose, the frame is not made: the client ends where it would end in one process.
        """
        make = self._answers[number].next()
        if make is None:
            return b"", False
        return b"lost" if lost else make(), not self.clients[number].waits or self.microbatches > 1

    def forget(self, number: int) -> None:
        """Have a client leave the epoch, and drop what it has not sent yet: the server has given it up."""
        self._answers[number].give_up()

    def costs(self) -> EpochCosts:
        """FLOPs and seconds since the last call."""
        return self.ledger.take()

    def ping(self) -> None:
        """Show that this process lives."""

    def end(self) -> None:
        """Remove what was written to the disk: the process is about to be killed."""
        self.pool.close()
        self._staged.close()

    def weights(self, number: int) -> dict[str, Tensor]:
        """A client's half."""
        return on_cpu(self.clients[number].half.state_dict())

    # --- checkpoints: halves and optimizers as files, a store in memory ---

    def state_dict(self) -> Iterator[tuple[str, bytes]]:
        """The halves of all clients here, by name, each as the content of its file."""
        with TemporaryFolder("sent") as folder:
            state_dicts.write(self.pool.state_dict(), folder.path)
            for file in sorted(folder.path.iterdir()):
                yield file.name, file.read_bytes()

    def stage(self, name: str, content: bytes) -> None:
        """Take a file for `load_state_dict`."""
        (self._staged.path / name).write_bytes(content)

    def load_state_dict(self) -> None:
        """Bring the clients to the files that were staged; to their beginning if there is none for them."""
        for answers in self._answers.values():
            answers.clear()
        self.pool.load_state_dict(state_dicts.read(self._staged.path, {"version": 0}))
        for file in self._staged.path.iterdir():
            file.unlink()
        self.ledger.take()

    def store_version(self, number: int, name: str) -> int:
        """The version of a client's own store of this name."""
        return self.clients[number].stores()[name].version

    def store_state_dict(self, number: int, name: str) -> dict[str, Any]:
        """The state of that store."""
        return plain_arrays(self.clients[number].stores()[name].state_dict())

    def load_store_state_dict(self, number: int, name: str, state: dict[str, Any]) -> None:
        """Bring that store to this state."""
        self.clients[number].stores()[name].load_state_dict(state)
