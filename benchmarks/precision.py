"""What channels-last and bf16 autocast save: split training beside uncut training in the same setting, and in fp32.

    python benchmarks/precision.py [--rounds 15] [--out benchmarks/results/precision.md]

Every figure is a ratio of two things measured in turn in the same run, pair by pair; median and quartiles are printed.
One thread.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from core import BATCH, CUT, SAMPLES, TRAINING, cut, images, ratios, replayed, summary, uncut

from cutlayer import Method
from cutlayer.records.environment import environment

WIDTH, CODEC = 0.25, "int4"
SETTINGS = {
    "channels last": replace(TRAINING, channels_last=True),
    "bf16, channels last": replace(TRAINING, channels_last=True, precision="bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, where = images(), environment()
    text = (
        f"`python benchmarks/precision.py --rounds {arguments.rounds}`: VGG11 of width {WIDTH}, cut after {CUT}, "
        f"epochs of {SAMPLES} images in batches of {BATCH}, n = {arguments.rounds}; torch {where['torch']}, Python "
        f"{where['python']}, {where['processor']} ({torch.backends.cpu.get_cpu_capability()}), one thread. Times are "
        "ratios, median (quartiles).\n\n"
        "| setting | A epoch over uncut, same setting | A epoch over uncut in fp32 | uncut over uncut in fp32 "
        f"| C epoch of {CODEC} over server half on floats, same setting | that server half over fp32's |\n"
        "|---|---|---|---|---|---|\n"
    )
    for name, training in SETTINGS.items():
        here = uncut(data, training, WIDTH)
        split = cut(data, Method(), training, WIDTH)[0]
        plain = uncut(data, width=WIDTH)
        replay, half = replayed(data, CODEC, training, WIDTH)
        half_plain = replayed(data, CODEC, width=WIDTH)[1]
        pairs = [(split, here), (split, plain), (here, plain), (replay, half), (half, half_plain)]
        cells = [summary(ratios(*pair, arguments.rounds)) for pair in pairs]
        text += f"| {' | '.join([name, *cells])} |\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
