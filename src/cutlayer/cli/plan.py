"""The command `cutlayer plan`: what each possible cut of a recipe would cost, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cutlayer.cli.arguments import parse_recipe
from cutlayer.durable import replace
from cutlayer.method import Task
from cutlayer.planning.choice import Plan, plan_of
from cutlayer.planning.clock import Link
from cutlayer.planning.leaks import leaks_of
from cutlayer.planning.plan import CutPlan, Energy, Limits
from cutlayer.planning.recipe import load_of
from cutlayer.planning.timing import Speeds
from cutlayer.report.plain import plain_console
from cutlayer.report.units import human_bytes, human_seconds
from cutlayer.runs.choices import Choices
from cutlayer.runs.experiment import threads
from cutlayer.runs.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """A recipe, with whatever is changed in it, the client's link and device, and what the run may cost."""

    recipe: tyro.conf.Suppress[str]
    choices: Annotated[Choices, tyro.conf.arg(name="")]
    cuts: tuple[str, ...] | None = None
    """Layers to cut after; by default those that are possible and not inside another."""
    exchanges: str | None = None
    """For a schedule that decides by the loss: how many epochs of each kind to expect, such as "39A 15B 6C". By default
    all are taken to be A, the most that the run can cost."""
    link: str | None = None
    """Rate and round trip of a client's link, such as 20Mbit/40ms, or 5Mbit:20Mbit/40ms (up:down)."""
    device_gflops: float | None = None
    """GFLOP/s of the client's device; by default it is timed here."""
    server_gflops: float | None = None
    """GFLOP/s of the server; by default it is timed here."""
    max: Limits = dataclasses.field(default_factory=Limits)
    """What the run may cost at most."""
    energy: Energy = dataclasses.field(default_factory=Energy)
    """What bytes and FLOPs cost a client."""
    advice: str | None = None
    """File of `cutlayer attack RUN --advise`, RUN/advice.jsonl, of this network trained: what each cut gives away."""
    json: str | None = None
    """File to write the plan to."""


def plan(arguments: Sequence[str], console: Console) -> None:
    """Say what each possible cut of a recipe would cost, and which to choose."""
    chosen: PlanArguments = parse_recipe(
        {name: PlanArguments(name, Choices.of(recipe())) for name, recipe in RECIPES.items()},
        {name: recipe.__doc__ or "" for name, recipe in RECIPES.items()},
        "cutlayer plan",
        arguments,
    )
    link = Link.parse(chosen.link) if chosen.link is not None else None
    leaks = leaks_of(chosen.advice) if chosen.advice is not None else None
    config = chosen.choices.applied_to(RECIPES[chosen.recipe]())
    outline = config.data.outline()
    with threads(config.threads), told(console.quiet) as tell:
        load, read = load_of(config)
        found = plan_of(
            config.network(outline),
            load,
            Task(),
            chosen.cuts,
            chosen.exchanges,
            link,
            Speeds(chosen.device_gflops, chosen.server_gflops),
            chosen.energy if chosen.energy != Energy() else None,
            chosen.max,
            on_cut=tell,
            at_cut=lambda halves: config.at_cut(halves, outline),
        )
    if leaks is not None:
        found = found.with_leaks(leaks)
    if chosen.json is not None:
        replace(Path(chosen.json), json.dumps(found.as_dict(), indent=2) + "\n")
    console.print(f"{config.model.name} on {config.data.name}, {config.training.epochs} epochs, {config.method!r}")
    for table in tables(found):
        console.print(table)
    for line in lines(found, read):
        console.print(line, soft_wrap=True)


SILENT = 2.0
"""Seconds after which a line says how far the plan is, if nobody sees a status."""


@contextmanager
def told(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """What says how far a plan is: on a terminal in one line that changes, elsewhere in a line now and then."""
    console, said = plain_console(stderr=True, quiet=quiet), time.monotonic()
    with console.status("") if console.is_terminal else nullcontext() as status:

        def tell(cut: str, number: int, of: int) -> None:
            nonlocal said
            line = f"planning a cut after {cut} ({number} of {of})"
            if status is not None:
                status.update(line)
            elif time.monotonic() - said > SILENT:
                said = time.monotonic()
                console.print(line, soft_wrap=True)

        yield tell


def tables(plan: Plan) -> Iterator[Table]:
    """The cuts below each other: what is sent and stored, and what it asks of the client."""
    best = plan.recommended.plan
    names = [f"{each.cut} *" if best is not None and best.cut == each.cut else each.cut for each in plan.cuts]
    client = CLIENT if plan.cuts[0].joules is None else (*CLIENT, "energy")
    parts: list[tuple[tuple[str, ...], Callable[[CutPlan], Iterator[str]]]] = [(SENT, _sent), (client, _client)]
    if plan.cuts[0].run_seconds is not None:
        parts.append((TIMES, _times))
    if any(each.leak for each in plan.cuts):
        parts.append((LEAKS, _leaks))
    for headers, cells in parts:
        made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        made.add_column("cut after", no_wrap=True)
        for header in headers:
            made.add_column(header, justify="right", no_wrap=True)
        for name, each in zip(names, plan.cuts, strict=True):
            made.add_row(name, *cells(each), style="bold" if name.endswith("*") else "")
        yield made


SENT = ("shape", "B a sample", "run, up", "run, down", "evaluation", "stored")
CLIENT = ("parameters", "memory A", "memory B", "client GFLOPs", "evaluation")
LEAKS = ("attack", "SSIM", "mean image")
TIMES = ("epoch A", "epoch B", "epoch C", "evaluation", "run")


def _sent(plan: CutPlan) -> Iterator[str]:
    about = "" if plan.exact else "~"
    yield "x".join(map(str, plan.shape))
    yield f"{about}{plan.sample_bytes[0]:.0f}, {plan.sample_bytes[1]:.0f}"
    for kind in ("up", "down", "evaluation"):
        yield about + human_bytes(plan.run_bytes[kind])
    yield human_bytes(plan.store_bytes)


def _client(plan: CutPlan) -> Iterator[str]:
    yield f"{plan.client_parameters:,}"
    yield from map(human_bytes, plan.client_memory)
    for gflops in (plan.client_flops / 1e9, plan.evaluation_flops / 1e9):
        yield f"{gflops:,.0f}" if gflops >= 1000 else f"{gflops:.4g}"
    if plan.joules is not None:
        yield f"{plan.joules:,.4g} J"


def _times(plan: CutPlan) -> Iterator[str]:
    for kind in ("A", "B", "C", "evaluation"):
        yield human_seconds(plan.seconds[kind]) if kind in plan.seconds else "-"
    yield "" if plan.run_seconds is None else human_seconds(plan.run_seconds)


def _leaks(plan: CutPlan) -> Iterator[str]:
    leak = plan.leak
    yield from (
        ("-",) * 3 if leak is None else (leak.attack, f"{leak.ssim:.3f} ± {leak.std:.2g}", f"{leak.mean_image:.3f}")
    )


def lines(plan: Plan, read: bool = True) -> Iterator[str]:
    """What is to be said below the table."""
    count = {kind: plan.exchanges.count(kind) for kind in "ABC"}
    if plan.assumed:
        yield (
            f"{plan.method.schedule!r} decides by the loss: all {len(plan.exchanges)} epochs are taken to be A, the "
            f"most it can cost; say what to expect with --exchanges, such as '{_third(plan.exchanges)}'"
        )
    else:
        yield f"epochs: {', '.join(f'{n} {kind}' for kind, n in count.items())}"
    if not read:
        yield "the data are not here: planned with as many samples as they have, of zeros"
    if not all(each.exact for each in plan.cuts):
        yield "~: what this codec sends depends on the values; estimated with the weights that the network begins with"
    for cut, why in plan.left_out.items():
        yield f"left out: a cut after {cut}: {why}"
    if any(each.leak for each in plan.cuts):
        yield "SSIM: what the attack got back of the images, 1 is a copy; the mean image takes no attack"
    best = plan.recommended
    if best.plan is not None:
        schedule = best.schedule or plan.method.schedule
        yield f"recommended (*): cut after {best.plan.cut}, {schedule!r}, {best.codec}"
        if best.schedule is not None or best.codec != f"{plan.method.activations}/{plan.method.gradients}":
            sent, seconds = human_bytes(best.plan.total_bytes), best.plan.run_seconds
            yield f"  so it sends {sent}" + (f" and takes {human_seconds(seconds)}" if seconds is not None else "")
    for why in best.why:
        yield f"  {why}"


def _third(exchanges: str) -> str:
    epochs = len(exchanges)
    return f"{epochs - epochs // 3 - epochs // 3}A {epochs // 3}B {epochs // 3}C"
