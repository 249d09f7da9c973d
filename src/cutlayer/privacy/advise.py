"""Where to cut: for each possible cut what an attacker gets back, beside what it costs the client."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cutlayer.codecs import get_transfer
from cutlayer.models.cut import cut_points, split
from cutlayer.models.flops import FlopTable
from cutlayer.privacy.assess import Assessment, assess
from cutlayer.privacy.scores import distance_correlation
from cutlayer.privacy.target import Attack, Target

SHAPE_ONLY = (nn.Flatten, nn.Identity)


@dataclass(frozen=True)
class Advice:
    """One possible cut.

    Attributes:
        cut: name of the layer to cut after.
        shape: of one sample's activations.
        forward, training: FLOPs of the client half for one sample: forward (B epochs), and with backward (A epochs).
        sample_bytes: what the codec makes of one sample's activations, on average over the private images.
        correlation: distance correlation of images and activations.
        assessment: of the attack.
    """

    cut: str
    shape: tuple[int, ...]
    forward: int
    training: int
    sample_bytes: float
    correlation: float
    assessment: Assessment

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "shape": list(self.shape), "assessment": self.assessment.as_dict()}


def advise(
    network: nn.Module, target: Target, attack: Attack, name: str, cuts: Sequence[str] | None = None
) -> Iterator[Advice]:
    """An `Advice` for each cut of a trained network, in order.

    The network is taken as it was trained: plain split learning gives the same weights wherever it is cut.

    Args:
        network: the uncut network.
        target: whose images are attacked; its halves are replaced.
        attack, name: what attacks each cut.
        cuts: layers to cut after; by default `usual_cuts`.
    """
    codec = get_transfer(target.codec).codec
    for cut in cuts or usual_cuts(network):
        halves = split(network, cut)
        each = dataclasses.replace(target, half=halves.client.eval(), server=halves.server.eval())
        inputs = target.inputs(target.private[:1])
        table = FlopTable(halves.client, inputs.shape[1:], inputs.dtype)
        batch = 8  # batch norm does not train on one sample of one value
        forward, backward = (count // batch for count in table(batch))
        activations = each.send(target.private)
        size = sum(map(len, codec.pack(codec.encode(activations)))) / len(activations)
        correlation = distance_correlation(target.private, activations).item() if len(activations) > 1 else 0.0
        found, _ = assess(name, attack, each)
        yield Advice(cut, tuple(activations.shape[1:]), forward, forward + backward, size, correlation, found)


def usual_cuts(network: nn.Module) -> list[str]:
    """The possible cuts of a network between its larger parts: those at the outermost level that has at least three.

    A layer that only changes the shape is left out, as its cut is that before it.
    """
    points = [cut for cut in cut_points(network) if not isinstance(network.get_submodule(cut), SHAPE_ONLY)]
    levels = {cut.count(".") for cut in points}
    by_level = [[cut for cut in points if cut.count(".") == level] for level in sorted(levels)]
    return next((cuts for cuts in by_level if len(cuts) >= 3), points)
