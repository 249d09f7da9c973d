"""What came of attacks: tables for the terminal, and the figure of an advice."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cutlayer import files
from cutlayer.errors import ConfigError
from cutlayer.privacy.advise import Advice
from cutlayer.privacy.assess import ATTACKS, Assessment, lengths
from cutlayer.report.units import human_bytes

COLUMNS = ("mse", "psnr", "ssim", "recognized")
CAPTION = (
    "MFLOPs of the client and bytes up are of one sample; corr. is that of distances between images with those\n"
    "between activations; the mean image takes no attack"
)


def spent(name: str, took: Mapping[str, int]) -> str:
    """How long an attack was, beside its usual length; "" if that is not known."""
    usual = lengths(ATTACKS[name]) if name in ATTACKS else {}
    return ", ".join(
        f"{count} {what}" + (f" of the usual {usual[what]}" if usual.get(what, count) != count else "")
        for what, count in took.items()
    )


def short(name: str, took: Mapping[str, int]) -> bool:
    """Whether an attack was shorter than it usually is."""
    usual = lengths(ATTACKS[name]) if name in ATTACKS else {}
    return any(took[what] < count for what, count in usual.items() if what in took)


def bound(shorter: bool) -> str:
    """What attacks say of what leaks, and what they do not; of some that were `short` or none."""
    return (
        f"{'Shorter than usual. ' if shorter else ''}What an attack got leaks; what it did not, a longer one may get."
    )


def attack_rows(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The newest line of each attack that reconstructs images, as cells by column.

    Args:
        lines: of a run's attacks.jsonl, of this version or an older one.
    """
    newest = {line["attack"]: line for line in lines if "baseline" in line}
    return [
        {
            "attack": name,
            "after epochs": str(line["epochs"]),
            "length": spent(name, line["took"]) if "took" in line else f"effort {line['effort']:g}",
            "auxiliary images": str(line["public"]),
            "SSIM": f"{line['scores']['ssim']['mean']:.3f} ± {line['scores']['ssim']['std']:.3f}",
            "SSIM of the mean image": f"{line['baseline']['ssim']['mean']:.3f}",
        }
        for name, line in newest.items()
    ]


def any_short(lines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any of such lines is of an attack that was shorter than it usually is."""
    return any(line.get("effort", 1.0) < 1 or short(line["attack"], line.get("took", {})) for line in lines)


def attack_table(assessments: Sequence[Assessment], title: str = "") -> Table:
    """A row for each attack, mean and sample standard deviation over images; the mean image last, as the yardstick."""
    count = assessments[0].scores["mse"].count if assessments else 0
    public = assessments[0].public if assessments else 0
    known = [f"{each.attack}: {spent(each.attack, each.took)}; the attacker has {each.knows}" for each in assessments]
    about = f"{count} images, mean ± standard deviation; mean image: of {public} auxiliary images, no attack"
    caption = "\n".join([about, *known, bound(any(short(each.attack, each.took) for each in assessments))])
    table = Table(title=title or None, title_justify="left", caption=caption, caption_justify="left")
    for name in ("attack", "MSE", "PSNR, dB", "SSIM", "recognized"):
        table.add_column(name, overflow="fold")
    for each in assessments:
        table.add_row(each.attack, *(str(each.scores[name]) for name in COLUMNS))
    if assessments:
        baseline = assessments[0].baseline
        table.add_section()
        table.add_row("mean image", *(str(baseline[name]) for name in COLUMNS))
    return table


LEAKS = {
    "norm AUC": "the rarest class told from the others by the norm; 0.5 is a guess",
    "direction accuracy": "labels named by the direction, given an example of each class",
    "bytes": "of a sample",
    "size spread": "standard deviation of a sample's size, relative to it",
    "zeros": "share of values that are exactly 0",
    "correlation": "of distances between images with those between activations",
    "matched": "images found among the public ones by their zeros alone",
    "guess": "what a guess would get",
}
"""What the figures of a leak are."""


def leak_table(name: str, values: Mapping[str, float]) -> Table:
    """What else a run gives away: figures by name, and what they are."""
    table = Table(title=f"from the {name}", title_justify="left", show_header=False)
    for key, value in values.items():
        table.add_row(key, f"{value:.4g}", LEAKS[key])
    return table


def advice_table(advice: Iterable[Advice]) -> Table:
    """A row for each possible cut: what it costs the client, and what an attacker gets back."""
    rows, caption = list(advice), CAPTION
    for each in (each.assessment for each in rows[:1]):
        how = f"{each.attack}: {spent(each.attack, each.took)}, {each.public} auxiliary images"
        caption += f"\n{how}\n{bound(short(each.attack, each.took))}"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for name in ("cut after", "shape", "MFLOPs B, A", "bytes", "corr.", "MSE", "SSIM"):
        table.add_column(name, justify="left" if name == "cut after" else "right", overflow="fold")
    for each in rows:
        scores, flops = each.assessment.scores, f"{each.forward / 1e6:.3g}, {each.training / 1e6:.3g}"
        shape = "x".join(map(str, each.shape))
        cells = (human_bytes(each.sample_bytes), f"{each.correlation:.3f}", str(scores["mse"]), str(scores["ssim"]))
        table.add_row(each.cut, shape, flops, *cells)
    if rows:
        baseline = rows[0].assessment.baseline
        table.add_section()
        table.add_row("mean image", "", "", "", "", str(baseline["mse"]), str(baseline["ssim"]))
    return table


def save_advice_figure(advice: Sequence[Advice], file: str | Path) -> None:
    """Draw SSIM against the client's FLOPs, a point a cut, larger for more bytes, as a PNG.

    Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("a figure needs matplotlib: pip install 'cutlayer[report]'") from None
    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.subplots()
    flops = [each.training / 1e6 for each in advice]
    scores = [each.assessment.scores["ssim"] for each in advice]
    most = max(each.sample_bytes for each in advice)
    sizes = [20 + 400 * each.sample_bytes / most for each in advice]
    axes.errorbar(flops, [s.mean for s in scores], yerr=[s.std for s in scores], fmt="none", ecolor="0.7", capsize=2)
    axes.scatter(flops, [s.mean for s in scores], s=sizes, alpha=0.6)
    for each, x, score in zip(advice, flops, scores, strict=True):
        axes.annotate(each.cut, (x, score.mean), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.axhline(advice[0].assessment.baseline["ssim"].mean, ls="--", color="0.5", label="mean image: no attack")
    axes.set(
        xlabel="client's FLOPs to train on a sample, in millions",
        ylabel=f"SSIM of the {advice[0].assessment.attack} attack (1 is a copy)",
        title="What each cut costs and gives away; the area is the bytes of a sample",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=150)
    files.replace(Path(file), out.getvalue())
