"""A client's actor is sent that client's samples alone."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.ray.compact import compact
from tests.helpers.small import noise_images

IMAGES = noise_images(1000)
TENSORS = TensorDataset(IMAGES.inputs, IMAGES.labels)
CHOSEN = [5, 999, 0, 7, 7]


@pytest.mark.parametrize(
    ("part", "samples"),
    [
        (IMAGES.take(torch.arange(10, 20)), 10),
        (IMAGES.first(3), 3),
        (TensorDataset(IMAGES.inputs[4:9], IMAGES.labels[4:9]), 5),
        (Subset(IMAGES, CHOSEN), 5),
        (Subset(TENSORS, CHOSEN), 5),
        (Subset(Subset(IMAGES, list(range(500))), [1, 2, 3]), None),
    ],
)
def test_the_same_samples_without_the_others(part: Dataset, samples: int | None) -> None:
    sent = pickle.dumps(compact(ClientData(part)))
    if samples is not None:
        assert len(sent) < samples * 3 * 32 * 32 + 4096
    got = pickle.loads(sent).train
    assert len(got) == len(part)
    for index in range(len(part)):
        assert all(torch.equal(a, b) for a, b in zip(got[index], part[index], strict=True))


def test_a_loader_goes_as_it_is() -> None:
    loader = DataLoader(TENSORS, batch_size=4)
    assert compact(ClientData(loader)).train is loader
