"""What frames say by themselves, without any attack on the activations: to the server, and to whoever sees their sizes.

Each function takes what its reader has, and returns what it learns. docs/privacy.md says in words what that is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.codecs import get_codec
from cutlayer.errors import ConfigError
from cutlayer.wire.frames import read
from cutlayer.wire.messages import Step


@dataclass(frozen=True, eq=False)
class Sighting:
    """A batch of training as the server saw it.

    Attributes:
        client, epoch, step: which batch.
        ids: of its samples, in their order, int64 [B].
        labels: [B, ...].
        sent: of which samples the activations, or their changes, came, bool [B]; with `delta` not of all.
        activation_bytes: what the activations took in the frame.
        frame_bytes: the length of the whole frame, which also someone sees who sees only encrypted traffic.
    """

    client: int
    epoch: int
    step: int
    ids: Tensor
    labels: Tensor
    sent: Tensor
    activation_bytes: int
    frame_bytes: int


def sightings(frames: Iterable[bytes]) -> list[Sighting]:
    """The batches of training among a client's frames, in their order. Raises RefusedError for what is no frame."""
    found = []
    for data in frames:
        received = read(data)
        message = received.message
        if not isinstance(message, Step):
            continue
        tensors = received.unpack().tensors
        ids, labels = (get_codec(tensors[name].codec).decode(tensors[name]) for name in ("ids", "labels"))
        sent = torch.ones(len(ids), dtype=torch.bool)
        if "sent" in tensors:
            sent = get_codec(tensors["sent"].codec).decode(tensors["sent"]).bool()
        size = next(field.nbytes for field in received.fields if field.name == "activations")
        found.append(Sighting(message.client, message.epoch, message.step, ids, labels, sent, size, len(data)))
    return found


def labels_by_sample(seen: Iterable[Sighting]) -> dict[tuple[int, int], int]:
    """The label of every sample, by client and id: ids are the same in every epoch, so all epochs are one file."""
    return {
        (batch.client, int(number)): int(label)
        for batch in seen
        for number, label in zip(batch.ids, batch.labels, strict=True)
    }


def looks(seen: Iterable[Sighting]) -> dict[tuple[int, int], int]:
    """How often the server was sent each sample, by client and id: so many looks at one image."""
    counts: dict[tuple[int, int], int] = {}
    for batch in seen:
        for number in batch.ids[batch.sent].tolist():
            counts[batch.client, number] = counts.get((batch.client, number), 0) + 1
    return counts


def unmoved(seen: Iterable[Sighting], epoch: int) -> set[tuple[int, int]]:
    """Samples of an epoch that were not sent as they moved too little (`delta`): those that the network has learned."""
    return {
        (batch.client, number) for batch in seen if batch.epoch == epoch for number in batch.ids[~batch.sent].tolist()
    }


def zero_patterns(activations: Tensor) -> Tensor:
    """Where activations [N, *cut] are exactly 0, bool [N, values]: after ReLU, on which side of each plane they are."""
    return (activations == 0).flatten(1)


def match_patterns(patterns: Tensor, candidates: Tensor) -> Tensor:
    """For each pattern of zeros [N, values] the nearest of the candidates' [M, values]: its position, int64 [N].

    A server that has the half knows the patterns of images that it has, and finds out which of them a client holds.
    """
    if patterns.shape[1:] != candidates.shape[1:]:
        raise ConfigError(f"expected patterns of one length, got {patterns.shape[1]} and {candidates.shape[1]}")
    return torch.stack([(pattern != candidates).sum(1).argmin() for pattern in patterns])
