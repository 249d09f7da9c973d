"""What each option for few exchanges does on the digits, one at a time: three seeds of each.

    python experiments/few_exchanges/study.py     # 57 runs of 60 epochs, some ten minutes on one idle core

Writes results/digits.jsonl (a line for each run) and results/digits.md. Runs that are in the file already are not run
again. The digits tell whether an option works, hardly which one is the best: that is for CIFAR-10.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from cutlayer import RunConfig, with_choices
from cutlayer.data.augment import CropFlip
from cutlayer.regularize import Regularize
from cutlayer.runs.fit import Result
from cutlayer.runs.recipes import digits
from cutlayer.studies import Study, add_options, carry_out, usual_figures
from cutlayer.studies.tables import spread

RESULTS = Path(__file__).parent / "results"
EPOCHS, SEEDS = 60, 3
FEW = {"schedule": "settle", "both_epochs": 3, "activation_epochs": 6, "codec": "int4+zstd"}
VIEWS = {**FEW, "views": 6}
SERVER = {
    "mixup 0.2": Regularize(mixup=0.2),
    "cutmix 1": Regularize(cutmix=1.0),
    "label smoothing 0.1": Regularize(label_smoothing=0.1),
    "dropout 0.1": Regularize(dropout=0.1),
    "channel dropout 0.1": Regularize(channel_dropout=0.1),
}
SETTINGS: dict[str, dict] = {
    "plain, 32 bits": {"schedule": "always", "codec": "fp32"},
    "plain, 32 bits, mixup 0.2": {"schedule": "always", "codec": "fp32", "regularize": SERVER["mixup 0.2"]},
    "plain, 32 bits, label smoothing 0.1": {
        **{"schedule": "always", "codec": "fp32"},
        "regularize": SERVER["label smoothing 0.1"],
    },
    "3 A + 6 B, rate by epochs": {
        **{"schedule": "fixed", "codec": FEW["codec"]},
        "fixed_exchanges": "AAAB" + "CCCCCCCCB" * 5,
    },
    "settle 3 A + 6 B": FEW,
    "settle, spread by rate": {**FEW, "spread": "rate"},
    "settle, last quarter averaged": {**FEW, "averaged_updates": 0.25},
    "settle, last half averaged": {**FEW, "averaged_updates": 0.5},
    "settle, 6 views": VIEWS,
    "settle, 6 views, B at once": {**VIEWS, "last_exchange": 0.01},
    "settle, 8 views, A from epoch 1": {**FEW, "views": 8, "views_from": 1},
    **{f"settle, 6 views, {name}": {**VIEWS, "regularize": chosen} for name, chosen in SERVER.items()},
    "settle, 6 views, server weight decay 2e-3": {**VIEWS, "weight_decay": 2e-3},
    "settle, 6 views, narrow 2": {**VIEWS, "narrow": 2},
    "settle, padded by 2": {**FEW, "padding": 2},
}


def config(settings: dict, seed: int) -> RunConfig:
    """A run of 400 images, of which each is moved by up to a pixel whenever it is sent."""
    base = with_choices(digits(), threads=1, epochs=EPOCHS, train_samples=400, evaluate_every=EPOCHS, seed=seed)
    decay = settings.get("weight_decay", base.training.server.weight_decay)
    made = with_choices(base, **{name: value for name, value in settings.items() if name != "weight_decay"})
    server = replace(made.training.server, weight_decay=decay)
    crop = CropFlip(padding=0 if made.model.padding else 1, flip=False)
    return replace(made, training=replace(made.training, server=server, augment=crop))


def measure(config: RunConfig, result: Result) -> dict:
    """What a run gave."""
    return {"key": names()[config], "seed": config.training.seed, **usual_figures(config, result)}


def names() -> dict[RunConfig, str]:
    """The name of each run's setting."""
    return {config(settings, seed): name for name, settings in SETTINGS.items() for seed in range(SEEDS)}


def table(runs: Study) -> str:
    """The study as a Markdown table: mean and sample standard deviation over the seeds."""
    lines = runs.outcomes()
    rows = [
        "| setting | runs | test accuracy, % | against plain | A / B / C | MB | traffic | client FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {line["seed"]: line["accuracy"] for line in lines if line["key"] == "plain, 32 bits"}
    for key in SETTINGS:
        same = [line for line in lines if line["key"] == key]
        if not same:
            continue
        paired = [100 * (line["accuracy"] - plain[line["seed"]]) for line in same if line["seed"] in plain]
        states = " / ".join(f"{statistics.mean(line['exchanges'].count(s) for line in same):.3g}" for s in "ABC")
        rows.append(
            f"| {key} | {len(same)} | {spread([100 * line['accuracy'] for line in same])} "
            f"| {statistics.mean(paired):+.2f} | {states} "
            f"| {statistics.mean(line['bytes_up'] + line['bytes_down'] for line in same) / 1e6:.2f} "
            f"| {statistics.mean(line['traffic_reduction'] for line in same):.1f}x "
            f"| {statistics.mean(line['client_flops_reduction'] for line in same):.1f}x |"
        )
    where = lines[0]["environment"]
    about = (
        "`python experiments/few_exchanges/study.py`: small CNN on 400 images of the digits, cut after layer3, "
        f"{EPOCHS} epochs, `int4+zstd` if not said otherwise. torch {where['torch']}, {where['processor']}, one "
        "thread. ± is the sample standard deviation over the seeds; *against plain* is the mean difference, seed by "
        "seed. One of the 360 test images is 0.28 points. MB are all bytes of training; reductions are relative to "
        "plain split learning of the same halves, which with *narrow* and *padded* are others.\n"
    )
    return about + "\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    asked = parser.parse_args()
    runs = Study(RESULTS / "digits.jsonl", list(names()), measure)
    carry_out(runs, asked, lambda: (RESULTS / "digits.md").write_text(table(runs)))


if __name__ == "__main__":
    main()
