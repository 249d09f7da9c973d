"""What is reported of the test data: metrics over the whole set, the loss over its samples."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from cutlayer import ConfigError, Halves, Method, Periodic, Run, Task, Training, accuracy, fit
from cutlayer.report import comparison


def r2(outputs: Tensor, labels: Tensor) -> Tensor:
    return 1 - (outputs - labels).square().sum() / (labels - labels.mean()).square().sum()


def macro_f1(outputs: Tensor, labels: Tensor) -> float:
    guess, scores = outputs.argmax(1), []
    for label in range(outputs.shape[1]):
        both = int(((guess == label) & (labels == label)).sum())
        scores.append(2 * both / max(1, int((guess == label).sum() + (labels == label).sum())))
    return sum(scores) / len(scores)


class R2:
    """As `r2`, in the form of torchmetrics: sums of what came in since the last reset."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.resets = 0

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.batches.append((outputs, labels))

    def compute(self) -> Tensor:
        return r2(*(torch.cat(tensors) for tensors in zip(*self.batches, strict=True)))

    def reset(self) -> None:
        self.batches, self.resets = [], self.resets + 1


def sorted_line(count: int = 70) -> TensorDataset:
    """Sorted, so that a batch says little of the whole; the last batch is smaller."""
    inputs = torch.linspace(-2, 2, count).unsqueeze(1)
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(inputs, 3 * inputs + torch.randn(count, 1, generator=draw))


def test_r2_is_that_of_the_whole_set_as_a_function_and_as_an_object() -> None:
    torch.manual_seed(0)
    data, steady = sorted_line(), R2()
    task = Task(mse_loss, {"r2": r2, "steady": steady})
    training = Training(epochs=5, batch_size=16)
    halves = Halves(nn.Linear(1, 4), nn.Linear(4, 1))
    result = fit(halves, data, data, method=Method(Periodic(period=3)), training=training, task=task)
    inputs, labels = data.tensors
    with torch.no_grad():
        outputs = result.model(inputs)
    assert result.history.test("r2") == pytest.approx(r2(outputs, labels).item(), rel=1e-5)
    assert result.history.test("steady") == pytest.approx(result.history.test("r2"))
    assert result.history.test("loss") == pytest.approx(mse_loss(outputs, labels).item(), rel=1e-5)
    assert steady.resets >= 5
    assert list(result.history.epochs[0].test) == ["loss", "r2", "steady"]


def test_macro_f1_of_classes_that_no_batch_holds_together() -> None:
    torch.manual_seed(1)
    labels = torch.arange(3).repeat_interleave(20)
    data = TensorDataset(torch.randn(60, 2) + labels.unsqueeze(1), labels)
    halves = Halves(nn.Linear(2, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))
    task = Task(metrics={"f1": macro_f1, "accuracy": accuracy})
    result = fit(halves, data, data, training=Training(epochs=4, batch_size=20), task=task)
    with torch.no_grad():
        outputs = result.model(data.tensors[0])
    assert result.history.test("f1") == pytest.approx(macro_f1(outputs, labels))
    assert result.history.test("accuracy") == (outputs.argmax(1) == labels).double().mean().item()


def test_labels_that_the_loss_leaves_out_do_not_count_for_accuracy() -> None:
    """A segmentation: outputs [B, classes, H, W], labels [B, H, W] with -100 where nothing is known."""
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (24, 4, 4), generator=draw)
    inputs = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    labels[:, 2:] = -100
    data = TensorDataset(inputs, labels)
    halves = Halves(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1))
    task = Task(cross_entropy, classes=3)
    training = Training(epochs=30, batch_size=7)
    history = fit(halves, data, data, training=training, task=task).history
    assert history.test("accuracy") > 0.99  # it would be half of that


def test_a_metric_that_is_no_number_is_named() -> None:
    data = sorted_line()
    task = Task(mse_loss, {"errors": lambda outputs, labels: (outputs - labels).abs().mean(1)})
    with pytest.raises(ConfigError, match=r"metric 'errors' failed on outputs \[70, 1\].*expected one number"):
        fit(Halves(nn.Linear(1, 4), nn.Linear(4, 1)), data, data, training=Training(epochs=1), task=task)


def test_scores_over_the_wire_and_of_the_merged_model_are_told_apart(tmp_path: Path) -> None:
    """With a codec of 1 bit in 8 the two differ; the merged model's cost no bytes and no FLOPs of the ledger."""
    torch.manual_seed(0)
    data = sorted_line()
    halves = Halves(nn.Linear(1, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 1)))
    method = Method(Periodic(period=2), "topk0.2>fp8_e4m3", "fp32")
    task, training = Task(mse_loss, {"r2": r2}), Training(epochs=4, batch_size=16)
    more = {"method": method, "training": training, "task": task}
    result = fit(halves, [data, data], [None, data], run=tmp_path, **more)
    inputs, labels = data.tensors
    with torch.no_grad():
        outputs = result.model(inputs)
    assert result.history.merged["r2"] == pytest.approx(r2(outputs, labels).item(), rel=1e-5)
    assert result.history.merged["loss"] == pytest.approx(mse_loss(outputs, labels).item(), rel=1e-5)
    assert result.history.test("r2") != pytest.approx(result.history.merged["r2"], abs=0.01)
    assert Run(tmp_path).history() == result.history
    console = Console(record=True, width=100, force_terminal=False)
    console.print(comparison({"run": Run(tmp_path).history()}))
    shown = console.export_text()
    for name, value in (("over the wire", result.history.test("r2")), ("merged model", result.history.merged["r2"])):
        assert any(f"test r2, {name}" in line and f"{value:.4f}" in line for line in shown.splitlines()), shown
    # What an epoch more would change is not claimed.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**result.history.epochs[-1].as_dict(), "epoch": 4}) + "\n")
    assert Run(tmp_path).history().merged == {}
    quiet = fit(halves, [data, data], **more).history
    assert quiet.merged == {}
    assert quiet.flops("server") == result.history.flops("server")
