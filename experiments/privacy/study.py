"""What the method changes for an attacker, and what defences cost: decoder inversion of plain split learning and of the
method, early and late in training, of one look and of all that the server has seen, at a shallow and at a deep cut.

    python experiments/privacy/study.py smoke             # digits, a minute or two; checks that all of it works
    python experiments/privacy/study.py cpu --jobs 2      # a narrow VGG11 on CIFAR-10: an hour on two cores
    python experiments/privacy/study.py gpu --device cuda # VGG11 on CIFAR-10 as published, 200 epochs
    python experiments/privacy/study.py cpu defences      # defences instead, at the cut between

Writes results/PRESET[-defences].jsonl, a line for each run, and a table of it; runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cutlayer import RunConfig, with_choices
from cutlayer.backends.client_data import ClientData
from cutlayer.privacy import DecoderInversion, Defence, Noise, Target, distance_correlation, mean_image, mse, ssim
from cutlayer.privacy.looks import combined
from cutlayer.runs.attack import attacked
from cutlayer.runs.choices import Choices
from cutlayer.runs.fit import Result
from cutlayer.runs.recipes import cifar10_small, digits, sips2021_vgg11
from cutlayer.runs.run import Run
from cutlayer.studies import Outcome, Study, add_options, carry_out, usual_figures

RESULTS = Path(__file__).parent / "results"
MOST_LOOKS = 6


@dataclass(frozen=True)
class Preset:
    """A size of the study.

    Attributes:
        base: what all runs have in common.
        cuts: shallow, between and deep.
        early: epochs after which the first attack is.
        images, public: how many are attacked, and how many the attacker has.
        decoder: the attack.
        best: the choices of the frontier's best method at this length.
        seeds: how many.
    """

    base: RunConfig
    cuts: tuple[str, str, str]
    early: int
    images: int
    public: int
    decoder: DecoderInversion
    best: dict[str, Any]
    seeds: int = 3


def settle(both: int, activations: int) -> dict[str, Any]:
    """Few exchanges, 4 bits and several views."""
    few = {"schedule": "settle", "both_epochs": both, "activation_epochs": activations}
    return {**few, "codec": "int4+zstd", "views": min(MOST_LOOKS, activations)}


PRESETS = {
    "smoke": Preset(
        with_choices(digits(), threads=1, train_samples=300, epochs=5, evaluate_every=5),
        ("layer1", "layer3", "layer5"),
        1,
        16,
        100,
        DecoderInversion(epochs=2, width=16, blocks=1),
        settle(2, 2),
        seeds=1,
    ),
    "cpu": Preset(
        with_choices(cifar10_small(), threads=1, train_samples=2000, test_samples=1000, epochs=12, evaluate_every=12),
        ("layer2", "layer4", "layer7"),
        2,
        32,
        1000,
        DecoderInversion(epochs=8, width=32, blocks=2),
        settle(3, 4),
    ),
    "gpu": Preset(
        with_choices(sips2021_vgg11(), evaluate_every=20),
        ("layer2", "layer4", "layer7"),
        5,
        256,
        10_000,
        DecoderInversion(),
        settle(5, 6),
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "plain, 32 bits": {"schedule": "always", "codec": "fp32"},
    "method, 8 bits": {"schedule": "drop", "threshold": 0.05, "codec": "fp8"},
}
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "NoPeek 0.5": {"defence": Defence(nopeek=0.5)},
    "NoPeek 3": {"defence": Defence(nopeek=3.0)},
    "attacker-aware 2": {"defence": Defence(adversary=2.0)},
    "noise 0.2, clip 20": {"defence": Defence(noise=0.2, clip=20.0)},
    "noise 1, clip 20": {"defence": Defence(noise=1.0, clip=20.0)},
    "channel dropout 0.25": {"defence": Defence(channel_dropout=0.25)},
    "channel dropout 0.5": {"defence": Defence(channel_dropout=0.5)},
    "narrow cut, 1/4": {"narrow": 4},
    "watch 0.1": {"defence": Defence(watch=0.1)},
}


def configs(preset: Preset, part: str) -> list[tuple[str, RunConfig]]:
    """The runs, each with what its row in the table is called."""
    found = []
    for seed in range(preset.seeds):
        base = with_choices(preset.base, seed=seed, keep_checkpoints=preset.base.training.epochs)
        if part == "defences":
            cut = with_choices(base, cut=preset.cuts[1], schedule="always", codec="fp32")
            found += [(name, with_choices(cut, **choices)) for name, choices in DEFENCES.items()]
            continue
        methods = {**METHODS, "few exchanges, 4 bits": preset.best}
        found += [
            (f"{name}, {cut}", with_choices(base, cut=cut, **choices))
            for cut in preset.cuts
            for name, choices in methods.items()
        ]
    return found


def measure(config: RunConfig, result: Result, preset: Preset, folder: Path) -> dict[str, Any]:
    """Accuracy, bytes, and what the attack gets early, late, and of all looks together."""
    where = Study(RESULTS / "unused", [config], folder=folder).run_folder(config)
    assert where is not None
    run, done = Run(where), len(result.history.epochs)
    exchanges = result.history.exchanges
    looks = [epoch for epoch, letter in enumerate(exchanges) if letter in "AB"]
    early = attack(run, config, preset, [epoch for epoch in looks if epoch < preset.early])
    late = attack(run, config, preset, looks)
    return {
        **usual_figures(config, result),
        **{f"early_{name}": value for name, value in early.items()},
        **{f"late_{name}": value for name, value in late.items()},
        "looks": len(looks),
        "epochs": done,
    }


def attack(run: Run, config: RunConfig, preset: Preset, looks: Sequence[int]) -> dict[str, float]:
    """Scores of the last look, and of the last so many looks together, aligned to it."""
    targets = [target(run, config, preset, epoch) for epoch in looks[-MOST_LOOKS:][::-1]]
    images = [preset.decoder(each) for each in targets]
    last, together = targets[0], combined(images, 4 if config.training.augment is not None else 0)
    sent = last.send(last.private)
    return {
        "mse": mse(last.private, images[0]).mean().item(),
        "ssim": ssim(last.private, images[0]).mean().item(),
        "ssim_spread": ssim(last.private, images[0]).std().item(),
        "all_ssim": ssim(last.private, together).mean().item(),
        "mean_image_ssim": ssim(last.private, mean_image(last)).mean().item(),
        "correlation": distance_correlation(last.private, sent).item(),
    }


def target(run: Run, config: RunConfig, preset: Preset, epoch: int) -> Target:
    """The half after an epoch, and the first samples as they were in that epoch: cropped and mirrored."""
    found = attacked(run, images=preset.images, public=preset.public, epochs=epoch + 1).target
    feed, _ = ClientData(config.datasets()[0]).feeds(0, config.training)
    views = torch.empty_like(found.private)
    for batch in feed.epoch(epoch):
        for number, view in zip(batch.ids.tolist(), batch.inputs, strict=True):
            if number < preset.images:
                views[number] = view.float() / 255
    defence, device = config.method.defence, config.training.device
    moved = {name: getattr(found, name).to(device) for name in ("half", "server", "labels", "public", "public_labels")}
    return dataclasses.replace(found, private=views.to(device), noise=Noise.of(defence), **moved)


def table(outcomes: Sequence[Outcome], names: dict[str, list[RunConfig]], file: Path) -> None:
    """A row for each setting: means, and the standard deviation over seeds."""

    def of(config: RunConfig) -> Choices:
        return Choices.of(with_choices(config, device="cpu", data_dir=None))

    columns = ("accuracy", "traffic_reduction", "looks", "early_ssim", "late_ssim", "late_all_ssim", "late_mse")
    heads = ("test accuracy", "traffic", "looks", "SSIM early", "SSIM late", "SSIM, all looks", "MSE late")
    lines = [
        f"Decoder inversion; mean ± standard deviation over seeds. Made by `python experiments/privacy/study.py "
        f"{file.stem.replace('-', ' ')}`.",
        "",
        f"| setting | runs | {' | '.join(heads)} | mean image's SSIM |",
        f"|{'---|' * (len(heads) + 3)}",
    ]
    for name, wanted in names.items():
        rows = [each for each in outcomes if of(each.config) in map(of, wanted)]
        if rows:
            cells = [spread([row[column] for row in rows]) for column in (*columns, "late_mean_image_ssim")]
            lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("part", choices=["method", "defences"], nargs="?", default="method")
    parser.add_argument("--runs", default="runs/privacy", help="where the run folders are, while they are needed")
    parser.add_argument("--device", default="cpu", help="of training and attacks")
    add_options(parser)
    asked = parser.parse_args()
    preset, folder = PRESETS[asked.preset], Path(asked.runs)
    stem = asked.preset if asked.part == "method" else f"{asked.preset}-defences"
    found = [(name, with_choices(config, device=asked.device)) for name, config in configs(preset, asked.part)]
    every = [config for _, config in found]
    names: dict[str, list[RunConfig]] = {}
    for name, config in found:
        names.setdefault(name, []).append(config)
    measured = partial(measure, preset=preset, folder=folder)
    study = Study(RESULTS / f"{stem}.jsonl", every, measured, folder)
    carry_out(study, asked, lambda: table(study.outcomes(every), names, RESULTS / f"{stem}.md"))


if __name__ == "__main__":
    main()
