"""What both sides must agree on before a byte of training crosses, by name, for the handshake to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from cutlayer.codecs import evaluation_codec, get_transfer
from cutlayer.describe import structure
from cutlayer.errors import RefusedError
from cutlayer.method import Method, Training


def terms_of(
    method: Method, training: Training, cut_shape: tuple[int, ...], client_half: nn.Module | None
) -> dict[str, str]:
    """The terms of a run, as text. A server that does not know the client's half leaves that term out."""
    terms = {
        "codec of the activations": method.activations,
        "codec of the gradients": method.gradients,
        "schedule": repr(method.schedule),
        "norm_in_b": method.norm_in_b,
        # How many halves a simulation keeps in memory is no term of a run.
        "fleet": repr(dataclasses.replace(method.fleet, live=1)),
        "shape at the cut": str(list(cut_shape)),
        "microbatches": str(training.microbatches),
        "epochs": str(training.epochs),
        "seed": str(training.seed),
    }
    if client_half is not None:
        terms["client half"] = structure(client_half, classes=False)
    return terms


def check_terms(expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """Raise RefusedError that names every term that differs."""
    different = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    if different:
        listed = "; ".join(f"{name}: expected {expected.get(name)}, got {got.get(name)}" for name in different)
        raise RefusedError(f"the client is set up for another run: {listed}")


def largest_frame(codec: str, cut_shape: tuple[int, ...], batch_size: int, half_bytes: int) -> int:
    """Bytes of the largest frame that a peer of this run has reason to send: a batch, or the client half.

    A batch has labels of 64 KiB a sample at most.
    """
    transfer = get_transfer(codec)
    layouts = [used.layout(cut_shape) for used in (transfer.codec, evaluation_codec(transfer))]
    row_bytes, shared_bytes = (max(sizes) for sizes in zip(*layouts, strict=True))
    return half_bytes + (1 << 20) + shared_bytes + batch_size * (2 * row_bytes + (1 << 16))
