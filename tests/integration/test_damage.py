"""Damage to a run's files is named, and gone back behind if there is a way back. A full disk costs no checkpoint."""

import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cutlayer import ConfigError, Method
from cutlayer.files import sealed
from cutlayer.runs.run import Run
from tests.helpers import started
from tests.helpers.processes import join, port_of, records, serve, weights
from tests.helpers.resumable import ONE_CLIENT, SEVERAL, halves, outcome, train
from tests.helpers.started import ENVIRONMENT, ROOT


def flip(file: Path, bit: int) -> None:
    """Flip a bit in place: names that share the file see it, too."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    with file.open("r+b") as out:
        out.write(content)


@pytest.mark.parametrize("method", [ONE_CLIENT, SEVERAL], ids=["one client", "several clients"])
def test_a_flipped_bit_is_refused_or_harmless_or_gone_back_behind(method: Method, tmp_path: Path, caplog) -> None:
    """Single bits anywhere in a run, which is then resumed: 100 of each kind of run, or as many as FLIPS says."""
    caplog.set_level(logging.WARNING)
    whole = tmp_path / "whole"
    train(whole, method)
    expected = outcome(whole)
    files = sorted(file for file in whole.rglob("*") if file.is_file() and file.stat().st_size)
    names = {file.name for file in files}
    assert {"config.json", "metrics.jsonl", "merged.json", "model.safetensors", "state.json"} <= names
    draw, counts = random.Random(0), {"refused": 0, "named": 0, "harmless": 0}
    draw.shuffle(files)
    for number in range(int(os.environ.get("FLIPS", "100"))):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        # Every file as often as any other, so that small ones have their share.
        file = copy / files[number % len(files)].relative_to(whole)
        flip(file, draw.randrange(8 * file.stat().st_size))
        caplog.clear()
        try:
            assert outcome(copy) == expected, f"{file} was read although it is damaged"
            train(copy, method)
            assert outcome(copy) == expected, f"{file} was resumed from although it is damaged"
            said, kind = caplog.text, "named"
        except ConfigError as error:
            said, kind = str(error), "refused"
        named = file.name in said
        counts[kind if named else "harmless"] += 1
        assert named or kind == "named", f"refused without the file's name: {said}"
        if "epoch-000005" in str(file):
            assert named, f"nothing was said of {file}"
    assert counts["refused"] > 0
    assert counts["named"] > 0


def test_the_newest_whole_checkpoint_counts(tmp_path: Path, caplog) -> None:
    train(tmp_path)
    checkpoints = Run(tmp_path).checkpoints
    assert checkpoints.epochs() == [4, 5]
    before = outcome(tmp_path)
    newest = checkpoints.place(5) / "server.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    train(tmp_path)
    assert "epoch-000005: server.safetensors is damaged; set aside as damaged-epoch-000005" in caplog.text
    assert outcome(tmp_path) == before
    assert checkpoints.epochs() == [4, 5]

    (checkpoints.place(5) / "state.json").unlink()
    flip(checkpoints.place(4) / "clients" / "0.safetensors", 5000)
    message = r"no checkpoint in .* is whole: .*epoch-000005: state\.json is missing; .*epoch-000004: clients/0\.safet"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path)


def test_damage_of_metrics_config_and_model_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    metrics, config, model = (tmp_path / name for name in ("metrics.jsonl", "config.json", "model.safetensors"))
    lines = metrics.read_text().splitlines()
    changed = json.dumps({**json.loads(lines[1]), "loss": 0.0})
    for damaged, message in (
        ([lines[0], lines[1][:20], *lines[2:]], r"metrics\.jsonl, line 2: it is damaged"),
        ([lines[0], changed, *lines[2:]], r"metrics\.jsonl, line 2: it is damaged: its checksum does not fit"),
        ([lines[1], lines[0], *lines[2:]], r"line 1 is damaged: expected epoch 0, got 1"),
        (lines[:1], "expected the 5 epochs of the checkpoint, found 1"),
    ):
        metrics.write_text("\n".join(damaged) + "\n")
        with pytest.raises(ConfigError, match=message):
            train(tmp_path)
    metrics.write_text("\n".join(lines) + "*")  # the last end of a line
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 5: it is damaged"):
        Run(tmp_path).history()
    metrics.write_text("\n".join(lines) + "\n")

    flip(model, 8 * (model.stat().st_size - 3))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged: its checksum does not fit"):
        Run(tmp_path).load_weights(halves().whole)
    config.write_text(config.read_text().replace('"batch_size": 8', '"batch_size": 9'))
    with pytest.raises(ConfigError, match=r"config\.json: .*checksum does not fit\. If you changed it by hand, remove"):
        train(tmp_path)
    config.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: it is damaged"):
        train(tmp_path)


def as_before(content: dict) -> dict:
    """What state.json held before all parts had a state dict: facts of optimizers and of stores."""
    facts = content.pop("facts")
    return {**content, "optimizers": {"server": facts.pop("server")}, "stores": facts, "format": 3}


def test_a_run_with_checkpoints_of_the_format_before_goes_on(tmp_path: Path, caplog) -> None:
    train(tmp_path, epochs=4)
    for state in (tmp_path / "checkpoints").glob("*/state.json"):
        content = as_before(json.loads(state.read_text()))
        del content["checksum"]
        state.write_text(json.dumps(sealed(content)))
    train(tmp_path)
    assert "checksums" not in caplog.text
    train(tmp_path / "undisturbed")
    assert outcome(tmp_path) == outcome(tmp_path / "undisturbed")


def test_a_run_of_an_older_release_goes_on_with_a_note(tmp_path: Path, caplog) -> None:
    """It has no checksums, and its config none of the newer choices."""
    train(tmp_path, epochs=4)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["checksum"], config["config"]["training"]["keep_checkpoints"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["checksum"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for state in (tmp_path / "checkpoints").glob("*/state.json"):
        content = {**as_before(json.loads(state.read_text())), "format": 2}
        del content["checksum"], content["files"]
        state.write_text(json.dumps(content))
    train(tmp_path)
    assert "has no checksums, it was written by an older release" in caplog.text
    train(tmp_path / "undisturbed")
    assert outcome(tmp_path) == outcome(tmp_path / "undisturbed")


def test_damage_on_either_side_of_two_machines(tmp_path: Path) -> None:
    """The server goes back a checkpoint, for which the client has its own; a client says what is damaged."""
    constant = ("--client.schedule", "constant", "--server.schedule", "constant")

    def together(folder: Path, epochs: int) -> str:
        with serve(folder, *constant, epochs=epochs) as server, join(folder, port_of(server)) as client:
            assert (client.wait(), server.wait()) == (0, 0), client.output + server.output
        return server.output

    run = tmp_path / "run"
    together(run, 2)
    flip(Run(run / "server").checkpoints.place(2) / "server.safetensors", 8000)
    said = together(run, 5)  # A B C C A
    assert "epoch-000002: server.safetensors is damaged; set aside as damaged-epoch-000002" in said
    together(tmp_path / "undisturbed", 5)
    assert weights(run) == weights(tmp_path / "undisturbed")
    assert records(run / "server") == records(tmp_path / "undisturbed" / "server")

    flip(run / "client" / "checkpoints" / "epoch-000005" / "client.safetensors", 8000)
    with serve(run, *constant, epochs=6) as server, join(run, port_of(server)) as client:
        assert (client.wait(), server.wait()) == (0, 0), client.output + server.output
    assert "epoch-000005: client.safetensors is damaged; set aside as damaged-epoch-000005" in client.output
    assert "the server goes back from the one after 5 epochs to the one after 4" in server.output
    together(tmp_path / "longer", 6)
    assert weights(run) == weights(tmp_path / "longer")
    assert records(run / "server") == records(tmp_path / "longer" / "server")


# --- a full disk ---


def limited(folder: Path, epochs: int, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.helpers.resumable", str(folder), str(epochs)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


def assert_one_line_and_the_older_checkpoint(folder: Path, done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "another length" not in line]  # which has its own
    assert "cannot be written" in line
    run = Run(folder)
    assert run.checkpoints.epochs()[-1] >= 2
    assert run.checkpoints.state() is not None  # it is whole
    assert not list((folder / "checkpoints").glob("writing-*"))


def test_a_file_that_the_system_does_not_take_is_one_line(tmp_path: Path) -> None:
    train(tmp_path / "run", epochs=2)
    largest = max(file.stat().st_size for file in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    limits = (largest - 100, resource.RLIM_INFINITY)
    done = limited(tmp_path / "run", 4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert_one_line_and_the_older_checkpoint(tmp_path / "run", done)
    assert f"the one after {Run(tmp_path / 'run').checkpoints.epochs()[-1]} epochs is whole" in done.stderr
    assert started.run("tests.helpers.resumable", tmp_path / "run", 4).returncode == 0
    train(tmp_path / "undisturbed", epochs=4)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of this size; skips the test if none can be mounted."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = disk / "run"
        train(run, epochs=2)
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(b"x" * free)
        done = started.run("tests.helpers.resumable", run, 4)
        assert_one_line_and_the_older_checkpoint(run, done)
        (disk / "other").unlink()
        assert started.run("tests.helpers.resumable", run, 4).returncode == 0
        train(tmp_path / "undisturbed", epochs=4)
        assert outcome(run) == outcome(tmp_path / "undisturbed")


def test_all_files_have_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(tmp_path / "run", SEVERAL, epochs=2)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert set(modes.values()) == {0o640}, modes
