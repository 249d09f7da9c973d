"""A bound cut: as the publication defines it, unbiased, and a group of samples crosses as one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cutlayer import Always, ConfigError, Fleet, Halves, Method, Regularize, Run, RunConfig, Settle, with_choices
from cutlayer.models.bound import bound
from cutlayer.privacy import Defence
from cutlayer.runs.attack import attacked
from cutlayer.runs.experiment import run_experiment
from cutlayer.runs.recipes import digits
from cutlayer.runs.weights import network_of

SHAPE, VALUES = (2, 3, 4), 24


def parts(group: int, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """What is added to either half."""
    torch.manual_seed(seed)
    made = bound(Halves(nn.Identity(), nn.Identity()), torch.zeros(2, *SHAPE), group)
    return made.client, made.server


def drawn(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_it_is_circular_convolution_and_correlation() -> None:
    """Written out: s = sum_i k_i * z_i, and k_i correlated with s gives z_i back."""
    client, server = parts(4)
    keys, values = client.bind.keys.double(), drawn(8).reshape(8, VALUES).double()
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(4).double())
    places = torch.arange(VALUES)
    convolved = torch.zeros(2, VALUES).double()
    for sample, row in enumerate(values):
        for place in range(VALUES):
            convolved[sample // 4, place] += (keys[sample % 4] * row[(place - places) % VALUES]).sum()
    sent = client(drawn(8))
    assert sent.shape == (8, 1, VALUES // 4)
    torch.testing.assert_close(sent.reshape(2, VALUES).double(), convolved, rtol=1e-4, atol=1e-5)
    got = server(sent)
    for sample in range(8):
        expected = [(keys[sample % 4] * convolved[sample // 4][(place + places) % VALUES]).sum() for place in places]
        torch.testing.assert_close(got[sample].flatten().double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [4, 7, 1], ids=["whole groups", "three left over", "one alone"])
def test_what_comes_back_is_right_in_the_mean_over_keys(count: int) -> None:
    """Noise from the others, and from what is not sent of a group that is not whole, cancels out."""
    values, total, draws = drawn(count), torch.zeros(count, *SHAPE), 1500
    for seed in range(draws):
        client, server = parts(4, seed)
        total += server(client(values))
    error = (total / draws - values).norm() / values.norm()
    assert error < 4 * 2 / draws**0.5  # the noise of one draw is about sqrt(4 - 1) of the values


def test_gradients_that_cross_are_those_of_the_sum() -> None:
    """The server's gradients at the cut give the client those of the whole network."""
    client, server = parts(4)
    values, wanted = drawn(6).requires_grad_(), drawn(6, 2)
    sent = client(values)
    crossing = sent.detach().requires_grad_()
    (server(crossing) * wanted).sum().backward()
    assert crossing.grad is not None
    assert crossing.grad.shape == sent.shape
    sent.backward(crossing.grad)
    split, values.grad = values.grad, None
    (server(client(values)) * wanted).sum().backward()
    torch.testing.assert_close(split, values.grad)


BASE = with_choices(
    digits(),
    **{"schedule": "always", "codec": "fp32", "train_samples": 260, "test_samples": 90, "epochs": 12, "threads": 1},
    **{"batch_size": 16, "evaluate_every": 12},
)


def test_a_run_sends_so_many_times_less_both_ways_and_learns() -> None:
    plain = run_experiment(with_choices(BASE, epochs=1), progress=False).history
    result = run_experiment(with_choices(BASE, bind=2), progress=False)
    for direction in ("up", "down"):
        each = [history.bytes(direction, kinds=("activations", "gradients")) for history in (plain, result.history)]
        assert each[1] / 12 == pytest.approx(each[0] / 2, rel=0.02)  # but for headers
    assert result.history.test("accuracy") > 0.3  # of ten classes
    # Evaluated over the wire in the same groups as in this process.
    assert result.history.test("accuracy") == pytest.approx(result.history.merged["accuracy"], abs=0.02)


def test_what_could_not_be_taken_apart_is_refused() -> None:
    config = with_choices(BASE, bind=4)
    assert RunConfig.from_dict(config.as_dict()) == config
    wrong: dict[str, RunConfig | dict] = {
        "other than always": {"method": Method(Settle())},
        "several clients": {"clients": 2},
        "delta>": {"method": Method(Always(), "delta>fp8_e4m3")},
        "ef>": {"method": Method(Always(), gradients="ef>topk0.1>fp8_e5m2", fleet=Fleet())},
        "regularize": {"training": replace(config.training, regularize=Regularize(mixup=0.2))},
        "no multiple": {"training": replace(config.training, batch_size=18)},
    }
    for what, changes in wrong.items():
        with pytest.raises(ConfigError, match=f"bind 4 cannot be combined with .*{what}"):
            replace(config, **changes)
    with pytest.raises(ConfigError, match="a divisor of the 24 values"):
        parts(5)


def test_it_is_chosen_beside_other_choices_in_any_order_and_read_back() -> None:
    config = with_choices(digits(), bind=8, batch_size=8, schedule="always")
    assert with_choices(digits(), schedule="always", batch_size=8, bind=8) == config
    assert network_of(config.as_dict(), Path("run")).merged().state_dict()
    assert with_choices(config, bind=1, schedule="drop").model.bind == 1


def test_defences_and_attacks_that_take_a_row_for_a_sample_are_refused(tmp_path: Path) -> None:
    small = {"schedule": "always", "bind": 4, "epochs": 1, "train_samples": 64, "threads": 1}
    with pytest.raises(ConfigError, match="bind 4 cannot be combined with a defence"):
        with_choices(digits(), **small, defence=Defence(noise=0.1, clip=1.0))
    run_experiment(with_choices(digits(), **small), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="sums of several samples"):
        attacked(Run(tmp_path))
