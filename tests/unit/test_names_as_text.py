"""Names from configs, folders and clients are text wherever they are shown."""

import csv
import io
from pathlib import Path

import pytest

from cutlayer.cli import main
from cutlayer.records.history import Baseline, EpochRecord, History
from cutlayer.report.charts import timeline
from cutlayer.report.page import epochs_csv, markdown
from cutlayer.report.spreadsheet import csv_text
from cutlayer.report.view import RunView


@pytest.mark.parametrize("begin", "=+-@\t")
def test_no_text_in_a_table_is_a_formula(begin: str) -> None:
    (row,) = csv.DictReader(io.StringIO(csv_text([{"run": f"{begin}1+1", "loss": -1.5}], ["run", "loss"]), newline=""))
    assert row == {"run": f"'{begin}1+1", "loss": "-1.5"}


def test_a_line_of_the_table_is_a_row() -> None:
    (row,) = csv.DictReader(io.StringIO(csv_text([{"run": "a\r=1\nb"}], ["run"]), newline=""))
    assert row == {"run": "a =1\nb"}


def view(name: str, exchange: str = "A") -> RunView:
    return RunView(
        name, History([EpochRecord(0, exchange, 0.5, 8)], Baseline(1, 1)), {}, {}, (), (), (), [f"{name}: x"]
    )


def test_the_name_of_a_run_is_no_formula_and_no_markup() -> None:
    name = "=<b>a|b</b>"
    assert "\n'=<b>" in epochs_csv([view(name)])
    tables = markdown([view(name), view("other")], name, [None, None])
    assert "<b>" not in tables
    assert "&lt;b&gt;a\\|b" in tables


def test_an_exchange_that_is_none_is_text_in_a_chart() -> None:
    drawn = timeline('A<"')
    assert "<<" not in drawn.replace("<</", "")
    assert 'class="x"' in drawn
    assert "&lt;" in drawn


def test_brackets_in_a_name_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "[bold]a[red].json"
    assert main(["partition", "--data", "digits", "--clients", "2", "--out", str(file)]) == 0
    assert str(file) in capsys.readouterr().out.replace("\n", "")
