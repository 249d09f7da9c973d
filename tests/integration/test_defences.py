"""Defences: each lowers what its attack gets, over every backend alike; the watch stops a client that is hijacked."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Always, ConfigError, Method, Optimizer, Periodic, Training, fit, run_experiment, with_choices
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.observed import Observed
from cutlayer.codecs import get_codec
from cutlayer.data.datasets import digits
from cutlayer.data.images import Images
from cutlayer.errors import HijackedError
from cutlayer.privacy import (
    FSHA,
    DecoderInversion,
    Hijacker,
    KnownHalf,
    Noise,
    Target,
    distance_correlation,
    mse,
    ssim,
)
from cutlayer.privacy.defence import Defence
from cutlayer.privacy.frames import sightings
from cutlayer.privacy.splitguard import SCORES, SplitGuard
from cutlayer.records.ledger import Ledger
from cutlayer.runs.recipes import digits as recipe
from cutlayer.runs.run import Run
from cutlayer.training.client import Client
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import ClientJob
from cutlayer.wire.frames import Frame, pack, read, unpack
from cutlayer.wire.messages import Plan, Step, Update
from tests.helpers import small
from tests.helpers.small import equal
from tests.helpers.threads import Together, shares

DECODER = DecoderInversion(epochs=8, width=32, blocks=2)
NONE = Defence()
WATCH = Defence(watch=0.25, watch_after=5)


@functools.cache
def attacked(defence: Defence = NONE, epochs: int = 5, **more: object) -> tuple[Target, float]:
    """The small CNN, trained on digits with a defence, as a target; and its test accuracy."""
    choices = {"cut": "layer3", "epochs": epochs, "schedule": "always", "codec": "fp32", "threads": 1, **more}
    config = with_choices(recipe(), **choices, evaluate_every=epochs, train_samples=700, defence=defence)
    result = run_experiment(config, progress=False)
    train, test = config.datasets()
    private, public = train.inputs[:48].float() / 255, test.inputs.float() / 255
    noise = Noise.of(defence)
    halves = result.halves
    target = Target(halves.client, halves.server, private, train.labels[:48], public, test.labels, noise=noise)
    return target, result.history.test("accuracy")


@functools.cache
def error(attack: object, target: Target) -> float:
    return mse(target.private, attack(target)).mean().item()


def test_nopeek_lowers_the_correlation_and_what_attacks_get() -> None:
    (plain, _), (defended, accuracy) = attacked(), attacked(Defence(nopeek=3.0))
    before, after = (distance_correlation(t.private, t.send(t.private)).item() for t in (plain, defended))
    assert after < before - 0.1
    assert error(DECODER, defended) > 1.3 * error(DECODER, plain)
    assert accuracy > 0.7


def test_attacker_aware_training_lowers_what_a_decoder_gets() -> None:
    long = {"epochs": 5, "batch_size": 16, "width": 0.5}  # the decoder in the client has to learn, too
    (plain, _), (defended, accuracy) = attacked(**long), attacked(Defence(adversary=2.0), **long)
    clear, blurred = DECODER(plain), DECODER(defended)
    before, after = (ssim(plain.private, images).mean().item() for images in (clear, blurred))
    assert after < before - 0.01
    assert mse(plain.private, blurred).mean() > 1.2 * mse(plain.private, clear).mean()
    assert accuracy > 0.7


def test_noise_at_the_cut_lowers_what_attacks_get() -> None:
    (plain, _), (defended, accuracy) = attacked(), attacked(Defence(noise=0.4, clip=20.0))
    assert error(DECODER, defended) > 1.2 * error(DECODER, plain)
    assert error(KnownHalf(steps=100), defended) > 10 * error(KnownHalf(steps=100), plain)
    assert accuracy > 0.7


def test_leaving_out_channels_lowers_what_attacks_get() -> None:
    (plain, _), (defended, accuracy) = attacked(), attacked(Defence(channel_dropout=0.25), epochs=10)
    assert error(DECODER, defended) > 1.2 * error(DECODER, plain)
    assert error(KnownHalf(steps=100), defended) > 10 * error(KnownHalf(steps=100), plain)
    assert accuracy > 0.7
    channels = defended.send(defended.private).abs().amax((2, 3)) > 0
    assert 0.5 < channels.float().mean() < 0.85  # some are 0 without it, too
    assert len({tuple(each) for each in channels.tolist()}) > 40  # of 48: a draw for each


def test_a_narrow_cut_lowers_what_attacks_get() -> None:
    (plain, _), (narrow, accuracy) = attacked(), attacked(narrow=8)
    assert narrow.send(narrow.private[:1]).shape[1] * 8 == plain.send(plain.private[:1]).shape[1]
    assert error(DECODER, narrow) > 1.2 * error(DECODER, plain)
    assert error(KnownHalf(steps=100), narrow) > 10 * error(KnownHalf(steps=100), plain)
    assert accuracy > 0.7


def test_what_is_sent_is_clipped_and_noisy_also_in_evaluation() -> None:
    frames: list[bytes] = []
    train, test = digits()
    method = Method(Always(), defence=Defence(noise=0.25, clip=1.0))
    config = with_choices(recipe(), cut="layer3")
    training = Training(epochs=1, batch_size=64)
    halves = config.halves(train)
    fit(halves, train.first(64), test.first(64), method=method, training=training, backend=Observed(frames.append))
    sent = [frame.tensors["activations"] for frame in map(unpack, frames) if "activations" in frame.tensors]
    assert len(sent) == 2
    for encoded in sent:
        values = get_codec(encoded.codec).decode(encoded)
        squares = values.flatten(1).square().sum(1)
        expected = 1 + 0.25**2 * values[0].numel()  # of the clipped activations, and of the noise
        assert squares.mean().item() == pytest.approx(expected, rel=0.15)


def gaussian_delta(multiplier: float, epsilon: float) -> float:
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8: delta of the Gaussian mechanism, exactly."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(0.5 / multiplier - epsilon * multiplier) - math.exp(epsilon) * phi(
        -0.5 / multiplier - epsilon * multiplier
    )


def test_the_accountant_states_the_epsilon_of_the_gaussian_mechanism() -> None:
    for std, clip, releases in ((4.0, 1.0, 1), (8.0, 1.0, 6), (30.0, 2.0, 20)):
        epsilon = Noise(std, clip).epsilon(releases, delta=1e-5)
        multiplier = std / (2 * clip) / math.sqrt(releases)
        assert gaussian_delta(multiplier, epsilon) == pytest.approx(1e-5, rel=0.02)
    assert Noise(1.0, None).epsilon(1) == math.inf
    assert Noise(4.0, 1.0).epsilon(6) > Noise(4.0, 1.0).epsilon(1)


# --- the watch ---


class Responder:
    """The server's side of one A epoch after another: gradients in answer to each step."""

    def __init__(self, method: Method, train: Images, gradients: object) -> None:
        config = with_choices(recipe(), cut="layer1")
        self.halves, self.gradients = config.halves(train), gradients
        training = Training(client=Optimizer("adam", lr=1e-2, weight_decay=0.0, schedule="constant"), batch_size=32)
        trained = TrainedHalf(self.halves.client, training.client, training)
        feed, _ = ClientData(train).feeds(0, training)
        self.client = Client(ClientJob(0, feed, None, method, training), lambda: trained, Ledger())

    def epoch(self, epoch: int) -> None:
        waiting = self.client.answers(read(pack(Frame(Plan(0, epoch, "A")))))
        while True:
            frame = unpack(next(waiting)())
            message = frame.message
            if not isinstance(message, Step):
                return
            tensors = {name: get_codec(each.codec).decode(each) for name, each in frame.tensors.items()}
            found = self.gradients(self, tensors["activations"], tensors["labels"])
            update = Frame(Update(0, epoch, message.step), {"gradients": get_codec("fp32").encode(found)})
            waiting = self.client.answers(read(pack(update)))


def hijacking(public: torch.Tensor) -> object:
    attackers: list[Hijacker] = []
    options = FSHA(width=8, pilot_lr=1e-2, critic_lr=3e-3)

    def answer(server: Responder, activations: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not attackers:
            attackers.append(Hijacker(options, activations, public))
        return attackers[0].gradients(activations)

    return answer


def honest() -> object:
    optimizers: list[torch.optim.Optimizer] = []

    def answer(server: Responder, activations: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        half = server.halves.server.train()
        if not optimizers:
            optimizers.append(torch.optim.Adam(half.parameters(), 3e-3))
        activations.requires_grad_(True)
        optimizers[0].zero_grad()
        nn.functional.cross_entropy(half(activations.clone()), labels).backward()
        optimizers[0].step()
        assert activations.grad is not None
        return activations.grad

    return answer


def test_the_watch_stops_a_client_that_is_hijacked_and_lets_an_honest_server_train() -> None:
    train, test = digits()
    method = Method(Always(), defence=WATCH)
    trusted = Responder(method, train, honest())
    for epoch in range(5):
        trusted.epoch(epoch)
    assert trusted.client.defence.scores, "it decided"
    malicious = Responder(method, train, hijacking(test.inputs.float() / 255))
    with pytest.raises(HijackedError, match=r"client 0, epoch \d, step \d+: the server's gradients are the same"):
        [malicious.epoch(epoch) for epoch in range(6)]


def test_without_the_watch_the_hijacked_client_goes_on() -> None:
    train, test = digits()
    malicious = Responder(Method(Always()), train, hijacking(test.inputs.float() / 255))
    for epoch in range(2):
        malicious.epoch(epoch)


def test_an_honest_run_with_the_watch_learns() -> None:
    _, accuracy = attacked(WATCH)
    assert accuracy > 0.8


def test_false_labels_are_all_wrong_and_only_where_the_watch_says() -> None:
    frames: list[bytes] = []
    train, _ = digits()
    halves = with_choices(recipe(), cut="layer3").halves(train)
    method, training = Method(Periodic(period=2), defence=Defence(watch=0.3)), Training(epochs=4, batch_size=32)
    fit(halves, train.first(640), method=method, training=training, backend=Observed(frames.append), progress=False)
    wrong = {"A": [], "B": []}
    for batch in sightings(frames):
        share = (batch.labels != train.labels[batch.ids]).double().mean().item()
        assert share in (0, 1)
        wrong["AB"[batch.epoch % 2]].append(share)
    assert 0.1 < sum(wrong["A"]) / len(wrong["A"]) < 0.5
    assert sum(wrong["B"]) == 0


def test_the_score_is_that_of_the_publication() -> None:
    """Worked by hand: false gradients of norm 3 across the regular ones, of norms 1 and 2."""
    guard = SplitGuard(0, 0, 0.5, 0.5)
    guard.first.add(torch.tensor([1.0, 0.0]))
    guard.second.add(torch.tensor([2.0, 0.0]))
    guard.false.add(torch.tensor([0.0, 3.0]))
    # apart |3 - 1.5| = 1.5, usual |1 - 2| = 1, angles pi/2 and 0.
    value = math.pi / 2 * 1.5 / 2.5
    assert guard.score() == pytest.approx((1 / (1 + math.exp(-5 * value))) ** 2)
    assert not guard.suspicious, "one score decides nothing"
    guard.scores.extend([0.2] * SCORES)
    assert guard.suspicious


def test_the_watch_needs_classes() -> None:
    with pytest.raises(ConfigError, match="one class a sample"):
        SplitGuard(0, 0, 0.1, 0.5).false_labels(torch.rand(4, 2), 0, 0)


# --- over every backend, and over a resume ---

ALL = Defence(nopeek=0.1, adversary=0.1, noise=0.1, clip=20.0, channel_dropout=0.1, watch=0.2)
SMALL = {"train_samples": 200, "test_samples": 40, "width": 0.5, "batch_size": 32, "epochs": 3, "threads": 1}


def test_defences_over_grpc_and_in_process_to_the_same_bits(tmp_path: Path) -> None:
    config = with_choices(recipe(), **{**SMALL, "width": 1.0}, schedule="periodic", period=2, defence=ALL)
    data = shares(config, ("client",))
    (train, test), *_ = data.values()
    expected = fit(config.halves(train), [train], test, method=config.method, training=config.training)
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "secret").write_text("0\n")  # as in one process; a real client draws its own
    server = Together(config, tmp_path, ("client",))
    half = server.join_all(data)["client"]
    assert equal(half, expected.halves.client)


def test_a_client_of_its_own_has_noise_that_the_runs_seed_does_not_give_away(tmp_path: Path) -> None:
    config = with_choices(recipe(), **{**SMALL, "width": 1.0, "epochs": 1}, defence=Defence(noise=0.5))
    data = shares(config, ("client",))
    (train, test), *_ = data.values()
    simulated = fit(config.halves(train), [train], test, method=config.method, training=config.training)
    half = Together(config, tmp_path, ("client",)).join_all(data)["client"]
    assert not equal(half, simulated.halves.client)
    secret = tmp_path / "client" / "secret"
    assert secret.stat().st_mode & 0o077 == 0
    assert int(secret.read_text()) > 0


def test_defences_over_a_resume_to_the_same_bits(tmp_path: Path) -> None:
    config = with_choices(recipe(), **SMALL, defence=dataclasses.replace(ALL, watch=0.0), schedule="always")
    free, quiet = with_choices(config, defence=NONE), {"progress": False}
    whole = run_experiment(config, tmp_path / "whole", progress=False)

    def stop(record: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, tmp_path / "parts", on_epoch=stop, progress=False)
    parts = run_experiment(config, tmp_path / "parts", resume=True, progress=False)
    assert equal(parts.model, whole.model)
    flops, plain = (sum(r.history.epochs[0].flops["client"].values()) for r in (parts, run_experiment(free, **quiet)))
    assert flops > 1.5 * plain, "what a defence computes is counted"


def test_a_budget_counts_what_a_defence_computes() -> None:
    config = with_choices(recipe(), **{**SMALL, "epochs": 8}, defence=Defence(adversary=0.1), schedule="always")
    epoch = run_experiment(with_choices(config, epochs=1), progress=False).history.flops("client")
    config = with_choices(config, schedule="budget", client_gflops=4 * epoch / 1e9)
    history = run_experiment(config, progress=False).history
    assert 0.5 * 4 * epoch < history.flops("client") <= 4 * epoch
    with pytest.raises(ConfigError, match="do not pay for the first epochs"):
        run_experiment(with_choices(config, client_gflops=0.9 * epoch / 1e9), progress=False)


@pytest.mark.xdist_group("ray")
def test_defences_on_ray_to_the_same_bits(cluster: object) -> None:
    from cutlayer.backends.ray import Ray

    config = with_choices(recipe(), **SMALL, defence=ALL, schedule="periodic", period=2)
    assert equal(
        run_experiment(config, progress=False, backend=Ray()).model, run_experiment(config, progress=False).model
    )


def test_a_run_of_before_there_were_defences_can_be_resumed(tmp_path: Path) -> None:
    config = with_choices(recipe(), **SMALL)
    run_experiment(config, tmp_path, progress=False)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    for name in ("defence", "views", "views_from"):
        del content["config"]["method"][name]
    del content["checksum"]
    file.write_text(json.dumps(content))
    assert Run(tmp_path).read_config()["config"]["method"]["defence"]["noise"] == 0
    run_experiment(config, tmp_path, resume=True, progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"nopeek": -1.0}, "nopeek of at least 0"), ({"clip": 0.0}, "clip above 0"), ({"watch": 1.0}, "watch from 0")],
)
def test_impossible_defences_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Defence(**wrong)


def test_an_adversary_needs_images() -> None:
    data = TensorDataset(torch.randn(8, 6), torch.arange(8) % 2)
    with pytest.raises(ConfigError, match=r"needs images \[channels, height, width\], got \[6\]"):
        fit(small.halves(), data, method=Method(defence=Defence(adversary=1.0)), training=small.training())
