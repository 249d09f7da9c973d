"""What clients do so that less can be made of what they send: a choice of training, the same over every backend."""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.errors import ConfigError


@dataclass(frozen=True)
class Defence:
    """A client's defences. All are off by default. What each costs and promises: docs/privacy.md."""

    nopeek: float = 0.0
    """Weight of the distance correlation between inputs and activations in the client's loss (NoPeek, arXiv
    2008.09161)."""
    adversary: float = 0.0
    """Weight of the SSIM that a decoder in the client reaches, which is trained along (ResSFL, arXiv 2205.04007)."""
    adversary_floor: float = 0.0
    """SSIM below which the decoder is bad enough, and not pushed any further."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on the activations that are sent."""
    clip: float | None = None
    """Largest Euclidean norm of a sample's activations; larger ones are scaled down."""
    channel_dropout: float = 0.0
    """Share of the channels that are left out of what is sent, drawn anew for each sample each time it is sent."""
    watch: float = 0.0
    """Share of the batches of A epochs that are sent with false labels, to tell a server that trains on the labels from
    one that hijacks the half (SplitGuard, arXiv 2108.09052)."""
    watch_score: float = 0.9
    """The client stops if the mean of the last ten scores of the watch is below this, from 0 to 1."""
    watch_after: int = 15
    """Batches with false labels before the first score: a network that has learned nothing yet minds no label."""

    @property
    def draws(self) -> bool:
        """Whether a client draws anything that the server must not be able to draw again."""
        return bool(self.noise or self.channel_dropout or self.watch)

    def __post_init__(self) -> None:
        for name in ("nopeek", "adversary", "noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"defence: expected {name} of at least 0, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"defence: expected clip above 0, got {self.clip}")
        for name in ("adversary_floor", "channel_dropout", "watch", "watch_score"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"defence: expected {name} from 0 to below 1, got {getattr(self, name)}")

    def check_stored(self, views_from: int | None, exchanges: str | None) -> None:
        """Raise ConfigError if the server were to store the watch's false labels as true ones.

        Args:
            views_from: as in `Method`.
            exchanges: letters of the epochs, after which all are C, if they are given and A epochs are stored.
        """
        if self.watch and views_from is not None:
            raise ConfigError(
                f"defence: the watch sends false labels in A epochs, and with views_from={views_from} the server "
                "would store them as true ones. Choose one"
            )
        if self.watch and exchanges is not None and "AC" in exchanges + "C":
            raise ConfigError(
                "defence: the watch sends false labels in A epochs, on which a C epoch right after one would train: "
                "have a B epoch follow each A, such as AABC"
            )
