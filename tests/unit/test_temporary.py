"""Temporary folders: none stays, however the run ends that made them."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from cutlayer import Fleet, Method, Run, fit
from cutlayer.schedule import Periodic
from cutlayer.temporary import TemporaryFolder
from tests.helpers.processes import ENVIRONMENT
from tests.helpers.small import data, halves, training
from tests.helpers.started import ROOT, Started


def test_it_goes_when_it_is_closed_or_no_longer_used(tmp_path: Path) -> None:
    with TemporaryFolder("halves", tmp_path) as folder:
        (folder.path / "file").touch()
        assert "halves" in folder.path.name
        assert [*tmp_path.iterdir()] == [folder.path]
    assert not [*tmp_path.iterdir()]
    folder = TemporaryFolder("halves", tmp_path)
    del folder
    assert not [*tmp_path.iterdir()]


def test_a_fork_leaves_it_to_its_parent(tmp_path: Path) -> None:
    folder = TemporaryFolder("halves", tmp_path)
    if (child := os.fork()) == 0:
        folder.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.is_dir()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process makes temporary folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


METHOD = Method.of(Periodic(period=2), "fp8", fleet=Fleet(live=1))


def test_a_run_and_one_that_fails_leave_nothing(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    seen = []
    run = tmp_path_factory.mktemp("run")
    fit(
        halves(), data((16, 16, 16)), method=METHOD, training=training(2), run=run / "whole",
        on_epoch=lambda record: seen.extend(temporary.glob("cutlayer-*")),
    )  # fmt: skip
    assert seen  # halves that are not in memory
    assert not [*temporary.glob("*cutlayer*")]

    def fails(record: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(halves(), data((16, 16, 16)), method=METHOD, training=training(2), run=run / "failed", on_epoch=fails)
    assert not [*temporary.glob("*cutlayer*")]


class Trained:
    """`cutlayer train` as a process with a folder for temporary files, once it has some there."""

    def __init__(self, temporary: Path, run: Path) -> None:
        output = os.open(run.with_name("output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        chosen = ("--epochs", 100000, "--train-samples", 40, "--test-samples", 10, "--threads", 1, "--run-dir", run)
        environment = {**ENVIRONMENT, "TMPDIR": str(temporary)}
        errors = os.dup(output)
        self.process = Started(
            "cutlayer", "train", "digits", *chosen, cwd=ROOT, env=environment, stdout=output, stderr=errors
        )
        deadline = time.monotonic() + 60
        while not [*temporary.glob("cutlayer-*")] or not (run.exists() and Run(run).checkpoints.epochs()):
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.02)

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str)
def test_who_is_asked_to_end_leaves_nothing_and_says_how_to_go_on(
    how: signal.Signals, status: int, tmp_path: Path
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    assert Trained(temporary, tmp_path / "run").end(how) == status
    assert not [*temporary.glob("*cutlayer*")]
    assert f"go on with: cutlayer train --resume {tmp_path / 'run'}" in (tmp_path / "output").read_text()


def test_what_a_killed_process_left_goes_with_the_next_and_what_a_live_one_has_stays(tmp_path: Path) -> None:
    trained = Trained(tmp_path, tmp_path / "run")
    TemporaryFolder("halves", tmp_path).close()
    assert (left := [*tmp_path.glob("cutlayer-*")])
    trained.end(signal.SIGKILL)
    assert left == [*tmp_path.glob("cutlayer-*")]
    with TemporaryFolder("halves", tmp_path) as folder:
        assert [*tmp_path.glob("cutlayer-*")] == [folder.path]


def test_of_a_folder_that_machines_share_each_removes_its_own(tmp_path: Path) -> None:
    """Locks that another machine holds may not be seen here."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with TemporaryFolder("halves", tmp_path) as folder:
        name = folder.path.name
    assert boot in name
    own, others = tmp_path / f"{name}x", tmp_path / name.replace(boot, boot[::-1])
    own.mkdir()
    others.mkdir()
    TemporaryFolder("halves", tmp_path).close()
    assert [*tmp_path.iterdir()] == [others]
