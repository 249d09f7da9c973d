"""Plans: memory, stores, limits, links and what is recommended."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import cutlayer
from cutlayer import ConfigError, Drop, Energy, Limits, Method, Once, Periodic, Settle, Training
from cutlayer.backends.client_data import client_data_of
from cutlayer.cli import main
from cutlayer.models.networks import make_model
from cutlayer.planning.clock import Clock, Link
from cutlayer.planning.leaks import leaks_of
from cutlayer.planning.load import Load, Outline, stated
from cutlayer.planning.memory import client_memory
from cutlayer.planning.timing import Pace, Saving, Step, measured
from cutlayer.records.ledger import Ledger
from cutlayer.records.lines import Lines
from cutlayer.schedule import Exchange
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.replay import Replay
from tests.helpers.small import noise_images

FAST = {"device_gflops": 5.0, "server_gflops": 50.0}


def network() -> nn.Module:
    torch.manual_seed(0)
    return make_model("cnn", (1, 8, 8), (0.3,), (0.4,))


def sample(count: int = 16) -> tuple[Tensor, Tensor]:
    images = noise_images(count, 8, 1)
    return images.inputs, images.labels


def plan(**more: object) -> cutlayer.Plan:
    training = more.pop("training", Training(epochs=10, batch_size=16))
    method = more.pop("method", Method.of(Periodic(period=5), "fp8"))
    return cutlayer.plan(network(), sample(), samples=320, method=method, training=training, **more)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_that_of_real_tensors(precision: str) -> None:
    """Against PyTorch's profiler, which counts what its allocator gives out."""
    half = cutlayer.split(make_model("vgg11", (3, 32, 32), (0.5,) * 3, (0.2,) * 3, width=0.25), "layer4").client
    inputs = noise_images(64).inputs
    training = Training(precision=precision)
    both, forward = client_memory(half, inputs, training)
    fixed = sum(each.nbytes for each in (*half.parameters(), *half.buffers(), inputs))
    optimizer = torch.optim.SGD(half.parameters(), lr=0.01, momentum=0.9)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(2):
            optimizer.zero_grad()
            with training.autocast():
                activations = half(inputs)
            activations.backward(torch.ones_like(activations))
            del activations
            optimizer.step()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert both == pytest.approx(peak + fixed, rel=0.1)
    assert forward < 0.6 * both


def test_a_mean_of_weights_takes_the_room_of_the_weights_once_more_in_a_epochs() -> None:
    chosen = [Method.of(Settle(both=4, activations=2, averaged=share), "fp8") for share in (0.0, 0.5)]
    single, averaged = (plan(method=method, cuts=["layer3"])["layer3"] for method in chosen)
    assert averaged.client_memory[0] - single.client_memory[0] >= 4 * single.client_parameters
    assert averaged.client_memory[1] == single.client_memory[1]


def test_bfloat16_takes_less_memory_than_32_bits() -> None:
    half = cutlayer.split(make_model("vgg11", (3, 32, 32), (0.5,) * 3, (0.2,) * 3, width=0.25), "layer4").client
    inputs = noise_images(64).inputs
    full, few = (client_memory(half, inputs, Training(precision=each)) for each in ("fp32", "bf16"))
    assert all(0.4 * most < least < 0.85 * most for most, least in zip(full, few, strict=True))


@pytest.mark.parametrize("codec", ["fp8", "int4", "delta0.1>mxfp4/fp8_e5m2"])
def test_the_store_takes_what_the_plan_says(codec: str) -> None:
    method = Method.of(Once(), codec)
    found = plan(method=method, cuts=["layer3"])["layer3"]
    clients = [ClientSummary(320, 0, 16, False, 0, 320, False)]
    halves = cutlayer.split(network(), "layer3")
    replay = Replay(Job(halves.server, found.shape, method, Training(), cutlayer.Task()), clients, Ledger())
    activations = replay.codec.encode(torch.zeros(1, *found.shape))
    replay.store.put(torch.tensor([0]), activations, torch.tensor([0]))
    assert found.store_bytes == replay.store.nbytes


def test_without_stored_activations_there_is_no_store() -> None:
    assert plan(method=Method.of(cutlayer.Always(), "fp8"), cuts=["layer3"])["layer3"].store_bytes == 0


def test_the_fastest_of_the_cuts_within_the_limits() -> None:
    found = plan(link="20Mbit/40ms", limits=Limits(client_mib=0.6), **FAST)
    best, within = found.recommended.plan, [each for each in found.cuts if each.client_memory[0] <= 0.6 * 2**20]
    assert 0 < len(within) < len(found.cuts)
    assert best in within
    assert best.run_seconds == min(each.run_seconds for each in within)
    assert any("over the limits" in why for why in found.recommended.why)


def test_fewer_bits_and_then_fewer_exchanges_if_nothing_else_is_within_the_limits() -> None:
    always = Method.of(cutlayer.Always(), "fp32")
    total = plan(method=always, cuts=["layer3"])["layer3"].total_bytes / 1e9
    same, bits, epochs, none = (
        plan(method=always, cuts=["layer3"], limits=Limits(gigabytes=total * part)).recommended
        for part in (1.01, 0.3, 0.05, 1e-6)
    )
    assert (same.schedule, same.codec) == (None, "fp32/fp32")
    assert (bits.schedule, bits.codec) == (None, "fp8_e4m3/fp8_e5m2")
    assert isinstance(epochs.schedule, Periodic | Once)
    assert epochs.plan.total_bytes <= total * 0.05 * 1e9
    assert none.plan is None
    assert "no cut stays within the limits" in none.why[0]


def test_the_exchanges_of_a_schedule_that_needs_the_loss_are_stated_or_the_most() -> None:
    drop = Method.of(Drop(), "fp8")
    most, given = plan(method=drop, cuts=["layer3"]), plan(method=drop, cuts=["layer3"], exchanges="3A 1B 6C")
    assert (most.exchanges, most.assumed) == ("A" * 10, True)
    assert (given.exchanges, given.assumed) == ("AAABCCCCCC", False)
    assert given["layer3"].total_bytes < most["layer3"].total_bytes
    assert stated("AABC 2C", 6) == "AABCCC"
    for wrong, said in (("3A", "expected 10 epochs"), ("10X", "expected epochs of A"), ("9A 1C", "a B epoch"),
                        ("10B", "first epoch")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            plan(method=drop, exchanges=wrong)
    with pytest.raises(ConfigError, match="leave them out"):
        plan(exchanges="10A")


def test_energy_is_of_bytes_and_flops() -> None:
    found = plan(cuts=["layer3"], energy=Energy(joules_per_byte=2.0, joules_per_flop=3.0))["layer3"]
    assert found.joules == 2 * found.total_bytes + 3 * (found.client_flops + found.evaluation_flops)


def test_links() -> None:
    assert Link.parse("20Mbit/40ms") == Link(20e6, 20e6, 0.04)
    assert Link.parse("500kbit:1Gbit/7.5ms") == Link(5e5, 1e9, 0.0075)
    for wrong in ("20Mbit", "fast", "0Mbit/40ms", "20MB/40ms"):
        with pytest.raises(ConfigError, match="link: expected"):
            Link.parse(wrong)


def test_an_epoch_takes_what_the_slowest_part_of_it_takes() -> None:
    inputs, labels = sample()
    load = Load(client_data_of(Outline(inputs, labels, 160), None), Method(), Training(batch_size=16))
    steps = {each: Step(0.1, 0.0, 0.1, 0.1) for each in Exchange}
    slow = Clock(load, Pace(steps, Saving(1.0, 2.0, 1e-3)), Link(8e3, 8e3, 0.5))
    # Ten batches of 1,000 bytes at 1,000 bytes a second, 4.8 % of headers: in A both ways and a round trip each.
    assert slow.epoch(Exchange.BOTH, 10_000, 10_000) == pytest.approx(10 * (2 * 1.048 + 0.3 + 0.5) + 0.5)
    assert slow.epoch(Exchange.ACTIVATIONS, 10_000, 0) == pytest.approx(10 * 1.048 + 0.2 + 0.5)
    assert slow.epoch(Exchange.NONE, 0, 0) == pytest.approx(1.0)
    # Batch norm's statistics, measured before, take the client's forward pass; checkpoints come one after the other.
    assert slow.epoch(Exchange.ACTIVATIONS, 10_000, 0, 4) == pytest.approx(10 * 1.048 + 0.2 + 0.5 + 4 * 0.1)
    saved = [slow.saved(*each) for each in ((Exchange.BOTH, 0), (Exchange.ACTIVATIONS, 500), (Exchange.NONE, 0))]
    assert saved == [3.0, 3.5, 2.0]


def test_an_epochs_time_has_all_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {each: Step(0.1, 0.0, 0.1, 0.1, 0.1) for each in Exchange}
    monkeypatch.setattr("cutlayer.planning.plan.measured", lambda *given: Pace(steps, Saving(1.0, 2.0, 1e-3)))

    def seconds(**more: object) -> tuple[float, ...]:
        more = {"checkpoint_every": 1, "evaluate_every": 5, "test_samples": 32, **more}
        training = Training(epochs=5, batch_size=16, **{n: more.pop(n) for n in ("checkpoint_every", "evaluate_every")})
        drop = Method.of(Drop(), "fp8")
        planned = plan(method=drop, training=training, exchanges="ABCBC", cuts=["layer3"], link="1Gbit/0ms", **more)
        return planned["layer3"].epoch_seconds

    usual, store = seconds(), 320 * (16 * 4 * 4 + 9 + 1)
    assert usual[1] - usual[3] == pytest.approx(16 * 0.1, abs=0.01)  # batch norm's statistics, after an A epoch
    assert usual[2] == pytest.approx(20 * 0.1 + 2.0)
    assert usual[4] - usual[2] == pytest.approx(2 * 0.1)  # the last epoch's evaluation of two batches
    rarely = [more - less for more, less in zip(usual, seconds(checkpoint_every=5), strict=True)]
    assert rarely == pytest.approx([3.0, 3.0 + 1e-3 * store, 2.0, 3.0 + 1e-3 * store, 0.0], abs=1.0)
    untested = [more - less for more, less in zip(usual, seconds(test_samples=0), strict=True)]
    assert [round(each, 1) > 0 for each in untested] == [False, True, False, True, True]


def test_both_halves_are_timed_here() -> None:
    load = Load(client_data_of(Outline(*sample(), 64), None), Method.of(Drop(), "fp8"), Training(batch_size=16))
    pace = measured(cutlayer.split(network(), "layer3"), load, cutlayer.Task(), budget=0.01)
    both, activations, none = (pace.steps[each] for each in Exchange)
    assert min(both.client, both.encode, both.rest, both.server, activations.client, none.server) > 0
    assert (activations.rest, none.client, none.rest) == (0, 0, 0)
    assert pace.saving.server > 0


def test_cuts_after_a_mere_change_of_shape_are_not_proposed() -> None:
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 4))
    inputs = torch.randn(8, 1, 8, 8), torch.randint(0, 4, (8,))
    assert [each.cut for each in cutlayer.plan(flat, inputs, samples=32).cuts] == ["0", "2", "3"]
    assert cutlayer.plan(flat, inputs, samples=32, cuts=["1"])["1"].shape == (72,)


def test_codecs_whose_sizes_depend_on_the_values_are_estimates() -> None:
    exact, packed = (
        plan(method=Method.of(Periodic(), codec), cuts=["layer3"])["layer3"] for codec in ("int4", "int4+zstd")
    )
    assert exact.exact
    assert not packed.exact
    assert packed.total_bytes < exact.total_bytes


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    call = ["plan", "digits", "--epochs", "10", "--exchanges", "3A 1B 6C", "--cuts", "layer2", "layer3"]
    call += ["--link", "20Mbit/40ms", "--device-gflops", "5", "--server-gflops", "50", "--json", str(file)]
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert "recommended (*): cut after layer3" in shown
    assert "epochs: 3 A, 1 B, 6 C" in shown
    assert [each["cut"] for each in json.loads(file.read_text())["cuts"]] == ["layer2", "layer3"]
    assert max(map(len, shown.splitlines()[2:16])) <= 80
    assert main(["plan", "digits", "--cuts", "layer99"]) == 2
    assert "possible cuts: layer1" in capsys.readouterr().err


def advice(cut: str, ssim: float, shape: tuple[int, ...] = (1, 2, 2)) -> dict:
    spread = {"mean": ssim, "std": 0.1, "count": 8}
    found = {"attack": "decoder", "scores": {"ssim": spread}, "baseline": {"ssim": {**spread, "mean": 0.05}}}
    return {"cut": cut, "shape": shape, "assessment": found}


def test_a_plan_shows_what_each_cut_was_measured_to_give_away(tmp_path: Path) -> None:
    planned, file = plan(cuts=["layer2", "layer3"]), tmp_path / "advice.jsonl"
    shape = planned["layer2"].shape
    Lines(file).rewrite([advice("layer2", 0.9, shape), advice("layer2", 0.7, shape), advice("layer9", 0.5)])
    found = planned.with_leaks(leaks_of(file))
    leak = found["layer2"].leak
    assert (leak.ssim, leak.mean_image, leak.attack) == (0.7, 0.05, "decoder")  # the newest line
    assert found["layer3"].leak is None
    assert json.loads(json.dumps(found.as_dict()))["cuts"][0]["leak"]["ssim"] == 0.7
    assert found["layer2"].total_bytes == planned["layer2"].total_bytes


def test_advice_of_another_network_or_none_is_refused(tmp_path: Path) -> None:
    planned, file = plan(cuts=["layer2"]), tmp_path / "advice.jsonl"
    with pytest.raises(ConfigError, match="attack RUN --advise"):
        leaks_of(file)
    for lines, said in (
        ([advice("layer2", 0.9)], "another network"),
        ([advice("layer9", 0.9)], "none of them is planned"),
        ([{"attack": "decoder"}], "line 1: expected"),
        ([], "holds no cut"),
    ):
        Lines(file).rewrite(lines)
        with pytest.raises(ConfigError, match=said):
            planned.with_leaks(leaks_of(file))


def test_a_recipe_is_planned_without_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "cifar10_small", "--cuts", "layer4", "--epochs", "2", "--data-dir", str(tmp_path)]
    assert main(call) == 0
    assert "the data are not here" in capsys.readouterr().out
