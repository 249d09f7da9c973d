"""The Python interface on networks, data, losses and metrics of the user's own."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cutlayer import (
    ConfigError,
    CustomOptimizer,
    DivergedError,
    Drop,
    Halves,
    Method,
    Optimizer,
    Periodic,
    Run,
    StoreFullError,
    StoreOptions,
    Task,
    Training,
    fit,
    split,
)
from cutlayer.data import digits
from cutlayer.models import make_model


def line_data(count: int = 64) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, generator=draw)
    return TensorDataset(inputs, inputs @ torch.tensor([[1.0], [-2.0], [0.5]]))


def test_regression_with_a_loss_metric_and_optimizers_of_ones_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    rates: list[float] = []

    def rate(epoch: int, epochs: int) -> float:
        rates.append(1 - epoch / epochs)
        return rates[-1]

    rmsprop = CustomOptimizer(lambda parameters: torch.optim.RMSprop(parameters, 0.01), rate)
    largest = {"largest_error": lambda outputs, labels: (outputs - labels).abs().max()}
    result = fit(
        split(model, "1"),
        line_data(),
        line_data(),
        method=Method.of(Periodic(period=4), "fp8"),
        training=Training(epochs=40, batch_size=16, client=rmsprop, server=Optimizer(name="adam", lr=0.01)),
        task=Task(nn.functional.mse_loss, largest),
    )
    # Asked for in the epochs in which the client takes part, A and B, by their place in the whole run.
    assert rates == [1 - epoch / 40 for epoch in range(40) if epoch % 4 in (0, 1)]
    losses = result.history.losses
    assert losses[-1] < 0.1 * losses[0]
    assert set(result.history.epochs[-1].test) == {"loss", "largest_error"}
    inputs, labels = line_data().tensors
    with torch.no_grad():
        error = nn.functional.mse_loss(result.model.eval()(inputs), labels).item()
    assert error == pytest.approx(result.history.test("loss"), rel=0.2)  # which went over the wire in 8 bits


def test_halves_of_ones_own_and_what_the_wire_reports_of_the_merged_model() -> None:
    train, test = digits()
    torch.manual_seed(0)

    class Client(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(64, 32), nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x.flatten(1).float() / 255)).relu()

    halves = Halves(Client(), nn.Sequential(nn.Linear(32, 10)))
    result = fit(halves, train, test, training=Training(epochs=3, batch_size=64))
    model = result.model.eval()
    with torch.no_grad():
        accuracy = (model(test.inputs).argmax(1) == test.labels).float().mean().item()
    assert accuracy == pytest.approx(result.history.test("accuracy"))
    assert accuracy > 0.8


def test_the_method_learns_the_digits() -> None:
    train, test = digits()
    torch.manual_seed(0)
    model = make_model("cnn", (1, 8, 8), train.mean, train.std)
    method = Method.of(Drop(threshold=0.2), "fp8")
    history = fit(
        split(model, "layer3"), train, test, method=method, training=Training(epochs=12, batch_size=64)
    ).history
    assert history.test() > 0.95
    assert history.traffic_reduction > 6
    assert {"A", "B", "C"} == set(history.exchanges)


def test_a_run_folder_holds_config_metrics_and_the_merged_model(tmp_path: Path) -> None:
    train, test = digits()
    torch.manual_seed(0)
    model = make_model("cnn", (1, 8, 8), train.mean, train.std, width=0.5)
    training = Training(epochs=3, batch_size=128, evaluate_every=2, checkpoint_every=2)
    result = fit(split(model, "layer3"), train, test, training=training, run=tmp_path)
    run = Run(tmp_path)
    assert run.history() == result.history
    assert [bool(record.test) for record in run.records()] == [False, True, True]
    assert run.read_config()["config"]["method.schedule"] == "Always(warmup=1)"
    assert run.read_config()["environment"]["torch"] == torch.__version__
    loaded = run.load_weights(make_model("cnn", (1, 8, 8), train.mean, train.std, width=0.5)).eval()
    assert torch.equal(loaded(test.inputs), result.model.eval()(test.inputs))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert {"epoch", "exchange", "loss", "test", "bytes", "flops", "seconds"} <= json.loads(line).keys()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-000003"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".tmp")]


def test_bf16_on_the_server_half_trains_and_leaves_fp32_weights() -> None:
    train, _ = digits()
    torch.manual_seed(0)
    model = make_model("cnn", (1, 8, 8), train.mean, train.std, width=0.5)
    halves = {precision: split(model, "layer3") for precision in ("fp32", "bf16")}
    losses = {
        precision: fit(pair, train, training=Training(epochs=2, batch_size=64, precision=precision)).history.losses
        for precision, pair in halves.items()
    }
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in halves["bf16"].server.parameters())


def test_divergence_is_an_error_that_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    training = Training(epochs=50, batch_size=16, client=Optimizer(lr=1.0), server=Optimizer(lr=1.0))
    with pytest.raises(DivergedError, match=r"not finite|has diverged"):
        fit(split(model, "0"), line_data(), training=training, task=Task(nn.functional.mse_loss, {}), run=tmp_path)
    assert Run(tmp_path).checkpoints.latest() is not None


def test_a_store_that_does_not_fit_is_an_error_before_anything_is_lost() -> None:
    train, _ = digits()
    model = make_model("cnn", (1, 8, 8), train.mean, train.std)
    method = Method(Periodic(period=2), store=StoreOptions("memory", memory_budget_mib=1))
    with pytest.raises(
        StoreFullError, match=r"1437 samples \[16, 4, 4\] in fp32 takes 1 MiB, the budget in memory is 1 MiB"
    ):
        fit(split(model, "layer3"), train, method=method, training=Training(epochs=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Method(activations="fp7"), "unknown codec for activations and gradients 'fp7'; known: fp32, fp16"),
        (lambda: Method.of(Drop(), "fp9"), "unknown codec 'fp9'; known: .*hfp8"),
        (lambda: Method(norm_in_b="frozen"), "unknown norm_in_b 'frozen'; known: train, eval"),
        (lambda: Training(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Training(device="gpu"), "unknown device 'gpu'"),
        (lambda: Training(precision="fp4"), "unknown precision 'fp4'; known: fp32, bf16"),
        (lambda: Optimizer(name="lion"), "unknown optimizer 'lion'; known: sgd, adam, adamw"),
        (lambda: Optimizer(lr=0), "lr must be above 0, got 0"),
        (
            lambda: fit(Halves(nn.LSTM(3, 4), nn.Linear(4, 1)), line_data(8)),
            "expected one floating-point tensor .* at the cut, the client half returns",
        ),
    ],
)
def test_wrong_choices_are_explained(wrong, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()
