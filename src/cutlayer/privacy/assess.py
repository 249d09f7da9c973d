"""Attacks by name, and what comes of one: scores beside those of the mean image, which takes no attack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cutlayer.codecs import get_transfer
from cutlayer.errors import ConfigError, unknown
from cutlayer.privacy.decoder import DecoderInversion
from cutlayer.privacy.frames import match_patterns, zero_patterns
from cutlayer.privacy.fsha import FSHA
from cutlayer.privacy.known_half import KnownHalf
from cutlayer.privacy.labels import by_direction, leak_auc, norm_scores
from cutlayer.privacy.scores import Spread, distance_correlation, image_scores, label_accuracy, recognized
from cutlayer.privacy.sdar import SDAR
from cutlayer.privacy.target import Attack, Target, mean_image
from cutlayer.privacy.unsplit import UnSplit

ATTACKS: dict[str, Attack] = {
    "decoder": DecoderInversion(),
    "known_half": KnownHalf(),
    "unsplit": UnSplit(),
    "fsha": FSHA(),
    "sdar": SDAR(),
}
"""Attacks that reconstruct images."""
LEAKS = ("labels", "frames")
"""What else `cutlayer attack` measures: labels from gradients, and what frames say by themselves."""


LENGTHS = ("epochs", "steps", "rounds")
"""What a longer attack has more of."""


def get_attack(name: str, effort: float = 1.0) -> Attack:
    """The attack of this name, with so many times its usual steps. Raises ConfigError with the known names."""
    if name not in ATTACKS:
        raise ConfigError(unknown("attack", name, [*ATTACKS, *LEAKS]))
    if not effort > 0:
        raise ConfigError(f"effort must be above 0, got {effort}")
    attack: Any = ATTACKS[name]
    return dataclasses.replace(attack, **{n: max(1, round(usual * effort)) for n, usual in lengths(attack).items()})


def lengths(attack: Attack) -> dict[str, int]:
    """How long an attack takes, such as {"steps": 500}; empty for one of another kind."""
    known = dataclasses.fields(attack) if dataclasses.is_dataclass(attack) else ()
    return {field.name: getattr(attack, field.name) for field in known if field.name in LENGTHS}


@dataclass(frozen=True)
class Assessment:
    """What came of an attack.

    Attributes:
        attack: its name.
        knows: what the attacker must have.
        took: how long it was, such as {"steps": 500}.
        public: how many images of its own the attacker had.
        scores: "mse", "psnr", "ssim" and "recognized" (whether the task's own network still gives the label) of the
            reconstructions.
        baseline: the same of the mean public image.
    """

    attack: str
    knows: str
    took: Mapping[str, int]
    public: int
    scores: Mapping[str, Spread]
    baseline: Mapping[str, Spread]

    @property
    def succeeds(self) -> bool:
        """Whether the images are nearer to the originals than the mean image is, by mean squared error."""
        return self.scores["mse"].mean < self.baseline["mse"].mean

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; an infinite PSNR, of perfect copies, is None."""
        about = {"attack": self.attack, "took": dict(self.took), "public": self.public}
        return {**about, "scores": _plain(self.scores), "baseline": _plain(self.baseline)}


def assess(name: str, attack: Attack, target: Target) -> tuple[Assessment, Tensor]:
    """Attack a target; the scores, and the reconstructions [N, C, H, W]."""
    images = attack(target)
    scores, baseline = _scores(target, images), _scores(target, mean_image(target))
    return Assessment(name, attack.knows, lengths(attack), len(target.public), scores, baseline), images


def label_leak(target: Target) -> dict[str, float]:
    """How well the labels of the private images follow from the gradients at the cut, were they not sent.

    Returns:
        "norm AUC" of telling the rarest class from the others, "direction accuracy" of naming the class, given the
        gradients of one public image of each class, and "guess", the share of the commonest class.
    """
    private = gradients_at_cut(target, target.private, target.labels)
    classes, counts = target.labels.unique(return_counts=True)
    if len(classes) < 2:
        raise ConfigError("labels from gradients: expected private images of two classes or more")
    first = [int((target.public_labels == label).nonzero()[0]) for label in classes if label in target.public_labels]
    known = gradients_at_cut(target, target.public[first], target.public_labels[first])
    guesses = by_direction(private, known, target.public_labels[first])
    return {
        "norm AUC": leak_auc(norm_scores(private), target.labels == classes[counts.argmin()]),
        "direction accuracy": label_accuracy(target.labels, guesses).mean().item(),
        "guess": (counts.max() / counts.sum()).item(),
    }


def gradients_at_cut(target: Target, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each sample's own cross-entropy with respect to its activations, [N, *cut]."""
    activations = target.send(images, "public" if images is not target.private else "private").requires_grad_(True)
    losses = cross_entropy(target.server.eval()(activations.clone()), labels, reduction="sum")
    return torch.autograd.grad(losses, activations)[0]


def frame_leak(target: Target) -> dict[str, float]:
    """What the encoded activations of the private images say by their size and by their zeros.

    Returns:
        "bytes" of a sample, "size spread" (the standard deviation of its size relative to that), "zeros" (the share of
        values that are exactly 0), "correlation" of distances between inputs with those between activations, and
        "matched": the share of private images that a server with the half finds among them and the public ones by
        the pattern of zeros alone, and "guess", what a guess would find.
    """
    codec = get_transfer(target.codec).codec
    activations = target.send(target.private)
    sizes = torch.tensor([sum(map(len, codec.pack(codec.encode(each[None])))) for each in activations]).double()
    candidates = torch.cat([target.private, target.public[:1000]])
    exact = dataclasses.replace(
        target, codec="fp32", noise=dataclasses.replace(target.noise, std=0.0, channel_dropout=0.0)
    )
    found = match_patterns(zero_patterns(activations), zero_patterns(exact.send(candidates)))
    count = len(activations)
    return {
        "bytes": sizes.mean().item(),
        "size spread": (sizes.std() / sizes.mean()).item() if count > 1 else 0.0,
        "zeros": zero_patterns(activations).double().mean().item(),
        "correlation": distance_correlation(target.private, activations).item() if count > 1 else 0.0,
        "matched": (found == torch.arange(count)).double().mean().item(),
        "guess": 1 / len(candidates),
    }


def _scores(target: Target, images: Tensor) -> dict[str, Spread]:
    whole = nn.Sequential(target.half, target.server)
    found = {
        **image_scores(target.private, images),
        "recognized": recognized(whole, target.inputs(images), target.labels),
    }
    return {name: Spread.of(values) for name, values in found.items()}


def _plain(scores: Mapping[str, Spread]) -> dict[str, dict[str, float | int | None]]:
    return {
        name: {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in each}
        for name, spread in scores.items()
        for each in [vars(spread).items()]
    }
