"""The Python interface on networks, data, losses and metrics of the user's own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cutlayer import (
    ConfigError,
    CustomOptimizer,
    DivergedError,
    Drop,
    Halves,
    Method,
    Optimizer,
    Periodic,
    RefusedError,
    Run,
    StoreFullError,
    StoreOptions,
    Task,
    Training,
    accuracy,
    fit,
    split,
)
from cutlayer.data.datasets import digits
from cutlayer.models.networks import make_model
from cutlayer.records.history import EpochRecord

MSE = Task(nn.functional.mse_loss, {})


def line_data(count: int = 64) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, generator=draw)
    return TensorDataset(inputs, inputs @ torch.tensor([[1.0], [-2.0], [0.5]]))


def line() -> Halves:
    """Halves for `line_data`, with batch norm."""
    return Halves(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)))


def small_batches(drop_last: bool = False) -> Training:
    return Training(epochs=1, batch_size=32, drop_last=drop_last)


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
    assert run.read_config()["config"]["method"]["schedule"] == {"kind": "Always", "warmup": 1}
    assert run.read_config()["facts"]["training samples"] == len(train)
    assert run.read_config()["environment"]["torch"] == torch.__version__
    loaded = run.load_weights(make_model("cnn", (1, 8, 8), train.mean, train.std, width=0.5)).eval()
    assert torch.equal(loaded(test.inputs), result.model.eval()(test.inputs))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert {"epoch", "exchange", "loss", "test", "bytes", "flops", "seconds"} <= json.loads(line).keys()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-000002", "epoch-000003"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".tmp")]


def test_bf16_trains_and_leaves_fp32_weights() -> None:
    train, _ = digits()
    torch.manual_seed(0)
    model = make_model("cnn", (1, 8, 8), train.mean, train.std, width=0.5)
    results = {
        precision: fit(split(model, "layer3"), train, training=Training(epochs=2, batch_size=64, precision=precision))
        for precision in ("fp32", "bf16")
    }
    losses = {precision: result.history.losses for precision, result in results.items()}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    for half in (results["bf16"].halves.client, results["bf16"].halves.server):
        assert all(p.dtype == torch.float32 for p in half.parameters())


def test_a_run_in_bf16_with_channels_last_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    train, test = (images.first(96) for images in digits())
    torch.manual_seed(0)
    halves = split(make_model("cnn", (1, 8, 8), train.mean, train.std), "layer3")
    method = Method(Periodic(period=3), "int4+zstd", "int4")
    training = Training(epochs=6, batch_size=32, precision="bf16", channels_last=True)

    def run(folder: Path, on_epoch: Callable[[EpochRecord], None] | None = None) -> dict[str, Tensor]:
        result = fit(halves, train, test, method=method, training=training, run=folder, resume=True, on_epoch=on_epoch)
        return result.model.state_dict()

    def interrupt(record: EpochRecord) -> None:
        if record.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", interrupt)
    expected = run(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in run(tmp_path / "resumed").items())


def test_a_test_set_whose_last_batch_has_one_sample_and_metrics_that_are_plain_numbers() -> None:
    task = Task(nn.functional.mse_loss, {"one": lambda outputs, labels: 1.0})
    history = fit(line(), line_data(64), line_data(33), training=small_batches(), task=task).history
    assert history.test("one") == 1.0
    with pytest.raises(ConfigError, match="unknown metric 'two'; known: loss, one"):
        history.test("two")


def test_a_loader_of_test_data_may_have_larger_batches() -> None:
    """They say nothing of the batches of a C epoch."""
    sizes: list[int] = []
    halves = line()
    halves.server.register_forward_hook(lambda m, i, out: sizes.append(len(out)) if m.training else None)
    train, test = DataLoader(line_data(), batch_size=16), DataLoader(line_data(), batch_size=64)
    history = fit(halves, train, test, method=Method(Periodic(period=3)), training=Training(epochs=3), task=MSE).history
    assert history.exchanges == "ABC"
    assert sizes == [16] * 12


def test_halves_are_left_alone_so_that_two_methods_can_be_compared() -> None:
    halves = line()
    losses = [fit(halves, line_data(), training=small_batches(), task=MSE).history.losses for _ in range(2)]
    assert losses[0] == losses[1]


def test_the_users_random_numbers_are_left_alone() -> None:
    halves, state = line(), torch.get_rng_state()
    loader = DataLoader(line_data(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
    own = loader.generator.get_state()
    fit(halves, loader, line_data(), training=small_batches(), task=MSE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), own)


def test_a_module_that_keeps_what_it_computed() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.linear(x)
            return self.kept

    model = nn.Sequential(Keeping(), nn.Linear(4, 1))
    for test in (line_data(), None):
        result = fit(split(model, "0"), line_data(), test, training=small_batches(), task=MSE)
        assert type(result.model[0]) is Keeping
        own = fit(Halves(Keeping(), nn.Linear(4, 1)), line_data(), test, training=small_batches(), task=MSE)
        kept, trained = own.model.state_dict()["client.linear.weight"], own.halves.client.state_dict()["linear.weight"]
        assert torch.equal(kept, trained)
    with pytest.raises(ConfigError, match="stores a tensor that it computed"):
        fit(own.halves, line_data(), training=small_batches(), task=MSE)


def test_a_module_that_looks_at_its_data_in_training_is_counted_all_the_same() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if not self.training or x.sum().item() < 1e9 else x

    halves = Halves(Dropping(), nn.Linear(4, 1))
    history = fit(halves, line_data(), training=small_batches(), task=MSE).history
    assert history.epochs[0].flops["client"] == {"forward": 2 * 64 * 12, "backward": 2 * 64 * 12}


def test_the_last_small_batch_is_left_out_in_c_as_well() -> None:
    loader = DataLoader(line_data(33), batch_size=32, shuffle=True, drop_last=True)
    method = Method(Periodic(period=3))
    history = fit(line(), loader, method=method, training=Training(epochs=12), task=MSE).history
    assert [record.samples for record in history.epochs] == [32] * 12


def test_labels_outside_the_classes_are_named_and_the_ignored_one_is_taken() -> None:
    inputs = torch.randn(8, 3)
    halves = Halves(nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(
        RefusedError,
        match=r"expected classes from 0 to 2, one a sample, got 3 \(sample [37]\), 3 \(sample [37]\)$",
    ):
        fit(halves, TensorDataset(inputs, torch.arange(8) % 4), training=small_batches())
    ignored = torch.tensor([0, 1, 2, -100] * 2)
    assert fit(halves, TensorDataset(inputs, ignored), training=small_batches()).history.losses[0] > 0
    other = Task(nn.CrossEntropyLoss(ignore_index=255))
    accepted = TensorDataset(inputs, torch.tensor([0, 1, 2, 255] * 2))
    assert fit(halves, accepted, training=small_batches(), task=other).history.losses[0] > 0
    with pytest.raises(RefusedError, match="expected classes from 0 to 2"):
        fit(halves, TensorDataset(inputs, ignored), training=small_batches(), task=other)


def test_probabilities_to_train_on_and_classes_to_test_on() -> None:
    inputs = torch.randn(8, 3)
    soft, hard = TensorDataset(inputs, torch.full((8, 3), 1 / 3)), TensorDataset(inputs, torch.arange(8) % 3)
    history = fit(Halves(nn.Linear(3, 4), nn.Linear(4, 3)), soft, hard, training=small_batches()).history
    assert history.test("accuracy") is not None


def test_labels_with_a_shape() -> None:
    inputs, labels = torch.randn(8, 3), torch.arange(40).reshape(8, 5) % 2
    halves = Halves(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 10), nn.Unflatten(1, (2, 5))))
    task = Task(nn.functional.cross_entropy, {}, classes=2)
    assert fit(halves, TensorDataset(inputs, labels), training=small_batches(), task=task).history.losses[0] > 0
    with pytest.raises(RefusedError, match="expected classes from 0 to 1, got"):
        fit(halves, TensorDataset(inputs, labels + 1), training=small_batches(), task=task)


def test_divergence_is_an_error_that_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    training = Training(epochs=50, batch_size=16, client=Optimizer(lr=1.0), server=Optimizer(lr=1.0))
    with pytest.raises(DivergedError, match=r"not finite|has diverged"):
        fit(split(model, "0"), line_data(), training=training, task=MSE, run=tmp_path)
    assert Run(tmp_path).checkpoints.latest() is not None


def test_a_store_that_does_not_fit_is_an_error_before_anything_is_lost() -> None:
    train, _ = digits()
    model = make_model("cnn", (1, 8, 8), train.mean, train.std)
    method = Method(Periodic(period=2), store=StoreOptions("memory", memory_budget_mib=1))
    with pytest.raises(
        StoreFullError, match=r"1437 samples \[16, 4, 4\] in fp32 takes 1.4 MiB, the budget on memory is 1 MiB"
    ):
        fit(split(model, "layer3"), train, method=method, training=Training(epochs=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Method(activations="fp7"), "unknown codec 'fp7'; known: fp32, fp16"),
        (lambda: Method.of(Drop(), "fp9"), "unknown codec 'fp9'; known: fp32.* fp8, hfp8"),
        (lambda: Method(norm_in_b="frozen"), "unknown norm_in_b 'frozen'; known: calibrated, eval, train"),
        (lambda: Training(epochs=0), "epochs must be a whole number of at least 1, got 0"),
        (lambda: Training(epochs=2.0), "epochs must be a whole number of at least 1, got 2.0"),
        (
            lambda: Training(client=torch.optim.SGD([torch.zeros(1)])),
            "client: expected an Optimizer or CustomOptimizer",
        ),
        (lambda: Method("drop"), r"expected a schedule, such as Drop\(threshold=0.05\), got 'drop'"),
        (lambda: Task(metrics={"loss": accuracy}), 'the metric name "loss" is taken'),
        (lambda: fit(nn.Linear(3, 1), line_data(8)), r"expected Halves, from split\(model, layer\).*, got Linear"),
        (lambda: fit(line(), line_data(8), resume=True), "resume needs the folder of the run"),
        (lambda: fit(line(), line_data(8).tensors), r"use torch.utils.data.TensorDataset"),
        (
            lambda: fit(Halves(nn.Flatten(), nn.Linear(3, 1)), line_data(8)),
            "Flatten has no parameters: as a client half it would send raw data",
        ),
        (
            lambda: fit(Halves(nn.Linear(4, 4), nn.Linear(4, 1)), line_data(8)),
            r"Linear does not take inputs .*\[batch, 3\]",
        ),
        (
            lambda: fit(Halves(nn.Linear(3, 4), nn.Linear(5, 1)), line_data(8)),
            r"Linear does not take inputs .*\[batch, 4\]",
        ),
        (
            lambda: fit(line(), line_data(33), training=small_batches(), task=MSE),
            "a batch of 1 cannot be trained on: Expected more",
        ),
        (lambda: fit(line(), line_data(8), training=small_batches(drop_last=True)), "no batch is left of 8 samples"),
        (
            lambda: fit(line(), line_data(32), training=small_batches(), task=Task(lambda o, y: (o - y) ** 2, {})),
            r"expected the loss to be a mean over the batch, a scalar; got shape \[32, 1\]",
        ),
        (lambda: Training(device="gpu"), "unknown device 'gpu'"),
        (lambda: Training(precision="fp4"), "unknown precision 'fp4'; known: fp32, bf16"),
        (lambda: Optimizer(name="lion"), "unknown optimizer 'lion'; known: sgd, adam, adamw"),
        (lambda: Optimizer(lr=0), "lr must be above 0, got 0"),
        (
            lambda: fit(Halves(nn.LSTM(3, 4), nn.Linear(4, 1)), line_data(8)),
            r"expected LSTM to return one tensor \[batch, ...\] of at most 32-bit floats, .* it returns tuple",
        ),
    ],
)
def test_wrong_choices_are_explained(wrong, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()
