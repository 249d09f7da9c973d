"""What a client is willing to do and to reveal, whatever a server asks; a refusal names the rule."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from torch import nn

from cutlayer.codecs import get_transfer
from cutlayer.errors import RefusedError
from cutlayer.method import Method
from cutlayer.wire.messages import Calibrate, EvaluationRequest, Plan, Weights

EXACT_BITS = 16.0
"""Bits a value from which on activations count as exact."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A client's rules.

    Attributes:
        cuts: names of the cuts that it accepts; None for any. A client that brings its own half has chosen its cut.
        codecs: codecs of activations that it accepts, as the config writes them; None for any.
        exact: whether it accepts a cut with no fewer values than the input, in 16 bits or more each. From such
            activations of a first layer whoever knows the layer's weights can solve for the input.
        labels: whether labels may leave. This version's method always sends them.
        evaluation: whether activations of test data may leave; without it there are none, as far as the server knows.
        weights: whether the half's weights may leave and be replaced by an average, as several clients need it.
        views: how often activations of its training data may leave, in all; None for as often as the run asks.
        checkpoints: most that it stores for a server that does not say that it has saved any itself.
        width, batch_size, threads: largest that it takes from a server's config.
    """

    cuts: tuple[str, ...] | None = None
    codecs: tuple[str, ...] | None = None
    exact: bool = False
    labels: bool = True
    evaluation: bool = True
    weights: bool = True
    views: int | None = None
    checkpoints: int = 100
    width: float = 4.0
    batch_size: int = 4096
    threads: int = 4 * (os.cpu_count() or 1)

    def check_config(self, values: dict[str, object]) -> None:
        """Check the sizes in a server's config before anything is built from it, and its cut. Raises RefusedError."""
        widths = {"width": self.width, "client_width": self.width}
        for name, most in {**widths, "batch_size": self.batch_size, "threads": self.threads}.items():
            got = values.get(name)
            if got is not None and not (isinstance(got, (int, float)) and 0 < got <= most):
                raise RefusedError(f"{name}: this client takes at most {most}, the server asks for {got!r}")
        if self.cuts is not None and values.get("cut") not in self.cuts:
            raise RefusedError(
                f"cut: this client accepts {', '.join(self.cuts)}, the server asks for {values['cut']!r}"
            )

    def check_method(self, method: Method) -> None:
        """Check what a run's method has a client reveal. Raises RefusedError."""
        if self.codecs is not None and method.activations not in self.codecs:
            raise RefusedError(
                f"codec of the activations: this client accepts {', '.join(self.codecs)}, the run has "
                f"{method.activations}"
            )
        if not self.labels:
            raise RefusedError("labels: this client's policy does not let them leave, and the run needs them")

    def check_cut(self, method: Method, cut: tuple[int, ...], inputs: tuple[int, ...]) -> None:
        """Check whether the input of a sample could be solved for. Raises RefusedError.

        Args:
            cut, inputs: shapes of a sample's activations and of its input.
        """
        values, bits = math.prod(cut), bits_a_value(method, cut)
        if not self.exact and values >= math.prod(inputs) and bits >= EXACT_BITS:
            raise RefusedError(
                f"exact: {values} values of {bits:.3g} bits a sample cross the cut, its input has {math.prod(inputs)}: "
                "whoever knows the half's weights may solve for it. Choose a later cut or fewer bits, or say that this "
                "is accepted (exact, --accept-exact)"
            )

    def check_message(self, message: object, views: int) -> None:
        """Check what a server asks for in the midst of a run. Raises RefusedError.

        Args:
            views: how often activations of the training data have left so far.
        """
        if isinstance(message, Plan) and self.views is not None and views >= self.views:
            raise RefusedError(f"views: this client lets a sample's activations leave {self.views} times, not more")
        shares = isinstance(message, Plan) and message.share is not None
        shares = shares or isinstance(message, Weights) or (isinstance(message, Calibrate) and message.share)
        if shares and not self.weights:
            raise RefusedError("weights: this client's policy neither lets them leave nor takes others")
        if isinstance(message, EvaluationRequest) and not self.evaluation:
            raise RefusedError("evaluation: this client's policy does not let activations of test data leave")


OWN_HALF = Policy(exact=True)
"""Of a client in Python, which brings a half and a method of its own choice."""


def bits_a_value(method: Method, cut: tuple[int, ...]) -> float:
    """Bits of an activation as it is sent, before the lossless stage."""
    row_bytes, _ = get_transfer(method.activations).codec.layout(cut)
    return 8 * row_bytes / math.prod(cut)


def revealed(method: Method, half: nn.Module, cut: tuple[int, ...], inputs: tuple[int, ...], policy: Policy) -> str:
    """What will leave the device, in a few lines for a person."""
    transfer = get_transfer(method.activations)
    size = sum(transfer.codec.layout(cut))
    parameters = sum(value.numel() for value in half.state_dict().values())
    lines = [
        "What will leave this device:",
        f"  activations at the cut: {list(cut)} for each sample of shape {list(inputs)}, in {transfer.name}, about "
        f"{size} bytes a sample, in every A and B epoch" + (f", {policy.views} times" if policy.views else ""),
        "  labels: yes, one for each sample" if policy.labels else "  labels: no",
        f"  activations of test data: {'yes, if there are any' if policy.evaluation else 'no'}",
        f"  weights of the first part ({parameters} numbers): "
        + ("if several clients take part" if policy.weights else "no"),
        "  raw data: no. What activations tell of them depends on the cut: docs/privacy.md",
    ]
    return "\n".join(lines)
