"""What a client says of itself when it comes, checked against the run and the operator's limits. Nothing is changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from torch import nn

from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.terms import check_terms, largest_frame, terms_of
from cutlayer.codecs import evaluation_codec, get_transfer
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.method import Method, Training
from cutlayer.schedule import Budget
from cutlayer.training.averaging import largest_weights
from cutlayer.training.checks import ClientSummary
from cutlayer.training.plain_epoch import PlainEpoch
from cutlayer.wire.messages import Hello

HALF = "client half"  # the one term that a server may not know by itself
MOST_FLOPS = 1 << 62
STEP_BYTES = 1024
"""More than the headers of a step's frames."""
ADVICE = {
    "samples": " of this client (the server's --max-samples, --quotas)",
    "test_samples": " of this client (the server's --max-samples, --quotas)",
    "batch_size": " (the server's --max-batch)",
    "test_batch_size": " (the server's --max-batch)",
}
IDENTITY = (
    "samples",
    "test_samples",
    "batch_size",
    "drop_last",
    "test_batch_size",
    "frozen",
    "epoch_samples",
    "epoch_flops",
    "epoch_forward",
    "epoch_defence",
)
"""What a client must say again each time it comes."""


@dataclass(frozen=True, eq=False)
class Outline:
    """What a server knows of a run before anyone has come.

    Attributes:
        names: the clients that the run begins with, in the order of their numbers.
        half: the client half, for its structure alone; None compares the clients' halves with each other.
        cut_shape: shape of one sample's activations.
    """

    names: Sequence[str]
    half: nn.Module | None
    cut_shape: tuple[int, ...]
    method: Method
    training: Training

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"clients: expected each name once, got {', '.join(self.names)}")


class Claims:
    """The bounds of what a client of this run may say of itself."""

    def __init__(self, run: Outline, limits: ClientLimits) -> None:
        self.run, self.limits = run, limits
        self.terms = terms_of(run.method, run.training, run.cut_shape, run.half)
        self.half_bytes = largest_weights(run.half) if run.half is not None else limits.max_half
        up, down = get_transfer(run.method.activations), get_transfer(run.method.gradients)
        # Of a sample: what is stored of it, 8 bytes of label, and what is remembered of its gradients.
        stored = [sum(codec.layout(run.cut_shape)) for codec in (up.codec, evaluation_codec(up))]
        values = math.prod(run.cut_shape)
        self._sample_bytes = 8 + max(*stored, 2 * values * (up.delta is not None), 4 * values * down.feedback)

    def check(self, hello: Hello, first: Hello | None, before: Hello | None) -> None:
        """Raise RefusedError for a claim that is not allowed.

        Args:
            first: the Hello of the first client that came in, which says what the server cannot know.
            before: what this client said when it came for the first time.
        """
        half = (first or hello).terms.get(HALF)
        check_terms(self.terms if HALF in self.terms or half is None else {**self.terms, HALF: half}, hello.terms)
        for field, (least, most) in self._bounds(hello).items():
            got = getattr(hello, field)
            if got < least:
                raise RefusedError(f"{field}: expected at least {least}, got {got}")
            if got > most:
                advice = ADVICE.get(field, "")
                raise RefusedError(f"{field}: expected at most {most}{advice}, got {got}")
        if hello.name in self.run.names:
            self._check_room(hello)
        if hello.frozen != hello.terms.get(HALF, "").endswith("(frozen)"):
            raise RefusedError(f"frozen: expected what its half says of itself, got {hello.frozen}")
        for field in IDENTITY:
            if before is not None and getattr(before, field) != getattr(hello, field):
                raise RefusedError(
                    f"{field}: expected {getattr(before, field)}, as when the run began, got {getattr(hello, field)}"
                )
        if (limit := self.largest_frame(hello)) > self.limits.largest_frame:
            raise RefusedError(
                f"frames: expected a batch, with labels of up to 64 KiB a sample, to fit {self.limits.largest_frame} "
                f"bytes, half of --client-memory; one of {max(hello.batch_size, hello.test_batch_size)} samples may "
                f"take {limit}. Choose a smaller batch_size"
            )

    def check_newcomer(self, hello: Hello, members: Sequence[Hello]) -> None:
        """Raise RefusedError for a claim with which a client cannot be admitted to a run of these."""
        self.check(hello, members[0], None)
        if hello.bfloat16 != (expected := all(member.bfloat16 for member in members)):
            raise RefusedError(f"bfloat16: expected {expected}, as of the run's clients, got {hello.bfloat16}")
        if isinstance(self.run.method.schedule, Budget):
            self._check_price(hello, members)
        budget = self._budget_mib << 20
        for field in ("samples", "test_samples"):
            taken = self._sample_bytes * sum(getattr(member, field) for member in members)
            if (needed := getattr(hello, field) * self._sample_bytes) > budget - taken:
                raise RefusedError(
                    f"{field}: {getattr(hello, field)} take up to {needed} bytes in the replay store, in which of "
                    f"{budget >> 20} MiB up to {max(0, budget - taken)} bytes are free; raise the budget"
                )

    def _check_price(self, hello: Hello, members: Sequence[Hello]) -> None:
        """Whether an epoch of this client costs what one of its size may: the others' budget is to pay for it, too.

        Tensors are as large as the cut says. What goes with them differs with labels and batches, FLOPs with the batch.
        """

        def each(field: str) -> int:
            return math.ceil(max(getattr(member, field) / max(1, member.epoch_samples) for member in members))

        def tensors(client: Hello) -> int:
            return client.epoch_samples * math.prod(self.run.cut_shape) * 4 * (1 if client.frozen else 2)

        samples = hello.epoch_samples
        around = max((member.epoch_bytes - tensors(member)) / max(1, member.epoch_samples) for member in members)
        beside = samples * 8 * max(1, math.ceil(around))  # the largest type of numbers, in place of the smallest
        for field, most in {
            "epoch_samples": hello.samples,
            "epoch_steps": samples,
            "epoch_bytes": tensors(hello) + beside + STEP_BYTES * (hello.epoch_steps + 1),
            "epoch_labels": beside,
            **{field: 2 * samples * each(field) for field in ("epoch_flops", "epoch_forward", "epoch_defence")},
        }.items():
            if (got := getattr(hello, field)) > most:
                raise RefusedError(
                    f"{field}: expected at most {most}, as of a client with {samples} samples in a run with a budget, "
                    f"got {got}"
                )

    def largest_frame(self, hello: Hello) -> int:
        """Bytes of the largest frame that this client has reason to send."""
        largest = max(hello.batch_size, hello.test_batch_size)
        return largest_frame(self.run.method.activations, self.run.cut_shape, largest, hello.half_bytes)

    def _bounds(self, hello: Hello) -> dict[str, tuple[int, int]]:
        samples, batch = self.limits.samples(hello.name), self.limits.max_batch or 4 * self.run.training.batch_size
        return {
            "samples": (1, samples),
            "test_samples": (0, samples),
            "batch_size": (1, batch),
            "test_batch_size": (0, batch),
            "epoch_samples": (0, samples),
            "epoch_steps": (0, samples),
            "epoch_flops": (0, MOST_FLOPS),
            "epoch_forward": (0, MOST_FLOPS),
            "epoch_defence": (0, MOST_FLOPS),
            "epoch_bytes": (0, samples * (8 * math.prod(self.run.cut_shape) + (1 << 17))),
            "epoch_labels": (0, samples << 16),
            "half_bytes": (0, self.half_bytes),
            "weights_bytes": (0, self.half_bytes),
        }

    @property
    def _budget_mib(self) -> int:
        """Of the replay store, wherever it lies."""
        store = self.run.method.store
        return store.memory_budget_mib if store.placement == "memory" else store.disk_budget_mib

    def _check_room(self, hello: Hello) -> None:
        """Whether what may be stored of a client fits its share of the store."""
        budget = self._budget_mib
        total = sum(self.limits.samples(name) for name in self.run.names)
        share = (budget << 20) * self.limits.samples(hello.name) // total
        for field in ("samples", "test_samples"):
            if (needed := getattr(hello, field) * self._sample_bytes) > share:
                raise RefusedError(
                    f"{field}: {getattr(hello, field)} take up to {needed} bytes in the replay store, expected at most "
                    f"{share}, this client's share of {budget} MiB; raise the budget, or give each its quota (--quotas)"
                )


def summary_of(hello: Hello) -> ClientSummary:
    """What the server is told of a client."""
    return ClientSummary(**{each.name: getattr(hello, each.name) for each in dataclasses.fields(ClientSummary)})


def plain_of(hello: Hello) -> PlainEpoch:
    """A client's share of an epoch of plain split learning."""
    return PlainEpoch(**{each.name: getattr(hello, f"epoch_{each.name}") for each in dataclasses.fields(PlainEpoch)})


def as_json(hello: Hello) -> dict[str, object]:
    """What a checkpoint keeps of a client's Hello."""
    return msgspec.to_builtins(msgspec.structs.replace(hello, session="", received=0, run="", checkpoints=()))


def from_json(values: Mapping[str, object]) -> Hello:
    """Inverse of `as_json`."""
    return msgspec.convert(values, Hello)
