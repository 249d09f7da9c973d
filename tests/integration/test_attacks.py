"""Attacks succeed on a shallow cut, where the mean image is the yardstick, and fail where their publications say so."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer.privacy import (
    FSHA,
    SDAR,
    DecoderInversion,
    KnownHalf,
    Simulation,
    Target,
    UnSplit,
    assess,
    mean_image,
    mse,
    ssim,
)
from tests.helpers.privacy import DEEP, SHALLOW, convolutions, trained, untrained

SDAR_SOON = SDAR(steps=100, width=16, batch_size=32, lr=1e-2)
DECODER = DecoderInversion(epochs=8, width=32, blocks=2)


def error(target: Target, images: torch.Tensor) -> float:
    return mse(target.private, images).mean().item()


def yardstick(target: Target) -> float:
    return error(target, mean_image(target))


def test_a_decoder_undoes_a_shallow_half_and_does_worse_on_a_deep_one() -> None:
    shallow, deep = trained(SHALLOW), trained(DEEP)
    images, blurred = DECODER(shallow), DECODER(deep)
    easy, hard = error(shallow, images), error(deep, blurred)
    assert easy < 0.1 * yardstick(shallow)
    assert ssim(shallow.private, images).mean() > 0.95
    assert hard > 5 * easy


def test_a_decoder_that_never_saw_a_pair_that_belongs_together_is_no_better_than_the_mean_image() -> None:
    target = trained(SHALLOW)
    activations, order = target.send(target.public, "public"), torch.randperm(len(target.public))
    network = DECODER.train(activations, target.public[order])
    with torch.no_grad():
        images = network.eval()(target.send(target.private))
    assert error(target, images) > 0.9 * yardstick(target)


def test_a_known_half_is_undone_exactly_if_it_is_shallow_and_not_at_all_if_it_is_deep() -> None:
    shallow, deep, attack = trained(SHALLOW), trained(DEEP), KnownHalf(steps=150)
    assert error(shallow, attack(shallow)) < 1e-3 * yardstick(shallow)
    assert error(deep, attack(deep)) > yardstick(deep)


def test_knowing_the_half_is_what_the_attack_on_a_known_half_needs() -> None:
    target, other = untrained(convolutions(2)), convolutions(2)
    torch.manual_seed(1)
    for module in other.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    sent, attack = target.send(target.private), KnownHalf(steps=150)
    with_half = error(target, attack.invert(target, sent))
    without = error(target, attack.invert(dataclasses.replace(target, half=other), sent))
    assert with_half < 0.1 * yardstick(target) < yardstick(target) < without


def test_unsplit_undoes_one_layer_and_fails_for_two() -> None:
    one, two, attack = untrained(convolutions(1)), untrained(convolutions(2)), UnSplit(rounds=30)
    assert error(one, attack(one)) < 0.6 * yardstick(one)
    assert error(two, attack(two)) > yardstick(two)


def test_fsha_hijacks_a_client_that_is_sent_gradients_and_not_one_that_is_sent_none() -> None:
    target = trained(SHALLOW)
    attack = FSHA(steps=200, width=16, batch_size=32, client_lr=1e-2, pilot_lr=1e-2, critic_lr=3e-3)
    hijacked, free = attack(target), dataclasses.replace(attack, client_lr=0)(target)
    assert error(target, hijacked) < 0.75 * yardstick(target)
    assert error(target, free) > yardstick(target)


def test_sdar_reconstructs_from_what_a_server_has_after_training() -> None:
    target = trained(SHALLOW)
    assert error(target, SDAR_SOON(target)) < 0.6 * yardstick(target)


def test_sdar_gets_no_more_than_the_labels_tell_if_the_cut_is_deep_and_narrow() -> None:
    target = trained(DEEP)
    of_labels = torch.stack([target.public[target.public_labels == label].mean(0) for label in range(10)])
    assert error(target, SDAR_SOON(target)) > 0.95 * error(target, of_labels[target.labels])


def test_sdar_beside_training_as_published() -> None:
    target = trained(SHALLOW, epochs=1)
    client, server = target.half.train(), target.server.train()
    optimizer = torch.optim.Adam([*client.parameters(), *server.parameters()], 1e-3)
    simulation = Simulation(SDAR_SOON, target)
    for step in range(SDAR_SOON.steps):
        rows = torch.arange(step * 16, step * 16 + 32) % len(target.private)
        activations = client(target.inputs(target.private[rows]))
        optimizer.zero_grad()
        cross_entropy(server(activations), target.labels[rows]).backward()
        optimizer.step()
        before = [value.clone() for value in server.state_dict().values()]
        simulation.step(activations.detach(), target.labels[rows], server)
        after = list(server.state_dict().values())
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "the attack is passive"
    images = simulation.reconstruct(target.send(target.private), target.labels)
    assert error(target, images) < 0.6 * yardstick(target)


@pytest.mark.parametrize("codec", ["fp8_e4m3", "int4"])
def test_few_bits_alone_do_not_protect(codec: str) -> None:
    exact = trained(SHALLOW)
    target = dataclasses.replace(exact, codec=codec)
    assert error(target, KnownHalf(steps=150)(target)) < 0.1 * yardstick(target)


def test_an_attack_is_the_same_for_the_same_seed() -> None:
    target, attack = trained(DEEP), DecoderInversion(epochs=1, width=8, blocks=1)
    assert torch.equal(attack(target), attack(target))
    assert not torch.equal(attack(target), attack(dataclasses.replace(target, seed=1)))


def test_an_assessment_has_the_mean_image_as_its_yardstick() -> None:
    target = trained(SHALLOW)
    found, images = assess("known_half", KnownHalf(steps=150), target)
    assert found.succeeds
    assert found.scores["mse"].mean == pytest.approx(error(target, images))
    assert found.baseline["mse"].mean == pytest.approx(yardstick(target))
    assert found.scores["recognized"].mean > found.baseline["recognized"].mean
    failed, _ = assess("known_half", KnownHalf(steps=1), trained(DEEP))
    assert failed.scores["mse"].mean == pytest.approx(failed.baseline["mse"].mean, rel=0.3)
