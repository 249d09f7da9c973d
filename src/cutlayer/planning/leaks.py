"""What each cut gives away, if it was measured: the lines of `cutlayer attack --advise`, for a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer.errors import ConfigError
from cutlayer.records.lines import Lines


@dataclass(frozen=True)
class Leak:
    """What an attack got back of the inputs at one cut, by structural similarity (SSIM; 1 is a copy).

    Attributes:
        attack: its name.
        shape: of one sample's activations.
        ssim, std: mean and sample standard deviation over the images.
        mean_image: SSIM of the mean image, which takes no attack.
    """

    attack: str
    shape: tuple[int, ...]
    ssim: float
    std: float
    mean_image: float


def leaks_of(file: str | Path) -> dict[str, Leak]:
    """By cut, from a run's advice.jsonl; of several lines for a cut the newest counts. Raises ConfigError."""
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"advice: {file} is not there; `cutlayer attack RUN --advise` writes RUN/advice.jsonl")
    found = {}
    for number, line in enumerate(Lines(file).read()):
        try:
            found[str(line["cut"])] = _leak(line)
        except (KeyError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{file}, line {number + 1}: expected one of `attack --advise` ({said})") from None
    if not found:
        raise ConfigError(f"advice: {file} holds no cut; run `cutlayer attack RUN --advise`")
    return found


def _leak(line: dict[str, Any]) -> Leak:
    assessment = line["assessment"]
    ssim, mean_image = assessment["scores"]["ssim"], assessment["baseline"]["ssim"]
    shape = tuple(map(int, line["shape"]))
    return Leak(str(assessment["attack"]), shape, float(ssim["mean"]), float(ssim["std"]), float(mean_image["mean"]))
