"""Reports of whole, unfinished and broken runs, as a page, as tables, and in a browser if there is one."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from cutlayer import History, Run, run_experiment, with_choices
from cutlayer.cli import main
from cutlayer.report.charts import Series, heat_map, lines, short, timeline
from cutlayer.runs.findings import view_of
from cutlayer.runs.recipes import digits

mpl.use("Agg")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that what is opened is closed, and gathers texts and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    small = {"train_samples": 200, "test_samples": 60, "epochs": 4, "clients": 3, "schedule": "periodic", "period": 3}
    for name, codec in (("eight bits", "fp8"), ("<all> & more", "fp32")):
        run_experiment(with_choices(digits(), **small, codec=codec), folder / name)
    return folder


def report(folder: Path, *runs: Path) -> Page:
    page = folder / "out.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    return Page(page.read_text())


def test_a_page_of_two_runs(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path, runs / "eight bits", runs / "<all> & more")
    assert all(address.startswith("data:") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    text = " ".join(page.texts)
    wanted = ["Training loss", "Test accuracy against what was sent", "Choices that differ", "<all> & more"]
    wanted += ["Which class is taken for which", "Who has what", "method.activations", "2 A, 1 B, 1 C"]
    assert [each for each in wanted if each not in text] == []
    assert "Missing" not in text
    assert "cuda None" not in text
    assert ", command " in text
    assert "command [" not in text  # a line for a shell
    assert page.tags.count("svg") == 2 + 5 + 2 + 2  # strips, charts, confusions, partitions


def test_the_same_figures_as_tables(runs: Path, tmp_path: Path) -> None:
    report(tmp_path, runs / "eight bits", runs / "<all> & more")
    history = Run(runs / "eight bits").history()
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 8
    assert sum(int(row["bytes up"]) for row in rows[:4]) == history.bytes("up")
    assert sum(int(row["client FLOPs"]) for row in rows[:4]) == history.flops("client")
    text = (tmp_path / "out.md").read_text()
    assert f"| test accuracy, merged model | {history.merged['accuracy']:.4f} |" in text
    matrix = text.split("taken for which: a eight bits")[1].split("##")[0].strip().splitlines()[2:]
    counts = [[int(cell) for cell in line.strip("| ").split(" | ")[1:]] for line in matrix]
    assert sum(map(sum, counts)) == 60
    assert sum(counts[n][n] for n in range(10)) == round(60 * history.merged["accuracy"])


def test_pictures_of_a_gallery(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "eight bits", tmp_path / "run")
    figure = Figure(figsize=(1, 1))
    (run / "privacy").mkdir()
    figure.savefig(run / "privacy" / "gallery.png")
    page = report(tmp_path, run)
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"]
    assert "What an attacker sees" in page.texts


def broken(run: Path, how: str) -> None:
    metrics = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    if how == "config":
        (run / "config.json").write_text("{")
    elif how == "no config":
        (run / "config.json").unlink()
    elif how == "half a line":
        (run / "metrics.jsonl").write_bytes(b"".join(metrics[:2]) + metrics[2][:30])
        (run / "model.safetensors").unlink()
    elif how == "a damaged line":
        (run / "metrics.jsonl").write_bytes(metrics[0] + metrics[1].replace(b"loss", b"lost", 1) + metrics[2])
    elif how == "begun":
        (run / "metrics.jsonl").unlink()
        (run / "model.safetensors").unlink()
        shutil.rmtree(run / "checkpoints")
    elif how == "merged":
        (run / "merged.json").write_text("{}{")
    elif how == "partition":
        (run / "partition.json").write_text("[]")
    else:
        (run / "model.safetensors").write_bytes(b"no model")


@pytest.mark.parametrize(
    ("how", "said", "epochs"),
    [
        ("config", "choices, hardware", 4),
        ("no config", "choices, hardware", 4),
        ("half a line", "the run is not at its end", 2),
        ("a damaged line", "from the first that cannot be read", 1),
        ("begun", "epochs 1 to 4", 0),
        ("merged", "scores of the merged model", 4),
        ("partition", "who has what", 4),
        ("model", "confusion matrix", 4),
    ],
)
def test_a_broken_run_gives_what_there_is(runs: Path, tmp_path: Path, how: str, said: str, epochs: int) -> None:
    run = shutil.copytree(runs / "eight bits", tmp_path / "run")
    broken(run, how)
    page = report(tmp_path, run, runs / "<all> & more")
    assert any(said in text for text in page.texts)
    assert len(view_of(run).history.epochs) == epochs
    assert any(f"{epochs} epochs" in text for text in page.texts)


def test_a_folder_without_a_run_is_left_out(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    report(tmp_path, runs / "eight bits", tmp_path / "nowhere")
    assert "left out" in capsys.readouterr().err
    assert main(["report", str(runs / "eight bits"), "--output", "page.pdf"]) == 2


def test_charts_hold_what_they_are_given() -> None:
    chart = lines([Series("a", "one", [(1, 2.0), (2, float("nan")), (3, 4.0)])], "x", "<y>")
    (points,) = re.findall(r'points="([^"]*)"', chart)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert x0 < x1
    assert y0 > y1
    assert "&lt;y&gt;" in chart
    assert lines([Series("a", "none", [])], "x", "y") == ""
    strip = timeline("AAAB" + 36 * "C")
    widths = [float(width) for width in re.findall(r'<rect[^>]*? width="([\d.]+)"', strip)]
    assert widths[0] == pytest.approx(3 * widths[1], rel=0.1)
    assert widths[2] == pytest.approx(12 * widths[0], rel=0.1)
    assert heat_map([[0, 4], [1, 0]], "ab", "cd", "counts").count("<rect") == 4
    assert [short(value) for value in (0.125, 1500, 2e7)] == ["0.125", "1.5k", "20M"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "columns"), [(500, 1), (1300, 2)])
def test_in_a_browser(runs: Path, tmp_path: Path, width: int, columns: int) -> None:
    """Nothing is wider than the window but what scrolls by itself, and charts stand side by side if there is room."""
    report(tmp_path, runs / "eight bits", runs / "<all> & more")
    page = tmp_path / "out.html"
    script = """<script>addEventListener("load", () => {
        const tops = [...document.querySelectorAll("figure")].slice(0, 2).map(f => f.getBoundingClientRect().top);
        const root = document.documentElement;
        document.title = JSON.stringify({wide: root.scrollWidth, window: root.clientWidth,
            columns: tops[0] === tops[1] ? 2 : 1,
            small: [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width < 100).length});
    })</script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    measured = json.loads(re.search(r"<title>(\{.*?\})</title>", shown)[1])
    assert measured == {"wide": measured["window"], "window": measured["window"], "columns": columns, "small": 0}


def test_notebooks_and_figures(runs: Path) -> None:
    run = Run(runs / "eight bits")
    axes = run.plot()
    assert axes.get_ylabel() == "training loss"
    assert axes.lines[0].get_ydata().tolist() == run.history().losses
    assert len(run.to_frame()) == 4
    shown = run._repr_html_() + History([], run.history().baseline)._repr_html_()
    Page(shown)
    assert "test accuracy" in shown
    with pytest.raises(ValueError, match="unknown metric 'f1'"):
        run.plot("f1")
