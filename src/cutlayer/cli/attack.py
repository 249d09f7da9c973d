"""The command `cutlayer attack`: what the cut of a run protects, measured by attacks; and where to cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from cutlayer.errors import ConfigError, unknown
from cutlayer.privacy.advise import advise
from cutlayer.privacy.assess import ATTACKS, LEAKS, assess, frame_leak, get_attack, label_leak
from cutlayer.privacy.gallery import save_gallery
from cutlayer.records.environment import environment
from cutlayer.records.lines import Lines
from cutlayer.report.privacy import advice_table, attack_table, leak_table, save_advice_figure, short, spent
from cutlayer.runs.attack import Attacked, attacked
from cutlayer.runs.experiment import threads
from cutlayer.runs.run import Run

NAMES = (*ATTACKS, *LEAKS)


@dataclasses.dataclass(frozen=True)
class AttackArguments:
    """Attack a recipe's run: reconstruct training images from what the server is sent.

    Results are added to attacks.jsonl in the run's folder; originals and reconstructions are in attacks.png there.
    """

    run: tyro.conf.Positional[str]
    """Folder of the run, finished or not."""
    attack: list[str] = dataclasses.field(default_factory=lambda: ["decoder"])
    """One or more of: decoder, known_half, unsplit, fsha, sdar (images); labels (from gradients), frames (sizes and
    zeros); or all. See docs/privacy.md."""
    advise: bool = False
    """Attack the network at every possible cut instead, beside the client's FLOPs and bytes (first of --attack)."""
    images: int = 64
    """Training images to reconstruct, the first so many of client 0."""
    public: int | None = 2000
    """Images that the attacker has: the first so many of the test data."""
    epochs: int | None = None
    """Attack the halves as they were after so many epochs, if that checkpoint is there."""
    client: str | None = None
    """Folder of the client, for a run that was served to one client."""
    effort: float = 1.0
    """Times an attack's usual steps: 0.1 for a quick look."""
    seed: int = 0
    """Seed of the attacks' draws."""
    threads: int | None = None
    """PyTorch's threads on the CPU."""


def attack(arguments: Sequence[str], console: Console) -> None:
    """Attack a run, to measure what its cut protects; or advise where to cut."""
    chosen = tyro.cli(AttackArguments, prog="cutlayer attack", args=arguments)
    names = list(NAMES) if chosen.attack == ["all"] else chosen.attack
    if strange := [name for name in names if name not in NAMES]:
        raise ConfigError(unknown("attack", strange[0], [*NAMES, "all"]))
    run = Run(chosen.run)
    limits = {"images": chosen.images, "public": chosen.public, "epochs": chosen.epochs}
    with threads(chosen.threads):
        found = attacked(run, **limits, client=chosen.client, seed=chosen.seed)
        if chosen.advise:
            _advise(run, found, names[0], chosen, console)
        else:
            _attack(run, found, names, chosen, console)


def _attack(run: Run, found: Attacked, names: Sequence[str], chosen: AttackArguments, console: Console) -> None:
    lines, about = Lines(run.folder / "attacks.jsonl"), _about(found, chosen)
    assessments, rows, leaks = [], {}, {}
    for name in names:
        if name in LEAKS:
            leaks[name] = label_leak(found.target) if name == "labels" else frame_leak(found.target)
            lines.append({"attack": name, "scores": leaks[name], **about})
            continue
        assessment, images = assess(name, get_attack(name, chosen.effort), found.target)
        lines.append({**assessment.as_dict(), **about})
        assessments.append(assessment)
        took = f", {spent(name, assessment.took)}" if short(name, assessment.took) else ""
        rows[f"{name}: SSIM {assessment.scores['ssim'].mean:.3f}{took}"] = images
    if assessments:
        console.print(attack_table(assessments, f"{run.folder.name} after {found.epochs} epochs"))
        file = run.folder / "attacks.png"
        save_gallery(found.target.private, rows, file)
        console.print(f"wrote {file}", soft_wrap=True)
    for name, values in leaks.items():
        console.print(leak_table("gradients at the cut" if name == "labels" else "frames alone", values))
    console.print(f"results: {lines.file}", soft_wrap=True)


def _advise(run: Run, found: Attacked, name: str, chosen: AttackArguments, console: Console) -> None:
    lines, rows = Lines(run.folder / "advice.jsonl"), []
    for each in advise(found.network, found.target, get_attack(name, chosen.effort), name):
        lines.append({**each.as_dict(), **_about(found, chosen)})
        rows.append(each)
        console.print(f"{each.cut}: SSIM {each.assessment.scores['ssim']}")
    console.print(advice_table(rows))
    figure: Path = run.folder / "advice.png"
    save_advice_figure(rows, figure)
    for file in (lines.file, figure):
        console.print(f"wrote {file}", soft_wrap=True)


def _about(found: Attacked, chosen: AttackArguments) -> dict[str, object]:
    return {
        "epochs": found.epochs,
        "public": len(found.target.public),
        "effort": chosen.effort,
        "seed": chosen.seed,
        "environment": environment(),
    }
