"""A reduction is not shown without its accuracy: `compare` and `report` say what it cost, or that it is not known."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Drop, Method, Run, Task, Training, fit, run_experiment, split, with_choices
from cutlayer.cli import main
from cutlayer.describe import describe
from cutlayer.privacy import Defence
from cutlayer.records.history import Baseline, EpochRecord, History
from cutlayer.report.accuracy import Scored, against_plain, not_compared
from cutlayer.runs.recipes import digits

SMALL = {"train_samples": 200, "test_samples": 80, "epochs": 2, "threads": 1}

FEW = with_choices(digits(), **SMALL, schedule="once", codec="mxfp4")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    plain = with_choices(FEW, schedule="always", codec="fp32")
    others = {
        "few": FEW,
        "few, seed 2": with_choices(FEW, seed=2, codec="fp8"),
        "plain": plain,
        "another seed": with_choices(plain, seed=1),
        "another cut": with_choices(plain, cut="layer1"),
        "shorter": with_choices(plain, epochs=1),
        "other data": with_choices(plain, train_samples=120),
        "noisy": with_choices(plain, defence=Defence(noise=0.1, clip=1.0)),
    }
    for name, config in others.items():
        run_experiment(config, folder / name, progress=False)
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in line.strip("│| ").replace("│", "|").split("|")][1:]


def test_compare_shows_the_points_that_a_reduction_cost(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "compare", runs / "plain", runs / "few")
    plain, few = (Run(runs / name).history().merged["accuracy"] for name in ("plain", "few"))
    assert row(text, "test accuracy against plain, points") == ["plain", f"{100 * (few - plain):+.2f}"]
    assert plain != few
    assert "not compared" not in text


@pytest.mark.parametrize("among", [[], ["shorter"], ["other data"], ["noisy"]], ids=str)
def test_without_plain_split_learning_it_says_so_and_how_to_get_it(
    runs: Path, among: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = runs / "few, seed 2"
    text = shown(capsys, "compare", runs / "few", other, *(runs / name for name in among))
    assert "not compared" in row(text, "test accuracy against plain, points")
    (line,) = [line for line in text.splitlines() if line.startswith("The accuracy of")]
    assert line.startswith(f"The accuracy of {runs / 'few'}, {other}")
    command = line.split("To make one: ")[1].removeprefix("cutlayer ").split()
    folder = runs.with_name(f"made {among}")
    assert main([*command, "--run-dir", str(folder)]) == 0
    capsys.readouterr()
    text = shown(capsys, "compare", runs / "few", folder)
    assert row(text, "test accuracy against plain")[1] == "plain"
    assert "not compared" not in text


def test_of_several_the_one_of_the_same_seed_and_whatever_cut(runs: Path) -> None:
    def tested(name: str) -> Scored:
        content = Run(runs / name).read_config()
        return Scored(Run(runs / name).history(), content["config"], content["facts"])

    found = against_plain([tested("another seed"), tested("few"), tested("plain")])
    assert [each.plain for each in found] == [0, 2, 2]
    found = against_plain([tested("few"), tested("another cut"), tested("noisy")])
    assert [each.plain for each in found] == [1, 1, 1]


def test_a_table_of_plain_runs_alone_has_nothing_to_compare(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "compare", runs / "plain", runs / "another seed")
    assert "against plain" not in text
    assert "not compared" not in text


def test_figures_have_it_too(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    assert main(["compare", str(runs / "plain"), str(runs / "few"), "--json", str(file)]) == 0
    plain, few = json.loads(file.read_text())
    lost = few["merged.accuracy"] - plain["merged.accuracy"]
    assert few["against_plain.accuracy"] == lost
    assert "against_plain.accuracy" not in plain


def test_a_report_says_it_on_the_page_and_in_markdown(runs: Path, tmp_path: Path) -> None:
    for name, among in (("with", [runs / "few", runs / "plain"]), ("without", [runs / "few"])):
        assert main(["report", *map(str, among), "--output", str(tmp_path / f"{name}.html")]) == 0
    lost = [Run(runs / name).history().merged["accuracy"] for name in ("few", "plain")]
    points = f"{100 * (lost[0] - lost[1]):+.2f}"
    page, text = ((tmp_path / f"with{suffix}").read_text() for suffix in (".html", ".md"))
    assert f"{points} points against plain split learning (b)" in page
    assert row(text, "test accuracy against plain, points") == [points, "plain"]
    page, text = ((tmp_path / f"without{suffix}").read_text() for suffix in (".html", ".md"))
    assert "not compared with plain split learning" in page
    for each in (page, text):
        assert "The accuracy of a is not compared" in each
        assert "cutlayer train digits --train-samples 200" in each


def test_runs_from_python_are_told_by_their_data_and_halves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
    for name, method in {"plain": Method(), "eight bits": Method.of(Drop(), "fp8")}.items():
        fit(split(network, "1"), data, data, method=method, training=Training(epochs=2), run=tmp_path / name)
    text = shown(capsys, "compare", tmp_path / "plain", tmp_path / "eight bits")
    assert row(text, "test accuracy against plain, points")[0] == "plain"
    assert "not compared" not in text
    text = shown(capsys, "compare", tmp_path / "eight bits")
    assert "To make one: the same call with method=Method()" in text
    shutil.rmtree(tmp_path / "plain")
    other = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
    fit(split(network, "1"), other, data, training=Training(epochs=2), run=tmp_path / "plain")
    assert "not compared" in shown(capsys, "compare", tmp_path / "plain", tmp_path / "eight bits")


def scored(method: Method, facts: dict, **task: object) -> Scored:
    """A run from Python, as its folder has it."""
    history = History([EpochRecord(0, "A", 1.0, 8, {"accuracy": 0.5})], Baseline(0, 0))
    return Scored(history, {"method": describe(method), "task": describe(Task(**task))}, facts)


def test_runs_of_which_nothing_is_known_or_that_learn_other_things_are_not_compared() -> None:
    """A server that was begun from Python does not know the data."""
    few, known = Method.of(Drop(), "fp8"), {"client half": "Linear", "samples": 8}
    served = [scored(few, {}), scored(Method(), {})]
    assert against_plain(served)[0].plain is None
    (line,) = not_compared({"few": served[0], "plain": served[1]}, {})
    assert "config.json does not say on which data and network" in line
    assert "To make one" not in line
    assert against_plain([scored(few, known), scored(Method(), known)])[0].plain == 1
    other = scored(Method(), known, loss=nn.functional.binary_cross_entropy_with_logits)
    assert against_plain([scored(few, known), other])[0].plain is None
