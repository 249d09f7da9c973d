"""A client that has lost its newest checkpoint: the server goes back for it, to the undisturbed bits, a few times."""

import contextlib
import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from cutlayer import RefusedError
from cutlayer.backends.grpc.stop import Stop, Stopped
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.runs.choices import with_choices
from cutlayer.runs.config import RunConfig
from cutlayer.runs.recipes import digits
from tests.helpers.threads import Together, in_process, shares

CONFIG = with_choices(digits(), epochs=6, batch_size=32, test_samples=40, schedule="always", threads=1)
NAMES = ("alice", "bob")


class Scene:
    """alice takes part in a thread all along; bob comes and goes."""

    def __init__(self, folder: Path, config: RunConfig = CONFIG) -> None:
        self.config, self.folder, self.data = config, folder, shares(config, NAMES)
        self._stop = Stop()
        self.together = Together(config, folder, NAMES, stop=self._stop)
        self.halves: dict[str, torch.nn.Module] = {}
        self.alice = threading.Thread(target=self.join, args=("alice",), kwargs={"stop": self._stop}, daemon=True)
        self.alice.start()
        self.checkpoints = Checkpoints(folder / "bob" / "checkpoints")

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.requested = True  # gRPC's threads would hold the process

    def join(self, name: str, **more: object) -> None:
        self.halves[name] = self.together.join(name, *self.data[name], **more)

    def bob_until(self, epoch: int) -> None:
        """bob takes part until this epoch is done, also for the server, and ends."""
        server = Checkpoints(self.folder / "server" / "checkpoints")
        while True:
            stop = Stop()

            def ends(exchange: str, number: int, stop: Stop = stop) -> None:
                stop.requested = stop.requested or number + 1 == epoch

            with contextlib.suppress(Stopped):
                self.join("bob", on_epoch=ends, stop=stop)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                if server.epochs()[-1] == epoch:
                    return
                time.sleep(0.02)
            # It ended before the server had heard that it was done.

    def damage(self) -> None:
        """A bit of bob's newest checkpoint flips."""
        file = self.checkpoints.place(self.checkpoints.epochs()[-1]) / "client.safetensors"
        content = bytearray(file.read_bytes())
        content[1000] ^= 1
        file.write_bytes(content)

    def finish(self) -> None:
        """In the bits of the undisturbed run."""
        for thread in (self.alice, self.together.thread):
            thread.join(60)
        assert self.together.served is not None
        expected = in_process(self.config, self.data)
        for half, whole in (
            *((half, expected.halves.client) for half in self.halves.values()),
            (self.together.served.half, expected.halves.server),
        ):
            state = half.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
        assert self.together.served.history.losses == expected.history.losses
        assert set(self.halves) == set(NAMES)


def test_the_server_goes_back_for_a_client_a_few_times_and_then_no_more(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    with Scene(tmp_path) as scene:
        scene.bob_until(3)
        shutil.copytree(tmp_path / "bob", tmp_path / "copy")
        for count in (1, 2, 3):
            scene.damage()
            scene.bob_until(3)
            assert f"after 3 epochs to the one after 2 ({count} of at most 3 times for this client)" in caplog.text
        assert "epoch-000003: client.safetensors is damaged; set aside as damaged-epoch-000003" in caplog.text
        scene.damage()
        with pytest.raises(
            RefusedError, match="went back for it 3 times and does no more: restore its folder, or go on"
        ):
            scene.join("bob")
        shutil.rmtree(tmp_path / "bob")
        shutil.copytree(tmp_path / "copy", tmp_path / "bob")
        scene.join("bob")
        scene.finish()


def test_damage_that_comes_while_a_client_takes_part_is_gone_back_behind(tmp_path: Path, caplog) -> None:
    """Its process goes on, and loads the checkpoint as another client begins anew."""
    caplog.set_level(logging.WARNING)
    with Scene(tmp_path, with_choices(CONFIG, epochs=5)) as scene:
        damaged = Checkpoints(tmp_path / "alice" / "checkpoints")
        scene.bob_until(3)
        file = damaged.place(damaged.epochs()[-1]) / "client.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        scene.join("bob")
        scene.finish()
    assert "a new session: to tell the server which checkpoints are whole" in caplog.text
    assert "client alice has lost its checkpoint after 3 epochs" in caplog.text


def test_if_no_checkpoint_of_the_server_goes_with_the_clients_it_says_so(tmp_path: Path) -> None:
    """The client's folder comes from an old backup."""
    bob, old, newest = (tmp_path / name for name in ("bob", "old", "newest"))
    with Scene(tmp_path) as scene:
        scene.bob_until(2)
        shutil.copytree(bob, old)
        scene.bob_until(4)
        bob.rename(newest)
        old.rename(bob)
        with pytest.raises(RefusedError, match=r"none of the server's, after \[3, 4\] epochs, goes with them: restore"):
            scene.join("bob")
        shutil.rmtree(bob)
        newest.rename(bob)
        scene.join("bob")
        scene.finish()
