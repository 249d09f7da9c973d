"""What a server, or someone who sees sizes alone, learns from real frames without attacking the activations."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cutlayer import Always, Drop, Halves, Method, Once, Optimizer, Training, fit, split
from cutlayer.backends.observed import Observed
from cutlayer.data.datasets import digits
from cutlayer.models.networks import make_model
from cutlayer.privacy import frame_leak
from cutlayer.privacy.frames import (
    Sighting,
    labels_by_sample,
    looks,
    match_patterns,
    sightings,
    unmoved,
    zero_patterns,
)
from tests.helpers.privacy import DEEP, SHALLOW, trained

TRAIN, TEST = digits()


def network(cut: str = "layer1") -> Halves:
    torch.manual_seed(0)
    return split(make_model("cnn", (1, 8, 8), TRAIN.mean, TRAIN.std, width=0.5), cut)


def seen(method: Method, data: object, epochs: int = 2, lr: float = 0.05) -> list[Sighting]:
    frames: list[bytes] = []
    optimizer = Optimizer(lr=lr, schedule="constant")
    training = Training(epochs=epochs, batch_size=16, client=optimizer, server=optimizer)
    fit(network(), data, method=method, training=training, backend=Observed(frames.append), progress=False)
    return sightings(frames)


def test_ids_link_a_sample_over_epochs_and_bring_its_label() -> None:
    found = seen(Method(Always()), TRAIN.first(64), epochs=3)
    assert labels_by_sample(found) == {(0, n): int(label) for n, label in enumerate(TRAIN.labels[:64])}
    assert looks(found) == {(0, n): 3 for n in range(64)}
    first, second = ([n for batch in found if batch.epoch == epoch for n in batch.ids.tolist()] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second, "the order is drawn anew, the ids are not"


def test_the_order_of_a_loader_that_does_not_shuffle_is_that_of_the_data_set() -> None:
    loader = DataLoader(TensorDataset(TRAIN.inputs[:32], TRAIN.labels[:32]), batch_size=8)
    assert [n for batch in seen(Method(Always()), loader, epochs=1) for n in batch.ids.tolist()] == list(range(32))


def test_few_exchanges_are_few_looks() -> None:
    found = seen(Method.of(Once()), TRAIN.first(32), epochs=6)
    assert set(looks(found).values()) == {2}


def plain_and_busy() -> TensorDataset:
    """Batches of blank images and of busy ones in turn."""
    draw = torch.Generator().manual_seed(0)
    busy = torch.randint(0, 256, (16, 1, 8, 8), generator=draw, dtype=torch.uint8)
    images = torch.cat([part for _ in range(3) for part in (torch.zeros_like(busy), busy)])
    return TensorDataset(images, TRAIN.labels[: len(images)])


@pytest.mark.parametrize(("codec", "tells"), [("fp8_e4m3", False), ("fp8_e4m3+zstd", True)])
def test_the_size_after_the_lossless_stage_tells_blank_images_from_busy_ones(codec: str, tells: bool) -> None:
    loader = DataLoader(plain_and_busy(), batch_size=16)
    sizes = [batch.frame_bytes for batch in seen(Method(Always(), codec, "fp32"), loader, epochs=1)]
    blank, busy = sizes[::2], sizes[1::2]
    assert (max(blank) < min(busy)) if tells else (len(set(sizes)) == 1)


def test_delta_tells_which_samples_have_settled() -> None:
    """A client that barely learns sends nothing of samples that it has sent; a sample that is new is sent."""
    data, changed = TensorDataset(TRAIN.inputs[:32].clone(), TRAIN.labels[:32]), [3, 17]
    epochs = _Epochs(data, changed)
    method = Method(Always(), "delta0.1>fp16", "fp32", norm_in_b="eval")
    found = seen(method, DataLoader(epochs, batch_size=32), epochs=3, lr=1e-6)
    settled = unmoved(found, 2)
    assert settled == {(0, n) for n in range(32) if n not in changed}


class _Epochs(torch.utils.data.Dataset):
    """Data of which some samples are others in the last epoch, as if a person's file was changed."""

    def __init__(self, data: TensorDataset, changed: list[int]) -> None:
        self.data, self.changed, self.fetched = data, changed, [0] * len(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.fetched[index] += 1
        image, label = self.data[index]
        # A first sample or two are looked at before training, for shapes.
        late = self.fetched[index] >= 3 + (index < 2)
        return (255 - image, label) if index in self.changed and late else (image, label)


def test_zeros_after_relu_tell_which_image_it_is() -> None:
    target = trained(SHALLOW)
    patterns = zero_patterns(target.send(target.private))
    candidates = torch.cat([target.public, target.private])
    found = match_patterns(patterns, zero_patterns(target.send(candidates)))
    assert torch.equal(found, len(target.public) + torch.arange(len(target.private)))


def test_the_summary_of_a_target_says_the_same() -> None:
    shallow, deep = frame_leak(trained(SHALLOW)), frame_leak(trained(DEEP))
    assert shallow["matched"] == 1 > shallow["guess"]
    assert shallow["zeros"] > 0.1
    assert shallow["size spread"] == 0, "without a lossless stage all samples have one size"
    assert shallow["bytes"] == 4 * 16 * 8 * 8
    assert deep["correlation"] < shallow["correlation"]


def frames_of_an_epoch() -> Iterator[Sighting]:
    yield from seen(Method(Drop()), TRAIN.first(16), epochs=1)


def test_sightings_count_every_byte_of_a_frame() -> None:
    (batch,) = frames_of_an_epoch()
    assert batch.activation_bytes == 16 * 4 * 8 * 8 * 8
    assert batch.frame_bytes > batch.activation_bytes
