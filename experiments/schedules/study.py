"""When to communicate: every schedule, three seeds, 32 and 8 bits; accuracy and bytes of each.

    python experiments/schedules/study.py digits     # 100 epochs each, about 15 minutes on one core
    python experiments/schedules/study.py cifar10    # narrow VGG11 on 10,000 images, one seed; hours on one core

Writes results/NAME.jsonl (a line for each run) and results/NAME.md (the table made of it). Runs that are in the file
already are not run again, so it can be interrupted; delete the file to start afresh.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from cutlayer import RunConfig, with_choices
from cutlayer.runs.choices import Choices
from cutlayer.runs.fit import Result
from cutlayer.runs.recipes import cifar10_small, digits
from cutlayer.studies import Outcome, Study, add_options, carry_out, usual_figures

RESULTS = Path(__file__).parent / "results"


def grid(base: RunConfig, thresholds: tuple[float, ...], periods: tuple[int, ...]) -> list[RunConfig]:
    """Plain split learning first, then every schedule."""
    settings: list[dict] = [{"schedule": "always"}]
    settings += [{"schedule": name, "threshold": t} for name in ("drift", "drop", "plateau") for t in thresholds]
    settings += [{"schedule": "periodic", "period": period} for period in periods]
    return [with_choices(base, **values) for values in settings]


def studies() -> dict[str, list[RunConfig]]:
    """The runs of each study."""
    small = with_choices(digits(), threads=1)
    first = [
        with_choices(config, codec=codec, seed=seed)
        for codec in ("fp32", "fp8")
        for config in grid(small, (0.2, 0.05, 0.01), (5, 20))
        for seed in range(3)
    ]
    vgg = with_choices(cifar10_small(), threads=1, evaluate_every=5, threshold=0.05)
    settings: list[dict] = [
        {"schedule": "always", "codec": "fp32"},
        {"schedule": "drop", "threshold": 0.05, "codec": "fp8"},
        {"schedule": "drop", "threshold": 0.01, "codec": "fp8"},
        {"schedule": "drift", "threshold": 0.05, "codec": "fp8"},
    ]
    return {
        "digits": first,
        "cifar10": [with_choices(vgg, **values) for values in settings],
    }


def key(config: RunConfig) -> str:
    """What tells the runs of a study apart."""
    made = Choices.of(config)
    limit = made.threshold if made.threshold is not None else made.period
    return f"{made.schedule}{'' if limit is None else f'({limit})'} {made.codec}"


def measure(config: RunConfig, result: Result) -> dict:
    """What a run gave."""
    return {"key": key(config), "seed": config.training.seed, **usual_figures(config, result)}


def table(name: str, runs: Study) -> str:
    """The study as a Markdown table: mean and sample standard deviation over the seeds."""
    lines = runs.outcomes()
    rows = [
        "| schedule and codec | runs | test accuracy, % | epochs A / B / C | MB up + down | traffic | all bytes "
        "| client FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = [line["bytes_up"] + line["bytes_down"] for line in lines if line["key"] == "always fp32"]
    for which in dict.fromkeys(line["key"] for line in lines):
        same = [line for line in lines if line["key"] == which]

        def mean(field: str, same: list[Outcome] = same) -> float:
            return statistics.mean(line[field] for line in same)

        spread = statistics.stdev(100 * line["accuracy"] for line in same) if len(same) > 1 else None
        states = " / ".join(f"{statistics.mean(line['exchanges'].count(s) for line in same):.3g}" for s in "ABC")
        totals = [line["bytes_up"] + line["bytes_down"] for line in same]
        reduced = f"{statistics.mean(statistics.mean(plain) / total for total in totals):.2f}x" if plain else ""
        rows.append(
            f"| {which} | {len(same)} | {100 * mean('accuracy'):.2f}{'' if spread is None else f' ± {spread:.2f}'} "
            f"| {states} | {statistics.mean(totals) / 1e6:.1f} | {mean('traffic_reduction'):.2f}x | {reduced} "
            f"| {mean('client_flops_reduction'):.2f}x |"
        )
    config, where = runs.configs[0], lines[0]["environment"]
    about = (
        f"`python experiments/schedules/study.py {name}`: {config.model.name} of width {config.model.width}, "
        f"cut after {config.model.cut}, {config.training.epochs} epochs, batch {config.training.batch_size}, "
        f"{config.data.train_samples or 'all'} training samples. torch {where['torch']}, {where['processor']}, one "
        "thread. ± is the sample standard deviation over the seeds. Bytes are all of training; reductions are relative "
        "to plain split learning in 32 bits, *traffic* counting activations and gradients, *all bytes* labels, ids and "
        "headers, too.\n"
    )
    return about + "\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=studies())
    add_options(parser)
    asked = parser.parse_args()
    runs = Study(RESULTS / f"{asked.study}.jsonl", studies()[asked.study], measure)
    carry_out(runs, asked, lambda: (RESULTS / f"{asked.study}.md").write_text(table(asked.study, runs)))


if __name__ == "__main__":
    main()
