"""A step in parts: the same update as the whole batch up to float addition, and without batch norm nothing more."""

import dataclasses

import pytest
import torch
from torch import nn

from cutlayer import Always, Halves, Method, Optimizer, RefusedError, Training, fit
from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.method import Task
from cutlayer.records.ledger import Ledger
from cutlayer.seeds import seeded
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Step
from tests.helpers.small import noise_images

TRAINING = Training(
    epochs=2, batch_size=24, client=Optimizer(lr=0.05), server=Optimizer(lr=0.05), evaluate_every=2, seed=3
)


class Floats(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() / 255


def halves(norm: bool = False) -> Halves:
    with seeded(0, "model"):
        client = nn.Sequential(Floats(), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity())
        server = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))
    return Halves(client, server)


def train(microbatches: int, norm: bool = False) -> tuple[dict[str, torch.Tensor], list[float], int]:
    data = noise_images(count=60, size=8)  # batches of 24, 24 and 12
    training = dataclasses.replace(TRAINING, microbatches=microbatches)
    result = fit(halves(norm), data, data, method=Method(Always(), "fp32", "fp32"), training=training)
    return result.model.state_dict(), result.history.losses, result.history.flops("client")


@pytest.mark.parametrize("parts", [2, 5, 24, 100])
def test_parts_give_the_update_of_the_whole_batch_up_to_float_addition(parts: int) -> None:
    whole, losses, flops = train(1)
    got, got_losses, got_flops = train(parts)
    assert got_losses == pytest.approx(losses, rel=1e-5)
    assert got_flops == flops
    for name, value in whole.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(got[name], value) for name, value in whole.items())


def test_batch_norm_normalizes_each_part_by_itself() -> None:
    whole, _, _ = train(1, norm=True)
    got, _, _ = train(4, norm=True)
    assert got["client.2.num_batches_tracked"] == 4 * whole["client.2.num_batches_tracked"]
    assert not torch.allclose(got["client.2.running_var"], whole["client.2.running_var"], rtol=1e-3)


def test_parts_out_of_order_or_of_another_step_are_refused() -> None:
    job = Job(halves().server, (4, 8, 8), Method(), TRAINING, Task())
    server = Server(job, [ClientSummary(60, 0, 24)], Ledger())
    server.begin()

    def frame(*numbers: int, size: int = 8) -> bytes:
        ids = torch.arange(size)
        activations = get_codec("fp32").encode(torch.ones(size, 4, 8, 8))
        tensors = {"ids": encode_exactly(ids), "labels": encode_exactly(ids % 10), "activations": activations}
        return pack(Frame(Step(0, 0, *numbers), tensors))

    def receive(data: bytes) -> bytes | None:
        (reply,) = server.train([server.take(read(data))])
        return reply

    for wrong in (frame(0, 1, 3, 24), frame(0, 0, 3, 25), frame(0, 0, 25, 24), frame(0, 0, 0, 24), frame(1)):
        with pytest.raises(RefusedError, match="expected"):
            receive(wrong)
    receive(frame(0, 0, 3, 24))
    before = [p.clone() for p in server.half.parameters()]
    for wrong in (
        frame(0, 0, 3, 24),
        frame(0, 2, 3, 24),
        frame(0, 1, 4, 24),
        frame(0, 1, 3, 23),
        frame(1),
        frame(1, 1, 3, 24),
    ):
        with pytest.raises(RefusedError, match="expected"):
            receive(wrong)
    receive(frame(0, 1, 3, 24))
    assert all(torch.equal(a, b) for a, b in zip(before, server.half.parameters(), strict=True))
    receive(frame(0, 2, 3, 24))
    assert not all(torch.equal(a, b) for a, b in zip(before, server.half.parameters(), strict=True))
    assert receive(frame(1)) is not None
