"""`cutlayer reproduce`: rows, runs that are killed and go on, tables; every row of the preset for a GPU, made small."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer import ModelConfig, with_choices
from cutlayer.runs.experiment import run_experiment
from cutlayer.studies import Study, frontier, sips2021
from cutlayer.studies.presets import PRESETS
from cutlayer.studies.rows import Plan
from tests.helpers import started
from tests.helpers.processes import ENVIRONMENT
from tests.helpers.study import SMALL

SMOKE = Plan(PRESETS["smoke"], sips2021.GROUPS)


def command(folder: Path, *more: str, name: str = "reproduce sips2021") -> list[str]:
    places = ["--results", str(folder / "results"), "--run-dir", str(folder / "runs")]
    return ["cutlayer", *name.split(), *places, *more]


def carried_out(folder: Path, *more: str, name: str = "reproduce sips2021") -> str:
    done = started.run(*command(folder, *more, name=name), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results/smoke.jsonl").read_text().splitlines()]


def test_rows_are_run_once_and_make_a_table(tmp_path: Path) -> None:
    said = carried_out(tmp_path, "--rows", "plain", "paper")
    assert "0 of 2 runs are there" in said
    plain, paper = lines(tmp_path)
    assert plain["exchanges"] == 20 * "A"
    assert paper["exchanges"] == 5 * "ABCC"
    assert {plain["preset"], paper["preset"]} == {"smoke"}
    samples, values = 512, 8 * 4 * 4  # at the cut
    assert plain["exchanged_bytes"] == 2 * 20 * samples * values * 4
    assert plain["bytes_up"] + plain["bytes_down"] > plain["exchanged_bytes"] > 10 * paper["exchanged_bytes"]
    # The client half goes forward in B, and forward and backward in A.
    assert 1 / 4 < paper["client_flops"] / plain["client_flops"] < 2 / 4
    assert not list((tmp_path / "runs").rglob("checkpoints"))

    table = carried_out(tmp_path, "--table")
    assert "2 of 34 runs are there" in table
    written = (tmp_path / "results/smoke.md").read_text()
    (row,) = [line for line in written.splitlines() if line.startswith("| 5 A + 5 B, 8 bits |")]
    assert f"| {100 * paper['accuracy']:.2f} |" in row
    assert f"| {100 * (plain['accuracy'] - paper['accuracy']):.2f} |" in row
    assert f"| {plain['exchanged_bytes'] / paper['exchanged_bytes']:.1f}x |" in row
    assert "| 5 / 5 / 10 | 10 |" in row
    assert "106.7x" in row
    assert written in table


def test_rivals_are_rows_beside_runs_of_the_other_study_in_a_table_and_in_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    carried_out(tmp_path, "--rows", "plain")
    said = carried_out(tmp_path, "--rows", "plain", "local5", "random", "randtopk", name="frontier")
    assert "1 of 4 runs are there" in said
    by_name = dict(zip(("plain", "local5", "random", "randtopk"), lines(tmp_path), strict=True))
    assert by_name["local5"]["exchanges"] == by_name["random"]["exchanges"] == "B" + 19 * "C"
    assert by_name["local5"]["exchanged_bytes"] < by_name["plain"]["exchanged_bytes"] / 200
    assert by_name["random"]["client_flops"] < by_name["local5"]["client_flops"] < by_name["plain"]["client_flops"]
    table = (tmp_path / "results/smoke.md").read_text()
    for title in (
        "plain split learning",
        "local head, 5 epochs",
        "random client half",
        "randomized top-k",
        "Yardsticks",
    ):
        assert title in table
    for name in ("bytes", "flops"):
        plot = (tmp_path / f"results/smoke-{name}.svg").read_text()
        assert plot.lstrip().startswith("<?xml")


def test_tables_and_plots_of_another_studys_runs_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    carried_out(tmp_path, "--rows", "plain")
    (tmp_path / "experiments/sips2021").mkdir(parents=True)
    (tmp_path / "results").rename(tmp_path / "experiments/sips2021/results")
    done = started.run("cutlayer", "frontier", "--preset", "smoke", "--table", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = {file.name for file in (tmp_path / "experiments/frontier/results").iterdir()}
    assert written == {"smoke.md", "smoke-bytes.svg", "smoke-flops.svg"}


def test_a_run_killed_in_its_midst_goes_on_and_loses_at_most_the_epoch_under_way(tmp_path: Path) -> None:
    rows = ("--rows", "few500")
    process = started.start(*command(tmp_path, *rows))
    deadline = time.monotonic() + 120
    metrics: list[Path] = []
    while time.monotonic() < deadline:
        metrics = list((tmp_path / "runs").glob("*/metrics.jsonl"))
        if metrics and metrics[0].read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = metrics[0].read_text().splitlines()
    assert 8 <= len(before) < 20
    assert not (tmp_path / "results/smoke.jsonl").exists() or not lines(tmp_path)

    carried_out(tmp_path, *rows)
    # Epochs that were trained again took another time.
    after = metrics[0].read_text().splitlines()
    assert len(after) == 20
    assert after[: len(before) - 1] == before[:-1]
    (got,) = lines(tmp_path)
    ((_, config),) = SMOKE.runs(["few500"])
    whole = run_experiment(config, progress=False).history
    assert got["exchanges"] == whole.exchanges == "ABCCCCCCCCCCCCCCBCCC"
    assert got["accuracy"] == whole.test("accuracy")
    assert got["accuracy_merged"] == whole.merged["accuracy"]
    assert got["bytes_up"] == whole.bytes("up")
    assert got["client_flops"] == whole.flops("client")


def test_runs_stop_when_their_minutes_are_over_and_go_on_the_next_time(tmp_path: Path) -> None:
    configs = [with_choices(SMALL, epochs=60, seed=seed) for seed in range(2)]
    study = Study(tmp_path / "study.jsonl", configs, folder=tmp_path / "runs")
    assert study.run(minutes=0.0) == []
    minutes = 0.001
    while not (begun := [*(tmp_path / "runs").glob("*/metrics.jsonl")]):
        assert study.run(minutes=minutes) == []
        minutes *= 2  # on a busy machine the first epoch takes longer
    before = begun[0].read_text()
    assert 0 < before.count("\n") < 60
    done = study.run()
    assert [outcome["exchanges"] for outcome in done] == ["A" * 60] * 2
    assert begun[0].read_text().startswith(before)


def test_runs_of_another_studys_file_count(tmp_path: Path) -> None:
    first = Study(tmp_path / "first.jsonl", [SMALL])
    first.run()
    second = Study(tmp_path / "second.jsonl", [SMALL, with_choices(SMALL, seed=5)], others=[first.file])
    assert [config.training.seed for config in second.todo()] == [5]
    assert len(second.run()) == 2
    assert len(Study(second.file, []).outcomes()) == 1


def test_what_ran_on_a_device_that_is_not_here_is_read(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    values = SMALL.as_dict()
    values["training"]["device"] = "cuda:7"
    file.write_text(json.dumps({"config": values, "accuracy": 0.5}) + "\n")
    assert [outcome["accuracy"] for outcome in Study(file, [SMALL]).outcomes([SMALL])] == [0.5]


@pytest.mark.parametrize("groups", [sips2021.GROUPS, frontier.GROUPS], ids=["reproduce", "frontier"])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_plans_hold_no_run_twice_and_plain_comes_first(groups, preset) -> None:
    plan = Plan(preset, groups)
    configs = [config for _, config in plan.runs()]
    Study("none.jsonl", configs)
    names = [row.name for row in plan.rows]
    assert len(set(names)) == len(names)
    assert names[0] == "plain"
    assert all(row.against in names for row in plan.rows)
    for row, config in plan.runs():
        assert config == row.config(preset, config.training.seed)


def test_every_row_of_the_preset_for_a_gpu_runs(cifar10_dir: Path, tmp_path: Path) -> None:
    full = PRESETS["full"]
    small = replace(
        full,
        data=replace(full.data, train_samples=64, test_samples=32),
        networks={name: ModelConfig(of.name, 0.0625, of.cut) for name, of in full.networks.items()},
        training=replace(full.training, epochs=2, batch_size=32),
    )
    groups = [[row for row in group if row.clients == 1] for group in (*sips2021.GROUPS, frontier.GROUPS[-1])]
    runs = Plan(small, groups).runs(seeds=1)
    # In two epochs some rows are one; with seeds of their own they are not.
    configs = {row.name: with_choices(config, seed=number) for number, (row, config) in enumerate(runs)}
    done = Study(tmp_path / "full.jsonl", configs.values(), folder=tmp_path / "runs").run()
    assert len(done) == len(configs) >= 18
