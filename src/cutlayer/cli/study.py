"""The commands `cutlayer reproduce` and `cutlayer frontier`: studies of many runs, which go on where they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown

from cutlayer.errors import ConfigError, unknown
from cutlayer.studies import Outcome, Study, frontier, sips2021
from cutlayer.studies.figures import figures
from cutlayer.studies.plots import plots
from cutlayer.studies.presets import PRESETS
from cutlayer.studies.rows import Plan, Row
from cutlayer.studies.tables import markdown


@dataclasses.dataclass(frozen=True)
class StudyArguments:
    """Carry out a study's runs and write its table. What is done is not done again; a run that was ended goes on."""

    preset: Literal["smoke", "cpu60", "cpu", "full"] = "smoke"
    """Size of the runs; see docs/studies.md for what each costs."""
    rows: list[str] | None = None
    """Only these rows; a wrong name lists them."""
    seeds: int | None = None
    """Most seeds of a row."""
    jobs: int | None = None
    """Runs side by side, each a process of one thread; by default what the preset says."""
    minutes: float | None = None
    """After so many, the runs under way stop after their epoch, to go on the next time."""
    table: bool = False
    """Run nothing: write the table of what is there."""
    results: Path | None = None
    """Folder for the results and tables; by default experiments/NAME/results."""
    run_dir: Path = Path("runs/studies")
    """Folder for the runs under way, which they go on from."""
    device: str | None = None
    """Device of the runs; by default cuda for the preset full, otherwise cpu."""


STUDIES = {"sips2021": sips2021.GROUPS}


def reproduce(arguments: Sequence[str], console: Console) -> None:
    """Run a paper's experiments and write their table."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        name, rest = next(iter(STUDIES)), ["--help"]
    if name not in STUDIES:
        raise ConfigError(f"{unknown('study', name, STUDIES)}; give it first: cutlayer reproduce STUDY ...")
    command = f"reproduce {name}"
    chosen = tyro.cli(StudyArguments, prog=f"cutlayer {command}", args=rest)
    _carry_out(chosen, command, STUDIES[name], [], console)


def frontier_command(arguments: Sequence[str], console: Console) -> None:
    """Run the method beside its rivals; write table and plots of accuracy against bytes and client FLOPs."""
    chosen = tyro.cli(StudyArguments, prog="cutlayer frontier", args=arguments)
    shared = _results(chosen, "sips2021") / f"{chosen.preset}.jsonl"
    _carry_out(chosen, "frontier", frontier.GROUPS, [shared], console)
    plan = Plan(PRESETS[chosen.preset], frontier.GROUPS)
    folder = _results(chosen, "frontier")
    study = Study(folder / f"{chosen.preset}.jsonl", [], others=[shared])
    for file in plots(study, plan, folder):
        console.print(f"plot: {file}", soft_wrap=True)


def _results(chosen: StudyArguments, name: str) -> Path:
    return chosen.results if chosen.results is not None else Path("experiments") / name / "results"


def _carry_out(
    chosen: StudyArguments, command: str, groups: Sequence[Sequence[Row]], others: list[Path], console: Console
) -> None:
    preset, folder = PRESETS[chosen.preset], _results(chosen, command.split()[-1])
    plan = Plan(preset, groups, chosen.device or ("cuda" if preset.name == "full" and not chosen.table else "cpu"))
    runs = plan.runs(chosen.rows, chosen.seeds)
    study = Study(
        folder / f"{preset.name}.jsonl",
        [config for _, config in runs],
        partial(figures, preset=preset.name),
        chosen.run_dir,
        others,
    )
    write = partial(_write_table, study, plan, folder / f"{preset.name}.md", command)
    left = len(study.todo())
    console.print(f"{study.file}: {len(runs) - left} of {len(runs)} runs are there", soft_wrap=True)
    if not chosen.table:
        jobs = preset.jobs if chosen.jobs is None else chosen.jobs
        study.run(jobs, _teller(plan, write, console), chosen.minutes)
        left = len(study.todo())
        console.print(f"{left} runs are left" + ("; the same command goes on with them" if left else ""))
    show(write() or "nothing is there yet", console)


def _teller(plan: Plan, write: Callable[[], str], console: Console) -> Callable[[Outcome], None]:
    def tell(outcome: Outcome) -> None:
        row = next(row for row, config in plan.runs() if config == outcome.config)
        console.print(
            f"{row.name}, seed {outcome['seed']}: {100 * outcome['accuracy']:.2f} %, "
            f"{outcome['exchanged_bytes'] / 1e6:.1f} MB, {outcome['seconds']:.0f} s",
            soft_wrap=True,
        )
        write()

    return tell


def show(text: str, console: Console) -> None:
    """Markdown: on a terminal its tables as such, in a pipe as it is."""
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        console.print(text, soft_wrap=True)


def _write_table(study: Study, plan: Plan, file: Path, command: str) -> str:
    text = markdown(study, plan, command, frontier.NOTES if command == "frontier" else ())
    if text:
        file.parent.mkdir(parents=True, exist_ok=True)  # the results may all be another study's
        file.write_text(text, encoding="utf-8")
    return text
