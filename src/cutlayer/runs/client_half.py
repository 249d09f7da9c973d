"""Client halves that are trained without the server's gradients, or not at all: the choices.

Most are made before the run, by `beforehand`, and are frozen in it, so that with the schedule `Once` activations go up
once.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.errors import ConfigError


class ClientHalf:
    """Base of these choices."""


@dataclass(frozen=True)
class LocalHead(ClientHalf):
    """The client trains its half by itself, with an auxiliary head on top and a local loss; then it is frozen.

    The head is a convolution with batch norm, global average pooling and a linear layer; it stays on the device, and
    what it costs there is counted. Source: Zhang, Leon and Varghese, "Ampere: Communication-Efficient and High-Accuracy
    Split Federated Learning" (arXiv 2507.07130), for one client; the head's exact shape is not theirs. A
    client that trains by itself while it sends is `LocalLoss`.

    Attributes:
        epochs: of local training, with the client half's optimizer, whose learning rate follows these epochs.
        channels: of the head's convolution; 0 for as many as cross the cut.
    """

    epochs: int = 20
    channels: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.channels < 0:
            raise ConfigError(f"local head: expected at least 1 epoch and 0 channels, got {self}")


@dataclass(frozen=True)
class Untrained(ClientHalf):
    """The client half stays as it was drawn; only its statistics of batch norm are measured.

    Source of random features as a baseline: Saxe et al., "On Random Weights and Unsupervised Feature Learning" (ICML
    2011); of fixed first layers in place of learned ones: Oyallon et al., "Scaling the Scattering Transform" (arXiv
    1703.08961).
    """


@dataclass(frozen=True)
class LocalLoss(ClientHalf):
    """The client trains its half by itself, with an auxiliary head and a local loss, all through the run.

    Of every so many batches that it trains on, the first is sent, for the server to train on; no gradients come back,
    so with the schedule `Always` every epoch is a B epoch. In C epochs the client rests. Source: Mu and Shen,
    "Federated Split Learning with Improved Communication and Storage Efficiency" (CSE-FSL, arXiv 2507.15816), for one
    client; the head's exact shape is ours, and the loss is cross-entropy.

    Attributes:
        every: batches of which one is sent (h in the publication).
        channels: of the head's convolution; 0 for as many as cross the cut.
    """

    every: int = 5
    channels: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.channels < 0:
            raise ConfigError(f"local loss: expected at least 1 batch and 0 channels, got {self}")


BEFOREHAND = (LocalHead, Untrained)
"""Those that are made before the run, and frozen in it."""
CLIENT_HALVES: dict[str, type[ClientHalf]] = {kind.__name__: kind for kind in (*BEFOREHAND, LocalLoss)}
