"""The plan of a run as a person gets it: all cuts, what is recommended, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cutlayer.codecs import get_pair
from cutlayer.errors import ConfigError
from cutlayer.method import Method, Task, Training
from cutlayer.models.cut import Halves, split
from cutlayer.planning.clock import Link
from cutlayer.planning.leaks import Leak
from cutlayer.planning.load import Load, known_exchanges
from cutlayer.planning.plan import CutPlan, Energy, Limits, Planner, data_like, exchanges_of, planned_cuts
from cutlayer.planning.timing import TIMED_HERE, Speeds
from cutlayer.schedule import Once, Periodic, Schedule

# From the mildest on. Their sizes are known beforehand; docs/formats.md has what accuracy they were measured at.
CODECS = ("fp32", "fp8", "mxfp4")
NO_LIMITS = Limits()


@dataclass(frozen=True)
class Recommendation:
    """What to choose.

    Attributes:
        plan: of the recommended cut; None if nothing was found that stays within the limits.
        schedule: the schedule, or None for the one that was asked about.
        codec: of both directions.
        why: in sentences.
    """

    plan: CutPlan | None
    schedule: Schedule | None
    codec: str
    why: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What every possible cut of a network costs.

    Attributes:
        cuts: in the order of the network.
        exchanges: of the run, such as "AABCC".
        assumed: whether these are the most it can cost, as the schedule decides by the loss.
        recommended: what to choose.
        left_out: cuts that the run's other choices do not go with, and why not.
    """

    cuts: tuple[CutPlan, ...]
    exchanges: str
    assumed: bool
    method: Method
    training: Training
    recommended: Recommendation
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Short: cuts and recommendation."""
        best = self.recommended.plan
        return f"Plan({len(self.cuts)} cuts; recommended: {best.cut if best else None})"

    def __getitem__(self, cut: str) -> CutPlan:
        """The plan of a cut, by its name."""
        found = next((each for each in self.cuts if each.cut == cut), None)
        if found is None:
            raise KeyError(f"no cut {cut!r}; there are {', '.join(each.cut for each in self.cuts)}")
        return found

    def with_leaks(self, leaks: Mapping[str, Leak]) -> Plan:
        """The same plan with what attacks got back at its cuts, by cut, as `leaks_of` reads them.

        Raises ConfigError if they are of another network, or of none of these cuts.
        """
        measured = [each for each in self.cuts if each.cut in leaks]
        if not measured:
            raise ConfigError(f"advice: is of {', '.join(leaks)}; none of them is planned (--cuts)")
        for each in measured:
            if (shape := leaks[each.cut].shape) != each.shape:
                raise ConfigError(
                    f"advice: is of another network: after {each.cut} it says shape {list(shape)}, planned is "
                    f"{list(each.shape)}"
                )
        return replace(self, cuts=tuple(replace(each, leak=leaks.get(each.cut)) for each in self.cuts))

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        best = self.recommended
        return {
            "exchanges": self.exchanges,
            "assumed": self.assumed,
            "cuts": [each.as_dict() for each in self.cuts],
            "recommended": {
                "cut": best.plan.cut if best.plan else None,
                "schedule": repr(best.schedule or self.method.schedule),
                "codec": best.codec,
                "why": list(best.why),
            },
        }

    def to_frame(self) -> Any:
        """A pandas.DataFrame with a row for each cut. Raises ConfigError without pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise ConfigError("Plan.to_frame() needs pandas: pip install pandas") from None
        return pandas.json_normalize([each.as_dict() for each in self.cuts])


def plan(
    network: nn.Module,
    sample: tuple[Tensor, Tensor],
    *,
    samples: int | Sequence[int],
    test_samples: int = 0,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    cuts: Sequence[str] | None = None,
    exchanges: str | None = None,
    link: str | Link | None = None,
    device_gflops: float | None = None,
    server_gflops: float | None = None,
    energy: Energy | None = None,
    limits: Limits = NO_LIMITS,
) -> Plan:
    """What every possible cut of a network would cost, before anything is trained; and which to choose.

    Bytes are those that the ledger will count, to the byte, unless a codec's sizes depend on the values (`exact`).
    Times and energy are estimates. How accurate the model will be, no plan can say.

    Args:
        network: the uncut network; it is left alone.
        sample: a few inputs [B, ...] and labels [B, ...], for their shapes and types, and to measure with.
        samples: training samples; a list of them for several clients.
        test_samples: of the first client.
        method, training, task: as for `fit`.
        cuts: names of layers; by default those that are possible and not inside another.
        exchanges: for a schedule that decides by the loss, how many epochs of each kind to expect, such as
            "39A 15B 6C", or epoch by epoch; without them all epochs are taken to be A, the most that it can cost.
        link: a client's link, such as "20Mbit/40ms" or "5Mbit:20Mbit/40ms" (up:down); without it no times.
        device_gflops, server_gflops: GFLOP/s of client and server; by default each is timed in this process.
        energy: what bytes and FLOPs cost a client.
        limits: what the recommendation has to stay within.

    Raises:
        ConfigError: what is given contradicts itself, or the network cannot be cut.
    """
    counts = [samples] if isinstance(samples, int) else list(samples)
    load = Load(data_like(*sample, counts, test_samples), method, training)
    return plan_of(
        network, load, task, cuts, exchanges,
        Link.parse(link) if isinstance(link, str) else link,
        Speeds(device_gflops, server_gflops), energy, limits,
    )  # fmt: skip


def plan_of(
    network: nn.Module,
    load: Load,
    task: Task,
    cuts: Sequence[str] | None,
    exchanges: str | None,
    link: Link | None,
    speeds: Speeds = TIMED_HERE,
    energy: Energy | None = None,
    limits: Limits = NO_LIMITS,
    on_cut: Callable[[str, int, int], None] = lambda cut, number, of: None,
    at_cut: Callable[[Halves], Halves] = lambda halves: halves,
) -> Plan:
    """As `plan`, for data that are at hand.

    Args:
        on_cut: called before each cut is planned: with its name, its number from 1, and how many there are.
        at_cut: what the run changes in its halves, such as to make the cut narrow; raises ConfigError if it cannot.
    """
    method, training = load.method, load.training
    if limits.hours is not None and link is None:
        raise ConfigError("a limit of hours needs a link, such as 20Mbit/40ms")
    expected = exchanges_of(method, training, exchanges)
    names = planned_cuts(network, load.first[0], cuts)
    halves = lambda cut: at_cut(split(network, cut, load.first[0]))  # noqa: E731
    planner = Planner(halves, load, expected, task, link, energy, speeds)
    plans, left_out = [], {}
    for number, name in enumerate(names, start=1):
        on_cut(name, number, len(names))
        try:
            planner.halves(name)
        except ConfigError as error:
            if cuts is not None or (number == len(names) and not plans):
                raise
            left_out[name] = str(error)
            continue
        plans.append(planner.plan(name))
    assumed = exchanges is None and known_exchanges(method.schedule, training) is None
    return Plan(tuple(plans), expected, assumed, method, training, recommend(planner, plans, limits), left_out)


def recommend(planner: Planner, plans: Sequence[CutPlan], limits: Limits) -> Recommendation:
    """The mildest method with a cut that stays within the limits, and of such cuts the fastest."""
    nearest: tuple[float, CutPlan] | None = None
    for schedule, method, exchanges in _milder_first(planner.load.method, planner.load.training):
        tried = list(plans)
        if method is not None:
            tried = [planner.plan(each.cut, method, exchanges) for each in plans]
        fitting = [each for each in tried if _excess(each, limits) <= 1]
        chosen = method or planner.load.method
        codec = f"{chosen.activations}/{chosen.gradients}"
        if fitting:
            best = min(fitting, key=_cost)
            return Recommendation(best, schedule, codec, tuple(_reasons(best, tried, limits, schedule, method)))
        closest = min(tried, key=lambda each: _excess(each, limits))
        if nearest is None or _excess(closest, limits) < nearest[0]:
            nearest = _excess(closest, limits), closest
    assert nearest is not None, "there is a first method"
    missed = f"no cut stays within the limits, even with the strongest of what was tried; nearest: {nearest[1].cut}, "
    return Recommendation(None, None, "", (missed + "; ".join(_over(nearest[1], limits)),))


def _milder_first(method: Method, training: Training) -> Iterator[tuple[Schedule | None, Method | None, str | None]]:
    """What to try: as asked; then fewer bits; then fewer exchanges, with the fewest bits."""
    yield None, None, None
    now = [each.name for each in get_pair(CODECS[0])]
    asked = [method.activations, method.gradients]
    later = CODECS[1:] if asked == now else CODECS[2:]
    methods = []
    for codec in later:
        up, down = get_pair(codec)
        methods.append(replace(method, activations=up.name, gradients=down.name))
        yield None, methods[-1], None
    for schedule in (Periodic(period=5), Periodic(period=10), Periodic(period=20), Once()):
        for chosen in (method, *methods):
            changed = replace(chosen, schedule=schedule)
            yield schedule, changed, known_exchanges(schedule, training)


def _cost(plan: CutPlan) -> tuple[float, float]:
    return (plan.run_seconds if plan.run_seconds is not None else plan.total_bytes, plan.client_memory[0])


def _used(plan: CutPlan, limits: Limits) -> list[tuple[str, float, float]]:
    """What a cut takes of each limit: its name with unit, the value, the limit."""
    pairs = [
        ("GB sent", plan.total_bytes / 1e9, limits.gigabytes),
        ("hours", (plan.run_seconds or 0.0) / 3600, limits.hours),
        ("MiB of client memory", plan.client_memory[0] / 2**20, limits.client_mib),
    ]
    return [(name, value, limit) for name, value, limit in pairs if limit is not None]


def _excess(plan: CutPlan, limits: Limits) -> float:
    return max((value / limit for _, value, limit in _used(plan, limits)), default=0.0)


def _over(plan: CutPlan, limits: Limits) -> list[str]:
    return [f"{value:.3g} {name}, {limit:g} allowed" for name, value, limit in _used(plan, limits) if value > limit]


def _reasons(
    best: CutPlan, tried: Sequence[CutPlan], limits: Limits, schedule: Schedule | None, method: Method | None
) -> Iterator[str]:
    if schedule is not None:
        yield "as asked, with 8 or with 4 bits, no cut stays within the limits, so it exchanges less often"
    elif method is not None:
        yield "with the codec asked about no cut stays within the limits, so it sends fewer bits"
    for name, value, limit in _used(best, limits):
        yield f"{value:.3g} {name} of {limit:g} allowed"
    out = [f"{each.cut} ({'; '.join(_over(each, limits))})" for each in tried if _over(each, limits)]
    if out:
        yield f"over the limits: {', '.join(out)}"
    fitting = [each for each in tried if not _over(each, limits)]
    if len(fitting) > 1:
        what = "takes the least time" if best.run_seconds is not None else "sends the least"
        stay = " that stay within the limits" if limits != Limits() else ""
        yield f"of the {len(fitting)} cuts{stay} it {what}"
