"""The figures in the tables of docs/formats.md are those of the committed results, rounded to the digits shown."""

import re
from pathlib import Path

import pytest

from cutlayer.codecs import get_float_codec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/formats.md"
CODECS = ROOT / "benchmarks/results/codecs.md"
LOSSLESS = ROOT / "benchmarks/results/lossless.md"
STUDIES = ROOT / "experiments/codecs/results"
SAMPLES, SHAPE = 1024, (32, 8, 8)  # of the tensors that benchmarks/codecs.py measures

# Names in the docs that stand for several rows of the results, or for one under another name.
ROWS = {
    "plain casts, E4M3": ["torch e4m3 scaled"],
    "plain casts, E5M2": ["torch e5m2 scaled"],
    "zstd level 1, 3, 19": ["zstd level 1", "zstd level 3", "zstd level 19"],
    "zstd level -1, -5": ["zstd level -1", "zstd level -5"],
    "zlib, Huffman only; level 1": ["zlib, Huffman only", "zlib level 1"],
    "brotli 1, 5": ["brotli 1", "brotli 5"],
}


def table(file: Path, header: str, after: str = "") -> list[list[str]]:
    """The cells of the first table behind the text `after` whose header line begins with `header`."""
    lines = file.read_text().partition(after)[2].splitlines() if after else file.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" `*") for cell in line.strip().strip("|").split("|")])
    return rows


def named(rows: list[list[str]]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in rows}


def figures(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


def agree(shown: str, results: list[str]) -> bool:
    """Whether the figures shown are the first of these results, rounded to as many digits as are shown."""
    got = figures(shown)
    places = [len(figure.partition(".")[2]) for figure in got]
    return len(got) == len(results) and all(
        abs(float(figure) - float(result)) <= 0.5 * 10**-place + 1e-9
        for figure, place, result in zip(got, places, results, strict=True)
    )


def measured(direction: str) -> dict[str, list[str]]:
    """Bits, entropy, error, encode, decode by codec; of the speeds the median."""
    rows = named(table(CODECS, "| codec |", f"## {direction}"))
    return {name: [cell.split(" ")[0] for cell in cells] for name, cells in rows.items()}


@pytest.mark.parametrize("direction", ["activations", "gradients"])
def test_bits_and_errors_of_formats(direction: str) -> None:
    results = measured(direction)
    shown = named(table(DOCS, "| format | activations: error"))
    assert len(shown) > 10
    for name, cells in shown.items():
        error, bits, packed, entropy = cells[:4] if direction == "activations" else cells[4:]
        layout = get_float_codec(name).layout(SHAPE)  # what a format takes without `+zstd` follows from the shape
        size = 8 * (SAMPLES * layout.row_bytes + layout.shared_bytes) / (SAMPLES * SHAPE[0] * SHAPE[1] * SHAPE[2])
        lossless = results[f"{name}+zstd"]
        assert agree(error, [lossless[2]]), name
        assert agree(bits, [str(size)]), name
        assert agree(packed, [lossless[0]]), name
        assert agree(entropy, [lossless[1]]), name


@pytest.mark.parametrize("direction", ["activations", "gradients"])
def test_speeds(direction: str) -> None:
    results = measured(direction)
    shown = named(table(DOCS, "| | activations: encode"))
    assert len(shown) > 10
    for name, cells in shown.items():
        there, back = cells[:2] if direction == "activations" else cells[2:]
        speeds = results[ROWS.get(name, [name])[0]][3:]
        assert agree(there, [speeds[0]]), name
        assert agree(back, [speeds[1]] if speeds[1] else []), name


def test_speed_beside_plain_casts() -> None:
    ratios = re.findall(r"out and back: ([\d.]+) times", CODECS.read_text())
    up, down = re.search(
        r"is ([\d.]+) times as fast as plain casts for activations and ([\d.]+)", DOCS.read_text()
    ).groups()
    assert [up, down] == ratios


def test_coders_of_the_lossless_stage() -> None:
    results = [named(table(LOSSLESS, "| coder |", f"\n{kind}:")) for kind in ("activations", "gradients")]
    shown = named(table(DOCS, "| coder |"))
    assert len(shown) > 5
    for name, cells in shown.items():
        for kind, (bits, times) in zip(results, (cells[:2], cells[2:]), strict=True):
            rows = [kind[row] for row in ROWS.get(name, [name])]
            assert agree(bits, [row[0] for row in rows]), name
            assert agree(times, [row[1] for row in rows] + [row[2] for row in rows]), name


def test_changes_by_epoch() -> None:
    results = {(spec, epoch): cells for spec, epoch, *cells in table(STUDIES / "changes.md", "| spec |")}
    specs = list(dict.fromkeys(spec for spec, _ in results))
    for name, *cells in table(DOCS, "| epoch |"):
        for place, spec in enumerate(specs):
            change, error, sent, bits = results[spec, name.split(" ")[0]]
            first = figures(sent)[0] if "0.3" in spec else change  # with a tolerance, the share that was sent
            assert agree(cells[2 * place], [first, error]), (name, spec)
            assert agree(cells[2 * place + 1], [bits]), (name, spec)


def test_accuracies() -> None:
    file, results = STUDIES / "cifar10.md", {}
    for header in re.findall(r"^\| .* \| runs \|", file.read_text(), re.MULTILINE):
        results |= named(table(file, header))
    shown = named(table(DOCS, "| activations and gradients |"))
    assert shown.keys() == results.keys()
    for name, (runs, accuracy, up, down, traffic) in shown.items():
        result = results[name]
        assert runs == result[0], name
        assert agree(accuracy, figures(result[1])), name
        assert agree(up, figures(result[3])[-1:]), name
        assert agree(down, figures(result[4])[-1:]), name
        assert agree(traffic, figures(result[5])), name
