"""The method on real CIFAR-10, small enough for a test; skipped, and said so, if the data are not there."""

from pathlib import Path

from cutlayer import run_experiment, with_choices
from cutlayer.runs.recipes import RECIPES


def test_a_narrow_vgg11_learns_from_real_images_over_8_bits(cifar10_dir: Path) -> None:
    config = with_choices(
        RECIPES["cifar10_small"](),
        data_dir=str(cifar10_dir),
        train_samples=1000,
        test_samples=500,
        width=0.25,
        epochs=8,
        batch_size=50,
        schedule="periodic",
        period=4,
        evaluate_every=8,
    )
    history = run_experiment(config).history
    assert history.exchanges == "ABCCABCC"
    assert history.losses[-1] < history.losses[0] - 0.3
    accuracy = history.test("accuracy")
    assert accuracy is not None
    assert accuracy > 0.2  # ten classes: 0.1 by chance
    assert history.traffic_reduction > 10
