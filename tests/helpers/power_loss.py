"""A loss of power at each of many moments of a real run, which must then go on to the bits of the undisturbed one.

    python -m tests.helpers.power_loss --points 100      # the long form of test_power_loss.py

A process trains and records what it does to its files (`recorded_writes`). For a point of the record the folder is made
that a disk would have, if the power failed just then (`disk`): once with nothing of what was not flushed, and once with
a random part of it. From there the run goes on. What someone was told before, such as that an epoch is done, must still
be so: at most the epoch under way is trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from cutlayer import Fleet, Method, Periodic
from cutlayer.records.noted import delivered
from cutlayer.runs.join import join
from cutlayer.runs.run import Run
from cutlayer.runs.serve import Callbacks, serve
from tests.helpers import small
from tests.helpers.disk import Disk
from tests.helpers.recorded_writes import Event, Recorder
from tests.helpers.resumable import ONE_CLIENT, SEVERAL, halves, outcome, train

EPOCHS = 5
SERVED = Method.of(Periodic(period=3), "fp8", fleet=Fleet())
CLIENTS = ("alice", "bob")
ROOT = Path(__file__).parents[2]
Say = Callable[[str, object], None]


class InOnePlace:
    """A run of `fit`; with `extended` it first ends after three epochs, and is then made longer."""

    places = ("run",)
    losses = (("run",),)

    def __init__(self, method: Method, extended: bool = False) -> None:
        self.method, self.extended = method, extended

    def run(self, root: Path, say: Say) -> None:
        """Begin, or go on to the end."""
        for epochs in (3, EPOCHS) if self.extended and not (root / "run").exists() else (EPOCHS,):
            say("run", "begins")
            train(root / "run", self.method, epochs, on_epoch=lambda record: say("run", record.epoch + 1))
            say("run", f"the model after {epochs} epochs")

    def outcome(self, root: Path) -> object:
        """What must be the same."""
        return outcome(root / "run")

    def check(self, root: Path, said: dict[str, list[object]]) -> None:
        """What must be there before anything goes on."""
        if said.get("run", [None])[-1] == "the model after 3 epochs":
            assert len(Run(root / "run").history().epochs) == 3
            Run(root / "run").load_weights(halves().whole)
        if f"the model after {EPOCHS} epochs" in said.get("run", ()):
            self.outcome(root)


class Served:
    """A server and two clients, each with a disk of its own, in one process."""

    places = ("server", *CLIENTS)
    losses = (("server",), ("alice",), ("server", *CLIENTS))

    def run(self, root: Path, say: Say) -> None:
        """Begin, or go on to the end."""
        ready, threads, errors, ports = threading.Event(), [], [], []

        def listening(port: int) -> None:
            ports.append(port)
            ready.set()

        def hold() -> None:
            serve(
                small.halves().server,
                (8,),
                listen="127.0.0.1:0",
                run=root / "server",
                clients=CLIENTS,
                client_half=small.halves().client,
                method=SERVED,
                training=small.training(EPOCHS),
                callbacks=Callbacks(lambda record: say("server", record.epoch + 1), listening),
            )
            say("server", "the end")

        def take_part(name: str, data: object) -> None:
            ready.wait(30)
            join(
                f"127.0.0.1:{ports[0]}",
                small.halves().client,
                data,
                folder=root / name,
                name=name,
                method=SERVED,
                training=small.training(EPOCHS),
                give_up_after=60,
            )
            say(name, "the end")

        def caught(what: Callable, *arguments: object) -> None:
            try:
                what(*arguments)
            except BaseException as error:
                errors.append(error)
                ready.set()

        sets = small.data((24, 16))
        told = delivered(root / "server").read()  # whom the server does not wait for any more
        ended = {name for name in told if (root / name / "client.safetensors").exists()}
        parts = ((take_part, name, part) for name, part in zip(CLIENTS, sets, strict=True) if name not in ended)
        for work in ((hold,), *parts):
            threads.append(threading.Thread(target=caught, args=work, daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(120)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "the run does not end"

    def outcome(self, root: Path) -> object:
        """What must be the same."""
        server = Run(root / "server")
        records = [{k: v for k, v in each.as_dict().items() if k != "seconds"} for each in server.records()]
        for record in records:
            for way in ("up", "down"):
                record["bytes"][way].pop("control", None)  # differs by who came first
        files = ("server/server", "server/client", *(f"{name}/client" for name in CLIENTS))
        weights = [(root / f"{file}.safetensors").read_bytes() for file in files]
        return [without_run(each) for each in weights], records

    def check(self, root: Path, said: dict[str, list[object]]) -> None:
        """What must be there before anything goes on."""
        for name in self.places:
            if "the end" in said.get(name, ()):
                assert (root / name / "client.safetensors").exists()


def without_run(weights: bytes) -> bytes:
    """A file of weights without its header, which names the run."""
    return weights[8 + int.from_bytes(weights[:8], "little") :]


KINDS: dict[str, InOnePlace | Served] = {
    "one client": InOnePlace(ONE_CLIENT),
    "several clients": InOnePlace(SEVERAL),
    "extended": InOnePlace(ONE_CLIENT, extended=True),
    "served": Served(),
}


def record(kind: str, folder: Path) -> list[Event]:
    """The record of a run of this kind, in a process of its own. What is replayed from it is what the process left."""
    command = [sys.executable, "-m", "tests.helpers.power_loss", "--record", kind, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    events = pickle.loads((folder / "events").read_bytes())
    replayed = Disk().replay(events).write(folder / "replayed", all_of_it=True)
    assert contents(replayed) == contents(folder / "root"), "something was written that the recorder has not seen"
    return events


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*"))
    return {name: path.read_bytes() if path.is_file() else None for name, path in found}


def goes_on(kind: str, events: list[Event], lost: Iterable[str], draw: random.Random | None, folder: Path) -> bool:
    """The power fails after these events, for these of the places; the run must go on, in `folder`/after.

    Returns whether an epoch is trained again that had a line in the metrics: it was under way until its checkpoint was
    written.
    """
    subject, disk = KINDS[kind], Disk().replay(events)
    after, whole = disk.write(folder / "after", draw), disk.write(folder / "whole", all_of_it=True)
    for place in {*subject.places} - {*lost}:  # a process that ends there, and no more
        if (after / place).exists():
            (after / place).rename(folder / f"{place}-lost")
        if (whole / place).exists():
            (whole / place).rename(after / place)
    main = subject.places[0]
    promised = max((each for each in disk.said.get(main, ()) if isinstance(each, int)), default=0)
    trained: list[int] = []
    with unflushed():
        subject.check(after, disk.said)
        subject.run(after, lambda who, what: trained.append(what) if who == main and isinstance(what, int) else None)
    begun = trained[0] - 1 if trained else EPOCHS
    assert begun >= promised, f"{promised} epochs were done, it goes on from {begun}"
    assert begun >= lines(disk, main) - 1, "more than the epoch under way is lost"
    assert not list(after.rglob("damaged-*")), "something was half there"
    return begun < lines(disk, main)


@contextlib.contextmanager
def unflushed() -> Iterator[None]:
    """Nothing is flushed in here: the power does not fail again, and flushing is most of the time."""
    before, os.fsync = os.fsync, lambda file: None
    try:
        yield
    finally:
        os.fsync = before


def lines(disk: Disk, main: str) -> int:
    """How many epochs had left a line in the metrics, promised or not."""
    content = disk.root.entries.get(main)
    metrics = content.entries.get("metrics.jsonl") if content is not None else None
    return metrics.content.count(b"\n") if metrics is not None else 0


Trial = tuple[int, tuple[str, ...], random.Random | None]


def trials(kind: str, events: list[Event], points: int, seed: int = 0) -> Iterator[Trial]:
    """So many points of a record, evenly spread but for a random shift; whose power fails there; and in which form."""
    draw, losses = random.Random(seed), KINDS[kind].losses
    for number in range(points):
        point = int((number + draw.random()) * (len(events) + 1) / points)
        for form in (None, draw):
            yield point, losses[number % len(losses)], form


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=100, help="of each kind of run, each in both forms")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.record:
        kind, folder = chosen.record
        (root := Path(folder) / "root").mkdir()
        recorder = Recorder(root)
        recorder.begin()
        KINDS[kind].run(root, recorder.say)
        (Path(folder) / "events").write_bytes(pickle.dumps(recorder.events))
        return
    failed = 0
    for kind in chosen.kinds:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            base = Path(name)
            events = record(kind, base)
            expected = KINDS[kind].outcome(base / "root")
            again, failures = 0, []
            for point, places, draw in trials(kind, events, chosen.points, chosen.seed):
                try:
                    with tempfile.TemporaryDirectory(dir=base) as place:
                        again += goes_on(kind, events[:point], places, draw, Path(place))
                        assert KINDS[kind].outcome(Path(place) / "after") == expected, "other bits"
                except Exception as error:
                    form = "nothing" if draw is None else "a part"
                    failures.append(f"point {point} ({events[point - 1][:2]}), {places}, {form}: {error!r:.400}")
        syncs = sum(event[0] == "sync" for event in events)
        print(
            f"{kind}: {len(events)} events, {syncs} of them fsync; {2 * chosen.points} losses of power, "
            f"{2 * chosen.points - len(failures)} gone on from to the same bits with at most the epoch under way lost, "
            f"{again} times one that had its line of metrics; {time.monotonic() - began:.0f} s",
            flush=True,
        )
        for failure in failures:
            print(f"  {failure}", flush=True)
        failed += len(failures)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
