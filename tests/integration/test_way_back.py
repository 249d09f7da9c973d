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
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.runs.choices import with_choices
from cutlayer.runs.config import RunConfig
from cutlayer.runs.recipes import digits
from cutlayer.stop_request import Stop, Stopped
from tests.helpers.threads import Together, in_process, shares

CONFIG = with_choices(digits(), epochs=6, batch_size=32, test_samples=40, schedule="always", threads=1)
NAMES = ("alice", "bob")


class Scene:
    """alice takes part in a thread all along; bob comes and goes."""

    def __init__(self, folder: Path, config: RunConfig = CONFIG, **more: object) -> None:
        self.config, self.folder, self.data = config, folder, shares(config, NAMES)
        self._stop = Stop()
        self.together = Together(config, folder, NAMES, stop=self._stop, **more)
        self.halves: dict[str, torch.nn.Module] = {}
        self.alice = threading.Thread(target=self.join, args=("alice",), kwargs={"stop": self._stop}, daemon=True)
        self.alice.start()
        self.checkpoints = Checkpoints(folder / "bob" / "checkpoints")

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.requested = True  # gRPC's threads would hold the process
        self.together.thread.join(30)

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
                if server.epochs()[-1] >= epoch:
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


def test_a_checkpoint_stays_that_goes_with_the_one_before_the_last_exchange(tmp_path: Path) -> None:
    """However many C epochs came since: their checkpoints all need what the client saved in the last exchange."""
    with Scene(tmp_path, with_choices(CONFIG, schedule="periodic", period=4)) as scene:  # A B C C A B
        scene.bob_until(2)
        server = Checkpoints(tmp_path / "server" / "checkpoints")
        deadline = time.monotonic() + 60
        while server.epochs()[-1] < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)  # for older ones to go
        assert server.epochs() == [1, 3, 4]
        scene.damage()
        scene.join("bob")
        scene.finish()


def test_how_often_the_server_went_back_outlives_its_process(tmp_path: Path) -> None:
    limits = ClientLimits(goings_back=1)
    with Scene(tmp_path, limits=limits) as scene:
        scene.bob_until(3)
        scene.damage()
        scene.bob_until(3)
    with Scene(tmp_path, limits=limits) as scene:
        scene.damage()
        with pytest.raises(RefusedError, match="went back for it 1 times and does no more"):
            scene.join("bob")


def test_who_is_to_try_again_waits_a_little_longer_each_time(tmp_path: Path, caplog) -> None:
    """A third process of one client, while it is not yet known whether the first lives."""
    caplog.set_level(logging.WARNING)
    stop, threads = Stop(), []
    with Scene(tmp_path) as scene:
        while len(Checkpoints(tmp_path / "alice" / "checkpoints").epochs()) < 1:
            time.sleep(0.02)
        time.sleep(0.5)
        for number in range(3):
            more = {"folder": tmp_path / f"copy{number}", "stop": stop}
            threads.append(threading.Thread(target=lambda more=more: until_stopped(scene, more), daemon=True))
            threads[-1].start()
        time.sleep(3)
        stop.requested = True
        for thread in threads:
            thread.join(10)
    tries = caplog.text.count("a new session")
    assert 2 <= tries <= 2 * 7, tries  # each after 0.1, 0.2, 0.4 ... seconds


def until_stopped(scene: Scene, more: dict[str, object]) -> None:
    data = scene.data["alice"]
    with contextlib.suppress(Stopped):
        scene.together.join("alice", *data, **more)
