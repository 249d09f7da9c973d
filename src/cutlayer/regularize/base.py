"""The choices."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cutlayer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Regularize:
    """What the server does to activations and labels before it learns from them; 0 for not at all.

    Its weight decay is its optimizer's. Mixing is within a client's batch, or the part of it that a worker has; with
    both kinds a coin is thrown for each step.
    """

    mixup: float = 0.0
    """Mix activations and losses of two samples, with a share from Beta(mixup, mixup); see `mixing`."""
    cutmix: float = 0.0
    """Put a box of one feature map into another, with an area from Beta(cutmix, cutmix); see `mixing`."""
    label_smoothing: float = 0.0
    """Part of a label that is spread over all classes; see `smoothing`."""
    dropout: float = 0.0
    """Chance that a value at the cut is set to 0; see `dropout`."""
    channel_dropout: float = 0.0
    """Chance that a whole channel at the cut is set to 0; see `dropout`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, mixes = getattr(self, field.name), field.name in ("mixup", "cutmix")
            if not value >= 0 or not (mixes or value < 1):
                expected = "0 or a positive number" if mixes else "a number from 0 to below 1"
                raise ConfigError(f"{field.name}: expected {expected}, got {value}")

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed."""
        return self.mixup > 0 or self.cutmix > 0
