"""What is said, and to whom: on terminals, in pipes, in notebooks, of mistakes."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cutlayer import Always, Drop, Method, RefusedError, Run, fit
from cutlayer.cli import main
from cutlayer.cli.study import show
from cutlayer.errors import unknown
from cutlayer.records.history import Baseline, EpochRecord, History
from cutlayer.report import lengths
from tests.helpers.small import data, halves, training

MARKDOWN = "# Title\n\n| row | accuracy |\n|---|---|\n| plain | 0.9 |\n"


def history(method: Method, epochs: int = 2) -> History:
    return fit(halves(), data((24,)), data((8,))[0], method=method, training=training(epochs)).history


def test_an_unknown_name_is_answered_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert unknown("codec", "fp9", ["fp8", "int4"]) == "unknown codec 'fp9'; known: fp8, int4; did you mean fp8?"
    assert unknown("cut", "layer", ["layer1", "layer2", "layer3"]).count("layer") == 1 + 3 + 2
    assert unknown("codec", "zzz", ["fp8", "int4"]).endswith("known: fp8, int4")


def test_a_recipe_that_is_mistyped_or_missing_is_answered_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "plan", "serve"):
        for arguments, expected in (
            (["digit"], "error: unknown recipe 'digit'; did you mean digits?\n"),
            (["cifar", "--epochs", "3"], "error: unknown recipe 'cifar'; did you mean cifar10_small?\n"),
            (["--epochs", "3", "digits"], f"error: expected a recipe first, such as cutlayer {command} digits ...; "),
            ([], f"error: expected a recipe first, such as cutlayer {command} digits ...; known: digits, "),
            (["xyzzy"], "error: unknown recipe 'xyzzy'; known: digits, "),
        ):
            assert main([command, *arguments]) == 2
            said = capsys.readouterr()
            assert said.err.startswith(expected)
            assert (said.err.count("\n"), said.out) == (1, "")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_study_shows_a_table_on_a_terminal_and_markdown_in_a_pipe(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    show(MARKDOWN, console)
    shown = console.file.getvalue()
    assert (shown == f"{MARKDOWN}\n") == (not terminal)
    assert ("|---|" in shown) == (not terminal)
    assert "accuracy" in shown


def test_a_clients_folder_is_told_from_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "client.safetensors").touch()
    for command in (["compare"], ["report"]):
        assert main([*command, str(tmp_path)]) == 2
        assert "It looks like a client's folder (cutlayer join)" in capsys.readouterr().err
        assert main([*command, str(tmp_path / "nowhere")]) == 2
        assert "client's folder" not in capsys.readouterr().err


def test_a_history_says_in_words_what_it_saved() -> None:
    plain, fewer = (repr(history(Method.of(Always(), codec))) for codec in ("fp32", "fp8"))
    assert "traffic as in plain split learning; client FLOPs as in plain split learning" in plain
    assert "x less; client FLOPs as in plain split learning" in fewer
    assert "1x" not in plain
    more = History([EpochRecord(0, "A", 1.0, 8, bytes={"up": {"activations": 20}})], Baseline(10, 0, 8))
    assert "traffic 2x more" in repr(more)


def test_a_notebook_shows_the_exchanges_and_the_loss() -> None:
    found = history(Method.of(Drop(threshold=9.0), "fp8"), epochs=5)
    shown = found._repr_html_()
    assert "<th>exchanges</th><td>2A, 1B, 2C</td>" in shown
    assert f"<th>training loss</th><td>{found.losses[-1]:.4g}</td>" in shown


def test_who_is_alone_is_not_told_of_client_0() -> None:
    wrong = data((24,))[0]
    wrong.tensors[1][3] = 7
    with pytest.raises(RefusedError, match=r"^labels: expected classes from 0 to 2.* 7 \(sample 3\)"):
        fit(halves(), wrong, training=training())
    parts = data((24, 16))
    parts[1].tensors[1][3] = 7
    with pytest.raises(RefusedError, match=r"^client 1: labels"):
        fit(halves(), parts, training=training())


def test_runs_of_different_lengths_are_not_compared_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, epochs in (("short", 1), ("long", 3), ("also", 3)):
        fit(halves(), data((24,)), run=Run(tmp_path / name, {}), training=training(epochs))
    assert main(["compare", *(str(tmp_path / name) for name in ("short", "long"))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The runs are of different lengths" in said
    page = tmp_path / "page.html"
    assert main(["report", *(str(tmp_path / name) for name in ("short", "long")), "--output", str(page)]) == 0
    for file in (page, page.with_suffix(".md")):
        assert "of different lengths (a short: 1, b long: 3 epochs)" in file.read_text()
    same = {name: Run(tmp_path / name).history() for name in ("long", "also")}
    assert lengths(same) == ""
    torch.testing.assert_close(same["long"].losses, same["also"].losses)
