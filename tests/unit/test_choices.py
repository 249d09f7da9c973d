"""What is not what `fit` expects: each says what came and what to do, before anything is trained."""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from cutlayer import (
    ConfigError,
    CutlayerError,
    DivergedError,
    Drop,
    Halves,
    Method,
    Optimizer,
    RefusedError,
    Task,
    Training,
    accuracy,
    fit,
)

TRAINING = Training(epochs=1, batch_size=4)
MSE = Task(functional.mse_loss, {})
INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(8) % 3
SOFT = torch.softmax(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), 1)


def halves(outputs: int = 3) -> Halves:
    torch.manual_seed(0)
    return Halves(nn.Linear(3, 4), nn.Linear(4, outputs))


def trained(data: object, test: object = None, outputs: int = 3, **more: object):
    return fit(halves(outputs), data, test, **{"training": TRAINING, **more})


def test_probabilities_have_an_accuracy() -> None:
    history = trained(TensorDataset(INPUTS, SOFT), TensorDataset(INPUTS, SOFT)).history
    hard = trained(TensorDataset(INPUTS, SOFT), TensorDataset(INPUTS, SOFT.argmax(1))).history
    assert history.test("accuracy") == hard.test("accuracy")
    assert accuracy(SOFT, SOFT) == 1


def test_a_metric_that_fails_is_named() -> None:
    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs @ labels

    data = TensorDataset(INPUTS, CLASSES)
    with pytest.raises(ConfigError, match=r"metric 'broken' failed on outputs \[8, 3\] and labels torch.int64 \[8\]: "):
        trained(data, data, task=Task(metrics={"broken": broken}))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
        lambda reduction: functools.partial(functional.cross_entropy, reduction=reduction),
    ],
    ids=["module", "partial"],
)
def test_a_loss_that_says_that_it_is_no_mean_is_refused(loss: Callable, reduction: str) -> None:
    with pytest.raises(ConfigError, match=f"expected the mean over the samples .* got reduction='{reduction}'"):
        Task(loss(reduction))
    Task(loss("mean"))
    Task(nn.KLDivLoss(reduction="batchmean"))


def test_a_loss_that_is_a_sum_is_refused_before_anything_is_trained() -> None:
    seen: list[int] = []

    def summed(outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.mse_loss(outputs, labels, reduction="sum")

    both = halves(1)
    with pytest.raises(ConfigError, match=r"expected the mean over the samples of a batch, got a sum .*divide by len"):
        fit(both, TensorDataset(INPUTS, INPUTS[:, :1]), training=TRAINING, task=Task(summed, {}), on_epoch=seen.append)
    assert seen == []


@pytest.mark.parametrize(
    "mean",
    [
        lambda outputs, labels: (outputs - labels).square().sum(1).mean(),
        lambda outputs, labels: functional.mse_loss(outputs, labels).sqrt(),
        lambda outputs, labels: functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs))),
        lambda outputs, labels: functional.dropout(outputs - labels, 0.5).square().mean(),
        lambda outputs, labels: 0 * outputs.sum(),
    ],
    ids=["summed over outputs", "root", "contrastive", "drawing", "nothing"],
)
def test_losses_that_are_no_sums_are_taken_and_the_check_changes_no_bit(mean: Callable, monkeypatch) -> None:
    def losses() -> list[float]:
        training = Training(epochs=3, batch_size=4)
        return trained(TensorDataset(INPUTS, INPUTS), training=training, task=Task(mean, {})).history.losses

    checked = losses()
    monkeypatch.setattr("cutlayer.training.step.require_mean", lambda *_: None)
    assert losses() == checked


def test_a_list_of_samples_is_one_clients_and_a_list_of_data_sets_is_several() -> None:
    pairs = [(x, int(y)) for x, y in zip(INPUTS, CLASSES, strict=True)]
    one = trained(pairs, pairs).history
    assert one.losses == trained(TensorDataset(INPUTS, CLASSES)).history.losses
    assert one.test("accuracy") is not None
    assert trained([pairs]).history.losses == one.losses
    assert trained([pairs[:4], pairs[4:]]).history.epochs[0].samples == 8
    arrays = [(x.numpy(), y) for x, y in pairs]
    assert trained(arrays).history.losses == one.losses


class DataFrame:
    """As pandas', as far as is asked."""

    __module__ = "pandas"

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: trained([(INPUTS, CLASSES), (INPUTS, CLASSES)]),
            r"got a list of pairs of tensors. If each is a sample, .* give \[pairs\]",
        ),
        (lambda: trained((INPUTS, CLASSES)), r"use torch.utils.data.TensorDataset\(\*tensors\)"),
        (lambda: trained((INPUTS.numpy(), CLASSES.numpy())), r"use torch.utils.data.TensorDataset\(\*tensors\)"),
        (lambda: trained(DataFrame()), r"got a DataFrame; make tensors of its columns: TensorDataset\("),
        (
            lambda: trained(TensorDataset(INPUTS.half(), CLASSES)),
            r"does not take inputs torch.float16 \[batch, 3\]; convert them to torch.float32, as its weights are",
        ),
        (
            lambda: trained(TensorDataset(INPUTS.double(), CLASSES)),
            r"does not take inputs torch.float64 \[batch, 3\]; convert them to torch.float32, as its weights are",
        ),
        (
            lambda: trained(TensorDataset(INPUTS, CLASSES), method=Drop(threshold=0.1)),
            r'expected a Method, got a schedule; give Method.of\(Drop\(warmup=1, threshold=0.1\), "fp8"\)',
        ),
        (lambda: trained(TensorDataset(INPUTS, CLASSES), method="fp8"), "method: expected a Method, got 'fp8'"),
        (lambda: trained(TensorDataset(INPUTS, CLASSES), training=5), "training: expected a Training, got 5"),
        (
            lambda: trained(TensorDataset(INPUTS, CLASSES), task=functional.mse_loss),
            r"task: expected a Task, got .*; give Task\(loss=...\)",
        ),
        (lambda: Method.of("fp8", Drop()), r"expected a schedule and then a codec, .* got 'fp8' and Drop\("),
        (lambda: Method.of(Drop), r"expected a schedule and then a codec"),
        (
            lambda: trained(TensorDataset(INPUTS, INPUTS[:, 0]), outputs=1),
            r"cannot learn from outputs of one number. If this is regression, give Task\(loss=",
        ),
        (
            lambda: trained(TensorDataset(INPUTS, INPUTS[:, 0])),
            r"expected classes from 0 to 2, .* got floats \[\]. If this is regression, give Task\(loss=",
        ),
    ],
)
def test_wrong_kinds_are_explained(wrong: Callable, message: str) -> None:
    with pytest.raises(CutlayerError, match=message):
        wrong()


def test_inputs_that_are_not_finite_are_named_by_sample() -> None:
    bad = INPUTS.clone()
    bad[5, 1] = float("nan")
    bad[2, 0] = float("inf")
    whole = Training(epochs=1, batch_size=8, shuffle=False)
    normed = Halves(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3))
    with pytest.raises(DivergedError, match="epoch 0, step 0: the inputs of samples 2, 5 hold infinities or NaN"):
        fit(normed, TensorDataset(bad, CLASSES), training=whole)
    with pytest.raises(DivergedError, match="the inputs of test samples 2, 5 hold infinities or NaN"):
        trained(TensorDataset(INPUTS, CLASSES), TensorDataset(bad, CLASSES), training=whole)


def test_labels_that_are_wrong_are_few_in_the_message() -> None:
    labels = torch.from_numpy(np.arange(8))
    with pytest.raises(CutlayerError) as error:
        trained(TensorDataset(INPUTS, labels), training=Training(epochs=1, batch_size=8, shuffle=False))
    assert str(error.value).endswith("got 3 (sample 3), 4 (sample 4), 5 (sample 5), 6 (sample 6), 7 (sample 7)")
    with pytest.raises(CutlayerError, match=r"got 7 \(sample 0\), .* \(sample 4\) and 3 more$"):
        trained(TensorDataset(INPUTS, labels * 0 + 7), training=Training(epochs=1, batch_size=8, shuffle=False))


def test_regression_labels_that_a_loss_would_broadcast_are_refused() -> None:
    inputs = torch.randn(32, 4)
    halves = Halves(nn.Linear(4, 3), nn.Linear(3, 1))
    task = Task(loss=nn.functional.mse_loss, metrics={})
    with pytest.raises(
        RefusedError, match=r"outputs \[\d+, 1\] and labels torch.float32 \[\d+\]; give the labels the shape"
    ):
        fit(halves, TensorDataset(inputs, inputs[:, 0]), training=Training(epochs=1), task=task)
    fit(halves, TensorDataset(inputs, inputs[:, :1]), training=Training(epochs=1), task=task)


def test_accuracy_of_one_output_is_refused() -> None:
    inputs = torch.randn(32, 4)
    data = TensorDataset(inputs, inputs[:, :1])
    halves = Halves(nn.Linear(4, 3), nn.Linear(3, 1))
    with pytest.raises(ConfigError, match="expected outputs for two classes or more"):
        fit(halves, data, data, training=Training(epochs=1), task=Task(loss=nn.functional.mse_loss))


def test_wrong_types_are_named_before_training() -> None:
    with pytest.raises(ConfigError, match="threshold must be a number of at least 0"):
        Drop(threshold="0.1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="metrics: expected them by name"):
        Task(metrics=["accuracy"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Drop(0.01), r"Drop: expected values by name, such as Drop\(threshold=0.01\), got 0.01"),
        (lambda: Drop(threshold=0.1, warmup="2"), "warmup: expected a whole number of epochs, got '2'"),
        (lambda: Training(seed=1.5), "seed: expected a whole number, got 1.5"),
        (lambda: Training(augment=3), "augment: expected a function of a batch"),
        (lambda: Training(early_stopping=3), r"early_stopping: expected EarlyStopping\(...\), got 3"),
        (lambda: Training(keep_best=True), "keep_best: expected the name of a test metric"),
        (lambda: Training(shuffle="no"), "shuffle: expected True or False"),
        (lambda: Task(nn.MSELoss), r"loss: expected a function or an object, got a class; give MSELoss\(\)"),
        (lambda: Task(3), "loss: expected a function of outputs and labels, got 3"),
        (lambda: Task(metrics={"a": 3}), "a: expected a function of outputs and labels, got 3"),
        (lambda: Task(classes="x"), "classes: expected the number of classes, or None, got 'x'"),
        (lambda: Method(fleet=3), "fleet: expected a Fleet, got 3"),
        (lambda: Method(store="disk"), "store: expected StoreOptions, got 'disk'"),
        (lambda: Method(activations=3), "activations: expected a spec"),
        (lambda: Optimizer(lr="a"), "lr: expected a number, got 'a'"),
    ],
)
def test_a_value_of_another_kind_is_refused_at_once(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make()


@pytest.mark.parametrize(("factor", "ends"), [(1.0, False), (1.004, False), (1.5, True), (-1.0, True)])
def test_probabilities_sum_to_one(factor: float, ends: bool) -> None:
    labels = SOFT.clone()
    labels[2] *= factor
    with pytest.raises(RefusedError, match="sum to 1, got others in samples 2") if ends else nullcontext():
        trained(TensorDataset(INPUTS, labels))
