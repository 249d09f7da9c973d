"""A study's table as Markdown, made from its results: each row beside plain split learning and beside the paper."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from cutlayer.studies.rows import Plan, Row
from cutlayer.studies.study import Outcome, Study

HEAD = (
    "| row | n | accuracy, % | merged, % | loss, points | MB | times the images | traffic | all bytes "
    "| client TFLOPs | client compute "
    "| epochs A / B / C | exchanges | seconds | the paper |"
)
ABOUT = (
    "*Accuracy* is that of the preset's test images at the end, over the wire, through the codec; *merged* that of the "
    "merged model in 32 bits; *loss* is plain minus this row, over the wire, paired by seed; all with the sample "
    "standard deviation over n seeds. *MB* (10^6 bytes) and *traffic* count activations and gradients by the ledger, "
    "as the paper does, *all bytes* also labels, ids, headers and weights of client halves; evaluation is apart. "
    "*Times the images* is MB divided by the bytes of uploading the training images once, as they are. "
    "*Traffic*, *all bytes* and *client compute* are plain's divided by this row's. *Exchanges* are epochs "
    "in which anything was sent: ratios grow with a run's epochs, exchanges do not. *The paper* is what its abstract "
    "claims of such cases, at under 0.5 points; which row of it belongs to which network, schedule and cut, and its "
    "training set-up, are not known."
)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def outcomes_of(study: Study, plan: Plan, row: Row) -> dict[int, Outcome]:
    """What is there of a row, by seed."""
    found = study.outcomes([plan.config(row, seed) for seed in range(plan.preset.seeds)])
    return {outcome.config.training.seed: outcome for outcome in found}


def markdown(study: Study, plan: Plan, command: str, notes: Sequence[str] = ()) -> str:
    """The table of what is there; empty if nothing is.

    Args:
        command: by which the study is carried out, without `cutlayer` and the preset.
        notes: what is said below the table.
    """
    by_row = {row.name: outcomes_of(study, plan, row) for row in plan.rows}
    once = plan.preset.images * plan.preset.image_bytes
    lines = [cells(row, by_row[row.name], by_row.get(row.against, {}), once) for row in plan.rows if by_row[row.name]]
    if not lines:
        return ""
    where = next(outcome["environment"] for found in by_row.values() for outcome in found.values())
    device = where["cuda"] or f"{where['processor']}, {where['cores']} cores, one thread a run"
    preset = plan.preset
    sizes = {
        name: f"{model.name} of width {model.width:g}, cut after {model.cut}" for name, model in preset.networks.items()
    }
    return "\n".join(
        [
            f"`cutlayer {command} --preset {preset.name} --table`. Preset {preset.name}: {preset.about}. "
            f"{'; '.join(sizes.values())}. torch {where['torch']}, Python {where['python']}, {device}.",
            "",
            ABOUT,
            "",
            HEAD,
            "|" + "---|" * (HEAD.count("|") - 1),
            *(f"| {' | '.join(line)} |" for line in lines),
            *(["", *notes] if notes else []),
            "",
        ]
    )


def cells(row: Row, found: Mapping[int, Outcome], plain: Mapping[int, Outcome], once: int) -> list[str]:
    """The cells of a row, from its outcomes and those of plain split learning, both by seed.

    Args:
        once: bytes of uploading the training images.
    """
    runs = list(found.values())

    def mean(measure: Callable[[Outcome], float]) -> float:
        return statistics.mean(measure(outcome) for outcome in runs)

    def times(measure: Callable[[Outcome], float]) -> str:
        if not plain or row.against == row.name:
            return "1x" if row.against == row.name else ""
        whole, part = statistics.mean(measure(outcome) for outcome in plain.values()), mean(measure)
        return f"{whole / part:.1f}x" if part else "all"

    paired = [100 * (plain[seed]["accuracy"] - found[seed]["accuracy"]) for seed in found if seed in plain]
    letters = [f"{mean(lambda o, x=x: o['exchanges'].count(x)):.3g}" for x in "ABC"]
    merged = [100 * run["accuracy_merged"] for run in runs if run["accuracy_merged"] is not None]
    return [
        row.title if row.network == "vgg11" else f"{row.network}: {row.title}",
        str(len(runs)),
        spread([100 * run["accuracy"] for run in runs]),
        spread(merged) if merged else "",
        spread(paired) if paired and row.against != row.name else "",
        f"{mean(exchanged) / 1e6:.1f}",
        f"{mean(exchanged) / once:.{0 if mean(exchanged) >= 100 * once else 1}f}",
        times(exchanged),
        times(all_bytes),
        f"{mean(client_flops) / 1e12:.3g}",
        times(client_flops),
        " / ".join(letters),
        f"{mean(lambda o: len(o['exchanges']) - o['exchanges'].count('C')):.3g}",
        f"{mean(lambda o: o['seconds']):.0f}",
        row.claim,
    ]


def exchanged(outcome: Outcome) -> float:
    """Bytes of activations and gradients."""
    return outcome["exchanged_bytes"]


def all_bytes(outcome: Outcome) -> float:
    """All bytes of training."""
    return outcome["bytes_up"] + outcome["bytes_down"]


def client_flops(outcome: Outcome) -> float:
    """FLOPs of the clients' training."""
    return outcome["client_flops"]
