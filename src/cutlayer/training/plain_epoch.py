"""A client's share of an epoch of plain split learning in 32 bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.models.cut import is_frozen
from cutlayer.training.client import Client
from cutlayer.wire.frames import Frame, pack
from cutlayer.wire.messages import Done, Plan, Step, Update


@dataclass(frozen=True)
class PlainEpoch:
    """A client's share of an epoch of plain split learning.

    Attributes:
        samples, steps: samples trained on, in so many batches.
        flops: of the client half, forward and backward.
        bytes: of all frames in both directions, but for those of weights.
        forward: FLOPs of the client half, forward alone.
        defence: FLOPs of the client's defences in an A epoch, which are no part of plain split learning.
        labels: bytes that labels may take beyond those in `bytes`, if later ones are larger numbers than the first.
    """

    samples: int
    steps: int
    flops: int
    bytes: int
    forward: int
    defence: int = 0
    labels: int = 0

    @staticmethod
    def of(client: Client) -> PlainEpoch:
        """That of this client: frames as they would be, of zeros."""
        sizes, number = Counter(client.train.batch_sizes()), client.number
        label, last = client.first_labels[:1].clone(), len(client.train) - 1
        if not label.is_floating_point():
            label[:] = client.first_labels.max()
        frozen = is_frozen(client.half)  # which no gradients would be sent to
        around = [Plan(number, 1, "B" if frozen else "A"), Done(number, 1, 1, {})]
        total = sum(len(pack(Frame(message))) for message in around)
        for size, count in sizes.items():
            values = get_codec("fp32").encode(torch.zeros(size, *client.cut_shape))
            labels = encode_exactly(label.expand(size, *label.shape[1:]).contiguous())
            tensors = {"ids": encode_exactly(torch.full((size,), last)), "labels": labels, "activations": values}
            up = pack(Frame(Step(number, 1, 1), tensors))
            down = pack(Frame(Update(number, 1, 1), {"gradients": values}))
            total += count * (len(up) + (0 if frozen else len(down)))
        steps, samples = sum(sizes.values()), sum(size * count for size, count in sizes.items())
        forward = sum(count * client.flops(size)[0] for size, count in sizes.items())
        backward = sum(count * client.flops(size)[1] for size, count in sizes.items())
        defence = sum(count * client.defence.flops(size) for size, count in sizes.items())
        wider = 0 if label.is_floating_point() else samples * (8 * label.numel() - encode_exactly(label).nbytes)
        return PlainEpoch(samples, steps, forward + backward, total, forward, defence, wider)
