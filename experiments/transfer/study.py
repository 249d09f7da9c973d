"""A pretrained client half that stands still, against fine-tuning both halves: 5,000 images of CIFAR-10.

    python experiments/transfer/study.py     # 7 to 11 minutes of one core a run

Needs the weights (extra `transfer`) and CIFAR-10. Writes results/cifar10.jsonl (a line for each run) and
results/cifar10.md. Runs that are in the file already are not run again, and one that was ended goes on from its newest
checkpoint in runs/studies.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from cutlayer import Method, RunConfig, Training
from cutlayer.data.augment import CropFlip
from cutlayer.models.optim import Optimizer
from cutlayer.regularize import Regularize
from cutlayer.runs.client_half import Untrained
from cutlayer.runs.config import DataConfig, ModelConfig
from cutlayer.runs.fit import Result
from cutlayer.schedule import Always, Fixed, Once
from cutlayer.studies import Study, add_options, carry_out
from cutlayer.studies.figures import figures
from cutlayer.studies.tables import spread

RESULTS = Path(__file__).parent / "results"
EPOCHS, IMAGES, SEEDS = 13, 5000, 3
FINE_TUNED = "fine-tuning of both halves, 32 bits, every epoch"
SETTINGS: dict[str, dict[str, Any]] = {
    "frozen, one upload, 4 bits": {"method": Method.of(Once(), "int4+zstd")},
    FINE_TUNED: {"method": Method.of(Always(), "fp32"), "frozen": False},
    "random weights: frozen, one upload, 4 bits": {"method": Method.of(Once(), "int4+zstd"), "pretrained": False},
    "random weights: both halves trained, 32 bits, every epoch": {
        **{"method": Method.of(Always(), "fp32"), "frozen": False, "pretrained": False}
    },
    "frozen, one upload, 8 bits": {"method": Method.of(Once(), "fp8_e4m3+zstd")},
    "frozen, one upload, 4 bits, cutmix": {
        "method": Method.of(Once(), "int4+zstd"),
        "regularize": Regularize(cutmix=1.0),
    },
    "frozen, two uploads, 4 bits, 2 views": {"method": Method.of(Fixed(exchanges="AB"), "int4+zstd", views=2)},
}
"""An A epoch of a half that stands still is a B epoch."""


def config(settings: dict[str, Any], seed: int) -> RunConfig:
    """A run of this setting."""
    optimizer = Optimizer(lr=0.02, schedule="cosine")
    training = Training(
        epochs=EPOCHS,
        batch_size=64,
        client=optimizer,
        server=optimizer,
        augment=CropFlip(),
        regularize=settings.get("regularize", Regularize()),
        channels_last=True,
        evaluate_every=EPOCHS,
        seed=seed,
    )
    model = ModelConfig("efficientnet_lite0", cut="block4", pretrained=settings.get("pretrained", True))
    half = Untrained() if settings.get("frozen", True) else None
    data = DataConfig("cifar10", train_samples=IMAGES)
    return RunConfig(data, model, settings["method"], training, threads=1, client_half=half)


def measure(config: RunConfig, result: Result) -> dict[str, Any]:
    """What a run gave."""
    return {
        "key": names()[config],
        "beforehand": result.history.beforehand,
        **figures(config, result, preset="transfer"),
    }


def names() -> dict[RunConfig, str]:
    """The name of each run's setting; all settings with one seed before any has its second."""
    return {config(settings, seed): name for seed in range(SEEDS) for name, settings in SETTINGS.items()}


def table(study: Study) -> str:
    """The study as a Markdown table: mean and sample standard deviation over the seeds."""
    lines = study.outcomes()
    rows = [
        "| setting | runs | test accuracy, % | merged, in 32 bits | against fine-tuning | epochs A / B / C | MB "
        "| traffic | client FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {line["seed"]: line for line in lines if line["key"] == FINE_TUNED}
    for key in SETTINGS:
        same = [line for line in lines if line["key"] == key]
        if not same:
            continue
        pairs = [(line, plain[line["seed"]]) for line in same if line["seed"] in plain]

        def mean(values: list[float], form: str, unit: str = "") -> str:
            return format(statistics.mean(values), form) + unit if values else "not run"

        rows.append(
            f"| {key} | {len(same)} | {spread([100 * line['accuracy'] for line in same])} "
            f"| {mean([100 * line['accuracy_merged'] for line in same], '.2f')} "
            f"| {mean([100 * (line['accuracy'] - other['accuracy']) for line, other in pairs], '+.2f')} "
            f"| {' / '.join(str(same[0]['exchanges'].count(state)) for state in 'ABC')} "
            f"| {mean([line['exchanged_bytes'] / 1e6 for line in same], '.1f')} "
            f"| {mean([other['exchanged_bytes'] / line['exchanged_bytes'] for line, other in pairs], '.1f', 'x')} "
            f"| {mean([other['client_flops'] / line['client_flops'] for line, other in pairs], '.1f', 'x')} |"
        )
    where = lines[0]["environment"]
    about = (
        f"`python experiments/transfer/study.py`: EfficientNet-Lite0 cut after block4, {IMAGES} training images of "
        f"CIFAR-10 taken at 64x64, all 10,000 test images, {EPOCHS} epochs. torch {where['torch']}, "
        f"{where['processor']}, one thread. ± is the sample standard deviation over the seeds; *against fine-tuning* "
        "is the mean difference, seed by seed. MB and traffic are activations and gradients; client FLOPs hold the "
        f"measuring of batch norm's statistics. The training images as they are would be {IMAGES * 3072 / 1e6:.1f} "
        "MB.\n"
    )
    return about + "\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    asked = parser.parse_args()
    study = Study(RESULTS / "cifar10.jsonl", list(names()), measure, folder="runs/studies")
    carry_out(study, asked, lambda: (RESULTS / "cifar10.md").write_text(table(study)))


if __name__ == "__main__":
    main()
