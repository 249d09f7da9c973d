"""The frontier as plots: accuracy against bytes, and against client FLOPs. Needs matplotlib (extra `report`)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cutlayer.errors import ConfigError
from cutlayer.studies.rows import Plan
from cutlayer.studies.study import Outcome, Study
from cutlayer.studies.tables import client_flops, exchanged, outcomes_of

AXES: dict[str, tuple[str, Callable[[Outcome], float]]] = {
    "bytes": ("activations and gradients, MB", lambda outcome: exchanged(outcome) / 1e6),
    "flops": ("client FLOPs, training, TFLOPs", lambda outcome: client_flops(outcome) / 1e12),
}


def plots(study: Study, plan: Plan, folder: Path) -> list[Path]:
    """Write PRESET-bytes.svg and PRESET-flops.svg of what is there; return the files, none if nothing is there.

    Points are means over seeds; bars are the sample standard deviation. Raises ConfigError without matplotlib.
    """
    by_title = {row.title: list(outcomes_of(study, plan, row).values()) for row in plan.rows}
    there = {title: runs for title, runs in by_title.items() if runs}
    if not there:
        return []
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("plots need matplotlib: pip install 'cutlayer[report]'") from None
    files = []
    for name, (label, measure) in AXES.items():
        lines = -(-(len(there) + 1) // 2)  # of the legend, in two columns below: titles may be long
        figure = Figure(figsize=(8.5, 4.0 + 0.22 * lines), layout="constrained")
        _draw(figure.subplots(), there, label, measure)
        if name == "bytes":
            once = plan.preset.images * plan.preset.image_bytes / 1e6
            figure.axes[0].axvline(once, color="grey", linestyle=":", label="the images, once")
        figure.legend(loc="outside lower center", fontsize="small", ncols=2)
        files.append(folder / f"{plan.preset.name}-{name}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
    return files


def _draw(axes: Any, there: dict[str, list[Outcome]], label: str, measure: Callable[[Outcome], float]) -> None:
    for number, (title, runs) in enumerate(there.items()):
        accuracies = [100 * run["accuracy"] for run in runs]
        axes.errorbar(
            statistics.mean(measure(run) for run in runs),
            statistics.mean(accuracies),
            statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
            marker="osD^v<>Pp*hX"[number % 12],
            linestyle="none",
            label=title,
        )
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy, %")
    axes.grid(visible=True, alpha=0.3)
