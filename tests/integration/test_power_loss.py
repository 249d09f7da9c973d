"""A loss of power costs at most the epoch under way. The long form is `python -m tests.helpers.power_loss`."""

import random
from pathlib import Path

import pytest

from cutlayer.errors import CutlayerError
from tests.helpers.disk import Disk
from tests.helpers.power_loss import KINDS, goes_on, record, trials

pytestmark = pytest.mark.xdist_group("power loss")  # two recordings are enough


@pytest.fixture(scope="module", params=["extended", "served"])
def recorded(request, tmp_path_factory) -> tuple[str, list, object]:
    folder = tmp_path_factory.mktemp("recorded")
    events = record(request.param, folder)
    return request.param, events, KINDS[request.param].outcome(folder / "root")


def test_a_run_goes_on_after_a_loss_of_power(recorded, tmp_path: Path) -> None:
    kind, events, expected = recorded
    for number, (point, places, draw) in enumerate(trials(kind, events, 3)):
        (folder := tmp_path / str(number)).mkdir()
        goes_on(kind, events[:point], places, draw, folder)
        assert KINDS[kind].outcome(folder / "after") == expected


def test_a_fsync_that_is_missing_would_be_noticed(recorded, tmp_path: Path) -> None:
    """The check can fail: without those of files, or of folders, promises are broken at the end of the record."""
    kind, events, _ = recorded
    root = KINDS[kind].places[0]
    folders = {".", root, f"{root}/checkpoints", *(event[1] for event in events if event[0] == "folder")}
    for number, of_folders in enumerate((True, False)):
        lacking = [event for event in events if event[0] != "sync" or (event[1] in folders) != of_folders]
        assert len(lacking) < len(events)
        (folder := tmp_path / str(number)).mkdir()
        with pytest.raises((AssertionError, OSError, CutlayerError)):
            goes_on(kind, lacking, (root,), None, folder)


def test_the_disk_has_what_was_flushed_and_perhaps_more(tmp_path: Path) -> None:
    events = [
        ("folder", "a"),
        ("sync", "."),
        ("create", "a/x"),
        ("content", "a/x", b"one"),
        ("sync", "a/x"),
        ("sync", "a"),
        ("content", "a/x", b"onetwo"),
        ("create", "a/y.tmp"),
        ("content", "a/y.tmp", b"new"),
        ("rename", "a/y.tmp", "a/y"),
        ("remove", "a/x"),
    ]
    disk, seen = Disk().replay(events), set()
    place = disk.write(tmp_path / "strict")
    assert {file.name: file.read_bytes() for file in (place / "a").iterdir()} == {"x": b"one"}
    for seed in range(200):
        place = disk.write(tmp_path / str(seed), random.Random(seed))
        left = {file.name: file.read_bytes() for file in (place / "a").iterdir()}
        assert left.get("x", b"one")[:3] == b"one"
        seen |= set(left.items())
    assert {("x", b"one"), ("x", b"onetwo"), ("y", b""), ("y", b"new")} <= seen
