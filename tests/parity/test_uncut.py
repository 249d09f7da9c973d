"""Split, unquantized, always exchanging: the same bits as the same network trained uncut."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch.nn.functional import cross_entropy

from cutlayer import CropFlip, Method, Optimizer, Training, fit, split
from cutlayer.data.batches import Batches
from cutlayer.data.images import Images
from cutlayer.models.networks import make_model
from cutlayer.seeds import seeded
from tests.helpers.small import noise_images

EPOCHS = 3


def train_uncut(
    model: torch.nn.Module, data: Images, training: Training
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """An ordinary training loop, with nothing of the split but the order and the augmentation of the batches."""
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    feed = Batches(data, batch_size=training.batch_size, seed=training.seed, augment=training.augment)
    losses = []
    for epoch in range(EPOCHS):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.2 ** sum(epoch >= milestone for milestone in (1, 2))
        total = torch.zeros((), dtype=torch.float64)
        for batch in feed.epoch(epoch):
            inputs = batch.inputs
            if training.channels_last and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"):
                outputs = model(inputs)
            loss = cross_entropy(outputs.float(), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach().double() * len(batch.labels)
        losses.append(total.item() / len(data))
    return losses, model.state_dict()


@pytest.mark.parametrize(
    "setting",
    [{}, {"channels_last": True}, {"precision": "bf16", "channels_last": True}, {"precision": "bf16"}],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "cut"), [("vgg11", "layer4"), ("vgg11", "layer5.1"), ("resnet18", "layer1"), ("resnet18", "layer2.0")]
)
def test_split_training_equals_uncut_training_bit_for_bit(name: str, cut: str, setting: dict) -> None:
    data = noise_images(count=80)
    with seeded(1, "model"):
        model = make_model(name, (3, 32, 32), data.mean, data.std, width=0.125)
    optimizer = Optimizer(lr=0.05, momentum=0.9, weight_decay=5e-4, milestones=(1 / 3, 2 / 3), decay=0.2)
    training = Training(
        epochs=EPOCHS,
        batch_size=32,
        client=optimizer,
        server=optimizer,
        augment=CropFlip(padding=4, flip=True),
        seed=7,
        **setting,
    )
    expected_losses, expected_weights = train_uncut(copy.deepcopy(model), data, training)

    result = fit(split(model, cut), data, method=Method(), training=training)

    assert result.history.losses == expected_losses
    weights = result.model.state_dict()
    assert list(weights) == list(expected_weights)
    different = [key for key in weights if not torch.equal(weights[key], expected_weights[key])]
    assert different == []
    assert not torch.equal(weights["head.weight"], model.state_dict()["head.weight"])


def test_what_autocast_leaves_in_32_bits_at_the_cut_stays_in_them() -> None:
    data = noise_images(count=40)
    with seeded(1, "model"):
        model = torch.nn.Sequential(OrderedDict(
            cast=Floats(), first=torch.nn.Linear(3 * 32 * 32, 16), cut=torch.nn.LayerNorm(16),
            second=torch.nn.Tanh(), head=torch.nn.Linear(16, 10),
        ))  # fmt: skip
    optimizer = Optimizer(milestones=(1 / 3, 2 / 3))
    training = Training(epochs=EPOCHS, batch_size=16, client=optimizer, server=optimizer, precision="bf16")
    expected_losses, expected_weights = train_uncut(copy.deepcopy(model), data, training)
    result = fit(split(model, "cut"), data, training=training)
    assert result.history.losses == expected_losses
    assert all(torch.equal(value, expected_weights[name]) for name, value in result.model.state_dict().items())


class Floats(torch.nn.Module):
    """Images as rows of floats."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) / 255
