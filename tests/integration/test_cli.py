"""The command line, as processes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from cutlayer.cli.entry import main
from cutlayer.cli.partition import PartitionArguments
from cutlayer.data.datasets import DATASETS
from cutlayer.models.networks import MODELS
from cutlayer.runs.choices import Choices
from cutlayer.schedule import SCHEDULES
from cutlayer.strategies import STRATEGIES
from tests.helpers.started import ENVIRONMENT, run


def cutlayer(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return run("cutlayer", *arguments, cwd=cwd, env={**ENVIRONMENT, "COLUMNS": "100"})


SMALL = ["--train-samples", "128", "--test-samples", "64", "--epochs", "4", "--width", "0.25"]


def test_train_compare_and_wrong_names(tmp_path: Path) -> None:
    first = cutlayer(
        "train", "digits", *SMALL, "--run-dir", "one", "--schedule", "periodic", "--period", "3", cwd=tmp_path
    )
    assert first.returncode == 0, first.stderr
    assert "epoch 4/4  A" in first.stdout
    assert not re.search(r"-\d+ s left", first.stdout)
    assert re.search(r"epochs A / B / C\W+2 / 1 / 1", first.stdout)
    config = json.loads((tmp_path / "one" / "config.json").read_text())["config"]
    assert config["method"]["schedule"] == {"kind": "Periodic", "warmup": 1, "period": 3}
    assert config["data"]["train_samples"] == 128
    assert (tmp_path / "one" / "model.safetensors").is_file()

    again = cutlayer("train", "digits", *SMALL, "--run-dir", "one", cwd=tmp_path)
    assert again.returncode == 2
    assert "holds a run already; resume it, or choose another folder" in again.stderr

    done = cutlayer("train", "--resume", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 4

    # Killed between a line of the metrics and its checkpoint: a resumed run counts from the checkpoint.
    interrupted = tmp_path / "two"
    shutil.copytree(tmp_path / "one", interrupted)
    shutil.rmtree(interrupted / "checkpoints")
    (interrupted / "metrics.jsonl").write_text((interrupted / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    resumed = cutlayer("train", "--resume", "two", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (interrupted / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()

    # Begun, but not through the first epoch.
    (interrupted / "metrics.jsonl").write_text("")
    table = cutlayer("compare", "one", "two", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert "activations and gradients reduced" in table.stdout

    # More runs than fit beside each other, and a folder that holds none.
    names = [f"a-run-with-a-long-name-{number}" for number in range(6)]
    for number, name in enumerate(names):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        written["config"]["training"]["seed"] = number
        del written["checksum"]  # as whoever changes it by hand is told to
        (tmp_path / name / "config.json").write_text(json.dumps(written))
    table = cutlayer("compare", *names, "nowhere", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert "left out: nowhere holds no run" in table.stderr
    assert "…" not in table.stdout
    seeds = [line for line in table.stdout.splitlines() if "seed" in line]
    assert re.findall(r"\d", "".join(seeds)) == ["0", "1", "2", "3", "4", "5"]

    *rows, said = table.stdout.splitlines()
    assert max(map(len, rows)) <= 100
    assert said.startswith("The accuracy of a-run-with-a-long-name-0, ")
    written = cutlayer("compare", "one", names[5], "--csv", "figures.csv", "--json", "figures.json", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["run"], row["config.training.seed"], row["epochs.A"]) for row in rows] == [
        ("one", 0, 2),
        (names[5], 5, 2),
    ]
    with (tmp_path / "figures.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["test.accuracy"]) for line in lines] == [row["test.accuracy"] for row in rows]
    assert [int(line["bytes.up"]) for line in lines] == [row["bytes.up"] for row in rows]

    for arguments, message in (
        (["train", "digits", "--client.lr", "-1"], "error: --client.lr: lr must be above 0, got -1.0"),
        (["train", "digits", "--store.folder=no", "--seed", "1"], "error: --store.folder: store folder 'no': expected"),
        (["train", "digits", "--threads", "0"], "threads must be at least 1, got 0"),
        (["train", "digits", "--cut", "conv9"], "no layer 'conv9' to cut at; possible cuts: layer1, layer1.0"),
        (["train", "digits", "--codec", "fp5"], "unknown codec 'fp5'; known: fp32"),
        (["train", "digits", "--model", "vgg11"], "vgg11 is built for 32x32 images, these are 8x8"),
        (["train", "cifar10_small", "--data-dir", "nowhere"], "missing: nowhere/cifar-10-batches-bin/data_batch_1.bin"),
        (["train", "digits", "--train-samples", "9999"], "expected a number of samples from 1 to 1437, got 9999"),
        (["train", "--resume", "nowhere"], "nowhere holds no run"),
        (["train", "digits", "--resume", "one"], "leave the recipe out: cutlayer train --resume RUN"),
        (["train", "digits", "--strategy", "parallel"], "strategy: expected with several clients only"),
        (["train", "digits", "--mode=parallel"], "strategy: expected with several clients only"),
        (["train", "digits", "--workers", "2"], "workers: expected with --backend ray only"),
        (["compare", "nowhere"], "nowhere holds no run"),
        (["fly"], "unknown command 'fly'; known: plan, train, attack, compare"),
    ):
        wrong = cutlayer(*arguments, cwd=tmp_path)
        assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False), wrong.stderr
        assert "tyro" not in wrong.stderr
        assert message in wrong.stderr
    (tmp_path / "file").write_text("")
    blocked = cutlayer("train", "digits", "--run-dir", "file", cwd=tmp_path)
    assert (blocked.returncode, "Traceback" in blocked.stderr) == (1, False)
    assert "file" in blocked.stderr
    for arguments in (["train", "cifar100"], ["train", "digits", "--schedule", "weekly"]):
        wrong = cutlayer(*arguments, cwd=tmp_path)
        assert wrong.returncode == 2
        assert "cifar10_small" in wrong.stderr or "plateau" in wrong.stderr  # the valid names


def test_the_demo_in_short(tmp_path: Path) -> None:
    shown = cutlayer("demo", "--epochs", "5", "--run-dir", "demo", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(
        r"plain split learning: epoch 5/5  A  loss \d\.\d+  accuracy 0\.\d+  [\d.]+ MiB so far", shown.stdout
    )
    for row in ("test accuracy", "epochs A / B / C", "sent up", "sent down", "client GFLOPs", "seconds"):
        assert row in shown.stdout
    plain, method = (
        json.loads((tmp_path / f"demo-{r}" / "config.json").read_text())["config"] for r in ("plain", "cutlayer")
    )
    assert plain["method"]["schedule"]["kind"] == "Always"
    assert (plain["method"]["activations"], method["method"]["gradients"]) == ("fp32", "fp8_e5m2")
    assert plain["training"] == method["training"]


def test_help_explains_every_field(tmp_path: Path) -> None:
    shown = cutlayer("train", "digits", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    for choice in get_type_hints(Choices):
        assert f"--{choice.replace('_', '-')}" in shown.stdout
    assert re.search(r"--threshold [^-]*\(default:[ │\n]*0\.05\)", shown.stdout)  # what the recipe says
    for text in ("What the network's channels are multiplied with", "--client.milestones", "--store.placement"):
        assert text in shown.stdout


def test_the_choices_of_the_config_are_those_there_are() -> None:
    hints = get_type_hints(Choices)
    for field, known in (("data", DATASETS), ("model", MODELS), ("schedule", SCHEDULES), ("strategy", STRATEGIES)):
        assert get_args(hints[field]) == tuple(known)
    assert get_args(get_args(get_type_hints(PartitionArguments)["data"])[0]) == tuple(DATASETS)


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cutlayer", "train", "digits", "--epochs", "500", "--run-dir", "long"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A shell starts jobs in the background with SIGINT ignored, and children inherit that.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics, deadline = tmp_path / "long" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; go on with: cutlayer train --resume long"


def test_a_wrong_option_is_said_once_and_not_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "digits", "--epoch", "3"])
    said = capsys.readouterr().err
    assert said.count("--epochs INT") == 1
    assert "cifar10" not in said


def test_a_damaged_run_is_left_out_of_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--train-samples", "64", "--test-samples", "32", "--epochs", "1", "--threads", "1", "--width", "0.25"]
    for name in ("one", "two"):
        assert main(["train", "digits", *small, "--run-dir", name]) == 0
    config = json.loads(Path("two/config.json").read_text())
    line = json.loads(Path("two/metrics.jsonl").read_text())
    del config["checksum"], line["checksum"]
    for file, content, reason in (
        ("merged.json", {"epochs": 1, "scores": {"accuracy": "high"}}, "merged.json is damaged"),
        ("given_up.json", {"up": "much"}, "given_up.json is damaged"),
        ("config.json", {}, "config.json: it is damaged (expected an object 'config'"),
        ("config.json", [1], "config.json: it is damaged (expected a JSON object"),
        ("config.json", {**config, "config": "mine"}, "config.json: it is damaged (expected an object 'config'"),
        ("config.json", {**config, "baseline": {"more": 1}}, "config.json: it is damaged (unexpected entries more)"),
        ("config.json", {**config, "baseline": {"exchanged_bytes": 1}}, "config.json: it is damaged (Object missing"),
        ("config.json", {**config, "config": {"data": "digits", "codec": 8}}, "config.json: the config cannot be read"),
        ("metrics.jsonl", {"epoch": 0}, "metrics.jsonl, line 1: it is damaged (Object missing"),
        ("metrics.jsonl", {**line, "bytes": [1]}, "metrics.jsonl, line 1: it is damaged (Expected `object`"),
        (
            "metrics.jsonl",
            {**line, "test": {"accuracy": "x"}},
            "metrics.jsonl, line 1: it is damaged (Expected `float`",
        ),
    ):
        damaged = Path("two") / file
        whole = damaged.read_bytes() if damaged.exists() else None
        damaged.write_text(json.dumps(content) + "\n")
        capsys.readouterr()
        assert main(["compare", "one", "two"]) == 0, content
        said = capsys.readouterr()
        assert f"left out: two/{reason}" in said.err, said.err
        assert "loss" in said.out
        damaged.unlink() if whole is None else damaged.write_bytes(whole)
    Path("two/metrics.jsonl").write_text(json.dumps({**line, "flops": {}}) + "\n")
    assert main(["compare", "one", "two"]) == 0
