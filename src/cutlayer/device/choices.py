"""What a device takes over from the server, and what the server may not choose for it: half, cut and codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cutlayer.device.half import DeviceHalf
from cutlayer.errors import ConfigError

NEEDS_TORCH = (
    "an A epoch trains the client half, which a device without PyTorch cannot do; serve the run with --frozen, so that "
    "it has none, or join from a machine with PyTorch (cutlayer join)"
)


@dataclass(frozen=True)
class Choices:
    """What the server chooses, and a device takes over."""

    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool

    def check(self) -> None:
        """Raise TypeError for what no server of this version says."""
        kinds = {"batch_size": int, "seed": int, "shuffle": bool, "drop_last": bool}
        if any(type(getattr(self, name)) is not kind for name, kind in kinds.items()) or self.batch_size < 1:
            raise TypeError(str(self))

    @staticmethod
    def checked(config: Mapping[str, Any], half: DeviceHalf) -> Choices:
        """The server's choices. Raises ConfigError for a run that this device cannot, or is not to, take part in."""
        try:
            training, method, terms = config["training"], config["method"], config["terms"]
            chosen = Choices(training["batch_size"], training["seed"], training["shuffle"], training["drop_last"])
            agreed = {
                "codec of the activations": half.facts["codec"],
                "shape at the cut": str(list(half.cut_shape)),
                "client half": frozen_structure(half.facts),
            }
            norm, augment, defence = method["norm_in_b"], training["augment"], method["defence"]
            noisy = bool(defence["noise"] or defence["clip"] or defence["channel_dropout"])
            chosen.check()
            if not all(isinstance(said, str) for said in {**terms}.values()):
                raise TypeError("terms")
        except (KeyError, TypeError):
            raise ConfigError(
                "the server's config is not of this version; use the same version on both sides"
            ) from None
        if not terms.get("client half", "(frozen)").endswith("(frozen)"):
            raise ConfigError(f"the server's run trains the client half: {NEEDS_TORCH}")
        for name, expected in agreed.items():
            if terms.get(name, expected) != expected:
                raise ConfigError(f"{name}: this device's export is for {expected}, the server's run for {terms[name]}")
        if norm == "train":
            raise ConfigError('norm_in_b: "train" needs PyTorch; serve with --norm-in-b calibrated or eval')
        if augment is not None:
            raise ConfigError(
                "augment: a device without PyTorch sends its samples as they are; serve with --no-augment"
            )
        if noisy:
            raise ConfigError(
                "defence: a device without PyTorch sends its activations without noise, and not clipped; serve without "
                "--defence.noise, --defence.clip and --defence.channel-dropout, or join from a machine with PyTorch "
                "(cutlayer join)"
            )
        return chosen


def frozen_structure(facts: Mapping[str, Any]) -> str:
    """The structure of a device's half, which is not trained."""
    return f"{facts['terms']['client half'].removesuffix(' (frozen)')} (frozen)"
